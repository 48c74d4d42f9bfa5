from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import uniform_stack
from widerf.erf.border import clipped_share
from widerf.erf.map import ERF
from widerf.errors import ClippedWarning


def centred(energy: Tensor, **more: object) -> ERF:
    center = tuple((n - 1) / 2 for n in energy.shape)
    return ERF.from_energy(energy, center=center, trf_size=tuple(energy.shape), **more)


def gaussian(sigmas: tuple[float, ...], means: tuple[float, ...], shape: tuple[int, ...]) -> Tensor:
    bell = torch.ones((), dtype=torch.float64)
    for sigma, mean, n in zip(sigmas, means, shape, strict=True):
        line = torch.exp(-0.5 * ((torch.arange(n, dtype=torch.float64) - mean) / sigma) ** 2)
        bell = bell[..., None] * line
    return bell


maps = st.tuples(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(0, 2**31)).map(
    lambda drawn: torch.rand(drawn[0], generator=torch.Generator().manual_seed(drawn[1]), dtype=torch.float64) + 1e-3
)


@given(maps)
@settings(max_examples=60, deadline=None)
def test_moments_equal_their_definition_pixel_by_pixel(energy: Tensor) -> None:
    erf = centred(energy)
    share = (energy / energy.sum()).numpy()
    pixels = list(np.ndindex(*share.shape))
    mean = [sum(share[p] * p[a] for p in pixels) for a in range(share.ndim)]
    variance = [sum(share[p] * (p[a] - mean[a]) ** 2 for p in pixels) for a in range(share.ndim)]
    assert float(erf.map.sum()) == pytest.approx(1, abs=1e-12)
    assert erf.centroid == pytest.approx(mean, abs=1e-9)
    assert [s**2 for s in erf.std_per_axis] == pytest.approx(variance, abs=1e-9)
    assert erf.std**2 == pytest.approx(sum(variance) / len(variance), abs=1e-9)


@given(maps, st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_radius_and_square_are_the_smallest_that_hold_the_mass(energy: Tensor, mass: float) -> None:
    erf = centred(energy)
    pixels = list(np.ndindex(*energy.shape))
    offsets = {p: [abs(i - c) for i, c in zip(p, erf.center, strict=True)] for p in pixels}

    def held(reach: float, norm: str) -> float:
        size = {"square": max, "disc": lambda o: math.hypot(*o)}[norm]
        return sum(float(erf.map[p]) for p in pixels if size(offsets[p]) <= reach + 1e-9)

    radius = erf.radius(mass)
    half = (round((erf.area_ratio(mass) * energy.numel()) ** (1 / energy.ndim), 6) - 1) / 2
    for reach, norm in ((radius, "disc"), (half, "square")):
        assert held(reach, norm) >= mass - 1e-9
        smaller = [
            r for r in (max(o) if norm == "square" else math.hypot(*o) for o in offsets.values()) if r < reach - 1e-9
        ]
        assert not smaller or held(max(smaller), norm) < mass + 1e-9


def test_figures_are_taken_about_the_units_own_centre_not_the_images() -> None:
    energy = torch.zeros(21, 21)
    energy[4:9, 4:9] = 1  # unit centred on pixel 6
    erf = ERF.from_energy(energy, center=(6, 6), trf_size=(5, 5))
    assert erf.area_ratio(1.0) == 25 / 441
    assert erf.radius(1.0) == pytest.approx(math.sqrt(8))
    about_image = ERF.from_energy(energy, center=(10, 10), trf_size=(21, 21), clipped=0.0)
    assert about_image.area_ratio(1.0) == 13**2 / 441


@pytest.mark.parametrize(
    ("layers", "energy_size", "amplitude_size"),
    [(5, 8.307, 10.440), (10, 11.705, 15.524), (20, 16.155, 22.738), (40, 22.738, 31.953)],
)
def test_two_sigma_sizes_of_uniform_stacks(layers: int, energy_size: float, amplitude_size: float) -> None:
    erf = centred(uniform_stack(layers))
    assert erf.size(of="energy") == pytest.approx(energy_size, abs=5e-4)
    assert erf.size() == pytest.approx(amplitude_size, abs=5e-4)
    assert erf.std == pytest.approx(math.sqrt(layers * 2 / 3), rel=1e-12)


def test_size_with_the_centre_between_pixels_takes_the_mean_of_its_neighbours() -> None:
    erf = ERF.from_energy(torch.tensor([0.1, 4.0, 4.0, 0.1]), center=(1.5,), trf_size=(4,))
    assert erf.size(0.5, of="energy") == 2
    assert erf.size(0.02, of="energy") == 4


def test_size_is_undefined_where_the_centre_pixel_is_zero() -> None:
    assert math.isnan(ERF.from_energy(torch.tensor([1.0, 0.0, 1.0]), center=(1,), trf_size=(3,)).size())


@pytest.mark.parametrize("shape", [(64,), (40, 56), (24, 20, 28)])
def test_excess_kurtosis_is_zero_for_a_gaussian_and_minus_1_2_for_a_flat_map(shape: tuple[int, ...]) -> None:
    middle = tuple((n - 1) / 2 for n in shape)
    assert centred(gaussian((2.0,) * len(shape), middle, shape)).excess_kurtosis == pytest.approx(0, abs=1e-2)
    flat = centred(torch.ones(shape)).excess_kurtosis
    discrete = sum(-1.2 * (n**2 + 1) / (n**2 - 1) for n in shape) / len(shape)
    assert flat == pytest.approx(discrete, abs=1e-9)
    assert flat == pytest.approx(-1.2, abs=0.01)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_fit_finds_the_gaussian_that_was_put_in(rank: int) -> None:
    sigmas, means, shape = (2.0, 3.0, 2.5)[:rank], (11.3, 14.0, 12.2)[:rank], (25, 31, 24)[:rank]
    fit = centred(gaussian(sigmas, means, shape)).gaussian_fit()
    assert fit.sigma == pytest.approx(sigmas, rel=1e-5)
    assert fit.mean == pytest.approx(means, rel=1e-5)
    assert fit.r2 == pytest.approx(1, abs=1e-9)


def test_the_fit_says_when_the_map_is_no_gaussian() -> None:
    corners = torch.zeros(15, 15)
    corners[::14, ::14] = 1
    assert centred(corners).gaussian_fit().r2 < 0.3


def test_amplitude_is_the_normalised_root() -> None:
    erf = centred(torch.tensor([[1.0, 4.0], [9.0, 16.0]]))
    assert torch.allclose(erf.amplitude, torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64))


