"""Energy on the taps of a weight, and how far out it lies."""

from __future__ import annotations

import functools
import math
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from widerf.geometry import tap_coordinates

Array: TypeAlias = NDArray[np.float64]


_CHUNK = 1 << 19  # weights that are squared at a time: they stay in the cache, and no second copy of a layer is made


def sum_of_squares(weight: Tensor, taps: int) -> Tensor:
    """Return Σ |w|² over all but the last ``taps`` entries of each row, float64 on the CPU."""
    matrix = weight.reshape(-1, math.prod(weight.shape[1:])) if weight.is_contiguous() else weight.flatten(1)
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        total += _energy_of_columns(matrix[start : start + step])
    return total.view(-1, taps).sum(0)


def _energy_of_columns(rows: Tensor) -> Tensor:
    """Return Σ |w|² of each column of a matrix, float64 on the CPU."""
    if rows.is_complex():
        return torch.view_as_real(rows).square().sum((0, 2)).double().cpu()
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    if rows.device.type == "cpu":  # NumPy multiplies and adds in one pass; PyTorch writes the squares out first
        array = rows.numpy()
        return torch.from_numpy(np.einsum("ij,ij->j", array, array)).double()
    return rows.square().sum(0).double().cpu()


def variances(places: Array, energy: Array) -> Array:
    """Return the variance of taps' energies along each axis, about their centroid; NaN without energy."""
    total = energy.sum()
    share = energy / total if 0 < total < np.inf else np.full_like(energy, np.nan)
    return np.asarray(share @ np.square(places - share @ places))


@functools.lru_cache(maxsize=256)
def tap_places(size: tuple[int, ...]) -> Array:
    """Return the centred coordinates of a kernel's taps, (taps, D); shared, and nobody writes to it."""
    return np.asarray(tap_coordinates(size).numpy(), dtype=np.float64)
