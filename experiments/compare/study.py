"""Run a protocol: choose each arm's learning rate on seeds of its own, then train the pairs that the figures come from.

    python -m experiments.compare.study far-pair --minutes 60
    python -m experiments.compare.study plain20 --minutes 60 --data-dir DIR
    python -m experiments.compare.study far-pair --costs

Appends one line a run to ``docs/results/study-PROTOCOL.jsonl``, most decisive first. It can be stopped at any time; the
same command goes on from there.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import widerf
from experiments.compare import arms, stacked, tasks, training
from experiments.compare.curve import Curve
from experiments.compare.protocol import Cell, Protocol, names, protocol
from experiments.compare.task import Task
from experiments.harness import data
from experiments.harness.device import machine
from experiments.harness.inputs import main_guard
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record
from experiments.harness.statistics import restricted_mean
from widerf.errors import ClippedWarning, DeadUnitError


@dataclass(frozen=True)
class Group:
    """Runs that are done together: one arm in one cell at one rate."""

    part: str
    cell: Cell
    arm: str
    lr: float
    seeds: tuple[int, ...]

    @property
    def where(self) -> Record:
        """What a row says of its place, the seed left out."""
        place = {"part": self.part, **self.cell.options, "arm": self.arm, "lr": self.lr}
        return place if self.cell.task == "far-pair" else {"task": self.cell.task, **place}


def ledger(about: Protocol, path: Path) -> Ledger:
    """Return the table of a protocol's runs; the options of its cells are part of the key."""
    return Ledger(path, ("part", *about.cells[0].options, "arm", "lr", "seed"))


def plan(about: Protocol, rows: Ledger) -> Iterator[Group]:
    """Yield what is missing: rates and first cell arm by arm, then the other cells; or rates, then seed by seed."""
    first, *others = about.cells
    for arm in about.arms:
        for lr in about.rates if about.choose else ():
            yield from _missing(rows, Group("choose", first, arm, lr, about.choose))
        if not about.by_seed:
            yield from _missing(rows, Group("confirm", first, arm, rate_of(arm, about, rows), about.confirm))
    for cell in about.cells if about.by_seed else others:
        for seeds in [(seed,) for seed in about.confirm] if about.by_seed else [about.confirm]:
            for arm in about.arms:
                yield from _missing(rows, Group("confirm", cell, arm, rate_of(arm, about, rows), seeds))


def _missing(rows: Ledger, group: Group) -> Iterator[Group]:
    there = {row["seed"] for row in rows.rows() if group.where.items() <= row.items()}
    left = tuple(seed for seed in group.seeds if seed not in there)
    if left:
        yield replace(group, seeds=left)


def rate_of(arm: str, about: Protocol, rows: Ledger) -> float:
    """Return the rate that did best on the choosing seeds, by the measure that the protocol judges arms by.

    For a task that ends at its target that is the restricted mean of the steps, else the accuracy at full budget.
    """
    if len(about.rates) == 1:
        return about.rates[0]
    tried = [row for row in rows.rows() if row["part"] == "choose" and row["arm"] == arm]

    def loss(lr: float) -> float:
        those = [row for row in tried if row["lr"] == lr]
        if about.by_seed:
            return -sum(row["accuracy"] for row in those) / len(those)
        return restricted_mean([row["steps_to_target"] for row in those], about.cells[0].steps)

    return min(about.rates, key=loss)


def do(group: Group, about: Protocol, data_dir: Path | None = None) -> list[Record]:
    """Train the runs of a group and return one record each."""
    cell, started = group.cell, time.perf_counter()
    task = tasks.make(
        cell.task, data_dir=data_dir, options=cell.options, steps=cell.steps, target=about.target, lr=group.lr
    )
    arm = arms.choose([group.arm], [])[0]
    task = arm.of(task)
    nets = [arm.build(task.network, seed) for seed in group.seeds]
    before = [erfs(net, task, seed) for net, seed in zip(nets, group.seeds, strict=True)]
    curves, seconds = _train(nets, task, [1000 + seed for seed in group.seeds], arm)
    each, records = (time.perf_counter() - started) / len(nets), list[Record]()
    for net, seed, curve, erf in zip(nets, group.seeds, curves, before, strict=True):
        record = {**group.where, "seed": seed, **_short(curve, task), "budget": cell.steps}
        if task.test is not None:
            record["test_accuracy"] = training.accuracy(net, *task.test, torch.device("cpu"))
        record |= {"erf_before": erf, "erf_after": None if curve.diverged else erfs(net, task, seed)}
        timing = {"seconds": {"step": seconds, "run": round(each, 2)}}
        records.append({**record, **timing, "protocol": about.hash, **machine(torch.device("cpu"))})
    return records


