"""Foveal taps: dense about the centre, ever sparser with distance, as in the eye."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from widerf._checks import require
from widerf.geometry import Size
from widerf.patterns.taps import dense_taps, match_dense, nearest_free, require_groups, sizes, window

_GOLDEN = math.pi * (3 - math.sqrt(5))  # radians from one tap of the spiral to the next: 2.39996
_GAP = 0.6  # cells between the core and the first tap of the spiral


def _directions(rank: int, count: int, turn: float) -> list[list[float]]:
    """Return ``count`` unit vectors that fill line, circle or sphere evenly at every count, turned by ``turn``."""
    around = [turn + i * _GOLDEN for i in range(count)]
    if rank == 1:
        return [[1.0 if math.cos(turn) * (-1) ** i >= 0 else -1.0] for i in range(count)]
    if rank == 2:
        return [[math.sin(a), math.cos(a)] for a in around]
    heights = [2 * ((i + 0.5) * _GOLDEN / (2 * math.pi) % 1) - 1 for i in range(count)]
    wide = [math.sqrt(1 - z * z) for z in heights]
    turns = [turn + i * math.sqrt(2) * math.pi for i in range(count)]  # no rational relation to the heights
    return [[z, r * math.sin(a), r * math.cos(a)] for z, r, a in zip(heights, wide, turns, strict=True)]


def _core(kernel_size: tuple[int, ...], core: int) -> tuple[int, ...]:
    """Return the side of the dense core per axis: ``core``, or two taps less than the kernel if that is no more."""
    return tuple(core if core < k else max(1, k - 2) for k in kernel_size)


def foveal(
    kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None, core: int = 3
) -> Tensor:
    """A dense core and a golden-angle log-spiral out to the edge of the window, turned from group to group.

    The i-th of the n taps beside the core lies at the radius r₀·(R/r₀)^((i + ½)/n), with r₀ the core's and R half the
    window's side, and 137.5° on from the one before (on one axis: on the other side; on three: spread over the sphere).
    So the taps' density falls as 1/r², which is what the 1/f² spectrum of natural images asks for: of all taps of equal
    number these predict the image about them best. A tap whose cell is taken goes to the free cell nearest to its
    place. All groups share one random angle; group g is turned by g/groups of a turn from there.

    ``core`` is the side of the dense core, in cells. Where the kernel is no wider, as with 3×3, the core is k − 2 wide:
    nine taps are few for two tasks, and the pattern comes into its own from k = 5 on, where depthwise layers make taps
    cheap.

    Other arguments and result as in `widerf.patterns.partition`.

    Raises:
        ValueError: if ``core`` is not positive.

    Example:
        >>> taps = foveal(7, 29, generator=torch.Generator().manual_seed(0))[0]
        >>> len(taps.unique(dim=0)), int((taps.abs().amax(1) <= 1).sum()), int(taps.abs().amax())
        (49, 9, 13)
    """
    k, s = sizes(kernel_size, extent)
    require_groups(groups)
    require(isinstance(core, int) and core >= 1, "core", "be a positive integer", core)
    cells, dense = window(k, s), dense_taps(_core(k, core))
    middle = (cells[0] + cells[-1]).double() / 2
    free = [axis for axis, n in enumerate(s) if n > 1]
    inner = torch.tensor([_core(k, core)[axis] / 2 + _GAP for axis in free], dtype=torch.float64)
    outer = torch.maximum(torch.tensor([s[axis] / 2 for axis in free], dtype=torch.float64), inner)
    count = math.prod(k) - len(dense)
    begin = float(torch.rand((), generator=generator, dtype=torch.float64))
    steps = (torch.arange(count, dtype=torch.float64) + 0.5) / max(1, count)
    rows = []
    for g in range(groups):
        places = middle.repeat(count, 1)
        if count:
            turned = _directions(len(free), count, 2 * math.pi * (begin + g / groups))
            places[:, free] += inner * (outer / inner) ** steps[:, None] * torch.tensor(turned, dtype=torch.float64)
        rows.append(nearest_free(cells, torch.cat([dense.double(), places])))
    return match_dense(torch.stack(rows), k)
