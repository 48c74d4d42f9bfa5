"""Estimates over pairs of runs that share their seed, with their intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
RESAMPLINGS = 9999


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


def geometric_ratio(
    new: Sequence[float], old: Sequence[float], resamplings: int = RESAMPLINGS, seed: int = 0
) -> Estimate:
    """Geometric mean of new / old over pairs with its 95 % BCa bootstrap interval (Efron 1987).

    Unlike the t-interval of :func:`paired_ratio` it assumes no law of the log ratios. Pairs that all agree have no
    spread: the interval is the point.

    Example:
        >>> print(geometric_ratio([50.0, 60.0, 40.0, 70.0], [100.0] * 4))
        0.538 (0.423 to 0.648)
    """
    log = np.log(np.asarray(new, dtype=float)) - np.log(np.asarray(old, dtype=float))
    n = len(log)
    mean = float(np.exp(log.mean())) if n else math.nan
    if n < 2:
        return Estimate(mean, 0.0, math.inf, n)
    return Estimate(mean, *_bca((log,), lambda x, axis: np.exp(x.mean(axis)), mean, resamplings, seed), n)


def restricted_ratio(
    new: Sequence[float | None],
    old: Sequence[float | None],
    longest: float,
    resamplings: int = RESAMPLINGS,
    seed: int = 0,
) -> Estimate:
    """Ratio of the restricted means of two arms with its 95 % BCa interval over pairs; None is a miss at ``longest``.

    Example:
        >>> print(restricted_ratio([100.0, 200.0, 300.0, 200.0], [300.0, None, 500.0, 400.0], 800))
        0.4 (0.259 to 0.556)
    """
    pair = _restricted(new, longest), _restricted(old, longest)
    ratio = float(pair[0].mean() / pair[1].mean())
    if len(pair[0]) < 2:
        return Estimate(ratio, 0.0, math.inf, len(pair[0]))
    limits = _bca(pair, lambda x, y, axis: x.mean(axis) / y.mean(axis), ratio, resamplings, seed)
    return Estimate(ratio, *limits, len(pair[0]))


def _bca(
    data: tuple[Array, ...], statistic: Callable[..., Array], value: float, resamplings: int, seed: int
) -> tuple[float, float]:
    if all(np.ptp(each) == 0 for each in data) or (len(data) == 2 and np.array_equal(*data)):
        return value, value
    with warnings.catch_warnings():  # a degenerate bootstrap warns and returns NaN
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            data, statistic, paired=True, vectorized=True, n_resamples=resamplings, method="BCa",
            random_state=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    # BCa has no interval where all resamplings agree but for one pair or so: nothing is known then.
    return (float(found.low), float(found.high)) if np.isfinite([*found]).all() else (0.0, math.inf)


def _restricted(steps: Sequence[float | None], longest: float) -> Array:
    return np.array([longest if step is None else min(step, longest) for step in steps], dtype=float)


def sign_flip(new: Sequence[float], old: Sequence[float], resamplings: int = RESAMPLINGS, seed: int = 0) -> float:
    """Two-sided p of the mean of new − old over pairs under random signs, exact up to ``resamplings`` sign patterns.

    Example:
        >>> sign_flip([1.0, 2.0, 3.0, 4.0, 5.0], [0.0] * 5)  # the least that five pairs can give
        0.0625
    """
    if len(new) < 2:
        return 1.0
    pair = np.asarray(new, dtype=float), np.asarray(old, dtype=float)
    found = stats.permutation_test(
        pair, lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True,
        n_resamples=resamplings, random_state=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979): reject where the result is below the level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Survival:
    """Kaplan–Meier estimate: share of runs that have not arrived after ``steps[i]``; constant in between."""

    steps: Array
    share: Array

    def area(self, longest: float) -> float:
        """Return the restricted mean: the area under the curve up to ``longest``."""
        inside = self.steps < longest
        edges = np.concatenate([[0.0], self.steps[inside], [longest]])
        heights = np.concatenate([[1.0], self.share[inside]])
        return float(np.diff(edges) @ heights)


def survival(steps: Sequence[float | None], budgets: Sequence[float]) -> Survival:
    """Return the Kaplan–Meier curve of the steps to the target; None is a miss, censored at the budget of its run.

    Example:
        >>> curve = survival([100, 300, None, None], [800, 800, 200, 800])
        >>> curve.steps.tolist(), [round(share, 3) for share in curve.share.tolist()]
        ([100.0, 200.0, 300.0, 800.0], [0.75, 0.75, 0.375, 0.375])
    """
    times = [budget if step is None else step for step, budget in zip(steps, budgets, strict=True)]
    missed = [step is None for step in steps]
    curve = stats.ecdf(stats.CensoredData.right_censored(times, missed)).sf
    return Survival(np.asarray(curve.quantiles, dtype=float), np.asarray(curve.probabilities, dtype=float))


def restricted_mean(steps: Sequence[float | None], longest: float) -> float:
    """Area under the Kaplan–Meier curve up to ``longest``; None is a run that had not arrived by then.

    Example:
        >>> round(restricted_mean([100.0, 300.0, None], 800), 6)
        400.0
    """
    return survival(steps, [longest] * len(steps)).area(longest)


def smallest_budget(curves: Sequence[tuple[Sequence[int], Sequence[float]]], target: float, looks: int) -> int | None:
    """Return the first step at which the mean accuracy over the runs is at ``target`` for ``looks`` looks in a row.

    Args:
        curves: steps and accuracies of each run, at the same looks; a run that ended keeps its last accuracy.
        target: mean accuracy that is asked for.
        looks: how many looks in a row make a crossing.

    Returns:
        The step of the first of those looks; None if there is none.

    Example:
        >>> smallest_budget([([10, 20], [0.8, 0.9]), ([10, 20, 30], [0.8, 0.92, 0.93])], 0.9, looks=2)
        20
    """
    steps = max((each for each, _ in curves), key=len)
    table = np.array([[*accuracy, *[accuracy[-1]] * (len(steps) - len(accuracy))] for _, accuracy in curves])
    there = (table.mean(0) >= target).tolist()
    return next((steps[i] for i in range(len(there) - looks + 1) if all(there[i : i + looks])), None)
