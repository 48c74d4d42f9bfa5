"""Foveal taps, mixtures and stride-safe grids hold what they promise; the same seed gives the same taps everywhere."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from widerf import patterns
from widerf.patterns import coverage, dense_taps

NAMES = sorted(patterns.NAMED)
THREE = [("dense", 0.5), ("grid", 0.25), ("rings", 0.25)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


def test_halfgrid_is_half_dense_and_half_the_widest_grid() -> None:
    offsets = patterns.halfgrid(3, 9, 4)
    assert same(offsets[:2], dense_taps(3).expand(2, -1, -1))
    assert same(offsets[2:], patterns.grid(3, 9, 2))
    assert same(patterns.halfgrid(3, 9, 1), patterns.grid(3, 9, 1))


@pytest.mark.parametrize(("k", "extent", "core"), [(5, 15, 3), (7, 29, 3), (7, 29, 5), (5, 9, 1)])
def test_foveal_holds_a_dense_core_and_radii_that_grow_geometrically(k: int, extent: int, core: int) -> None:
    offsets = patterns.foveal(k, extent, 3, seeded(), core=core)
    for group in offsets:
        taps = {tuple(t) for t in group.tolist()}
        assert len(taps) == k * k
        assert {tuple(t) for t in dense_taps(core).tolist()} <= taps
        radii = group.double().norm(dim=1).sort().values[core * core :]
        n = len(radii)
        inner, outer = core / 2 + 0.6, extent / 2
        wanted = inner * (outer / inner) ** ((torch.arange(n).double() + 0.5) / n)
        # rounding to cells moves a radius by √½ at most, and taken cells near the crowded core by one cell more
        assert float((radii - wanted).abs().max()) < 1.75
        assert float((radii - wanted).abs().mean()) < 0.6


def test_foveal_turns_from_group_to_group() -> None:
    offsets = patterns.foveal(7, 29, 4, seeded())
    assert len({tuple(map(tuple, sorted(group.tolist()))) for group in offsets}) == 4
    # half a turn: the point reflection, but for taps that rounding or a taken cell moved
    one, other = ({tuple(t) for t in offsets[g].tolist()} for g in (0, 2))
    assert len({(-y, -x) for y, x in one} & other) >= 40


def test_the_energy_of_foveal_taps_is_heavy_tailed() -> None:
    foveal, stratified = patterns.foveal(7, 29, 8, seeded()), patterns.stratified(7, 29, 8, seeded())
    assert coverage([foveal]).excess_kurtosis > coverage([stratified]).excess_kurtosis + 1


@pytest.mark.parametrize("name", ["grid", "halfgrid", "multiscale"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.integers(0, 14), st.lists(st.integers(1, 6), min_size=2, max_size=2), st.integers(1, 6))
def test_no_grid_shares_a_factor_of_its_spacing_with_the_stride(
    name: str, k: int, more: int, stride: list[int], groups: int
) -> None:
    pattern: Any = patterns.NAMED[name]
    for group in pattern((k, k), k + more, groups, None, stride=stride):
        for axis, step in enumerate(stride):
            places = sorted(set(group[:, axis].tolist()))
            spacing = {b - a for a, b in itertools.pairwise(places)}
            assert len(spacing) == 1
            assert math.gcd(spacing.pop(), step) == 1
            assert len({p % step for p in places}) == min(k, step)


PART = st.tuples(st.sampled_from(["dense", "grid", "stratified", "partition"]), st.integers(1, 9))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(PART, min_size=1, max_size=4), st.integers(0, 20))
def test_a_mixture_gives_each_part_its_share_of_the_groups_and_at_least_one(kinds: Any, more: int) -> None:
    total = sum(weight for _, weight in kinds)
    mixture = [(kind, weight / total) for kind, weight in kinds]
    groups = len(kinds) + more
    counts: Counter[int] = Counter()

    def counting(index: int) -> Any:
        def pattern(k: Any, s: Any, n: int, generator: Any) -> Tensor:
            counts[index] = n
            return patterns.dense(k, s, n)

        return pattern

    patterns.draw([(counting(i), share) for i, (_, share) in enumerate(mixture)], 3, 9, groups)
    assert sum(counts.values()) == groups
    for i, (_, share) in enumerate(mixture):
        assert counts[i] >= 1
        assert counts[i] == 1 or abs(counts[i] - share * groups) < len(kinds)
    offsets = patterns.draw(mixture, 3, 9, groups, seeded(1))
    assert offsets.shape == (groups, 9, 2)
    generator, start = seeded(1), 0
    for i, (kind, _) in enumerate(mixture):  # run after run, from one generator
        wanted = patterns.NAMED[kind](3, 9, counts[i], generator)
        assert same(offsets[start : start + counts[i]], wanted)
        start += counts[i]


def test_mixed_and_halfgrid_are_mixtures_of_halves() -> None:
    for name, far in (("mixed", "partition"), ("halfgrid", "grid")):
        one = patterns.draw(name, 3, 9, 6, seeded())
        assert same(one, patterns.draw([("dense", 0.5), (far, 0.5)], 3, 9, 6, seeded()))


@pytest.mark.parametrize(
    ("error", "message", "pattern"),
    [
        (ValueError, "pattern must be one of .*did you mean 'mixed'", "mixt"),
        (ValueError, "pattern must be one of .*did you mean 'dense'", [("dens", 1.0)]),
        (ValueError, r"pattern must have shares that add up to 1, got \[0.5, 0.4\]", [("dense", 0.5), ("grid", 0.4)]),
        (ValueError, "pattern must have positive shares, got 0", [("dense", 0), ("grid", 1.0)]),
        (ValueError, "groups must be at least the 3 parts of the mixture, got 2", THREE),
        (TypeError, "pattern must be a name or hold pairs", []),
        (TypeError, "pattern must be a name or hold pairs .*, got 7", 7),
        (TypeError, "pattern must be a name or hold pairs .*, got 'dense'", ["dense", "grid"]),
        (TypeError, "pattern must be a name or hold pairs .*, got '1'", [("dense", "1")]),
        (TypeError, "pattern must be a name or hold pairs .*, got 3", [(3, 1.0)]),
    ],
)  # fmt: skip
def test_bad_mixtures_are_refused_by_name_rule_and_value(error: Any, message: str, pattern: Any) -> None:
    with pytest.raises(error, match=message):
        patterns.draw(pattern, 3, 9, 2)


def test_a_bad_core_is_refused() -> None:
    with pytest.raises(ValueError, match="core must be a positive integer, got 0"):
        patterns.foveal(7, 15, core=0)


def digest() -> str:
    """One number for the taps of every pattern, and for those that layers draw."""
    from widerf import SparseConv2d
    from widerf.conversion.swap import convert

    text = hashlib.sha256()
    for name in NAMES:
        for k, extent, groups in (((3, 3), (9, 9), 5), ((7, 7), (23, 23), 3), ((2, 5), (8, 11), 4)):
            text.update(patterns.draw(name, k, extent, groups, seeded(7)).numpy().tobytes())
    for channels, groups, pattern in ((128, 1, "mixed"), (96, 96, "foveal"), (36, 1, "rings"), (64, 4, "stratified")):
        layer = SparseConv2d(channels, channels, 5, groups=groups, extent=11, pattern=pattern, seed=3, device="meta")
        text.update(repr(layer._taps).encode())
    net = torch.nn.Sequential(*[torch.nn.Conv2d(32, 32, 3, device="meta") for _ in range(3)])
    convert(net, extent=9, seed=5)
    text.update(repr([layer._taps for layer in net[1:]]).encode())
    return text.hexdigest()


def test_the_same_seeds_give_the_same_taps_in_every_process_and_on_every_processor() -> None:
    told = digest()
    code = "import torch; torch.manual_seed(9); from tests.patterns.test_mixtures import digest; print(digest())"
    for more in ({"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "3"}, {"PYTHONHASHSEED": "11"}):
        run = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **more}, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == told
    # What was drawn when these patterns were written: a change of it changes the networks that users draw by a seed.
    assert told[:16] == "e96e78ce4bc63fee"


def test_roughness_isotropy_and_kurtosis_are_those_of_slow_twins() -> None:
    found = coverage([patterns.stratified(3, 7, 2, seeded()), patterns.multiscale((3, 3), (5, 9), 2)], jumps=[1, 2])
    cells = [
        (y, x, found.energy[y, x].item()) for y in range(found.energy.shape[0]) for x in range(found.energy.shape[1])
    ]
    mean = [sum(c[a] * c[2] for c in cells) for a in range(2)]
    std = [math.sqrt(sum((c[a] - mean[a]) ** 2 * c[2] for c in cells)) for a in range(2)]
    z = [((y - mean[0]) / std[0], (x - mean[1]) / std[1], e) for y, x, e in cells]
    fourth = [sum(c[a] ** 4 * c[2] for c in z) for a in range(2)]
    assert found.excess_kurtosis == pytest.approx(sum(fourth) / 2 - 3)
    assert found.isotropy == pytest.approx(3 * sum(a**2 * b**2 * e for a, b, e in z) / (sum(fourth) / 2))
    low = [math.ceil(s) for s in std]
    weights = []  # of the bell, per axis, on whole cells
    for axis in range(2):
        bell = [math.exp(-((x / (std[axis] / 4)) ** 2) / 2) for x in range(-low[axis], low[axis] + 1)]
        weights.append({x - low[axis]: b / sum(bell) for x, b in enumerate(bell)})
    error = total = 0.0
    for y in range(-low[0], found.energy.shape[0] + low[0]):
        for x in range(-low[1], found.energy.shape[1] + low[1]):
            smooth = sum(weights[0].get(y - b, 0.0) * weights[1].get(x - a, 0.0) * e for b, a, e in cells)
            inside = 0 <= y < found.energy.shape[0] and 0 <= x < found.energy.shape[1]
            error += ((found.energy[y, x].item() if inside else 0.0) - smooth) ** 2
            total += smooth**2
    assert found.roughness == pytest.approx(math.sqrt(error / total))


def test_isotropy_is_one_for_round_maps_and_none_in_one_dimension() -> None:
    disc = [(y, x) for y in range(-40, 41) for x in range(-40, 41) if y * y + x * x <= 40**2]
    assert coverage([torch.tensor([disc])]).isotropy == pytest.approx(1.0, abs=0.02)
    assert coverage([dense_taps(41)[None]]).isotropy == pytest.approx(5 / 3, abs=0.01)
    cross = torch.tensor([[[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]]])
    assert coverage([cross]).isotropy == 0
    bell = coverage([dense_taps((3, 3, 3))[None]] * 40)  # a product of bells is round
    assert bell.isotropy == pytest.approx(1.0, abs=0.02)
    assert math.isnan(coverage([dense_taps((5,))[None]]).isotropy)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 99), st.sampled_from([0.25, 0.5, 1.0]), st.integers(1, 3)), min_size=1, max_size=4
    )
)
def test_residual_branches_leave_the_rest_of_the_energy_where_it_is(layers: list[tuple[int, float, int]]) -> None:
    stack = [patterns.random((3,), (7,), 2, seeded(seed)) for seed, _, _ in layers]
    found = coverage(stack, [jump for _, _, jump in layers], [share for _, share, _ in layers])
    wanted: Counter[int] = Counter({0: 1.0})  # type: ignore[dict-item]
    for offsets, (_, share, jump) in zip(stack, layers, strict=True):
        step: Counter[int] = Counter()
        taps = offsets.flatten().tolist()
        for cell, energy in wanted.items():
            step[cell] += (1 - share) * energy  # type: ignore[assignment]
            for tap in taps:
                step[cell + jump * tap] += share * energy / len(taps)  # type: ignore[assignment]
        wanted = step
    for i, energy in enumerate(found.energy.tolist()):
        assert energy == pytest.approx(wanted[i + found.low[0]], abs=1e-12)
    assert sum(wanted.values()) == pytest.approx(float(found.energy.sum())) == pytest.approx(1.0)
