"""The profiles: optimal by the conditions of Karush, Kuhn and Tucker, and by the closed form."""

from __future__ import annotations

import itertools
import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import divergence, gibbs_axis, gibbs_corners, gibbs_network
from widerf.geometry import tap_coordinates
from widerf.profile import (
    allocate,
    corner_variance,
    largest_gain,
    soft_corners,
    strength_of,
    tap_profile,
    uniform_variance,
)

RESNET18 = [(7, 7)] + [(3, 3)] * 16
RESNET18_WEIGHTS = [1.0, *[16.0] * 5, *[64.0] * 4, *[256.0] * 4, *[1024.0] * 3]


def axis_variances(profile: Tensor) -> list[float]:
    places = tap_coordinates(tuple(profile.shape))
    return [float((profile.flatten() * places[:, axis] ** 2).sum()) for axis in range(profile.ndim)]


def kkt_residual(profile: Tensor, strength: float) -> float:
    """Largest violation of the optimality conditions, moments scaled to [0, 1]; multipliers by least squares."""
    size = tuple(profile.shape)
    free = [axis for axis, k in enumerate(size) if k > 2]
    reach = [corner_variance(size[axis]) for axis in free]
    features = np.stack([tap_coordinates(size)[:, a].numpy() ** 2 / r for a, r in zip(free, reach, strict=True)], 1)
    v = profile.flatten().numpy()
    design = np.column_stack([np.ones(len(v)), features])
    multipliers = np.linalg.lstsq(design, np.log(v), rcond=None)[0]
    stationarity = np.abs(np.log(v) - design @ multipliers).max()
    bounds = [
        ((1 - strength) * uniform_variance(size[a]) + strength * corner_variance(size[a])) / r
        for a, r in zip(free, reach, strict=True)
    ]
    slack = features.T @ v - np.array(bounds)
    feasible = max(abs(v.sum() - 1), float((-slack).max()), float((-v).max()))
    complementary = np.abs(multipliers[1:] * slack).max()
    return float(max(stationarity, feasible, complementary, (-multipliers[1:]).max()))


@pytest.mark.parametrize("taps", range(3, 32))
def test_kkt_conditions_and_closed_form_hold_for_every_kernel_size(taps: int) -> None:
    for strength in (0.01, 0.25, 0.5, 0.75, 0.95):
        line = soft_corners((taps,), strength)
        assert kkt_residual(line, strength) <= 1e-6
        assert np.abs(line.numpy() - gibbs_axis(taps, strength)).max() <= 1e-8
        square = soft_corners((taps, taps), strength)
        assert kkt_residual(square, strength) <= 1e-6


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (7, 2), (1, 9), (2, 3, 5), (3, 3, 3), (31, 4), (6, 3, 1)], ids=str)
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.9])
def test_kkt_conditions_and_closed_form_hold_in_every_rank(size: tuple[int, ...], strength: float) -> None:
    profile = soft_corners(size, strength)
    assert kkt_residual(profile, strength) <= 1e-6
    assert np.abs(profile.numpy() - gibbs_corners(size, strength)).max() <= 1e-8


@pytest.mark.parametrize("size", [(3, 3), (3, 5), (3, 3, 3)], ids=str)
def test_product_of_axes_solves_the_programme_that_is_not_split(size: tuple[int, ...]) -> None:
    strength, places = 0.5, tap_coordinates(size).numpy()
    scaled = (places / np.abs(places).max(0)) ** 2
    v = cp.Variable(math.prod(size))
    wanted = (1 - strength) * scaled.mean(0) + strength
    cp.Problem(cp.Maximize(cp.sum(cp.entr(v))), [cp.sum(v) == 1, scaled.T @ v >= wanted]).solve(solver=cp.CLARABEL)
    assert np.abs(soft_corners(size, strength).flatten().numpy() - v.value).max() <= 1e-5


