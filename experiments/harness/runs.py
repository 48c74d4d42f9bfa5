"""Runs that survive a kill: each in a process of its own, each in a file of its own."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.harness.inputs import InputError

Record = dict[str, Any]


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a kill leaves the old file or the new one, never half of one.

    The part has a name of its own, so that two writers of one file do not tear each other's, and is on the disk before
    it takes its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
    ) as part:
        try:
            part.write(text)
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).replace(path)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


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
