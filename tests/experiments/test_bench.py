"""The benchmarks: the figures that they make are those of their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.bench import measure
from tests.reference import uniform_stack
from widerf.erf.map import ERF


def test_the_error_of_one_image_is_the_spread_over_images() -> None:
    """For maps of equal mass the relative error of the mean map is known in closed form."""
    generator = torch.Generator().manual_seed(0)
    maps = uniform_stack(3) * (1 + 0.01 * torch.randn(400, 7, 7, generator=generator))
    found = measure.errors(maps.double(), {"map": lambda m: m, "std": measure.std})
    assert found["map"] == pytest.approx(0.01, rel=0.2)
    assert found["std"] < 0.01


def test_a_side_needs_the_square_of_its_error_in_images() -> None:
    side = measure.Side(start=1.0, per_image=0.5, errors={"std": 0.2, "map": 0.001})
    assert side.images("std") == pytest.approx(100)
    assert side.seconds("std") == pytest.approx(51)
    assert side.images("map") == 1


def test_std_of_the_benchmark_is_that_of_the_library() -> None:
    share = uniform_stack(3)
    assert measure.std(share) == ERF.from_energy(share, center=(3, 3), trf_size=(7, 7)).std
    assert math.isclose(float(measure.amplitude(share).sum()), 1)
