"""The main job: does widening make training faster, and the ERF wider?

Trains the same network under several arms from paired seeds (the same base draw, the same order of the data), measures
the ERF before and after, counts the steps to the target accuracy, and writes ``results.jsonl`` and ``report.html``.

    python -m experiments.compare far-pair
    python -m experiments.compare cifar10 --data-dir DIR --seeds 5
    python -m experiments.compare my_module:my_task --engine ray --address ADDRESS
    torchrun --nproc-per-node=2 -m experiments.compare far-pair --arms he --seeds 1
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.compare import arms, page, table, tasks, training
from experiments.compare.protocol import protocol
from experiments.compare.verdict import Verdict
from experiments.harness import data, distributed
from experiments.harness.device import machine, pick_device
from experiments.harness.engines import ENGINES, Engine
from experiments.harness.inputs import InputError
from experiments.harness.runs import Record, run_all, write_jsonl

# Options of the command line that are a task's own.
OPTIONS = {"far-pair": ("radius", "depth"), "plain20": ("kernel",)}


@dataclass(frozen=True)
class Job:
    """One run: an arm and a seed of a task. Everything that its record depends on."""

    arm: arms.Arm
    seed: int
    task: str
    data_dir: Path | None
    options: tuple[tuple[str, Any], ...]
    overrides: tuple[tuple[str, Any], ...]
    device: str
    erf_samples: int

    def __str__(self) -> str:
        return f"{self.arm.name}-seed{self.seed}"


def work(job: Job) -> Record:
    """Do one run; the record holds no figure that depends on anything but the job, except its duration."""
    task = job.arm.of(tasks.cached(job.task, job.data_dir, job.options, job.overrides))
    device = torch.device(job.device)
    torch.manual_seed(job.seed)
    net = job.arm.build(task.network, job.seed)
    record = training.one_run(net, task, 1000 + job.seed, device, job.erf_samples)
    of = {"protocol": protocol("far-pair").hash, **machine(device)}
    return {"task": job.task, "arm": job.arm.name, "seed": job.seed, **record, **of}


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    default = argparse.ArgumentDefaultsHelpFormatter
    line = argparse.ArgumentParser("experiments.compare", description=__doc__.split("\n")[0], formatter_class=default)
    line.add_argument("task", help=f"one of {', '.join(tasks.TASKS)}, or module:callable that returns your own Task")
    line.add_argument("--seeds", type=int, default=8, help="paired seeds, i.e. runs of each arm")
    line.add_argument("--first-seed", type=int, default=0, help="the smallest seed")
    line.add_argument("--arms", nargs="+", default=list(arms.DEFAULT), metavar="ARM", help="arms to train")
    line.add_argument("--strengths", nargs="+", type=float, default=[0.25, 0.5, 0.75], help="strengths of 'widened'")
    line.add_argument("--data-dir", type=Path, default=data.default_dir(), help="folder that holds the images")
    line.add_argument("--radius", type=int, default=4, help="far-pair: distance of the markers from the centre")
    line.add_argument("--depth", type=int, default=6, help="far-pair: 3×3 layers")
    line.add_argument("--kernel", type=int, default=3, help="plain20: taps on an axis")
    line.add_argument("--steps", type=int, help="longest training; default: the task's")
    line.add_argument("--target", type=float, help="validation accuracy that counts as learnt; default: the task's")
    line.add_argument("--lr", type=float, help="learning rate of Adam; default: the task's")
    line.add_argument("--erf-samples", type=int, default=64, help="backward passes a measured ERF")
    line.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    line.add_argument("--workers", type=int, help="runs at a time; default: cores on a CPU, 1 on an accelerator")
    line.add_argument("--engine", default="local", help="local (processes) or ray (tasks; needs widerf[ray])")
    line.add_argument("--address", help="of a Ray cluster; default: one is started on this machine")
    line.add_argument("--gpus", type=float, default=0.0, help="share of a GPU that a run takes on Ray")
    line.add_argument("--out", type=Path, help="folder for the results; default: runs/TASK")
    return line


def checked(options: argparse.Namespace) -> list[Job]:
    """Check every option before anything is written, and return the runs.

    Raises:
        InputError: an option that cannot be used.
    """
    for name in ("seeds", "steps", "erf_samples", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.target is not None and not 0 < options.target <= 1:
        raise InputError(f"--target must be in (0, 1], got {options.target}")
    if options.lr is not None and not options.lr > 0:
        raise InputError(f"--lr must be positive, got {options.lr}")
    if options.engine not in ENGINES:
        raise InputError(f"--engine must be one of {', '.join(ENGINES)}, got {options.engine!r}")
    chosen = arms.choose(options.arms, options.strengths)
    device = str(pick_device(options.device))
    overrides = tuple((name, getattr(options, name)) for name in ("steps", "target", "lr"))
    of_task = tuple((name, getattr(options, name)) for name in OPTIONS.get(options.task, ()))
    tasks.cached(options.task, options.data_dir, of_task, overrides)  # reads the images: a bad one ends it here
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    shared = (options.task, options.data_dir, of_task, overrides, device, options.erf_samples)
    # Seed by seed, so that a stopped series has whole pairs.
    return [Job(arm, seed, *shared) for seed in seeds for arm in chosen]


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison that the command line describes."""
    options = parser().parse_args(arguments)
    jobs = checked(options)
    folder = options.out or Path("runs") / options.task.replace(":", ".")
    task = tasks.cached(options.task, options.data_dir, jobs[0].options, jobs[0].overrides)
    # Seeds, arms and workers may differ between calls: they add runs and change none.
    settings = {
        "task": task.name, **dict(jobs[0].options), "steps": task.steps,
        "target": task.target, "lr": task.lr, "erf_samples": options.erf_samples,
    }  # fmt: skip
    workers = options.workers or ((os.cpu_count() or 1) if jobs[0].device == "cpu" else 1)
    kind = "torchrun" if distributed.started_by_torchrun() else options.engine
    engine = Engine(kind, workers, options.address, options.gpus)
    print(f"{len(jobs)} runs of {task.name} into {folder}, {engine.name}: {workers} at a time")
    with distributed.group(torch.device(jobs[0].device)) if distributed.started_by_torchrun() else nullcontext():
        records = run_all(jobs, work, folder, engine=engine, settings=settings)
        if not distributed.first():
            return
    write_jsonl(folder / "results.jsonl", map(_without_maps, records))
    verdict = Verdict(records, target=task.target, longest=task.steps)
    report = page.write(folder / "report.html", verdict, task, settings, protocol("far-pair"))
    print(f"\n{verdict.headline}\n\n{verdict.sentence}\n\n{table.plain(verdict.rows, not task.stop_at_target)}\n")
    print(f"report: {report}\nresults: {folder / 'results.jsonl'}")


def _without_maps(record: Record) -> Record:
    erfs = {name: record[name] for name in ("erf_before", "erf_after") if record[name] is not None}
    return {**record, **{name: {k: v for k, v in erf.items() if k != "map"} for name, erf in erfs.items()}}
