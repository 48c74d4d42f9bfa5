"""Patterns hold what they promise, and `coverage` says what a stack of them reaches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import widerf
from tests.reference import minkowski_sum
from widerf import SparseConv2d, patterns
from widerf.patterns import coverage, dense_taps, window

NAMES = sorted(patterns.NAMED)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def arguments(draw: Any) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
    rank = draw(st.integers(1, 3))
    k = tuple(draw(st.integers(1, 5 if rank < 3 else 3)) for _ in range(rank))
    extent = tuple(n + draw(st.integers(0, 9 if rank < 3 else 3)) for n in k)
    names = [name for name in NAMES if rank == 2 or name != "rings"]  # circles need two axes
    return draw(st.sampled_from(names)), k, extent, draw(st.integers(1, 12))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(arguments(), st.integers(0, 2**40))
def test_every_pattern_has_distinct_taps_in_its_window_and_follows_its_seed(case: Any, seed: int) -> None:
    name, k, extent, groups = case
    offsets = patterns.NAMED[name](k, extent, groups, seeded(seed))
    assert offsets.dtype == torch.int64
    assert tuple(offsets.shape) == (groups, math.prod(k), len(k))
    cells = {tuple(c) for c in window(k, extent).tolist()}
    for group in offsets.tolist():
        taps = {tuple(t) for t in group}
        assert len(taps) == math.prod(k)
        assert taps <= cells
    assert torch.equal(offsets, patterns.NAMED[name](k, extent, groups, seeded(seed)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(arguments())
def test_partition_reads_every_cell_as_evenly_as_can_be(case: Any) -> None:
    _, k, extent, groups = case
    offsets = patterns.partition(k, extent, groups, seeded())
    counts = torch.zeros(len(window(k, extent)), dtype=torch.int64)
    cells = {tuple(c): i for i, c in enumerate(window(k, extent).tolist())}
    for tap in offsets.flatten(0, 1).tolist():
        counts[cells[tuple(tap)]] += 1
    assert int(counts.max() - counts.min()) <= 1


def test_centered_keeps_the_centre_and_partitions_the_rest() -> None:
    offsets = patterns.centered(3, 5, 3, seeded())
    assert all((group == 0).all(1).any() for group in offsets)
    rest = [tuple(t) for t in offsets.flatten(0, 1).tolist() if t != [0, 0]]
    assert len(rest) == len(set(rest)) == 24


def test_mixed_is_half_dense_and_half_a_partition() -> None:
    offsets = patterns.mixed(3, 9, 18, seeded())
    assert torch.equal(offsets[:9], dense_taps(3).expand(9, -1, -1))
    assert len({tuple(t) for t in offsets[9:].flatten(0, 1).tolist()}) == 81


@pytest.mark.parametrize("name", NAMES)
def test_with_extent_k_every_pattern_is_the_dense_kernel_in_order(name: str) -> None:
    for k in ((3, 3), (2, 4), (5, 1)):
        assert torch.equal(patterns.NAMED[name](k, k, 3, seeded()), dense_taps(k).expand(3, -1, -1))


def test_a_permutation_of_the_taps_is_undone_by_matching() -> None:
    dense = dense_taps(3) * 4
    shuffled = dense[torch.randperm(9, generator=seeded())]
    assert torch.equal(patterns.match_dense(shuffled[None], 3)[0], dense)


def test_matching_beats_every_other_assignment() -> None:
    import itertools

    offsets = patterns.random((3,), (9,), 1, seeded(3))
    m = torch.tensor([-1.0, 0.0, 1.0])
    best = max(
        float((m * torch.tensor(p, dtype=torch.float)).sum())
        for p in itertools.permutations(offsets.flatten().tolist())
    )
    assert float((m * offsets.flatten()).sum()) == best


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("k", "extent"), [(k, s) for k in (3, 5) for s in (5, 7, 15, 31) if s >= k])
def test_holes_and_side_equal_those_of_the_minkowski_sum(name: str, k: int, extent: int) -> None:
    layers = 2 if extent > 7 else 3
    groups = min(6, patterns.natural_groups(name, k, extent))
    stack = [patterns.NAMED[name](k, extent, groups, seeded(i)) for i in range(layers)]
    found = coverage(stack)
    cells = minkowski_sum(stack)
    low = [min(c[a] for c in cells) for a in range(2)]
    box = [max(c[a] for c in cells) - low[a] + 1 for a in range(2)]
    assert found.low == tuple(low)
    assert list(found.energy.shape) == box
    assert found.holes == math.prod(box) - len(cells)
    solid = [[(y + low[0], x + low[1]) in cells for x in range(box[1])] for y in range(box[0])]
    largest, row = 0, [0] * box[1]
    for y in range(box[0]):  # the textbook's largest square: one row of side lengths at a time
        new = []
        for x in range(box[1]):
            corner = (row[x], row[x - 1], new[x - 1]) if x and y else (0, 0, 0)
            new.append(1 + min(corner) if solid[y][x] else 0)
        row, largest = new, max(largest, *new)
    assert found.side == largest


def test_energy_is_the_convolution_of_the_layers() -> None:
    stack = [patterns.random((3,), (7,), 2, seeded(i)) for i in range(3)]
    found = coverage(stack, jumps=[1, 2, 3])
    wanted: dict[int, float] = {0: 1.0}
    for jump, offsets in zip([1, 2, 3], stack, strict=True):
        taps = offsets.flatten().tolist()
        step: dict[int, float] = {}
        for cell, share in wanted.items():
            for tap in taps:
                step[cell + jump * tap] = step.get(cell + jump * tap, 0.0) + share / len(taps)
        wanted = step
    for i, energy in enumerate(found.energy.tolist()):
        assert energy == pytest.approx(wanted.get(i + found.low[0], 0.0), abs=1e-12)
    assert found.erf().std == pytest.approx(found.std)
    assert float(found.energy.sum()) == pytest.approx(1.0)


def test_variances_add() -> None:
    a, b = patterns.partition(3, 9, 9), patterns.grid(3, 7)
    assert coverage([a, b]).std ** 2 == pytest.approx(coverage([a]).std ** 2 + coverage([b]).std ** 2)
    assert coverage([a]).std ** 2 == pytest.approx((9**2 - 1) / 12)


def test_a_grid_aliases_and_spacings_1_3_9_tile_flat() -> None:
    assert coverage([patterns.grid(3, 7)] * 3).sidelobe == pytest.approx(1.0, abs=0.01)
    flat = coverage([patterns.grid(3, extent) for extent in (3, 7, 19)])
    assert flat.holes == 0
    assert flat.side == 27
    assert flat.energy.std() < 1e-15
    assert flat.sidelobe == pytest.approx(0.217, abs=0.01)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_energy_of_partitioned_layers_is_that_of_the_dense_window(layers: int) -> None:
    sparse = coverage([patterns.partition(3, 9, 9, seeded(i)) for i in range(layers)])
    dense = coverage([dense_taps(9)[None]] * layers)
    torch.testing.assert_close(sparse.energy, dense.energy, rtol=1e-12, atol=0)


def stack_of(name: str, k: int, extent: int, layers: int = 2) -> nn.Sequential:
    channels = min(12, patterns.natural_groups(name, k, extent))
    arguments: Any = {"padding": k // 2, "bias": False, "extent": extent, "pattern": name, "dtype": torch.float64}
    return nn.Sequential(*[SparseConv2d(channels, channels, k, seed=i, **arguments) for i in range(layers)])


def redraw(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)


def predicted_and_measured(name: str, k: int, extent: int, samples: int) -> tuple[float, tuple[float, float]]:
    net = stack_of(name, k, extent)
    side = 2 * extent + 3
    std = coverage([layer.offsets for layer in net]).std  # type: ignore[misc]
    measured = widerf.measure(
        net, (net[0].in_channels, side, side), layer="1", samples=samples, redraw=redraw, generator=seeded()
    )
    return std, measured.interval("std", confidence=0.999)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("k", "extent"), [(3, 5), (5, 7)])
def test_predicted_std_lies_in_the_interval_of_the_measured_one(name: str, k: int, extent: int) -> None:
    std, (low, high) = predicted_and_measured(name, k, extent, 48)
    assert low <= std <= high
    assert high - low < 0.3 * std


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("extent", [7, 11, 15, 21, 31])
def test_predicted_std_lies_in_the_interval_of_the_measured_one_up_to_31(name: str, k: int, extent: int) -> None:
    std, (low, high) = predicted_and_measured(name, k, extent, 96)
    assert low <= std <= high


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"extent must be at least kernel_size \(3, 3\)", lambda: patterns.mixed(3, 2)),
        (ValueError, "groups must be a positive integer, got 0", lambda: patterns.mixed(3, 7, 0)),
        (TypeError, "kernel_size must hold integers", lambda: patterns.mixed((3.0, 3), 7)),
        (ValueError, "extent must be one integer or 2", lambda: patterns.mixed((3, 3), (7, 7, 7))),
        (ValueError, "pattern must be one of .*did you mean 'mixed'", lambda: patterns.natural_groups("mixt", 3, 7)),
        (ValueError, "kernel_size must have two axes with pattern 'rings'", lambda: patterns.rings((3,), (7,))),
        (ValueError, "list_of_offsets must hold at least one layer", lambda: coverage([])),
        (TypeError, "list_of_offsets must hold integer tensors", lambda: coverage([torch.zeros(1, 9, 2)])),
        (ValueError, "jumps must hold 1 integers", lambda: coverage([dense_taps(3)[None]], jumps=[1, 2])),
    ],
)  # fmt: skip
def test_bad_input_names_argument_rule_and_value(error: Any, message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()


def test_no_pattern_advances_the_global_generator_if_it_has_its_own() -> None:
    state = torch.get_rng_state()
    for name in NAMES:
        patterns.NAMED[name](3, 9, 4, seeded())
    assert torch.equal(state, torch.get_rng_state())


def per_cell(offsets: Tensor) -> set[tuple[int, ...]]:
    return {tuple(t) for t in offsets.flatten(0, 1).tolist()}


def test_the_natural_number_of_groups_is_the_least_that_reads_the_window() -> None:
    for name in ("partition", "centered", "mixed"):
        n = patterns.natural_groups(name, 3, 7)
        step = 2 if name == "mixed" else 1
        assert len(per_cell(patterns.NAMED[name](3, 7, n, seeded()))) == 49
        assert len(per_cell(patterns.NAMED[name](3, 7, n - step, seeded()))) < 49


@pytest.mark.parametrize(("k", "extent"), [((3, 3), (9, 9)), ((3, 3), (7, 11)), ((2, 5), (4, 11)), ((3,), (8,))])
def test_stratified_takes_one_cell_of_each_block_and_partitions_the_window(k: Any, extent: Any) -> None:
    groups = patterns.natural_groups("stratified", k, extent)
    offsets = patterns.stratified(k, extent, groups, seeded())
    assert {tuple(t) for t in offsets.flatten(0, 1).tolist()} == {tuple(c) for c in window(k, extent).tolist()}
    corner = window(k, extent)[0]
    for axis, (n, s) in enumerate(zip(k, extent, strict=True)):
        cuts = torch.tensor([s * t // n for t in range(n + 1)])
        block = torch.searchsorted(cuts, (offsets - corner)[..., axis].contiguous(), right=True) - 1
        wanted = (patterns.dense_taps(k) - patterns.dense_taps(k)[0])[:, axis]
        assert torch.equal(block, wanted.expand(groups, -1))


def test_rings_lie_on_their_circles_and_turn() -> None:
    offsets = patterns.rings(3, 15, 7, seeded())
    for group, radius in zip(offsets.double(), torch.linspace(1, 7, 8)[1:].tolist(), strict=True):
        distance = group.norm(dim=1).sort().values
        assert distance[0] == 0
        assert ((distance[1:] - radius).abs() < 1).all()


def test_multiscale_has_all_spacings_from_dense_to_the_widest() -> None:
    offsets = patterns.multiscale(3, 15, 6)
    assert [int(group.max()) for group in offsets] == [1, 2, 3, 4, 6, 7]
    assert torch.equal(offsets[0], dense_taps(3))
