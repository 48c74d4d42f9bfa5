"""From records to an answer: restricted means of steps, smallest budgets, differences of accuracy, ratios of ERF."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from experiments.compare.curve import DIVERGED, LOOKS
from experiments.harness.runs import Record
from experiments.harness.statistics import (
    Estimate,
    geometric_ratio,
    holm,
    paired_difference,
    paired_ratio,
    restricted_ratio,
    sign_flip,
    smallest_budget,
)

BASELINE = "he"
LEVEL = 0.05


@dataclass(frozen=True)
class Row:
    """One arm, held against the baseline of the same seeds; what compares is None in the baseline's own row.

    Attributes:
        arm: its name.
        budget: the smallest budget, in steps, whose mean accuracy over the seeds is at the target; None: there is none.
        steps: median steps to the target; a run that never arrived counts as the longest training.
        missed: runs that never arrived, diverged ones among them.
        diverged: runs whose loss became no number.
        dead: runs after which no gradient reaches the input from the unit; they have no ERF.
        n: runs.
        steps_ratio: restricted mean of the steps / the baseline's, with its BCa interval.
        arrived_ratio: geometric mean of steps / the baseline's over the pairs in which both arrived.
        p, p_adjusted: sign-flip of the log ratios, and the same after Holm over the arms.
        seconds_ratio: ``steps_ratio`` × the seconds of a step / the baseline's; None where they were not recorded.
        accuracy: mean final accuracy, on the test images where the task has them.
        accuracy_difference: this arm − baseline, in percentage points.
        std_before, std_after: mean ERF std in pixels.
        std_ratio_before, std_ratio_after: ERF std of this arm / of the baseline.
    """

    arm: str
    budget: int | None
    steps: float
    missed: int
    diverged: int
    dead: int
    n: int
    steps_ratio: Estimate | None
    arrived_ratio: Estimate | None
    p: float | None
    p_adjusted: float | None
    seconds_ratio: Estimate | None
    accuracy: float
    accuracy_difference: Estimate | None
    std_before: float
    std_after: float
    std_ratio_before: Estimate | None
    std_ratio_after: Estimate | None

    @property
    def clear(self) -> bool:
        """Whether the steps differ from the baseline's beyond chance: interval clear of 1, p after Holm below 5 %."""
        ratio, p = self.steps_ratio, self.p_adjusted
        return ratio is not None and p is not None and p < LEVEL and (ratio.high < 1 or ratio.low > 1)


