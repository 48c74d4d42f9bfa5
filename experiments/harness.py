"""What every experiment shares: runs that survive a kill, devices, and paired statistics."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

Record = dict[str, Any]


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line and says what would be right."""


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a kill leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def _follow_parent() -> None:
    """Prepare a worker: one thread, Ctrl-C left to the parent, and an end when the parent ends.

    With one thread sums run in one order, so that a run gives the same numbers whatever runs beside it.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def run_all(
    jobs: Sequence[Any], work: Callable[[Any], Record], folder: Path, *, workers: int, settings: Record
) -> list[Record]:
    """Do every job once, each in a process of its own kind, and keep what is done if the whole is stopped.

    A finished job is one file in ``folder/runs``; a second call does only what is missing. A job must give the same
    record whenever it is done (its seed is part of it), so that a series that was stopped and resumed equals one that
    was not.

    Args:
        jobs: hashable, printable descriptions; ``str(job)`` names the file.
        work: top-level function of one job (it is sent to another process).
        folder: where the results go.
        workers: processes at a time.
        settings: everything else that the records depend on. A folder made with others is refused.

    Returns:
        The records, in the order of ``jobs``.

    Raises:
        InputError: ``folder`` holds results of other settings.
    """
    runs = folder / "runs"
    settings_file = folder / "settings.json"
    wanted = json.dumps(settings, indent=1, sort_keys=True)
    if settings_file.exists() and settings_file.read_text() != wanted:
        raise InputError(f"--out must be a new folder or one of the same settings, got {folder}: see {settings_file}")
    write_whole(settings_file, wanted)
    todo = [job for job in jobs if not (runs / f"{job}.json").exists()]
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    try:
        futures = {pool.submit(work, job): job for job in todo}
        with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="run", disable=None) as bar:
            for future in as_completed(futures):
                job = futures[future]
                write_whole(runs / f"{job}.json", json.dumps(future.result()))
                bar.set_postfix_str(str(job))
                bar.update()
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return [json.loads((runs / f"{job}.json").read_text()) for job in jobs]


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write one record a line."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA if there is one, then MPS, then the CPU.

    Raises:
        InputError: the device is unknown or absent.
    """
    if name == "auto":
        accelerators = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind, there in accelerators.items() if there), "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device must be auto or a device that this machine has, got {name!r}") from error
    return device


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast on CUDA, full precision elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def machine(device: torch.device) -> Record:
    """Kind of machine and versions, for the record."""
    import timm

    import widerf

    kind = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()}-core {platform.machine()}"
    )
    return {
        "device": f"{device.type}: {kind}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "widerf": widerf.__version__,
    }


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval over n pairs."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def paired_difference(new: Sequence[float], old: Sequence[float]) -> Estimate:
    """Mean of new − old over pairs with its 95 % t-interval; a pair with a NaN is left out.

    Example:
        >>> print(paired_difference([2.0, 3.0, 4.0], [1.0, 2.0, 2.5]))
        1.17 (0.45 to 1.88)
    """
    difference = np.asarray(new, dtype=float) - np.asarray(old, dtype=float)
    difference = difference[~np.isnan(difference)]
    mean = float(difference.mean()) if len(difference) else math.nan
    if len(difference) < 2:
        return Estimate(mean, -math.inf, math.inf, len(difference))
    half = float(stats.sem(difference) * stats.t.ppf(0.975, len(difference) - 1))
    return Estimate(mean, mean - half, mean + half, len(difference))


def paired_ratio(new: Sequence[float], old: Sequence[float]) -> Estimate:
    """Geometric mean of new / old over pairs with its 95 % t-interval on the log scale.

    Example:
        >>> print(paired_ratio([50.0, 60.0, 40.0], [100.0, 100.0, 100.0]))
        0.493 (0.298 to 0.817)
    """
    log = paired_difference(np.log(np.asarray(new, dtype=float)), np.log(np.asarray(old, dtype=float)))
    with np.errstate(over="ignore"):
        low, mean, high = np.exp([log.low, log.mean, log.high]).tolist()
    return Estimate(mean, low, high, log.n)


def main_guard(main: Callable[[], None]) -> None:
    """Run ``main``: bad input is one line and status 2, Ctrl-C says how to go on."""
    try:
        main()
    except InputError as error:
        sys.exit(_complain(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(_complain("stopped; what is finished is kept, and the same command goes on from there", 130))


def _complain(message: str, status: int) -> int:
    print(f"error: {message}" if status == 2 else message, file=sys.stderr)
    return status
