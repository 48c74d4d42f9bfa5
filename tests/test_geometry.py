"""Moments and marginals of maps: against sums written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from widerf.geometry import marginal, moments, ntuple, tap_coordinates


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=30))
def test_moments_are_the_sums_that_define_them(values: list[float]) -> None:
    share = np.array(values) / np.sum(values)
    places = np.arange(len(share))
    mean = float((share * places).sum())
    found = moments(torch.from_numpy(share))
    wanted = [mean, *(float((share * (places - mean) ** power).sum()) for power in (2, 4))]
    np.testing.assert_allclose([float(x) for x in found], wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_a_marginal_sums_over_all_other_axes(shape: tuple[int, ...]) -> None:
    share = torch.rand(shape, dtype=torch.float64)
    for axis in range(len(shape)):
        slices = [share.select(axis, place).sum() for place in range(shape[axis])]
        torch.testing.assert_close(marginal(share, axis), torch.stack(slices))


def test_the_variance_can_be_differentiated() -> None:
    line = torch.softmax(torch.randn(6, dtype=torch.float64), 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: moments(x).variance, line)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_tap_coordinates_are_centred_and_one_apart(size: list[int]) -> None:
    places = tap_coordinates(size)
    assert places.shape == (int(np.prod(size)), len(size))
    torch.testing.assert_close(places.mean(0), torch.zeros(len(size), dtype=torch.float64))
    variances = [(k**2 - 1) / 12 for k in size]
    torch.testing.assert_close(places.square().mean(0), torch.tensor(variances, dtype=torch.float64))


def test_a_tuple_of_the_wrong_length_names_its_argument() -> None:
    with pytest.raises(ValueError, match="stride must be one integer or 2"):
        ntuple((1, 2, 3), 2, "stride")
    with pytest.raises(TypeError, match="stride must hold integers only"):
        ntuple(True, 2, "stride")
