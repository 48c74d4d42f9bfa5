"""Arms of one network on one task, trained side by side: rates are chosen on seeds of their own, then pairs confirm."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

import widerf
from experiments.gpu.evidence_training import Pictures, Plan, seconds_a_step, train
from experiments.harness.runs import Record
from widerf.errors import ClippedWarning, DeadUnitError

Build = Callable[[int], nn.Sequential]
Rows = Callable[[], list[Record]]


@dataclass(frozen=True)
class Run:
    """One run: its key in the table, and what does it; a record may name another arm."""

    arm: str
    seed: int
    do: Callable[[], list[Record]]


@dataclass(frozen=True)
class Study:
    """Arms of one network on one task, trained side by side.

    Attributes:
        name: of the setting.
        builds: from a seed to the network of an arm.
        pictures: reads the images, once.
        plan: of every training.
        rates: that the arms choose from.
        choose, confirm: seeds that choose the rate of each arm by held-out images, and those the figures come from.
        said: goes into every row.
        erf: of how many of the confirming seeds the ERF is predicted, before and after.
    """

    name: str
    builds: dict[str, Build]
    pictures: Callable[[], Pictures]
    plan: Plan
    rates: tuple[float, ...]
    choose: tuple[int, ...]
    confirm: tuple[int, ...]
    said: Record
    erf: int = 0

    def best_rates(self, rows: Sequence[Record]) -> list[float]:
        """Return for each arm the rate with the best mean of the last held-out scores; of those that died, none."""
        found = []
        for arm in self.builds:
            mine = [row for row in rows if row.get("phase") == "choose" and row["arm"] == f"{self.name}: {arm}"]
            # A network that was lost before the first look has no score: the worst one.
            scores = {rate: [[0.0, *row["curve"]][-1] for row in mine if row["rate"] == rate] for rate in self.rates}
            found.append(
                max(self.rates, key=lambda rate: sum(scores[rate]) / len(scores[rate]) if scores[rate] else -1)
            )
        return found

    def train(self, seed: int, rates: Sequence[float], phase: str) -> list[Record]:
        """Train all arms of one seed and return their records; the test images are looked at to confirm only."""
        there = self.pictures()
        nets = [build(seed) for build in self.builds.values()]
        side = tuple(there.test[0].shape[1:])
        first = phase == "confirm" and seed < self.confirm[0] + self.erf
        before = [_predicted(net, side) if first else None for net in nets]
        torch.manual_seed(seed)
        plan = replace(self.plan, last_look=phase == "confirm")
        outcomes = train(nets, there, plan, rates, seed=1000 + seed)
        after = [
            _predicted(net.cpu(), side) if first and outcome.loss is not None else None
            for net, outcome in zip(nets, outcomes, strict=True)
        ]
        return [
            {
                "arm": f"{self.name}: {arm}",
                "phase": phase,
                "seed": seed,
                "rate": rate,
                "score": outcome.score,
                "curve": outcome.curve,
                "loss": outcome.loss,
                "outcome": "budget" if outcome.loss is not None else "diverged",
                "predicted_std": [old, new],
                "steps": plan.steps,
                "size": plan.size,
                **self.said,
            }
            for arm, rate, outcome, old, new in zip(self.builds, rates, outcomes, before, after, strict=True)
        ]

    def runs(self, rows: Rows) -> Iterator[Run]:
        """Yield the trainings that choose rates, then those that confirm."""
        for seed in self.choose:
            for rate in self.rates:
                do = partial(self.train, seed, [rate] * len(self.builds), "choose")
                yield Run(f"{self.name}: choose {rate:g}", seed, do)
        for seed in self.confirm:
            yield Run(f"{self.name}: confirm", seed, partial(self._confirm, seed, rows))

    def _confirm(self, seed: int, rows: Rows) -> list[Record]:
        return self.train(seed, self.best_rates(rows()), "confirm")

    def costs(self, steps: int) -> Iterator[Run]:
        """Yield what a step of each arm takes that has the device to itself."""
        for arm, build in self.builds.items():
            yield Run(f"{self.name}: {arm}", 0, partial(self._cost, build, steps))

    def _cost(self, build: Build, steps: int) -> list[Record]:
        seconds = seconds_a_step(build(0), self.pictures(), replace(self.plan, steps=steps))
        return [{"seed": 0, "phase": "cost", "seconds": {"step": seconds}, **self.said}]


def _predicted(net: nn.Sequential, size: tuple[int, ...]) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)
        try:
            return round(widerf.predict(net.eval(), size, layer="features").std, 4)
        except DeadUnitError:
            return None
