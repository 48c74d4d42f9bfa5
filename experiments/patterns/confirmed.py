"""What the rows of the pattern study hold, setting by setting: pairs, the best of the tuned grids, regrets.

The rows are those that ``python -m experiments.gpu evidence`` writes for the settings of
:mod:`experiments.patterns.settings`. Nothing here looks at test scores to choose what they are compared with: the best
grid of a setting is the one with the best mean score on held-out images over the confirmed seeds.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.harness.ledger import Ledger
from experiments.harness.runs import Record
from experiments.harness.statistics import Estimate, holm, paired_difference, sign_flip
from experiments.patterns import settings

ROLES = ("grid, growing", "grid, second", "grid, third")
BEST = "best of the three grids"
ENOUGH = 6  # pairs: with fewer no sign-flip p is below .05
Scores = dict[str, dict[int, float]]
Array = npt.NDArray[np.float64]


def read(paths: Iterable[Path]) -> list[Record]:
    """Return the rows of the pattern study in these files, with ``setting`` and the bare ``arm``; others are not read.

    Raises:
        OSError: a file is not there.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no file {path}")
        for row in Ledger(path, ("run", "arm", "seed")).rows():
            setting, _, arm = str(row["arm"]).partition(": ")
            if setting in settings.SETTINGS and row.get("phase") in ("choose", "confirm", "cost"):
                found.append(row | {"setting": setting, "arm": arm, "file": path.name})
    return found


@dataclass(frozen=True)
class Comparison:
    """An arm against the best grid, in points, over the seeds that both have.

    Attributes:
        test, held_out: arm − best grid, with 95 % t-intervals.
        p: sign-flip of the test differences, after Holm over the arms of the setting.
    """

    test: Estimate
    held_out: Estimate
    p: float

    @property
    def clear(self) -> int:
        """1 if the arm is ahead, −1 if it is behind, beyond chance: interval clear of 0 and p < .05; else 0."""
        if self.p >= 0.05 or self.test.low <= 0 <= self.test.high:
            return 0
        return 1 if self.test.mean > 0 else -1