def _train(
    nets: list[nn.Sequential], task: Task, seeds: Sequence[int], arm: arms.Arm
) -> tuple[list[Curve], float | None]:
    if task.name == "far-pair" and arm.taps != "sparse" and not task.penalty:
        return stacked.train(nets, task, seeds)
    alone = [training.train(net, task, seed, torch.device("cpu")) for net, seed in zip(nets, seeds, strict=True)]
    timed = [seconds for _, seconds in alone if seconds is not None]
    return [curve for curve, _ in alone], sum(timed) / len(timed) if timed else None


def _short(curve: Curve, task: Task) -> Record:
    """Return the curve without what can be told from the rest: looks are ``every`` steps apart."""
    record = curve.record()
    return {**record, "curve": {"every": task.every, "accuracy": curve.accuracy}, "steps": curve.steps[-1]}


def erfs(net: nn.Module, task: Task, seed: int) -> Record | None:
    """Return std and excess kurtosis, measured, and the predicted std; None for a dead unit."""
    measured = training.erf_of(net, task, seed, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)
        try:
            predicted = widerf.predict(net, task.erf_size, layer="features")
        except DeadUnitError:
            return None
    if measured is None:
        return None
    of = {"std": measured.std, "excess_kurtosis": measured.excess_kurtosis, "predicted_std": predicted.std}
    return {name: round(value, 4) for name, value in of.items()}


def costs(about: Protocol, data_dir: Path | None, rounds: int = 7, steps: int = 5) -> Iterator[Record]:
    """Measure what a training step costs in the first cell by the kind of taps: processor time, in turn, the median.

    Arms that differ in their weights alone do the same work. All take the same road: one network at a time, whole maps.
    """
    cell, cpu = about.cells[0], torch.device("cpu")
    task = tasks.make(cell.task, data_dir=data_dir, options=cell.options, steps=steps, every=steps + 1)
    task = replace(task, faster=None, validation=(task.validation[0][:1], task.validation[1][:1]))
    kinds = dict.fromkeys(arm.taps for arm in arms.choose(about.arms, []))
    nets = {taps: arms.Arm(taps, taps=taps).build(task.network, 0) for taps in kinds}
    spent: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(rounds + 1):  # the first round pays for what is made once
        for name, net in nets.items():
            started = time.process_time()
            training.train(net, task, 0, cpu)
            spent[name].append((time.process_time() - started) / steps)
    for name, seconds in spent.items():
        place = Group("cost", cell, name, 0.0, (0,)).where
        measured = {"step": round(statistics.median(seconds[1:]), 5), "run": 0.0}
        yield {**place, "seed": 0, "seconds": measured, "protocol": about.hash, **machine(cpu)}


def main() -> None:
    """Do what is missing until the time is up."""
    line = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    line.add_argument("protocol", help=f"one of {', '.join(names())}")
    line.add_argument("--minutes", type=float, default=60, help="begin nothing after this time")
    line.add_argument("--data-dir", type=Path, default=data.default_dir(), help="folder that holds the images")
    line.add_argument("--out", type=Path, help="default: docs/results/study-PROTOCOL.jsonl")
    line.add_argument("--costs", action="store_true", help="measure what a step of each arm costs, and nothing else")
    options = line.parse_args()
    torch.set_num_threads(1)
    about, started = protocol(options.protocol), time.monotonic()
    rows = ledger(about, options.out or RESULTS / f"study-{about.name}.jsonl")
    if options.costs:
        for record in costs(about, options.data_dir):
            rows.append(record)
        return
    for group in plan(about, rows):
        if time.monotonic() - started > 60 * options.minutes:
            print("the time is up; the same command goes on from here")
            return
        for record in do(group, about, options.data_dir):
            rows.append(record)
        print(f"{group.part} {group.cell}: {group.arm} at {group.lr:g}, {len(group.seeds)} runs", flush=True)


if __name__ == "__main__":
    main_guard(main)
