"""A folder of runs: damaged files are named, set aside and done again; writers do not tear each other's files."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from experiments.harness.engines import Engine
from experiments.harness.inputs import InputError, main_guard
from experiments.harness.runs import read_record, run_all, write_whole

ROOT = Path(__file__).parents[2]
HERE = Engine("torchrun")  # in this very process: nothing to start


def square(job: int) -> dict[str, Any]:
    return {"job": job, "value": job * job}


def finished(folder: Path) -> list[dict[str, Any]]:
    return run_all([1, 2, 3], square, folder, settings={"task": "square"}, engine=HERE)


def overwrite(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "runs" / "2.json").write_bytes(data)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("no folder")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "an empty run": overwrite(b""),
    "a run cut short": overwrite(b'{"job": 2, "val'),
    "a run of zeros": overwrite(bytes(64)),
    "a run of noise": overwrite(bytes(range(256))),
    "a run in UTF-16": overwrite(json.dumps(square(2)).encode("utf-16")),
    "a list for a run": overwrite(b"[1, 2]"),
    "a number for a run": overwrite(b"7"),
    "null for a run": overwrite(b"null"),
    "words for a run": overwrite(b"square of two"),
    "two records in a run": overwrite(b"{}{}"),
    "a run with a comma too many": overwrite(b'{"job": 2,}'),
    "a run nested too deep": overwrite(b"[" * 100_000),
    "a folder for a run": lambda folder: to_folder(folder / "runs" / "2.json"),
    "a run that links to nothing": lambda folder: dangling(folder / "runs" / "2.json"),
    "a run that links to itself": lambda folder: loop(folder / "runs" / "2.json"),
    "a file for the folder of runs": lambda folder: to_file(folder / "runs"),
    "empty settings": lambda folder: (folder / "settings.json").write_text(""),
    "settings cut short": lambda folder: (folder / "settings.json").write_text('{"task"'),
    "no settings": lambda folder: (folder / "settings.json").unlink(),
    "a folder for the settings": lambda folder: to_folder(folder / "settings.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_named_set_aside_and_done_again(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = finished(tmp_path)
    DAMAGE[kind](tmp_path)
    capsys.readouterr()
    assert finished(tmp_path) == whole == [square(job) for job in (1, 2, 3)]
    said = [line for line in capsys.readouterr().err.splitlines() if "set aside" in line]
    assert said and all(str(tmp_path) in line for line in said)
    assert len(said) == (2 if "settings" in kind and kind != "no settings" else 1)
    assert finished(tmp_path) == whole and "set aside" not in capsys.readouterr().err


def test_runs_of_other_settings_are_refused_and_kept(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(InputError, match="same settings"):
        run_all([1], square, tmp_path, settings={"task": "cube"}, engine=HERE)
    assert read_record(tmp_path / "runs" / "3.json") == square(3)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), BrokenProcessPool("x"), PermissionError("no")]
)
def test_a_full_disk_or_killed_workers_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main_guard(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and len(said.splitlines()) == 1 and "goes on from there" in said


def write_many(path: Path, writer: int, count: int) -> None:
    for turn in range(count):
        write_whole(path, json.dumps([writer] * (1000 + turn % 50)))


def test_two_writers_of_one_file_never_show_half_of_it(tmp_path: Path) -> None:
    path, context = tmp_path / "x.json", multiprocessing.get_context("spawn")
    jobs = [context.Process(target=write_many, args=(path, writer, 60)) for writer in (1, 2)]
    for job in jobs:
        job.start()
    while any(job.is_alive() for job in jobs):
        if path.exists():
            assert len(set(json.loads(path.read_text()))) == 1
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


SERIES = """
import sys, time
from pathlib import Path
from experiments.harness.engines import Engine
from experiments.harness.runs import run_all

def work(job):
    time.sleep(0.01)
    return {"job": job, "value": job * job}

run_all(list(range(30)), work, Path(sys.argv[1]), settings={"task": "square"}, engine=Engine("torchrun"))
"""


def writers(folder: Path) -> list[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SERIES, str(folder)]
    return [subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) for _ in range(2)]


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_two_writers_killed_again_and_again_end_with_the_same_results(kills: int, tmp_path: Path) -> None:
    folder = tmp_path / "series"
    for kill in range(kills):
        pair = writers(folder)
        before = len(list(folder.glob("runs/*.json")))
        patience = time.monotonic() + 60
        while time.monotonic() < patience and all(process.poll() is None for process in pair):
            if len(list(folder.glob("runs/*"))) > before + kill % 3:
                break
            time.sleep(0.005)
        for process in pair:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if len(list(folder.glob("runs/*.json"))) == 30:
            shutil.rmtree(folder)
    for process in writers(folder):
        assert process.wait() == 0
    assert [json.loads((folder / "runs" / f"{job}.json").read_text()) for job in range(30)] == list(
        map(square, range(30))
    )