@dataclass(frozen=True)
class Verdict:
    """What a series of runs says.

    Attributes:
        records: one a run.
        target: validation accuracy that counts as learnt.
        longest: steps of the longest training.
        baseline: arm that the others are held against; the first one if ``he`` was not trained.
    """

    records: Sequence[Record]
    target: float
    longest: int

    @cached_property
    def arms(self) -> list[str]:
        """Names of the arms, in the order in which they were asked for."""
        return list(dict.fromkeys(record["arm"] for record in self.records))

    @cached_property
    def baseline(self) -> str:
        """The arm that the others are held against."""
        return BASELINE if BASELINE in self.arms else self.arms[0]

    def of(self, arm: str) -> list[Record]:
        """Return the records of one arm, by seed."""
        return sorted((record for record in self.records if record["arm"] == arm), key=lambda record: record["seed"])

    def pairs(self, arm: str) -> tuple[list[Record], list[Record]]:
        """Return the records of the arm and of the baseline over the seeds that both have."""
        base = {record["seed"]: record for record in self.of(self.baseline)}
        shared = [record for record in self.of(arm) if record["seed"] in base]
        return shared, [base[record["seed"]] for record in shared]

    def steps(self, arm: str) -> list[int]:
        """Return the steps to the target by seed; a run that never arrived counts as the longest training."""
        return [_capped(record, self.longest) for record in self.of(arm)]

    def accuracy(self, record: Record) -> float:
        """Return the final accuracy in percent: on the test images where there are some."""
        test: float | None = record.get("test_accuracy")
        return 100 * (record["accuracy"] if test is None else test)

    @cached_property
    def rows(self) -> list[Row]:
        """One row an arm."""
        rows = [self._row(arm) for arm in self.arms]
        others = [row for row in rows if row.p is not None]
        adjusted = dict(zip([row.arm for row in others], holm([row.p or 0.0 for row in others]), strict=True))
        return [replace(row, p_adjusted=adjusted.get(row.arm)) for row in rows]

    def _row(self, arm: str) -> Row:
        records, (new, old) = self.of(arm), self.pairs(arm)
        plain = Row(
            arm=arm,
            budget=self._budget(arm),
            steps=float(np.median(self.steps(arm))),
            missed=sum(record["steps_to_target"] is None for record in records),
            diverged=sum(record.get("outcome") == DIVERGED for record in records),
            dead=sum(record["erf_after"] is None and record.get("outcome") != DIVERGED for record in records),
            n=len(records),
            accuracy=statistics.fmean(map(self.accuracy, records)),
            std_before=_mean([_std(record, "before") for record in records]),
            std_after=_mean([_std(record, "after") for record in records]),
            **dict.fromkeys(
                ("steps_ratio", "arrived_ratio", "p", "p_adjusted", "seconds_ratio", "accuracy_difference",
                 "std_ratio_before", "std_ratio_after")
            ),
        )  # fmt: skip
        return plain if arm == self.baseline or not new else replace(plain, **self._compared(new, old))

    def _compared(self, new: list[Record], old: list[Record]) -> dict[str, object]:
        """Return what a row says about pairs of runs."""
        steps = [[record["steps_to_target"] for record in side] for side in (new, old)]
        both = [(a, b) for a, b in zip(*steps, strict=True) if a is not None and b is not None]
        logs = [[math.log(_capped(record, self.longest)) for record in side] for side in (new, old)]
        ratio = restricted_ratio(steps[0], steps[1], self.longest)
        return {
            "steps_ratio": ratio,
            "arrived_ratio": geometric_ratio([a for a, _ in both], [b for _, b in both]) if both else None,
            "p": sign_flip(*logs),
            "seconds_ratio": _in_seconds(ratio, new, old),
            "accuracy_difference": paired_difference(
                [self.accuracy(record) for record in new], [self.accuracy(record) for record in old]
            ),
            **{
                f"std_ratio_{when}": paired_ratio([_std(r, when) for r in new], [_std(r, when) for r in old])
                for when in ("before", "after")
            },
        }

    def _budget(self, arm: str) -> int | None:
        curves = [record["curve"] for record in self.of(arm) if "curve" in record]
        if not curves:
            return None
        return smallest_budget([(looks(curve), curve["accuracy"]) for curve in curves], self.target, LOOKS)

    @cached_property
    def sentence(self) -> str:
        """The answer: steps to the target against the baseline, with their intervals."""
        tried = [row for row in self.rows if row.arm in ("widened-0.5", "sparse")]
        shown = tried or [row for row in self.rows if row.arm != self.baseline]
        says = "; ".join(self._clause(row) for row in shown) or f"only {self.baseline} was trained: nothing to compare"
        return f"To {self.target:.0%} on {self.records[0]['task']}: {says}.{self.notes}"

    @cached_property
    def headline(self) -> str:
        """The answer in one line: the first widened arm, else the first arm, with its interval."""
        others = [row for row in self.rows if row.arm != self.baseline]
        row = next((row for row in others if row.arm == "widened-0.5"), others[0] if others else None)
        if row is None or row.steps_ratio is None or row.missed == row.n == self._missed(self.baseline):
            return "No answer: " + (self._clause(row) if row else f"only {self.baseline} was trained")
        word = "Cannot tell" if not row.clear else "Yes, faster" if row.steps_ratio.high < 1 else "No, slower"
        ratio = row.steps_ratio
        return (
            f"{word}: {row.arm} reaches {self.target:.0%} in {ratio.mean:.2f} × the steps of {self.baseline} "
            f"({ratio.low:.2f} to {ratio.high:.2f}, {ratio.n} pairs)."
        )

    def _missed(self, arm: str) -> int:
        return sum(record["steps_to_target"] is None for record in self.of(arm))

    @cached_property
    def notes(self) -> str:
        """Which runs never arrived, diverged or died; empty if none did."""
        missed = [f"{row.missed} of {row.n} {row.arm} runs" for row in self.rows if row.missed]
        note = f" Never at the target, and counted as {self.longest} steps: {', '.join(missed)}." if missed else ""
        diverged = [f"{row.diverged} of {row.n} {row.arm} runs" for row in self.rows if row.diverged]
        note += f" Diverged (their loss is no number): {', '.join(diverged)}." if diverged else ""
        dead = [f"{row.dead} of {row.n} {row.arm} runs" for row in self.rows if row.dead]
        return note + (f" Dead after training (no gradient from the unit): {', '.join(dead)}." if dead else "")

    def _clause(self, row: Row) -> str:
        ratio = row.steps_ratio
        if ratio is None:
            return f"{row.arm} and {self.baseline} share no seed"
        if row.missed == row.n and self._missed(self.baseline) == len(self.of(self.baseline)):
            return f"neither {row.arm} nor {self.baseline} ever arrived"
        if ratio.n < 2:
            return f"{row.arm} took {ratio.mean:.2f} × the steps of {self.baseline} (one seed: no interval)"
        word = (
            "no clear difference from" if not row.clear else "fewer steps than" if ratio.high < 1 else "more steps than"
        )
        return (
            f"{row.arm} took {ratio.mean:.2f} × the steps of {self.baseline} (95 % interval {ratio.low:.2f} to "
            f"{ratio.high:.2f}, {ratio.n} paired seeds, p {row.p_adjusted:.2g} after Holm: {word} {self.baseline})"
        )


def looks(curve: Record) -> list[int]:
    """Return the steps at which a recorded curve was looked at: as they are, or ``every`` steps apart."""
    if "step" in curve:
        return list(curve["step"])
    return [curve["every"] * (i + 1) for i in range(len(curve["accuracy"]))]


def _capped(record: Record, longest: int) -> int:
    return longest if record["steps_to_target"] is None else record["steps_to_target"]


def _std(record: Record, when: str) -> float:
    erf = record[f"erf_{when}"]
    return math.nan if erf is None else erf["std"]


def _in_seconds(ratio: Estimate, new: list[Record], old: list[Record]) -> Estimate | None:
    """Return the ratio times what a step of the one costs over a step of the other (median over the runs)."""
    costs = []
    for side in (new, old):
        timed = [r["seconds"]["step"] for r in side if isinstance(r.get("seconds"), dict) and r["seconds"]["step"]]
        if not timed:
            return None
        costs.append(statistics.median(timed))
    scale = costs[0] / costs[1]
    return Estimate(ratio.mean * scale, ratio.low * scale, ratio.high * scale, ratio.n)


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return statistics.fmean(there) if there else math.nan
