"""The harness judges itself: does the test reject where there is nothing, and find what was put in?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.harness.statistics import geometric_ratio, sign_flip


@dataclass(frozen=True)
class Judgement:
    """Of many series of pairs that were made from one arm's own runs.

    Attributes:
        false_alarms: share of series without a difference that the test rejects at 5 %; should be .05.
        covered: share of series with an injected ratio whose interval holds it; should be .95.
        found: share of those series that the test rejects (its power at this n).
    """

    false_alarms: float
    covered: float
    found: float


def judge(steps: Sequence[float], injected: float, n: int, series: int, seed: int = 0) -> Judgement:
    """Hold an arm against itself.

    Each series draws 2n of the arm's runs with replacement and pairs them at random, so that there is nothing to be
    found; then one side is multiplied by ``injected``. Runs paired at random differ more than runs of one seed do:
    real pairs find more.

    Example:
        >>> judgement = judge([100.0, 110.0, 120.0, 90.0, 105.0], 0.5, n=12, series=20)
        >>> judgement.covered >= 0.8, judgement.found
        (True, 1.0)
    """
    rng = np.random.default_rng(seed)
    alarms = covered = found = 0
    for number in range(series):
        one, other = rng.choice(np.asarray(steps, dtype=float), (2, n))
        alarms += sign_flip(np.log(one).tolist(), np.log(other).tolist(), 999, number) < 0.05
        changed = injected * one
        interval = geometric_ratio(changed.tolist(), other.tolist(), 999, number)
        covered += interval.low <= injected <= interval.high
        found += sign_flip(np.log(changed).tolist(), np.log(other).tolist(), 999, number) < 0.05
    return Judgement(alarms / series, covered / series, found / series)