# ── standard errors ────────────────────────────────────────────────────────────────────────────────────────────────


def measured(blocks: Tensor, counts: list[int]) -> ERF:
    return centred(blocks.sum(0), samples=sum(counts), blocks=blocks, block_samples=counts)


def test_the_jackknife_of_equal_blocks_is_the_textbook_one() -> None:
    blocks = torch.rand(7, 5, 5, dtype=torch.float64) + 0.1
    erf = measured(blocks, [3] * 7)
    partial = np.array([centred(blocks.sum(0) - block).std for block in blocks])
    expected = math.sqrt(6 / 7 * ((partial - partial.mean()) ** 2).sum())
    assert erf.standard_error() == pytest.approx(expected, rel=1e-5)


def test_the_jackknife_of_a_linear_figure_is_the_standard_error_of_a_mean() -> None:
    """With equal masses the centroid is a mean over draws; blocks of unequal size still estimate its error."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.zeros(3000, 9)
    hits = torch.randint(9, (3000,), generator=generator)
    draws[torch.arange(3000), hits] = 1
    textbook = float(hits.double().std() / math.sqrt(3000))
    sizes = [100] * 29 + [50, 50]
    assert measured(torch.stack([d.sum(0) for d in draws.split(sizes)]), sizes).standard_error("centroid")[
        0
    ] == pytest.approx(textbook, rel=0.4)


def test_every_figure_has_an_interval_that_holds_it() -> None:
    erf = measured(uniform_stack(4) * (torch.rand(12, 9, 9) + 0.5), [1] * 12)
    for figure, arguments in [("std", {}), ("size", {"of": "energy"}), ("radius", {"mass": 0.5}), ("clipped", {})]:
        low, high = erf.interval(figure, **arguments)
        assert low <= high
    for low, high in erf.interval("std_per_axis") + erf.interval("centroid"):
        assert low < high
    low, high = erf.interval(lambda e: e.gaussian_fit().sigma[0])
    assert low < erf.gaussian_fit().sigma[0] < high
    wide, narrow = erf.interval(confidence=0.99), erf.interval(confidence=0.5)
    assert wide[0] < narrow[0] < erf.std < narrow[1] < wide[1]


def test_a_prediction_has_no_interval() -> None:
    with pytest.raises(ValueError, match="figure must belong to a measured ERF; a prediction has no sampling error"):
        centred(torch.ones(3, 3)).interval()


def test_one_draw_has_no_interval() -> None:
    with pytest.raises(ValueError, match="samples must be at least 2 for a standard error, got 1"):
        measured(torch.ones(1, 3, 3), [1]).interval()


# ── the border ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_clipped_where_the_theoretical_field_lies_inside() -> None:
    assert clipped_share(torch.full((9, 9), 1 / 81), (4, 4), (9, 9)) == 0


@given(st.floats(3, 12), st.integers(0, 20))
@settings(max_examples=40, deadline=None)
def test_the_clipped_share_of_a_gaussian_is_bounded_from_above_and_not_by_much(sigma: float, shift: int) -> None:
    """A Gaussian's tails fall faster than the exponential that continues them."""
    whole = gaussian((sigma, sigma), (100, 100 + shift), (201, 201))
    whole /= whole.sum()
    cut = whole[76:125, 76:125]
    truth = 1 - float(cut.sum())
    estimate = clipped_share(cut / cut.sum(), (24, 24 + shift), (201, 201))
    assert estimate >= 0.98 * truth
    # Where a third and more is missing, the continuation is no longer close, but it alarms all the same.
    assert estimate <= 3 * truth + 1e-3