@dataclass(frozen=True)
class Confirmed:
    """The rows of one setting.

    Attributes:
        name: of the setting.
        test, held_out: from an arm to its scores by seed, in percent; confirmed seeds only. A run whose loss became no
            number has 0 on held-out images.
        rates: of each arm's confirmed runs.
        tuning: from (arm, rate) to the held-out scores, by seed, of the runs that choose the rate.
        seconds: a step of each arm that has the device to itself.
        diverged: confirmed runs whose loss became no number, by arm.
        devices: on which each confirmed seed was trained.
        clock: the device of ``seconds``.
        protocol: hash of the settings of these rows.
        aside: rows of other protocols.
    """

    name: str
    test: Scores
    held_out: Scores
    rates: dict[str, set[float]]
    tuning: dict[tuple[str, float], dict[int, float]]
    seconds: dict[str, float]
    diverged: Counter[str]
    devices: dict[int, str]
    clock: str
    protocol: str
    aside: int

    @property
    def arms(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys([*self.test, *(arm for arm, _ in self.tuning)]))

    @property
    def depthwise(self) -> bool:
        """Whether the layers that differ are depthwise ones."""
        return settings.SETTINGS[self.name].kernel > 3

    @property
    def grids(self) -> list[str]:
        """Names of the arms on grids, the growing one first; dense is none."""
        return [arm for arm in self.arms if arm.startswith("grid ")]

    @cached_property
    def seeds(self) -> list[int]:
        """Confirmed seeds that every arm has."""
        return sorted(set.intersection(*map(set, self.test.values()))) if self.test else []

    @property
    def enough(self) -> bool:
        """Whether there are as many seeds as a verdict needs, and a grid among the arms."""
        return len(self.seeds) >= ENOUGH and self.best_grid is not None

    @cached_property
    def tuned(self) -> dict[str, float]:
        """The held-out score of each arm at its best rate, over the choosing seeds that all arms have at all rates."""
        shared = set.intersection(*map(set, self.tuning.values())) if self.tuning else set()
        best: dict[str, float] = {}
        for (arm, _), scores in self.tuning.items() if shared else ():
            mean = float(np.mean([scores[seed] for seed in shared]))
            best[arm] = max(mean, best.get(arm, -math.inf))
        return best

    @cached_property
    def best_grid(self) -> str | None:
        """The grid with the best mean score on held-out images over the seeds that all arms have."""
        there = [grid for grid in self.grids if grid in self.test]
        if not there or not self.seeds:
            return None
        return max(there, key=lambda grid: float(np.mean([self.held_out[grid][seed] for seed in self.seeds])))

    def role(self, arm: str) -> str:
        """Return what an arm is called in every setting: grids by their place among the three."""
        return ROLES[self.grids.index(arm)] if arm in self.grids else arm

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Every other arm against the best grid."""
        base = self.best_grid
        if base is None:
            return {}
        pairs, p_values = {}, []
        for arm in self.test:
            if arm == base:
                continue
            seeds = [seed for seed in self.test[arm] if seed in self.test[base]]
            test, held_out = ([[of[key][s] for s in seeds] for key in (arm, base)] for of in (self.test, self.held_out))
            pairs[arm] = paired_difference(*test), paired_difference(*held_out)
            p_values.append(sign_flip(test[0], test[1]))
        return {arm: Comparison(*pairs[arm], p) for arm, p in zip(pairs, holm(p_values), strict=True)}

    def table(self) -> tuple[list[str], Array]:
        """Return the arms by role, the best grid once more as such, and their test scores (arms, seeds)."""
        names = [self.role(arm) for arm in self.test]
        rows = [[scores[seed] for seed in self.seeds] for scores in self.test.values()]
        if self.best_grid is not None:
            names.append(BEST)
            rows.append([self.test[self.best_grid][seed] for seed in self.seeds])
        return names, np.array(rows, dtype=float)


def _held_out(row: Record) -> float:
    return float(row["curve"][-1]) if row["outcome"] == "budget" else 0.0


def gather(rows: Sequence[Record]) -> dict[str, Confirmed]:
    """Sort rows by setting. Rows of other protocols than that of most are put aside, and counted.

    Where two files have the same seed, the file with more confirmed rows counts: the runs of a pair are of one device.
    """
    found = {}
    for name in settings.SETTINGS:
        mine = [row for row in rows if row["setting"] == name]
        if mine:
            found[name] = _gather(name, mine)
    return found


def _gather(name: str, rows: Sequence[Record]) -> Confirmed:
    protocols = Counter(row["protocol"] for row in rows)
    confirmed = Counter(row["protocol"] for row in rows if row["phase"] == "confirm")
    protocol = max(protocols, key=lambda each: (confirmed[each], protocols[each]))
    kept = [row for row in rows if row["protocol"] == protocol]
    files = Counter(row["file"] for row in kept if row["phase"] == "confirm")
    owner: dict[int, Record] = {}
    runs = []
    for row in sorted(kept, key=lambda row: -files[row["file"]]):  # stable
        if row["phase"] == "confirm" and owner.setdefault(row["seed"], row)["file"] == row["file"]:
            runs.append(row)
    devices = {seed: row["device"] for seed, row in owner.items()}
    test: Scores = defaultdict(dict)
    held_out: Scores = defaultdict(dict)
    rates: dict[str, set[float]] = defaultdict(set)
    tuning: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    for row in runs:
        test[row["arm"]][row["seed"]], held_out[row["arm"]][row["seed"]] = row["score"], _held_out(row)
        rates[row["arm"]].add(row["rate"])
    for row in kept:
        if row["phase"] == "choose":
            tuning[row["arm"], row["rate"]][row["seed"]] = _held_out(row)
    diverged = Counter(row["arm"] for row in runs if row["outcome"] != "budget")
    clock, seconds = _costs(kept, Counter(devices.values()))
    return Confirmed(
        name, test, held_out, rates, tuning, seconds, diverged, devices, clock, protocol, len(rows) - len(kept)
    )


def _costs(rows: Sequence[Record], trained: Counter[str]) -> tuple[str, dict[str, float]]:
    """Return the seconds of a step of each arm on one device: where most was trained, then where most was timed."""
    clocks: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["phase"] == "cost" and row["seconds"]["step"] is not None:
            clocks[row["device"]][row["arm"]] = row["seconds"]["step"]
    clock = max(clocks, key=lambda device: (trained[device], len(clocks[device])), default="")
    return clock, clocks.get(clock, {})


@dataclass(frozen=True)
class Regret:
    """What is lost by an arm, at worst over settings.

    Attributes:
        by: from a setting to the best arm's mean test score − this one's, in points.
        worst: the largest of them, with the 95 % percentile interval over resampled seeds.
        least: share of the resamplings in which no other arm of its kind (grids one by one, patterns) has a smaller
            worst regret.
        everywhere: whether the arm is in every setting.
    """

    by: dict[str, float]
    worst: Estimate
    least: float
    everywhere: bool


def kind_of(role: str) -> str:
    """Return pattern, grid or dense, or for the best of the grids its own name."""
    return "grid" if role in ROLES else role if role in ("dense", BEST) else "pattern"


def regrets(found: Sequence[Confirmed], resamplings: int = 2000, seed: int = 0) -> dict[str, Regret]:
    """Return the regret of every arm over the settings that have enough seeds which all their arms share.

    Seeds are resampled within each setting, all arms together. The best arm of a setting is the best of all, dense and
    grids too; it is taken anew in each resampling.
    """
    held = {one.name: one.table() for one in found if one.enough}
    generator = np.random.default_rng(seed)
    by: dict[str, dict[str, float]] = defaultdict(dict)
    worst: dict[str, Array] = {}
    for name, (roles, scores) in held.items():
        drawn = generator.integers(scores.shape[1], size=(resamplings, scores.shape[1]))
        means = np.concatenate([scores.mean(1)[:, None], scores[:, drawn].mean(2)], axis=1)
        lost = means.max(0) - means
        for role, row in zip(roles, lost, strict=True):
            by[role][name] = float(row[0])
            worst[role] = np.maximum(worst[role], row) if role in worst else row
    everywhere = {role for role in by if len(by[role]) == len(held)}
    made = {}
    for role, values in worst.items():
        rivals = [worst[r] for r in everywhere if kind_of(r) == kind_of(role)]
        least = float((values[1:] <= np.min(rivals, 0)[1:]).mean()) if role in everywhere else math.nan
        low, high = np.percentile(values[1:], [2.5, 97.5]).tolist()
        n = min(held[name][1].shape[1] for name in by[role])
        made[role] = Regret(by[role], Estimate(float(values[0]), low, high, n), least, role in everywhere)
    return made
