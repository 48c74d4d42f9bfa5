"""The experiments about initialisation: the figures that they make are those of their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from experiments import dose_response, gain, timm_init
from experiments.timm_models import SmallModel


def test_moments_of_maps_average_to_the_std_of_the_mean_map() -> None:
    torch.manual_seed(0)
    maps = torch.rand(5, 9, 7, dtype=torch.float64)
    mean = sum(m / m.sum() for m in maps) / 5
    variances = []
    for axis in (0, 1):
        marginal, place = mean.sum(1 - axis), torch.arange(mean.shape[axis], dtype=torch.float64)
        variances.append(float((marginal * place**2).sum() - (marginal * place).sum() ** 2))
    assert gain.std_of(map(gain.moments, maps)) == pytest.approx(math.sqrt(sum(variances) / 2))


def test_jackknife_error_of_a_ratio_is_that_of_the_delta_method() -> None:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        shared = generator.normal(0, 0.5)
        before, after = 10 + shared + generator.normal(0, 0.1), 14.4 + 1.44 * shared + generator.normal(0, 0.1)
        rows.append({"measured": {"0": [0.0, before, 0.0, before], "0.5": [0.0, after, 0.0, after]}})
    ratio, error = gain.ratio(rows, "0.5")
    assert ratio == pytest.approx(1.2, abs=0.01)
    # d√(a/b) = √(a/b)/2 · (δa/a − δb/b): the shared part cancels.
    assert error == pytest.approx(1.2 / 2 * math.hypot(0.1 / 14.4, 0.1 / 10) / math.sqrt(400), rel=0.15)


def test_theory_is_linear_in_variance() -> None:
    assert dose_response.theory(0.0, 1.5) == 1.0 and dose_response.theory(1.0, 1.5) == pytest.approx(1.5)
    squares = [dose_response.theory(s, 1.5) ** 2 for s in (0.2, 0.4, 0.6)]
    assert squares[2] - squares[1] == pytest.approx(squares[1] - squares[0])


def test_a_model_is_swept_and_a_model_without_convolutions_says_so() -> None:
    row = timm_init._as_text(timm_init.look_at(SmallModel("resnet", "test_resnet", (3, 64, 64), 0)))
    assert timm_init.good(row) and int(row["widened"]) > 0 and float(row["energy_error"]) < 1e-6
    bad = timm_init._as_text(timm_init.look_at(SmallModel("x", "no_such_model", (3, 64, 64), 0)))
    assert not timm_init.good(bad) and bad["error"]
    assert "1 passed in every column" in timm_init.summary([row, bad])
