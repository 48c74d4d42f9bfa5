"""Runs that survive a kill: each is a file of its own."""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from experiments.harness import distributed
from experiments.harness.engines import Engine, Record, Work
from experiments.harness.inputs import InputError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of ``path`` at the end: a kill leaves the old or the new one, never half of one.

    The part has a name of its own, so that two writers of one file do not tear each other's, and is on the disk before
    it takes its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as part:
        try:
            yield part
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).replace(path)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, see :func:`replacing`."""
    with replacing(path) as part:
        part.write(text.encode("utf-8"))


def read_record(path: Path) -> Record | None:
    """Return the record of a file, or ``None`` if there is none; a damaged file is set aside, and named in one line."""
    try:
        record = json.loads(path.read_bytes().decode("utf-8"))
        if isinstance(record, dict):
            return record
        why = f"it holds a {type(record).__name__}, no record"
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        why = "it is a link to nothing"
    except (OSError, ValueError, RecursionError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
    _set_aside(path, f"is damaged ({why})")
    return None


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

    A finished job is one file in ``folder/runs``; a second call does only what is missing or damaged. A job must give
    the same record whenever it is done (its seed is part of it), so that a series that was stopped and resumed equals
    one that was not.

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
    known = read_record(settings_file)
    if known is None and runs.is_dir() and any(runs.glob("*.json")):
        _set_aside(runs, "has no settings that tell what it was made with")
    if known is not None and known != json.loads(wanted):
        raise InputError(f"--out must be a new folder or one of the same settings, got {folder}: see {settings_file}")
    if os.path.lexists(runs) and not runs.is_dir():
        _set_aside(runs, "is no folder")
    records = {job: read_record(runs / f"{job}.json") for job in jobs}
    todo = [job for job, record in records.items() if record is None]
    distributed.wait()  # all processes of a group must see the same runs as missing
    writes = distributed.first()
    if writes:
        write_whole(settings_file, wanted)
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="run", disable=None) as bar:
        for job, record in (engine or Engine(workers=workers)).done(todo, work):
            if writes:
                write_whole(runs / f"{job}.json", json.dumps(record))
            records[job] = record
            bar.set_postfix_str(str(job))
            bar.update()
    # As JSON has them, whether they were done now or before.
    return [json.loads(json.dumps(records[job])) for job in jobs] if writes else []


def _set_aside(path: Path, why: str) -> None:
    aside = next(p for n in itertools.count(1) if not os.path.lexists(p := path.with_name(f"{path.name}.damaged-{n}")))
    path.rename(aside)
    tqdm.write(f"{path} {why}: set aside as {aside.name}, and done again", file=sys.stderr)


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write one record a line."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
