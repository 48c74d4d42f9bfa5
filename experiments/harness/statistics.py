"""Estimates over pairs of runs that share their seed, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over n pairs."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def paired_difference(new: Sequence[float], old: Sequence[float]) -> Estimate:
    """Mean of new − old over pairs with its 95 % t-interval; a pair with a NaN is left out.

    Example:
        >>> print(paired_difference([2.0, 3.0, 4.0], [1.0, 2.0, 2.5]))
        1.17 (0.45 to 1.88)
    """
    difference = np.asarray(new, dtype=float) - np.asarray(old, dtype=float)
    difference = difference[~np.isnan(difference)]
    mean = float(difference.mean()) if len(difference) else math.nan
    if len(difference) < 2:
        return Estimate(mean, -math.inf, math.inf, len(difference))
    half = float(stats.sem(difference) * stats.t.ppf(0.975, len(difference) - 1))
    return Estimate(mean, mean - half, mean + half, len(difference))


def paired_ratio(new: Sequence[float], old: Sequence[float]) -> Estimate:
    """Geometric mean of new / old over pairs with its 95 % t-interval on the log scale.

    Example:
        >>> print(paired_ratio([50.0, 60.0, 40.0], [100.0, 100.0, 100.0]))
        0.493 (0.298 to 0.817)
    """
    log = paired_difference(np.log(np.asarray(new, dtype=float)), np.log(np.asarray(old, dtype=float)))
    with np.errstate(over="ignore"):
        low, mean, high = np.exp([log.low, log.mean, log.high]).tolist()
    return Estimate(mean, low, high, log.n)


def restricted_mean(steps: Sequence[float | None], longest: float) -> float:
    """Area under the Kaplan–Meier curve up to ``longest``; None is a run that had not arrived by then.

    Where every miss is censored at ``longest`` itself it is the mean of min(steps, longest).

    Example:
        >>> restricted_mean([100.0, 300.0, None], 800)
        400.0
    """
    return math.fsum(longest if step is None else min(step, longest) for step in steps) / len(steps)
