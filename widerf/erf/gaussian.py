"""The Gaussian nearest to a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from widerf._checks import require


@dataclass(frozen=True)
class GaussianFit:
    """Least-squares fit of a Gaussian with axis-parallel axes to the energy map.

    Attributes:
        sigma: standard deviation per axis, input pixels.
        mean: centre per axis, input pixels.
        r2: share of the map's variance over pixels that the fit explains.
    """

    sigma: tuple[float, ...]
    mean: tuple[float, ...]
    r2: float


def fit_gaussian(energy: Any, mean: Sequence[float], std: Sequence[float]) -> GaussianFit:
    """Fit a Gaussian with axis-parallel axes to a map by least squares over its pixels.

    Args:
        energy: NumPy array with 1 to 3 axes.
        mean: where the search starts, per axis.
        std: standard deviations at which it starts, per axis.

    Raises:
        ValueError: if the map has fewer pixels than the fit has parameters.

    Example:
        >>> at = np.arange(21.0)
        >>> bell = np.exp(-0.5 * ((at - 10) / 2) ** 2)
        >>> round(fit_gaussian(bell, [9.0], [3.0]).sigma[0], 6)
        2.0
    """
    from scipy.optimize import least_squares

    rank = energy.ndim
    require(energy.size > 2 * rank + 1, "map", f"have more than {2 * rank + 1} pixels for a Gaussian fit", energy.size)
    axes = [np.arange(n, dtype=np.float64) for n in energy.shape]
    scale = energy.max()

    def shape_of(parameters: Any) -> Any:
        bell = np.ones((1,) * rank)
        for axis, at in enumerate(axes):
            z = (at - parameters[axis]) / np.exp(parameters[rank + axis])
            bell = bell * np.exp(-0.5 * z**2).reshape([-1 if a == axis else 1 for a in range(rank)])
        return bell

    def residual(parameters: Any) -> Any:
        # The height enters linearly: its best value for these parameters is put in (variable projection).
        bell = shape_of(parameters)
        height = (bell * energy).sum() / max((bell**2).sum(), 1e-300)
        return ((height * bell - energy) / scale).ravel()

    start = [*mean, *(math.log(max(s, 0.5)) for s in std)]
    bounds = ([-1.0] * rank + [math.log(0.1)] * rank, [*energy.shape] + [math.log(10 * n + 1) for n in energy.shape])
    best = least_squares(residual, start, bounds=bounds)
    spread = ((energy - energy.mean()) ** 2).sum() / scale**2
    r2 = 1 - 2 * best.cost / spread if spread > 0 else 0.0
    return GaussianFit(tuple(np.exp(best.x[rank:]).tolist()), tuple(best.x[:rank].tolist()), float(r2))
