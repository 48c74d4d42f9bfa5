"""Taps and where they lie: the integer geometry that every other module stands on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from widerf._checks import require

Size = int | Sequence[int]  # one number for all axes, or one for each


def ntuple(value: int | Sequence[int], rank: int, argument: str) -> tuple[int, ...]:
    """Return ``value`` as a tuple of ``rank`` integers; an integer stands for all axes.

    Raises:
        TypeError: if an entry is not an integer.
        ValueError: if the length is not ``rank``.

    Example:
        >>> ntuple(3, 2, "kernel_size")
        (3, 3)
    """
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    for entry in values:
        require(
            isinstance(entry, int) and not isinstance(entry, bool), argument, "hold integers only", value, TypeError
        )
    require(len(values) == rank, argument, f"be one integer or {rank}", value)
    return values


def tap_coordinates(kernel_size: Sequence[int]) -> Tensor:
    """Return the centred coordinate m of each tap of a kernel, in taps.

    Tap index t on an axis of length k lies at m = t − (k − 1)/2: an even kernel has its centre between two taps.

    Args:
        kernel_size: taps per axis, D of them.

    Returns:
        float64 tensor of shape ``(prod(kernel_size), D)``; row r belongs to the r-th tap in C order.

    Example:
        >>> tap_coordinates((3,)).squeeze(1).tolist()
        [-1.0, 0.0, 1.0]
    """
    axes = [[t - (k - 1) / 2 for t in range(k)] for k in kernel_size]
    return torch.tensor(list(itertools.product(*axes)), dtype=torch.float64)


class Moments(NamedTuple):
    """Mean and central moments of a distribution over the places 0, 1, 2, and so on; zero-dimensional tensors."""

    mean: Tensor
    variance: Tensor
    fourth: Tensor


def marginal(share: Tensor, axis: int) -> Tensor:
    """Return a map summed over all axes but one."""
    others = [a for a in range(share.ndim) if a != axis]
    return share.sum(others) if others else share


def moments(line: Tensor) -> Moments:
    """Return the moments of a line of shares that sum to 1; differentiable.

    Example:
        >>> [round(float(x), 6) for x in moments(torch.full((3,), 1 / 3, dtype=torch.float64))]
        [1.0, 0.666667, 0.666667]
    """
    at = torch.arange(len(line), dtype=line.dtype, device=line.device)
    mean = (line * at).sum()
    away = at - mean
    return Moments(mean, (line * away**2).sum(), (line * away**4).sum())


def mean_variance(energy: Tensor) -> Tensor:
    """Return the mean over axes of the variance of an energy map, on any scale, about its centroid; differentiable.

    Example:
        >>> float(mean_variance(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])))
        0.5
    """
    share = energy / energy.sum()
    return torch.stack([moments(marginal(share, axis)).variance for axis in range(energy.ndim)]).mean()