def test_a_flat_map_without_a_known_field_is_flagged() -> None:
    with pytest.warns(ClippedWarning, match="sees the whole image at any size"):
        erf = ERF.from_energy(torch.ones(14, 14), center=(7, 7))
    assert erf.clipped > 0.5


def test_the_warning_says_which_input_would_hold_the_field() -> None:
    with pytest.warns(ClippedWarning, match=r"a spatial input size of \(41, 41\) or more would hold all of it"):
        ERF.from_energy(torch.ones(15, 15), center=(7, 7), trf_size=(41, 41))


def test_a_map_inside_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        centred(uniform_stack(5))


# ── keeping ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_erf_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    erf = measured(torch.rand(5, 6, 7) + 0.1, [2] * 5)
    erf.save(tmp_path / "erf.npz")
    back = ERF.load(tmp_path / "erf.npz")
    assert torch.equal(back.map, erf.map)
    assert back.interval("size") == erf.interval("size")
    assert repr(back) == repr(erf)
    bare = ERF.from_energy(torch.ones(3), center=(1,), clipped=0.0, untraced="no rule for aten.foo")
    bare.save(tmp_path / "bare.npz")
    assert repr(ERF.load(tmp_path / "bare.npz")) == repr(bare)


def test_png_draws(tmp_path: Path) -> None:
    centred(uniform_stack(5)).save(tmp_path / "erf.png")
    assert (tmp_path / "erf.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: centred(torch.zeros(3, 3)), "energy must be positive somewhere"),
        (lambda: centred(torch.tensor([1.0, math.nan])), "energy must be finite"),
        (lambda: centred(torch.tensor([1.0, -1.0])), "energy must be finite and ≥ 0"),
        (lambda: ERF.from_energy(torch.ones(3, 3), center=(1,)), "energy must have 1 axes"),
        (lambda: centred(torch.ones(3)).size(1.5), r"level must be in \(0, 1\), got 1.5"),
        (lambda: centred(torch.ones(3)).size(of="amplitud"), "did you mean 'amplitude'"),
        (lambda: centred(torch.ones(3)).radius(0), r"mass must be in \(0, 1\], got 0"),
        (lambda: centred(torch.ones(3)).save("erf.txt"), "path must end in .npz"),
        (lambda: measured(torch.ones(3, 3), [1] * 3).interval("sdt"), "did you mean 'std'"),
        (
            lambda: measured(torch.ones(3, 3), [1] * 3).interval(confidence=95),
            r"confidence must be in \(0, 1\), got 95",
        ),
        (lambda: centred(torch.ones(2)).gaussian_fit(), "map must have more than 3 pixels"),
    ],
)
def test_bad_input_is_named(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
