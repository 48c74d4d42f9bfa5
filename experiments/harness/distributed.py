"""One large run over several processes, as ``torchrun`` starts them: each takes its share of every batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.harness.inputs import InputError


def started_by_torchrun() -> bool:
    """Whether this process is one of several that ``torchrun`` started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextlib.contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Join the other processes, by NCCL on CUDA and gloo elsewhere."""
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        yield
    finally:
        distributed.destroy_process_group()


def joined() -> bool:
    """Whether this process is in a group."""
    return distributed.is_available() and distributed.is_initialized()


def first() -> bool:
    """Whether this process is the one that writes: the first of a group, or alone."""
    return not joined() or distributed.get_rank() == 0


def wait() -> None:
    """Wait for the other processes of the group."""
    if joined():
        distributed.barrier()


def spread(model: nn.Module) -> nn.Module:
    """Return ``model`` with its gradients averaged over the group; as it is without one.

    Raises:
        InputError: it holds batch normalisation, whose statistics would be those of a share of the batch.
    """
    if not joined():
        return model
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise InputError("task must have no batch norm under torchrun: each process would see its share of a batch")
    return DistributedDataParallel(model)


def share(batch: Tensor) -> Tensor:
    """Return this process's part of a batch; all of it without a group.

    Raises:
        InputError: the batch has no equal parts: averaged gradients would not be those of the whole.
    """
    if not joined():
        return batch
    parts = distributed.get_world_size()
    if len(batch) % parts:
        raise InputError(f"--nproc-per-node must divide the batch of {len(batch)}, got {parts}")
    return batch.chunk(parts)[distributed.get_rank()]