@given(st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_closed_form_at_three_taps(strength: float) -> None:
    s, profile = strength, soft_corners((3, 3), strength)
    expected = {(0, 0): (2 + s) ** 2 / 36, (0, 1): (2 + s) * (1 - s) / 18, (1, 1): (1 - s) ** 2 / 9}
    for tap, value in expected.items():
        assert abs(float(profile[tap]) - value) <= 1e-8


@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_variance_is_linear_in_strength(size: list[int], strength: float) -> None:
    profile = soft_corners(size, strength)
    assert profile.shape == tuple(size) and profile.dtype == torch.float64
    assert abs(float(profile.sum()) - 1) <= 1e-12 and float(profile.min()) >= 0
    for taps, variance in zip(size, axis_variances(profile), strict=True):
        expected = (1 - strength) * uniform_variance(taps) + strength * corner_variance(taps)
        assert variance == pytest.approx(expected, rel=1e-8, abs=1e-12)


@given(st.integers(2, 9), st.integers(2, 9), st.floats(0.0, 1.0))
@settings(max_examples=20, deadline=None)
def test_profile_has_the_symmetries_of_the_kernel(height: int, width: int, strength: float) -> None:
    profile = soft_corners((height, width), strength)
    assert torch.allclose(profile, profile.flip(0), atol=1e-12) and torch.allclose(profile, profile.flip(1), atol=1e-12)
    assert torch.allclose(profile, soft_corners((width, height), strength).T, atol=1e-12)


def test_std_is_monotone_in_strength() -> None:
    stds = [math.sqrt(sum(axis_variances(soft_corners((7, 7), s)))) for s in np.linspace(0, 1, 21)]
    assert all(b > a for a, b in itertools.pairwise(stds))


@pytest.mark.parametrize("size", [(3,), (5, 4), (3, 7, 3)], ids=str)
def test_strength_zero_is_uniform_and_one_is_equal_corners(size: tuple[int, ...]) -> None:
    assert torch.allclose(
        soft_corners(size, 0.0), torch.full(size, 1 / math.prod(size), dtype=torch.float64), rtol=1e-15
    )
    corners = soft_corners(size, 1.0)
    assert int((corners > 0).sum()) == 2 ** len(size)
    assert torch.equal(corners[corners > 0], torch.full((2 ** len(size),), 0.5 ** len(size), dtype=torch.float64))


def test_two_taps_have_nothing_to_gain() -> None:
    assert torch.equal(soft_corners((2, 2), 0.9), torch.full((2, 2), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf])
def test_bad_strength_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"strength must be in \[0, 1\], got"):
        soft_corners((3, 3), bad)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="strength must be a number"):
        soft_corners((3, 3), "0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel_size"):
        soft_corners((3, 0), 0.5)
    with pytest.raises(ValueError, match="kernel_size"):
        soft_corners((3, 3, 3, 3), 0.5)


def test_solver_failure_is_raised_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cp.Problem, "solve", lambda *_, **__: None)
    monkeypatch.setattr(cp.Problem, "status", property(lambda _: "infeasible"))
    with pytest.raises(RuntimeError, match="status 'infeasible'"):
        soft_corners((13,), 0.123456)


def test_results_are_cached_but_not_shared() -> None:
    first = soft_corners((5, 5), 0.3)
    first.zero_()
    assert float(soft_corners((5, 5), 0.3).sum()) == pytest.approx(1.0)


def test_taps_on_a_grid_get_the_soft_corners_of_the_grid() -> None:
    offsets = tap_coordinates((3, 5)).long()[None]
    assert torch.allclose(tap_profile(offsets, 0.4)[0], soft_corners((3, 5), 0.4).flatten(), atol=1e-8)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.7, 1.0])
