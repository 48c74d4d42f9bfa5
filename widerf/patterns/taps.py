"""What all tap patterns are made of: the window, the dense kernel, and which tap takes which weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from widerf._checks import require
from widerf.geometry import Size, ntuple, tap_coordinates


def sizes(kernel_size: Size, extent: Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return kernel size and extent as tuples of the same rank; two integers stand for two axes.

    Raises:
        ValueError: if an extent is smaller than the kernel on its axis.

    Example:
        >>> sizes(3, (7, 7, 5))
        ((3, 3, 3), (7, 7, 5))
    """
    rank = next((len(s) for s in (kernel_size, extent) if not isinstance(s, int)), 2)
    k, s = ntuple(kernel_size, rank, "kernel_size"), ntuple(extent, rank, "extent")
    require(all(n >= 1 for n in k), "kernel_size", "be positive", kernel_size)
    require(
        all(a >= b for a, b in zip(s, k, strict=True)), "extent", f"be at least kernel_size {k} on each axis", extent
    )
    return k, s


def window(kernel_size: Size, extent: Size) -> Tensor:
    """Return the offsets of all cells of the window, int64 ``(prod(extent), D)``, in C order.

    The window has the same centre as the k dense taps: on each axis it begins ``(S − k)//2`` cells before them, so that
    a layer of extent S and padding p is a dense S-tap convolution of padding ``p + (S − k)/2``. If S − k is odd, the
    window reaches one cell further on the high side.

    Example:
        >>> window((3,), (5,)).flatten().tolist()
        [-2, -1, 0, 1, 2]
        >>> window((2,), (4,)).flatten().tolist()
        [-1, 0, 1, 2]
    """
    k, s = sizes(kernel_size, extent)
    axes = [range(-((b - 1) // 2) - (a - b) // 2, a - (b - 1) // 2 - (a - b) // 2) for a, b in zip(s, k, strict=True)]
    return torch.tensor(list(itertools.product(*axes)), dtype=torch.int64)


def dense_taps(kernel_size: Size) -> Tensor:
    """Return the offsets of the dense kernel, int64 ``(taps, D)``: the window of extent k.

    Example:
        >>> dense_taps((3,)).flatten().tolist()
        [-1, 0, 1]
    """
    return window(kernel_size, kernel_size)


def match_dense(offsets: Tensor, kernel_size: Size) -> Tensor:
    """Order each group's taps so that tap t is the partner of dense tap t.

    The assignment maximises ``Σ_t m_t · o_t`` with m_t the centred coordinate of dense tap t and o_t the offset it is
    sent to. That minimises ``Σ_t |c·m_t − o_t|²`` for every scale c > 0 at once: the upper left weight of a trained
    kernel goes to an upper left tap, however wide the window is. The dense kernel itself is left in order.

    Args:
        offsets: int64 ``(groups, taps, D)``.
        kernel_size: the kernel whose weights the taps will carry.

    Returns:
        the same offsets, taps reordered within each group.

    Example:
        >>> match_dense(torch.tensor([[[4], [-3], [0]]]), (3,)).flatten().tolist()
        [-3, 0, 4]
    """
    from scipy.optimize import linear_sum_assignment

    k = ntuple(kernel_size, offsets.shape[-1], "kernel_size")
    benefit = torch.einsum("td,gsd->gts", tap_coordinates(k), offsets.double())
    order = [torch.from_numpy(linear_sum_assignment(b.numpy(), maximize=True)[1]) for b in benefit]
    return torch.stack([o[i] for o, i in zip(offsets, order, strict=True)]) if order else offsets


_FINE = 4096.0  # places are rounded to 1/4096 of a cell, so that another processor's last bit moves no tap


def nearest_free(cells: Tensor, places: Tensor) -> Tensor:
    """Return for each place, one after the other, the nearest cell that is not taken yet.

    Args:
        cells: int64 ``(cells, D)``, at least as many as places.
        places: float64 ``(places, D)``.

    Example:
        >>> nearest_free(torch.tensor([[0], [1], [2]]), torch.tensor([[0.2], [0.1], [9.0]])).flatten().tolist()
        [0, 1, 2]
    """
    free = torch.ones(len(cells), dtype=torch.bool)
    row = []
    for place in (places * _FINE).round() / _FINE:
        best = int((cells - place).square().sum(1).masked_fill(~free, math.inf).argmin())
        free[best] = False
        row.append(cells[best])
    return torch.stack(row)


def widest_spacing(kernel_size: Sequence[int], extent: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Return the widest spacing of a grid in the window, per axis, that shares no factor with the layer's stride.

    A grid of spacing d in a layer of stride s reads the pixels of a lattice of step gcd(d, s) only: 1/gcd(d, s)² of a
    two-dimensional map.

    Example:
        >>> widest_spacing((3, 3), (9, 9), (1, 1)), widest_spacing((3, 3), (9, 9), (2, 2))
        ((4, 4), (3, 3))
    """
    steps = zip(kernel_size, extent, stride, strict=True)
    return tuple(coprime((s - 1) // (k - 1), step) if k > 1 else 1 for k, s, step in steps)


def coprime(spacing: int, stride: int) -> int:
    """Return the largest integer up to ``spacing`` that shares no factor with ``stride``."""
    return next(d for d in range(spacing, 0, -1) if math.gcd(d, stride) == 1)


def require_groups(groups: int) -> None:
    """Raise ``ValueError`` unless ``groups`` is a positive integer."""
    require(isinstance(groups, int) and groups >= 1, "groups", "be a positive integer", groups)
