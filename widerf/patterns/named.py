"""The patterns by their names, and how many groups each needs."""

from __future__ import annotations

import math

from widerf._checks import require_known
from widerf.patterns.designed import multiscale, rings, spacings, stratified
from widerf.patterns.drawn import Pattern, Size, centered, gaussian, grid, mixed, partition, random
from widerf.patterns.taps import sizes

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
}


def natural_groups(pattern: str, kernel_size: Size, extent: Size) -> int:
    """Return how many groups ``pattern`` needs: to read the whole window, or to have all its radii or spacings.

    Example:
        >>> natural_groups("mixed", 3, 9), natural_groups("partition", 3, 9), natural_groups("grid", 3, 9)
        (18, 9, 1)
    """
    require_known(pattern, NAMED, "pattern")
    k, s = sizes(kernel_size, extent)
    cells, taps = math.prod(s), math.prod(k)
    if pattern == "grid" or s == k:
        return 1
    if pattern == "stratified":
        return math.prod(math.ceil(a / b) for a, b in zip(s, k, strict=True))
    if pattern == "multiscale":
        return len(spacings(k, s))
    if pattern == "rings":
        return max(2, max(s) // 2)
    if pattern == "centered":
        return math.ceil((cells - 1) / (taps - 1)) if taps > 1 else 1
    return math.ceil(cells / taps) * (2 if pattern == "mixed" else 1)
