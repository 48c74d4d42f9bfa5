"""Do what fits the time, what matters most first; write every row at once; say what was left out."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as LateError
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from experiments.gpu import layers, race, sweep, uses
from experiments.gpu.page import page
from experiments.harness.device import machine, pick_device
from experiments.harness.inputs import InputError
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record, write_whole

LAYERS = 300
SHARE = 0.45  # of the time for the layers against float64 and for compiling, at most
LEAST, STEP = 10.0, 15.0  # seconds that a heat, and the steps of a network, have to have left
COMPILED = 75.0  # and of a compiled network: compiling cannot be stopped


class Run:
    """A run against the clock, its rows on disk as soon as they are there."""

    def __init__(self, path: Path, seconds: float) -> None:
        path.unlink(missing_ok=True)
        self.ledger = Ledger(path, ("part", "heat", "arm"))
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def say(self, row: Record) -> None:
        """Write a row and show it."""
        self.ledger.append({"part": "", "heat": "", "arm": ""} | row)
        shown = {k: v for k, v in row.items() if k not in ("case", "errors", "why", "times", "shape")}
        print(
            "  ".join(f"{k} {v}" if k not in ("part", "heat", "arm") else str(v) for k, v in shown.items()), flush=True
        )

    def attempt(self, row: Record, needed: float, rows: Callable[[], Iterator[Record]]) -> None:
        """Write all of ``rows``, or one that says that there was no time, or what went wrong."""
        if self.left < needed:
            self.say(row | {"left out": f"{needed:.0f} s needed, {max(0.0, self.left):.0f} s left"})
            return
        try:
            for found in rows():
                self.say(found)
        except Exception as error:  # a run unattended goes on to the next part, whatever this one raised
            self.say(row | {"failed": f"{type(error).__name__}: {error}"[:300]})


MAPS = ("forward", "grad_input", "grad_weight")
Task = tuple[Record, Callable[..., Any], tuple[Any, ...]]


def _tasks(count: int, device: str, small: bool, tune: bool, until: float) -> Iterator[Task]:
    """Yield (row, function, arguments) of what is done in several processes: compiling is what takes the time."""
    if device != "cpu":
        for index, heat in enumerate(race.heats(small)):
            for arm in (name for name, _ in heat.arms if not name.startswith(("dense", "dilated", "deform"))):
                yield {"part": "warm", "heat": heat.name, "arm": arm}, race.warm, (index, arm, device, small)
        for index, layer in enumerate(sweep.layers(small) if tune else ()):
            for name in MAPS:
                yield {"part": "warm", "heat": layer.name, "arm": name}, sweep.warm, (index, name, device, small, until)
    for seed in range(count):
        case = layers.draw(seed, small)
        yield {"part": "layer", "heat": str(seed), "case": case}, layers.check, (case, device)


def prepare(run: Run, tasks: Iterable[Task], until: float, workers: int) -> None:
    """Check layers against float64, and compile what will be timed, in several processes at once."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    pending = {pool.submit(task, *given): row for row, task, given in tasks}
    open_ = Counter(row["part"] for row in pending.values())
    try:
        for future in as_completed(pending, timeout=max(1.0, until - time.time())):
            row, error = pending[future], future.exception()
            open_[row["part"]] -= 1
            if row["part"] == "layer":
                run.say(row | (future.result() if error is None else {"right": False, "failed": repr(error)[:300]}))
            elif error is not None:
                run.say(row | {"failed": repr(error)[:300]})
    except LateError:
        pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    for part, left in open_.items():
        if left:
            run.say({"part": part, "heat": "rest", "left out": f"{left}: no time"})


def _race(
    run: Run, heats: Sequence[race.Heat], networks: Sequence[race.Network], device: torch.device, timed: float
) -> None:
    """Time these heats, then training steps of these networks; ``timed``: seconds of a call, 0 if nothing is meant."""
    for heat in heats:
        run.attempt(
            {"part": heat.part, "heat": heat.name}, LEAST if timed else 0, partial(race.run, heat, device, timed)
        )
    for model, batch, side, way in networks:
        row = {"part": "network", "heat": f"{model}, {batch}×3@{side}²", "arm": way}
        needed = 0 if not timed else COMPILED if way == "compiled" else STEP
        run.attempt(row, needed, partial(_network, (model, batch, side, way), device, 5 * timed))


def _network(network: race.Network, device: torch.device, seconds: float) -> Iterator[Record]:
    yield race.run_network(*network, device, seconds)


def kernels(device: torch.device, out: Path, seconds: float, small: bool, count: int, tune: bool) -> Path:
    """Check and race; return the path of the page."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    stem = "gpu-" + re.sub(r"\W+", "-", name.lower()).strip("-")
    run = Run(out / f"{stem}.jsonl", seconds)
    run.say({"part": "machine", "small": small, "seconds": seconds, "name": name} | machine(device))
    workers = 1 if small else max(1, min(16, os.cpu_count() or 2))
    until = time.time() + SHARE * seconds
    prepare(run, _tasks(count, str(device), small, tune, until), until, workers)
    run.attempt({"part": "use", "heat": "all"}, 0 if small else 10, lambda: uses.check(device))
    timed = 0.0 if small else 0.03
    heats, networks = race.heats(small), race.networks(small)
    asked = 1 + [heat.part for heat in heats].index("launch")
    first = [network for network in networks if network[0] == networks[0][0]]
    _race(run, heats[:asked], first, device, timed)
    _race(run, heats[asked:], (), device, timed)
    for layer in sweep.layers(small) if tune else ():
        row = {"part": "sweep", "heat": layer.name}
        run.attempt(row, LEAST if timed else 0, partial(sweep.run, layer, device, timed))
    _race(run, (), networks[len(first) :], device, timed)
    written = out / f"{stem}.md"
    write_whole(written, page(run.ledger.rows(), run.ledger.path.name))
    return written


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser("experiments.gpu", description="Sparse layers on this machine's GPU.")
    parser.add_argument("what", choices=["kernels"], help="kernels: layers against float64, then the race")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=285.0, help="for all of it; what does not fit is named")
    parser.add_argument("--layers", type=int, help=f"how many layers are drawn; default {LAYERS}, 6 with --small")
    parser.add_argument(
        "--tune", action="store_true", help="measure the candidates of the table of configurations, too"
    )
    parser.add_argument("--small", action="store_true", help="tiny shapes: does the command work, on any device?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows and the page")
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        raise InputError(f"--seconds must be positive, got {options.seconds}")
    device = pick_device(options.device)
    if device.type != "cuda" and not options.small:
        raise InputError(f"--device must be a CUDA device without --small, got {options.device!r}")
    count = options.layers if options.layers is not None else 6 if options.small else LAYERS
    print(f"wrote {kernels(device, options.out, options.seconds, options.small, count, options.tune)}")
