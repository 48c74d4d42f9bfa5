"""Where runs are done: in processes of this machine, or as tasks of a Ray cluster. Neither knows what a run is.

An engine takes jobs and a pure function from a job to its record, and yields ``(job, record)`` as they are done, in any
order. A process that dies takes its run with it; the run is done again.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from experiments.harness.inputs import InputError

Record = dict[str, Any]
Work = Callable[[Any], Record]
ENGINES = ("local", "ray")
_ATTEMPTS = 4  # of a run whose process dies


@dataclass(frozen=True)
class Engine:
    """Where runs are done.

    Attributes:
        name: ``local``, ``ray``, or ``torchrun``: all processes of a group do every run together, one after the other.
        workers: runs at a time on this machine; Ray counts its own processors.
        address: of a Ray cluster; None starts one on this machine.
        gpus: share of a GPU that a run takes on Ray.
    """

    name: str = "local"
    workers: int = 1
    address: str | None = None
    gpus: float = 0.0

    def done(self, jobs: Sequence[Any], work: Work) -> Iterator[tuple[Any, Record]]:
        """Yield every job with its record as soon as it is done.

        Raises:
            InputError: Ray is asked for and not installed.
        """
        if self.name == "torchrun":
            return ((job, work(job)) for job in jobs)
        return _ray(jobs, work, self) if self.name == "ray" else _local(jobs, work, self.workers)


def single_threaded(work: Work, job: Any) -> Record:
    """Do a run with one thread: its sums run in one order then, whatever runs beside it."""
    torch.set_num_threads(1)
    return work(job)


def _follow_parent() -> None:
    """Prepare a worker: one thread, Ctrl-C left to the parent, and an end when the parent ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _local(jobs: Sequence[Any], work: Work, workers: int) -> Iterator[tuple[Any, Record]]:
    left = dict.fromkeys(jobs)
    for attempt in range(_ATTEMPTS):
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_follow_parent)
        try:
            futures = {pool.submit(work, job): job for job in left}
            for future in as_completed(futures):
                record = future.result()
                del left[futures[future]]
                yield futures[future], record
        except BrokenProcessPool:
            if attempt == _ATTEMPTS - 1:
                raise
            tqdm.write("a process of a run was killed; what is missing is done again")
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=not left, cancel_futures=True)
        if not left:
            return


def _ray(jobs: Sequence[Any], work: Work, engine: Engine) -> Iterator[tuple[Any, Record]]:
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray needs Ray: pip install 'widerf[ray]'") from error
    ray.init(address=engine.address, ignore_reinit_error=True, log_to_driver=False)
    # A run whose process or node dies is done again elsewhere.
    task = ray.remote(num_cpus=1, num_gpus=engine.gpus, max_retries=_ATTEMPTS - 1)(single_threaded)
    try:
        futures = {task.remote(work, job): job for job in jobs}
        while futures:
            for future in ray.wait(list(futures), num_returns=1)[0]:
                yield futures.pop(future), ray.get(future)
    finally:
        ray.shutdown()
