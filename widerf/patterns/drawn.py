"""Patterns by chance and by cutting up the window: partition, centered, mixed, gaussian, random; the dilated grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from widerf.geometry import Size, ntuple, tap_coordinates
from widerf.patterns.taps import dense_taps, match_dense, require_groups, sizes, widest_spacing, window

Pattern = Callable[..., Tensor]


def _cells_per_group(cells: int, taps: int, groups: int, generator: Generator | None) -> Tensor:
    """Deal ``cells`` cells to ``groups`` hands of ``taps`` distinct ones, as evenly as can be."""
    rows: list[list[int]] = []
    deck: list[int] = []
    for _ in range(groups):
        row = deck[:taps]
        deck = deck[taps:]
        if len(row) < taps:  # the deck ran out: a new one, of which this hand takes only cells that it does not hold
            deck = torch.randperm(cells, generator=generator).tolist()
            fresh = [c for c in deck if c not in set(row)][: taps - len(row)]
            row = row + fresh
            deck = [c for c in deck if c not in set(fresh)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.int64).reshape(groups, taps)


def partition(kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None) -> Tensor:
    """Cut the window at random into disjoint sets of k^D taps, one per group.

    With ``groups`` a multiple of S^D/k^D every cell is read by the same number of groups, so that the expected ERF at
    initialisation is that of the dense S^D kernel (docs/theory.md (12)). Otherwise each cell is read ⌊n⌋ or ⌈n⌉ times,
    n = groups·k^D/S^D, which is as even as can be; with n < 1 some cells are read by nobody.

    Args:
        kernel_size: taps per axis; an integer stands for all axes.
        extent: side of the window per axis, at least ``kernel_size``.
        groups: number of groups of input channels.
        generator: source of randomness on the CPU; default torch's global one.

    Returns:
        int64 offsets ``(groups, taps, D)``.

    Example:
        >>> cells = partition(3, 9, groups=9, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
        >>> len(cells), len(cells.unique(dim=0))
        (81, 81)
    """
    k, s = sizes(kernel_size, extent)
    require_groups(groups)
    cells = window(k, s)
    return match_dense(cells[_cells_per_group(len(cells), math.prod(k), groups, generator)], k)


def centered(kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None) -> Tensor:
    """Every group keeps the centre tap; the others partition the rest of the window, as `partition` does.

    (S^D − 1)/(k^D − 1) groups read every cell but the centre once. With S = k it is the dense kernel.

    Arguments and result as in `partition`.

    Example:
        >>> centered(3, 5, groups=3).shape
        torch.Size([3, 9, 2])
    """
    k, s = sizes(kernel_size, extent)
    require_groups(groups)
    cells = window(k, s)
    centre = (cells == 0).all(dim=1)
    rest = cells[~centre][_cells_per_group(len(cells) - 1, math.prod(k) - 1, groups, generator)]
    return match_dense(torch.cat([cells[centre].expand(groups, 1, -1), rest], dim=1), k)


def mixed(kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None) -> Tensor:
    """The first half of the groups keep the dense kernel, the others partition the window.

    With an odd number of groups the greater half partitions. 2·S^D/k^D groups read every cell.

    Arguments and result as in `partition`.

    Example:
        >>> mixed(3, 7, groups=2)[0].tolist() == dense_taps(3).tolist()
        True
    """
    k, s = sizes(kernel_size, extent)
    require_groups(groups)
    near = dense_taps(k).expand(groups // 2, -1, -1)
    return torch.cat([near, partition(k, s, groups - groups // 2, generator)])


def _draw(weights: Tensor, taps: int, groups: int, generator: Generator | None) -> Tensor:
    """Draw ``taps`` distinct cells per group, each next one with probability proportional to its weight."""
    noise = torch.rand(groups, len(weights), generator=generator, dtype=torch.float64)
    # Exponential races: the order of arrival of clocks with rates `weights` is such a draw without replacement.
    return (noise.log().neg() / weights).argsort(dim=1)[:, :taps]


def gaussian(kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None) -> Tensor:
    """Each group draws its taps by a Gaussian about the window's centre, of standard deviation S/4, no tap twice.

    Groups are drawn on their own, so some cells may be read by nobody: see `coverage`. Arguments and result as in
    `partition`.

    Example:
        >>> gaussian(3, 15, groups=4).shape
        torch.Size([4, 9, 2])
    """
    k, s = sizes(kernel_size, extent)
    require_groups(groups)
    z = tap_coordinates(s) / torch.tensor(s, dtype=torch.float64) * 4
    return match_dense(window(k, s)[_draw((-z.square().sum(1) / 2).exp(), math.prod(k), groups, generator)], k)


def random(kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None) -> Tensor:
    """Each group draws its taps uniformly from the window, no tap twice.

    Groups are drawn on their own, so some cells may be read by nobody: see `coverage`. Arguments and result as in
    `partition`.

    Example:
        >>> random(3, 15, groups=4).shape
        torch.Size([4, 9, 2])
    """
    k, s = sizes(kernel_size, extent)
    require_groups(groups)
    cells = window(k, s)
    return match_dense(cells[_draw(torch.ones(len(cells)), math.prod(k), groups, generator)], k)


def grid(
    kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None, *, stride: Size = 1
) -> Tensor:
    """The dilated kernel: every group reads the same grid, of the widest spacing d with d·(k − 1) + 1 ≤ S.

    The spacing shares no factor with ``stride``, that of the layer: otherwise the grid would read 1/gcd(d, stride)² of
    the map only. Nothing is drawn. A stack of these aliases: `coverage` tells.

    Other arguments and result as in `partition`.

    Example:
        >>> grid((3,), (9,)).flatten().tolist(), grid((3,), (9,), stride=2).flatten().tolist()
        ([-4, 0, 4], [-3, 0, 3])
    """
    k, s = sizes(kernel_size, extent)
    require_groups(groups)
    first = window(k, s)[0]
    spacing = widest_spacing(k, s, ntuple(stride, len(k), "stride"))
    start = [(a - 1 - d * (b - 1)) // 2 for a, b, d in zip(s, k, spacing, strict=True)]
    axes = [[int(f) + o + d * t for t in range(b)] for f, o, d, b in zip(first, start, spacing, k, strict=True)]
    return torch.tensor(list(itertools.product(*axes)), dtype=torch.int64).repeat(groups, 1, 1)


def dense(kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None) -> Tensor:
    """The plain kernel, whatever the window: the local part of a mixture. Nothing is drawn.

    Arguments and result as in `partition`.

    Example:
        >>> dense((3,), (9,), groups=2).squeeze(-1).tolist()
        [[-1, 0, 1], [-1, 0, 1]]
    """
    k, _ = sizes(kernel_size, extent)
    require_groups(groups)
    return dense_taps(k).repeat(groups, 1, 1)


def halfgrid(
    kernel_size: Size, extent: Size, groups: int = 1, generator: Generator | None = None, *, stride: Size = 1
) -> Tensor:
    """The first half of the groups keep the dense kernel, the others read the widest grid.

    With an odd number of groups the greater half reads the grid. PSConv (Li, Yao & Chen, ECCV 2020) is of this family:
    some channels local, some wide. Nothing is drawn.

    Arguments and result as in `grid`.

    Example:
        >>> halfgrid((3,), (9,), groups=2).squeeze(-1).tolist()
        [[-1, 0, 1], [-4, 0, 4]]
    """
    require_groups(groups)
    wide = grid(kernel_size, extent, groups - groups // 2, stride=stride)
    near = dense(kernel_size, extent, groups // 2) if groups > 1 else wide[:0]
    return torch.cat([near, wide])
