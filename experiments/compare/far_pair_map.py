"""Where do widened weights pay? The far-pair map: depths and radii, every arm and its controls, many paired seeds.

    python -m experiments.compare.far_pair_map --minutes 60

Does what ``protocol.json`` says, most decisive first, and appends one line a run to
``docs/results/far-pair-map.jsonl``. It can be stopped at any time; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import widerf
from experiments.compare import arms, stacked, training
from experiments.compare.curve import Curve
from experiments.compare.far_pair import far_pair
from experiments.compare.protocol import Cell, Protocol, protocol
from experiments.compare.task import Task
from experiments.harness.device import machine
from experiments.harness.inputs import main_guard
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record
from experiments.harness.statistics import restricted_mean
from widerf.errors import ClippedWarning, DeadUnitError

KEY = ("part", "depth", "radius", "arm", "lr", "seed")


@dataclass(frozen=True)
class Stacked:
    """Runs that are trained together: one arm in one cell at one rate."""

    part: str
    cell: Cell
    arm: str
    lr: float
    seeds: tuple[int, ...]


def plan(about: Protocol, ledger: Ledger) -> Iterator[Stacked]:
    """Yield what is missing, in the order of the protocol: rates and first cell arm by arm, then the other cells."""
    first, *others = about.cells
    for arm in about.arms:
        for lr in about.rates:
            yield _missing(ledger, Stacked("choose", first, arm, lr, about.choose))
        yield _missing(ledger, Stacked("confirm", first, arm, rate_of(arm, about, ledger), about.confirm))
    for cell in others:
        for arm in about.arms:
            yield _missing(ledger, Stacked("confirm", cell, arm, rate_of(arm, about, ledger), about.confirm))


def _missing(ledger: Ledger, stack: Stacked) -> Stacked:
    cell = stack.cell
    there = {
        row["seed"]
        for row in ledger.rows()
        if tuple(row[name] for name in KEY[:-1]) == (stack.part, cell.depth, cell.radius, stack.arm, stack.lr)
    }
    return dataclasses.replace(stack, seeds=tuple(seed for seed in stack.seeds if seed not in there))


def rate_of(arm: str, about: Protocol, ledger: Ledger) -> float:
    """Return the rate with the least restricted mean of the steps over the choosing seeds."""
    rows = [row for row in ledger.rows() if row["part"] == "choose" and row["arm"] == arm]
    longest = about.cells[0].steps
    return min(
        about.rates,
        key=lambda lr: restricted_mean([row["steps_to_target"] for row in rows if row["lr"] == lr], longest),
    )


def do(stack: Stacked, about: Protocol) -> list[Record]:
    """Train the runs of a stack and return one record each."""
    cell, started = stack.cell, time.perf_counter()
    task = dataclasses.replace(
        far_pair(cell.radius, cell.depth),
        steps=cell.steps,
        target=about.target,
        lr=stack.lr,
        erf_size=(1, 2 * cell.depth + 3, 2 * cell.depth + 3),
    )
    arm = arms.choose([stack.arm], [])[0]
    nets = [arm.build(task.network, seed) for seed in stack.seeds]
    before = [_erfs(net, task, seed) for net, seed in zip(nets, stack.seeds, strict=True)]
    curves, seconds = _train(nets, task, [1000 + seed for seed in stack.seeds], arm.taps != "sparse")
    each = (time.perf_counter() - started) / len(nets)
    where = {"part": stack.part, "depth": cell.depth, "radius": cell.radius, "arm": stack.arm, "lr": stack.lr}
    records = []
    for net, seed, curve, erf in zip(nets, stack.seeds, curves, before, strict=True):
        after = None if curve.diverged else _erfs(net, task, seed)
        timing = {"step": seconds, "run": round(each, 2)}
        record = {**where, "seed": seed, **_short(curve), "budget": cell.steps, "erf_before": erf, "erf_after": after}
        records.append({**record, "seconds": timing, "protocol": about.hash, **machine(torch.device("cpu"))})
    return records


def _train(nets: list[nn.Sequential], task: Task, seeds: Sequence[int], dense: bool) -> tuple[list[Curve], float]:
    if dense:
        return stacked.train(nets, task, seeds)
    alone = [training.train(net, task, seed, torch.device("cpu")) for net, seed in zip(nets, seeds, strict=True)]
    return [curve for curve, _ in alone], sum(seconds or 0.0 for _, seconds in alone) / len(alone)


def _short(curve: Curve) -> Record:
    """Return the curve without what can be told from the rest: looks are ``every`` steps apart."""
    record = curve.record()
    return {**record, "curve": {"every": curve.steps[0], "accuracy": curve.accuracy}, "steps": curve.steps[-1]}


def _erfs(net: nn.Module, task: Task, seed: int) -> Record | None:
    """Return std and excess kurtosis, measured and predicted; None for a dead unit."""
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


def main() -> None:
    """Do what is missing until the time is up."""
    line = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    line.add_argument("--minutes", type=float, default=60, help="begin nothing after this time")
    line.add_argument("--out", type=Path, default=RESULTS / "far-pair-map.jsonl")
    options = line.parse_args()
    torch.set_num_threads(1)
    about, ledger, started = protocol(), Ledger(options.out, KEY), time.monotonic()
    for stack in plan(about, ledger):
        if time.monotonic() - started > 60 * options.minutes:
            print("the time is up; the same command goes on from here")
            return
        for record in do(stack, about) if stack.seeds else []:
            ledger.append(record)
        print(f"{stack.part} {stack.cell} {stack.arm} at {stack.lr:g}: {len(stack.seeds)} runs", flush=True)


if __name__ == "__main__":
    main_guard(main)