def test_scattered_taps_get_the_wanted_second_moments(strength: float) -> None:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.stack([torch.randperm(81, generator=generator)[:9] for _ in range(6)])
    offsets = torch.stack([offsets // 9 - 4, offsets % 9 - 4], dim=-1)
    moments = offsets.double() ** 2
    profile, ends = tap_profile(offsets, strength), [tap_profile(offsets, s) for s in (0.0, 1.0)]
    assert torch.allclose(profile.sum(1), torch.ones(6, dtype=torch.float64))
    got, low, high = ((p[..., None] * moments).sum((0, 1)) for p in (profile, *ends))
    # At least the wanted moment on each axis, and exactly that where the multiplier is positive (here on both axes).
    assert torch.allclose(got, (1 - strength) * low + strength * high, rtol=1e-7)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
def test_network_programme_has_one_multiplier(share: float) -> None:
    sizes, weights = [(7, 7), (3, 3), (3, 5), (5,), (2, 2), (4, 3, 3)], [1.0, 16.0, 64.0, 5.0, 9.0, 2.0]
    gain = 1 + share * (largest_gain(sizes, weights) - 1)
    for mine, theirs in zip(allocate(sizes, weights, gain), gibbs_network(sizes, weights, gain), strict=True):
        assert np.abs(mine.numpy() - theirs).max() <= 1e-7


def test_network_programme_costs_a_third_of_an_equal_strength_on_resnet18() -> None:
    gain = 1 + 0.5 * (largest_gain(RESNET18, RESNET18_WEIGHTS) - 1)
    best = sum(map(divergence, allocate(RESNET18, RESNET18_WEIGHTS, gain)))
    low = sum(w * uniform_variance(k[0]) for k, w in zip(RESNET18, RESNET18_WEIGHTS, strict=True))
    high = sum(w * corner_variance(k[0]) for k, w in zip(RESNET18, RESNET18_WEIGHTS, strict=True))
    equal = (gain**2 - 1) * low / (high - low)
    assert best <= 0.32 * sum(divergence(soft_corners(size, equal)) for size in RESNET18)


def test_gain_is_reached_exactly_and_strength_grows_with_weight() -> None:
    profiles = allocate(RESNET18, RESNET18_WEIGHTS, 1.1)
    after = sum(w * axis_variances(p)[0] for p, w in zip(profiles, RESNET18_WEIGHTS, strict=True))
    before = sum(w * uniform_variance(k[0]) for k, w in zip(RESNET18, RESNET18_WEIGHTS, strict=True))
    assert math.sqrt(after / before) == pytest.approx(1.1, rel=1e-8)
    strengths = [strength_of(profile) for profile in profiles[1:]]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(strengths))


@pytest.mark.parametrize("cap", [0.3, 0.6, 0.8])
def test_no_layer_passes_the_cap(cap: float) -> None:
    limit = largest_gain(RESNET18, RESNET18_WEIGHTS, cap=cap)
    profiles = allocate(RESNET18, RESNET18_WEIGHTS, 1 + 0.97 * (limit - 1), cap=cap)
    strengths = [strength_of(profile) for profile in profiles]
    assert max(strengths) <= cap + 1e-8
    assert sum(s > cap - 1e-6 for s in strengths) >= 3, "the cap must bind for this to mean anything"


def test_fixed_variance_dilutes_the_gain() -> None:
    assert largest_gain([(3, 3)], [1.0], fixed=0.0) == pytest.approx(math.sqrt(1.5))
    assert largest_gain([(3, 3)], [1.0], fixed=2 / 3) == pytest.approx(math.sqrt((2 / 3 + 1) / (4 / 3)))


def test_too_much_gain_is_refused_with_the_largest_one() -> None:
    with pytest.raises(ValueError, match=r"gain must be at most 1\.2247, the largest gain"):
        allocate([(3, 3)] * 5, [1.0] * 5, 1.3)
    with pytest.raises(ValueError, match="gain must be at least 1"):
        allocate([(3, 3)], [1.0], 0.9)
    with pytest.raises(ValueError, match="weights must have one entry per kernel"):
        allocate([(3, 3)], [1.0, 2.0], 1.1)
    with pytest.raises(ValueError, match="weights must be finite and at least 0"):
        allocate([(3, 3)], [-1.0], 1.1)


def test_the_largest_gain_is_the_corners_and_none_is_uniform() -> None:
    limit = largest_gain([(3, 3), (5, 5)], [1.0, 2.0])
    assert all(strength_of(p) == pytest.approx(1.0) for p in allocate([(3, 3), (5, 5)], [1.0, 2.0], limit))
    assert all(strength_of(p) == pytest.approx(0.0) for p in allocate([(3, 3), (5, 5)], [1.0, 2.0], 1.0))
