"""Patterns that are designed rather than drawn: what might beat a well-chosen grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from widerf._checks import require
from widerf.geometry import Size, ntuple
from widerf.patterns.taps import coprime, dense_taps, match_dense, nearest_free, require_groups, sizes, window


def stratified(kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None) -> Tensor:
    """Cut the window into k^D blocks; each group takes one cell of each block, and no cell before all had their turn.

    A partition whose patterns are spread like the dense kernel: each weight stays in its part of the window, so that
    an edge detector remains one at the wider scale. With S a multiple of k, (S/k)^D groups read every cell once.
    Blocks differ by one cell in size if S is no multiple.

    Arguments and result as in `widerf.patterns.partition`.

    Example:
        >>> stratified((3,), (9,), groups=3).flatten(0, 1).unique().tolist()
        [-4, -3, -2, -1, 0, 1, 2, 3, 4]
    """
    k, s = sizes(kernel_size, extent)
    require_groups(groups)
    first = window(k, s)[0].tolist()
    cuts = [[f + a * t // b for t in range(b + 1)] for f, a, b in zip(first, s, k, strict=True)]
    taps = []
    for place in itertools.product(*(range(b) for b in k)):
        block = list(itertools.product(*(range(c[t], c[t + 1]) for c, t in zip(cuts, place, strict=True))))
        turns = math.ceil(groups / len(block))
        order = torch.cat([torch.randperm(len(block), generator=generator) for _ in range(turns)])[:groups]
        taps.append(torch.tensor(block, dtype=torch.int64)[order])
    return torch.stack(taps, dim=1)


def spacings(kernel_size: Sequence[int], extent: Sequence[int]) -> list[int]:
    """Return the spacings 1, 2, 3, 4, 6, 8, 11, … up to the widest grid in the window: ratio √2, each integer once.

    Example:
        >>> spacings((3, 3), (15, 15))
        [1, 2, 3, 4, 6, 7]
    """
    widest = max(((a - 1) // (b - 1) for a, b in zip(extent, kernel_size, strict=True) if b > 1), default=1)
    steps = {min(widest, round(2 ** (i / 2))) for i in range(2 * widest.bit_length() + 1)}
    return sorted(steps | {widest})


def multiscale(
    kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None, *, stride: Size = 1
) -> Tensor:
    """Every group has a grid of its own spacing, from the dense kernel to the widest that the window holds.

    The spacings (`spacings`) are dealt out evenly; several dilations in one layer take each other's aliases away, as
    in PSConv (Li, Yao & Chen, ECCV 2020). Nothing is drawn.

    Arguments and result as in `widerf.patterns.grid`.

    Example:
        >>> multiscale((3,), (9,), groups=3).squeeze(-1).tolist()
        [[-1, 0, 1], [-3, 0, 3], [-4, 0, 4]]
        >>> multiscale((3,), (9,), groups=2, stride=2).squeeze(-1).tolist()
        [[-1, 0, 1], [-3, 0, 3]]
    """
    k, s = sizes(kernel_size, extent)
    require_groups(groups)
    steps, strides = spacings(k, s), ntuple(stride, len(k), "stride")
    most = [(a - 1) // (b - 1) if b > 1 else 1 for a, b in zip(s, k, strict=True)]
    scales = [tuple(coprime(min(d, m), step) for m, step in zip(most, strides, strict=True)) for d in steps]
    scales = list(dict.fromkeys(scales))
    low, high = window(k, s)[0], window(k, s)[-1]
    rows = []
    for g in range(groups):
        share = g / (groups - 1) * (len(scales) - 1) if 1 < groups < len(scales) else g * len(scales) // groups
        row = dense_taps(k) * torch.tensor(scales[round(share)] if groups > 1 else scales[-1])
        # even kernels: back into the window
        rows.append(row - (row - high).clamp(min=0).amax(0) + (low - row).clamp(min=0).amax(0))
    return torch.stack(rows)


def rings(kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None) -> Tensor:
    """Every group has the centre and k^2 − 1 taps on a circle of its own radius, turned by a random angle.

    The radii go in equal steps from 1 to (S − 1)/2, so the layer answers to all distances alike, and to all
    directions: no grid axis is preferred. A tap whose cell is taken goes to the free cell nearest to its place.

    Arguments and result as in `widerf.patterns.partition`; two axes only.

    Raises:
        ValueError: if the kernel has not two axes.

    Example:
        >>> rings(3, 9, groups=4)[3].abs().amax().item()
        4
    """
    k, s = sizes(kernel_size, extent)
    require_groups(groups)
    require(len(k) == 2, "kernel_size", "have two axes with pattern 'rings'", kernel_size)
    cells = window(k, s)
    middle = (cells[0] + cells[-1]).double() / 2
    most = (torch.tensor(s, dtype=torch.float64) - 1) / 2
    around = math.prod(k) - 1
    rows = []
    for g in range(groups):
        share = (g + 1) / groups if groups > 1 else 1.0
        radius = torch.minimum(most, 1 + (most - 1) * share) if groups > 1 else most
        turn = float(torch.rand((), generator=generator, dtype=torch.float64))
        angle = (torch.arange(around, dtype=torch.float64) + turn) * (2 * math.pi / max(1, around))
        circle = torch.stack([angle.sin() * radius[0], angle.cos() * radius[1]], dim=1) + middle
        rows.append(nearest_free(cells, torch.cat([middle[None], circle])))
    return match_dense(torch.stack(rows), k)
