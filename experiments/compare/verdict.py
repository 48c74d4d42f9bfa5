"""From records to an answer: paired ratios of steps, differences of accuracy, ratios of ERF."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.harness.runs import Record
from experiments.harness.statistics import Estimate, paired_difference, paired_ratio

BASELINE = "he"


@dataclass(frozen=True)
class Row:
    """One arm, held against the baseline of the same seeds.

    Attributes:
        arm: its name.
        steps: median steps to the target; a run that never arrived counts as the longest training.
        missed: runs that never arrived.
        dead: runs after which no gradient reaches the input from the unit; they have no ERF.
        n: runs.
        steps_ratio: steps of this arm / steps of the baseline.
        accuracy: mean final accuracy, on the test images where the task has them.
        accuracy_difference: this arm − baseline, in percentage points.
        std_before, std_after: mean ERF std in pixels.
        std_ratio_before, std_ratio_after: ERF std of this arm / of the baseline.
    """

    arm: str
    steps: float
    missed: int
    dead: int
    n: int
    steps_ratio: Estimate | None
    accuracy: float
    accuracy_difference: Estimate | None
    std_before: float
    std_after: float
    std_ratio_before: Estimate | None
    std_ratio_after: Estimate | None


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

    def steps(self, arm: str) -> list[int]:
        """Return the steps to the target by seed; a run that never arrived counts as the longest training."""
        return [record["steps_to_target"] or self.longest for record in self.of(arm)]

    def accuracies(self, arm: str) -> list[float]:
        """Return the final accuracy by seed: on the test images where there are some."""
        kind = "accuracy" if self.records[0]["test_accuracy"] is None else "test_accuracy"
        return [record[kind] for record in self.of(arm)]

    def stds(self, arm: str, when: str) -> list[float]:
        """Return the ERF std by seed, ``when`` = before or after training; NaN where the unit is dead."""
        erfs = [record[f"erf_{when}"] for record in self.of(arm)]
        return [math.nan if erf is None else erf["std"] for erf in erfs]

    @cached_property
    def rows(self) -> list[Row]:
        """One row an arm."""
        return [self._row(arm) for arm in self.arms]

    def _row(self, arm: str) -> Row:
        base, same = self.baseline, arm == self.baseline
        points = [100 * a for a in self.accuracies(arm)], [100 * a for a in self.accuracies(base)]
        return Row(
            arm=arm,
            steps=float(np.median(self.steps(arm))),
            missed=sum(record["steps_to_target"] is None for record in self.of(arm)),
            dead=sum(record["erf_after"] is None for record in self.of(arm)),
            n=len(self.of(arm)),
            steps_ratio=None if same else paired_ratio(self.steps(arm), self.steps(base)),
            accuracy=float(np.mean(self.accuracies(arm))),
            accuracy_difference=None if same else paired_difference(*points),
            std_before=_mean(self.stds(arm, "before")),
            std_after=_mean(self.stds(arm, "after")),
            std_ratio_before=None if same else paired_ratio(self.stds(arm, "before"), self.stds(base, "before")),
            std_ratio_after=None if same else paired_ratio(self.stds(arm, "after"), self.stds(base, "after")),
        )

    @cached_property
    def sentence(self) -> str:
        """The answer: steps to the target against the baseline, with their intervals."""
        tried = [row for row in self.rows if row.arm in ("widened-0.5", "sparse")]
        shown = tried or [row for row in self.rows if row.arm != self.baseline]
        says = "; ".join(self._clause(row) for row in shown) or f"only {self.baseline} was trained: nothing to compare"
        missed = [f"{row.missed} of {row.n} {row.arm} runs" for row in self.rows if row.missed]
        note = f" Never at the target, and counted as {self.longest} steps: {', '.join(missed)}." if missed else ""
        dead = [f"{row.dead} of {row.n} {row.arm} runs" for row in self.rows if row.dead]
        note += f" Dead after training (no gradient from the unit): {', '.join(dead)}." if dead else ""
        return f"To {self.target:.0%} on {self.records[0]['task']}: {says}.{note}"

    def _clause(self, row: Row) -> str:
        ratio = row.steps_ratio
        assert ratio is not None
        if all(not record["steps_to_target"] for arm in (row.arm, self.baseline) for record in self.of(arm)):
            return f"neither {row.arm} nor {self.baseline} ever arrived"
        if ratio.n < 2:
            return f"{row.arm} took {ratio.mean:.2f} × the steps of {self.baseline} (one seed: no interval)"
        word = (
            "fewer steps than" if ratio.high < 1 else "more steps than" if ratio.low > 1 else "no clear difference from"
        )
        return (
            f"{row.arm} took {ratio.mean:.2f} × the steps of {self.baseline} (95 % interval {ratio.low:.2f} to "
            f"{ratio.high:.2f}, {ratio.n} paired seeds: {word} {self.baseline})"
        )

    @cached_property
    def table(self) -> str:
        """The rows as plain text."""
        head = ("arm", "steps", "× baseline", "accuracy", "difference, points", "ERF std before", "after")
        lines = [head, *(cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _mean(values: Sequence[float]) -> float:
    there = [value for value in values if not math.isnan(value)]
    return statistics.fmean(there) if there else math.nan


def cells(row: Row) -> tuple[str, ...]:
    """Write a row of the table as text."""
    ratio = (
        f"{row.steps_ratio.mean:.2f} ({row.steps_ratio.low:.2f}–{row.steps_ratio.high:.2f})" if row.steps_ratio else "1"
    )
    gap = row.accuracy_difference
    difference = f"{gap.mean:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})" if gap else "0"
    steps = f"{row.steps:.0f}" + (f" ({row.missed} of {row.n} never)" if row.missed else "")
    stds = f"{row.std_before:.2f}", f"{row.std_after:.2f}"
    return row.arm, steps, ratio, f"{row.accuracy:.1%}", difference, *stds
