"""The statistics of the protocol against slow twins, and the harness as its own judge."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.harness.judge import judge
from experiments.harness.ledger import RESULTS
from experiments.harness.statistics import (
    geometric_ratio,
    holm,
    restricted_mean,
    restricted_ratio,
    sign_flip,
    smallest_budget,
    survival,
)

BUDGET = 50


def product_limit(steps: list[int | None], budgets: list[int]) -> dict[int, float]:
    """Kaplan and Meier's estimate as they wrote it down: a product over the times at which a run arrived."""
    share, curve = 1.0, {}
    times = [budget if step is None else step for step, budget in zip(steps, budgets, strict=True)]
    for time in sorted(set(times)):
        at_risk = sum(other >= time for other in times)
        arrived = sum(step is not None and step == time for step in steps)
        share *= 1 - arrived / at_risk
        curve[time] = share
    return curve


runs = st.lists(st.tuples(st.none() | st.integers(1, BUDGET), st.integers(1, BUDGET)), min_size=1, max_size=30)


@settings(deadline=None)
@given(runs)
def test_kaplan_meier_agrees_with_the_product_limit_written_out(pairs: list[tuple[int | None, int]]) -> None:
    steps, budgets = [step for step, _ in pairs], [budget for _, budget in pairs]
    curve, twin = survival(steps, budgets), product_limit(steps, budgets)
    assert curve.steps.tolist() == list(twin)
    np.testing.assert_allclose(curve.share, list(twin.values()), atol=1e-12)
    fine = [
        twin[max((t for t in twin if t <= step), default=-1)] if min(twin) <= step else 1.0 for step in range(BUDGET)
    ]
    assert curve.area(BUDGET) == pytest.approx(math.fsum(fine))


@settings(deadline=None)
@given(st.lists(st.none() | st.integers(1, BUDGET), min_size=1, max_size=30))
def test_with_one_budget_the_restricted_mean_is_the_mean_of_what_was_used(steps: list[int | None]) -> None:
    used = [BUDGET if step is None else step for step in steps]
    assert restricted_mean(steps, BUDGET) == pytest.approx(sum(used) / len(used))


def test_sign_flips_of_few_pairs_are_counted_out() -> None:
    rng = np.random.default_rng(0)
    new, old = rng.normal(0.4, 1, 9), rng.normal(0, 1, 9)
    difference = new - old
    flips = np.array(list(itertools.product((1, -1), repeat=9))) @ difference
    assert sign_flip(new.tolist(), old.tolist()) == pytest.approx((abs(flips) >= abs(difference.sum()) - 1e-12).mean())


def test_holm_is_the_largest_of_the_steps_down() -> None:
    p = [0.001, 0.2, 0.012, 0.04, 0.04]
    adjusted = holm(p)
    for value, mine in zip(p, adjusted, strict=True):
        steps = [min(1, sum(other >= smaller for other in p) * smaller) for smaller in p if smaller <= value]
        assert mine == pytest.approx(max(steps))
    assert holm([]) == []


def test_the_bca_interval_covers_a_skewed_ratio() -> None:
    """Log ratios from an exponential law, 20 pairs; the nominal share is 95 %."""
    rng = np.random.default_rng(2)
    hits = 0
    for number in range(300):
        logs = rng.exponential(0.4, 20) - 0.4 + math.log(0.7)
        found = geometric_ratio(np.exp(logs).tolist(), [1.0] * 20, resamplings=499, seed=number)
        hits += found.low <= 0.7 <= found.high
    assert 0.88 <= hits / 300 <= 0.98


def test_ratios_without_spread_or_pairs_claim_nothing_more() -> None:
    equal = geometric_ratio([5.0] * 4, [10.0] * 4)
    assert (equal.low, equal.high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert geometric_ratio([5.0], [10.0]).high == math.inf
    assert restricted_ratio([5, None], [5, None], 9).high == 1
    assert sign_flip([1.0], [0.0]) == 1


def test_one_look_at_the_target_is_no_budget() -> None:
    steps = [10, 20, 30, 40]
    assert smallest_budget([(steps, [0.95, 0.5, 0.95, 0.95])], 0.9, looks=2) == 30
    assert smallest_budget([(steps, [0.95, 0.5, 0.95, 0.5])], 0.9, looks=2) is None
    assert smallest_budget([(steps[:2], [0.9, 0.9]), (steps, [0.8, 0.8, 0.9, 0.9])], 0.9, looks=2) == 30


def test_the_harness_rejects_nothing_where_there_is_nothing_and_finds_what_was_put_in() -> None:
    """He's own runs of the far-pair map, held against themselves in 400 series."""
    rows = map(json.loads, (RESULTS / "study-far-pair.jsonl").read_text().splitlines())
    he = [
        row["steps_to_target"]
        for row in rows
        if row["part"] == "confirm" and (row["arm"], row["depth"], row["radius"]) == ("he", 6, 4)
    ]
    assert len(he) >= 20
    assert None not in he
    judgement = judge(he, injected=0.9, n=24, series=400)
    assert 0.02 <= judgement.false_alarms <= 0.08
    assert judgement.covered >= 0.9
