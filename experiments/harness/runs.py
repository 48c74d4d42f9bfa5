"""Runs that survive a kill: each is a file of its own."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.harness import distributed
from experiments.harness.engines import Engine, Record, Work
from experiments.harness.inputs import InputError


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


def run_all(
    jobs: Sequence[Any],
    work: Work,
    folder: Path,
    *,
    settings: Record,
    workers: int = 1,
    engine: Engine | None = None,
) -> list[Record]:
    """Do every job once, each in a process of its own kind, and keep what is done if the whole is stopped.

    A finished job is one file in ``folder/runs``; a second call does only what is missing. A job must give the same
    record whenever it is done (its seed is part of it), so that a series that was stopped and resumed equals one that
    was not.

    Args:
        jobs: hashable, printable descriptions; ``str(job)`` names the file.
        work: top-level function of one job (it is sent to another process).
        folder: where the results go.
        settings: everything else that the records depend on. A folder made with others is refused.
        workers: processes at a time on this machine.
        engine: where the runs are done, if not there.

    Returns:
        The records, in the order of ``jobs``; none in a process that does not write.

    Raises:
        InputError: ``folder`` holds results of other settings.
    """
    runs = folder / "runs"
    settings_file = folder / "settings.json"
    wanted = json.dumps(settings, indent=1, sort_keys=True)
    if settings_file.exists() and settings_file.read_text() != wanted:
        raise InputError(f"--out must be a new folder or one of the same settings, got {folder}: see {settings_file}")
    todo = [job for job in jobs if not (runs / f"{job}.json").exists()]
    distributed.wait()  # all processes of a group must see the same runs as missing
    writes = distributed.first()
    if writes:
        write_whole(settings_file, wanted)
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="run", disable=None) as bar:
        for job, record in (engine or Engine(workers=workers)).done(todo, work):
            if writes:
                write_whole(runs / f"{job}.json", json.dumps(record))
            bar.set_postfix_str(str(job))
            bar.update()
    return [json.loads((runs / f"{job}.json").read_text()) for job in jobs] if writes else []


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write one record a line."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
