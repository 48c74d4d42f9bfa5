"""Engines: the same job gives the same record wherever it is done, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from experiments.compare import arms
from experiments.compare.command import Job, work
from experiments.harness.engines import Engine
from experiments.harness.inputs import InputError
from experiments.harness.runs import run_all

ROOT = Path(__file__).parents[2]
ENGINES = ["local", pytest.param("ray", marks=pytest.mark.slow)]


class Number(NamedTuple):
    """A job whose process dies the first time that it is done, where ``fatal``."""

    value: int
    folder: str
    fatal: bool

    def __str__(self) -> str:
        return str(self.value)


def square(job: Number) -> dict:
    mark = Path(job.folder) / f"begun-{job.value}"
    if job.fatal and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"square": job.value**2}


@pytest.fixture
def ray_cluster():  # type: ignore[no-untyped-def]
    """Two nodes on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed: --engine ray is NOT tested (pip install 'widerf[ray]')")
    from ray.cluster_utils import Cluster

    # The workers must find experiments and tests, as those of a real cluster find the installed project.
    os.environ["PYTHONPATH"] = str(ROOT)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def engine(name: str, request: pytest.FixtureRequest) -> Engine:
    address = request.getfixturevalue("ray_cluster").address if name == "ray" else None
    return Engine(name, workers=2, address=address)


@pytest.mark.parametrize("name", ENGINES)
def test_a_killed_process_costs_no_record(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    jobs = [Number(value, str(tmp_path), fatal=value == 2) for value in range(5)]
    records = run_all(jobs, square, tmp_path / "out", engine=engine(name, request), settings={})
    assert records == [{"square": value**2} for value in range(5)]
    assert (tmp_path / "begun-2").exists()


def far_pair_jobs() -> list[Job]:
    chosen = arms.choose(["he", "widened"], [0.5])
    shared = ("far-pair", None, (("radius", 1), ("depth", 2)), (("steps", 20), ("target", 0.9), ("lr", 1e-3)), "cpu", 4)
    return [Job(arm, seed, *shared) for seed in range(2) for arm in chosen]


def timeless(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.parametrize("name", ENGINES)
def test_the_same_job_gives_the_same_record_as_in_this_process(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = json.loads(json.dumps([work(job) for job in far_pair_jobs()]))
    finally:
        torch.set_num_threads(threads)
    there = run_all(far_pair_jobs(), work, tmp_path, engine=engine(name, request), settings={})
    assert timeless(there) == timeless(here)


@pytest.mark.slow
def test_a_node_that_is_lost_costs_no_record(ray_cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lost = ray_cluster.add_node(num_cpus=1)
    jobs = [Number(value, str(tmp_path), fatal=False) for value in range(30)]
    done = []
    for job, record in Engine("ray", address=ray_cluster.address).done(jobs, square):
        done.append((job.value, record["square"]))
        if len(done) == 3:
            ray_cluster.remove_node(lost, allow_graceful=False)
    assert sorted(done) == [(value, value**2) for value in range(30)]


@pytest.mark.slow
def test_a_driver_that_is_killed_costs_no_record(ray_cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    series = ["far-pair", "--radius", "1", "--depth", "2", "--steps", "40", "--target", "1", "--arms", "he", "xavier",
              "--seeds", "6", "--erf-samples", "4", "--out"]  # fmt: skip
    command = [sys.executable, "-m", "experiments.compare", *series]
    on_ray = [*command, str(tmp_path / "ray"), "--engine", "ray", "--address", ray_cluster.address]
    driver = subprocess.Popen(on_ray, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = tmp_path / "ray" / "runs"
    while len(list(runs.glob("*.json"))) < 2:
        assert driver.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert len(list(runs.glob("*.json"))) < 12, "nothing was left to do"
    subprocess.run(on_ray, cwd=ROOT, check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "local"), "--workers", "1"], cwd=ROOT, check=True, capture_output=True)
    here, there = (
        timeless([json.loads(line) for line in (tmp_path / name / "results.jsonl").read_text().splitlines()])
        for name in ("local", "ray")
    )
    assert there == here


def test_ray_that_is_not_there_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="--engine ray needs Ray"):
        list(Engine("ray").done([1], square))


def test_two_processes_of_torchrun_train_as_one_does(tmp_path: Path) -> None:
    options = ["far-pair", "--radius", "1", "--depth", "3", "--steps", "20", "--target", "1", "--arms", "he",
               "--seeds", "1", "--erf-samples", "4", "--workers", "1"]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    module = ["-m", "experiments.compare", *options, "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([sys.executable, *module, str(one)], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([sys.executable, *torchrun, *module, str(two)], cwd=ROOT, check=True, capture_output=True)
    alone, spread = (json.loads((folder / "results.jsonl").read_text()) for folder in (one, two))
    assert alone["curve"]["step"] == spread["curve"]["step"] == [10, 20]
    for value, other in zip(alone["curve"]["accuracy"], spread["curve"]["accuracy"], strict=True):
        assert value == pytest.approx(other, abs=1e-4)
    assert alone["erf_after"]["std"] == pytest.approx(spread["erf_after"]["std"], rel=1e-4)
    assert alone["erf_after"]["std"] != pytest.approx(alone["erf_before"]["std"], rel=1e-3), "it did not train"
