"""The patterns by their names, mixtures of them, and how many groups each needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from widerf._checks import require, require_known
from widerf.geometry import Size
from widerf.patterns.designed import multiscale, rings, spacings, stratified
from widerf.patterns.drawn import Pattern, centered, dense, gaussian, grid, halfgrid, mixed, partition, random
from widerf.patterns.fovea import foveal
from widerf.patterns.taps import require_groups, sizes

NAMED: dict[str, Pattern] = {
    "mixed": mixed,
    "partition": partition,
    "centered": centered,
    "gaussian": gaussian,
    "random": random,
    "grid": grid,
    "rings": rings,
    "stratified": stratified,
    "multiscale": multiscale,
    "foveal": foveal,
    "halfgrid": halfgrid,
    "dense": dense,
}
HALVES = ("mixed", "halfgrid")  # the first half of the groups is dense
_GRIDS = ("grid", "multiscale", "halfgrid")  # their spacings must share no factor with the layer's stride

Part: TypeAlias = tuple["str | Pattern", float]
Mixture: TypeAlias = Sequence[Part]


def check_named(pattern: str | Mixture) -> None:
    """Raise unless ``pattern`` is a known name, or a list of (name or function, share of the channels).

    Raises:
        TypeError: if an entry of a mixture is no such pair.
        ValueError: if a name is unknown, a share is not positive, or the shares do not add up to 1.

    Example:
        >>> check_named([("dense", 0.5), ("stratified", 0.6)])
        Traceback (most recent call last):
        ...
        ValueError: pattern must have shares that add up to 1, got [0.5, 0.6]
    """
    if isinstance(pattern, str):
        return require_known(pattern, NAMED, "pattern")
    rule = "be a name or hold pairs (name or function, share of the channels)"
    require(isinstance(pattern, (list, tuple)) and len(pattern) > 0, "pattern", rule, pattern, TypeError)
    for part in pattern:
        require(isinstance(part, (list, tuple)) and len(part) == 2, "pattern", rule, part, TypeError)
        kind, share = part
        require(isinstance(kind, str) or callable(kind), "pattern", rule, kind, TypeError)
        require(isinstance(share, (int, float)), "pattern", rule, share, TypeError)
        require(share > 0, "pattern", "have positive shares", share)
        if isinstance(kind, str):
            require_known(kind, NAMED, "pattern")
    shares = [share for _, share in pattern]
    require(abs(sum(shares) - 1) < 1e-6, "pattern", "have shares that add up to 1", shares)
    return None


def describe(pattern: str | Mixture) -> str:
    """Return the name of a pattern, or the names and shares of a mixture.

    Example:
        >>> describe([("dense", 0.5), (stratified, 0.5)])
        '0.5 dense + 0.5 stratified'
    """
    if isinstance(pattern, str):
        return pattern
    named = [(k if isinstance(k, str) else getattr(k, "__name__", type(k).__name__), share) for k, share in pattern]
    return " + ".join(f"{share:g} {name}" for name, share in named)


def kinds(pattern: str | Mixture) -> int:
    """Return how many kinds of group ``pattern`` is made of: as many groups it needs to be itself.

    Example:
        >>> kinds("mixed"), kinds("stratified"), kinds([("dense", 0.25), ("grid", 0.25), ("rings", 0.5)])
        (2, 1, 3)
    """
    return (2 if pattern in HALVES else 1) if isinstance(pattern, str) else len(pattern)


def _deal(pattern: Mixture, groups: int) -> list[int]:
    """Return how many of the groups each part gets: at least one, otherwise nearest to its share."""
    counts = [max(1, math.floor(share * groups + 1e-9)) for _, share in pattern]
    while sum(counts) != groups:
        step = 1 if sum(counts) < groups else -1
        # the part that is furthest from its share in that direction, the first of equals
        lacks = [
            step * (share * groups - n) if n + step >= 1 else -math.inf
            for n, (_, share) in zip(counts, pattern, strict=True)
        ]
        counts[lacks.index(max(lacks))] += step
    return counts


def draw(
    pattern: str | Mixture,
    kernel_size: Size,
    extent: Size,
    groups: int = 1,
    generator: Generator | None = None,
    stride: Size = 1,
) -> Tensor:
    """Draw a pattern by its name, or a mixture of several: each part takes a run of neighbouring groups.

    Args:
        pattern: a name of `NAMED`, or a list of (name or function, share of the groups); functions take the arguments
            of `widerf.patterns.partition`.
        kernel_size: taps per axis.
        extent: side of the window per axis.
        groups: number of groups of input channels, at least one for each part of a mixture.
        generator: source of randomness on the CPU.
        stride: of the layer; grids keep spacings that share no factor with it.

    Returns:
        int64 offsets ``(groups, taps, D)``.

    Raises:
        TypeError: if the pattern is of the wrong type.
        ValueError: if a name is unknown, shares do not add up to 1, or there are fewer groups than parts.

    Example:
        >>> draw([("dense", 0.75), ("grid", 0.25)], (3,), (7,), groups=4).squeeze(-1).tolist()
        [[-1, 0, 1], [-1, 0, 1], [-1, 0, 1], [-3, 0, 3]]
    """
    check_named(pattern)
    require_groups(groups)
    if isinstance(pattern, str):
        more = {"stride": stride} if pattern in _GRIDS else {}
        return NAMED[pattern](kernel_size, extent, groups, generator, **more)
    require(groups >= len(pattern), "groups", f"be at least the {len(pattern)} parts of the mixture", groups)
    rows = []
    for (kind, _), count in zip(pattern, _deal(pattern, groups), strict=True):
        if isinstance(kind, str):
            rows.append(draw(kind, kernel_size, extent, count, generator, stride))
        else:
            rows.append(kind(kernel_size, extent, count, generator))
    return torch.cat(rows)


def natural_groups(pattern: str | Mixture, kernel_size: Size, extent: Size) -> int:
    """Return how many groups ``pattern`` needs: to read the whole window, or to have all its radii or spacings.

    Example:
        >>> natural_groups("mixed", 3, 9), natural_groups("partition", 3, 9), natural_groups("grid", 3, 9)
        (18, 9, 1)
        >>> natural_groups([("dense", 0.5), ("partition", 0.5)], 3, 9)
        18
    """
    check_named(pattern)
    k, s = sizes(kernel_size, extent)
    if not isinstance(pattern, str):
        needs = [(natural_groups(kind, k, s) if isinstance(kind, str) else 1, share) for kind, share in pattern]
        return max(len(pattern), *(math.ceil(need / share - 1e-9) for need, share in needs))
    cells, taps = math.prod(s), math.prod(k)
    if pattern in ("grid", "dense") or s == k:
        return 1
    if pattern == "halfgrid":
        return 2
    if pattern == "stratified":
        return math.prod(math.ceil(a / b) for a, b in zip(s, k, strict=True))
    if pattern == "multiscale":
        return len(spacings(k, s))
    if pattern == "rings":
        return max(2, max(s) // 2)
    if pattern == "centered":
        return math.ceil((cells - 1) / (taps - 1)) if taps > 1 else 1
    return math.ceil(cells / taps) * (2 if pattern == "mixed" else 1)
