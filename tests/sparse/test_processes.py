"""A converted model trained by two processes, each with half of the batch, is the model that one process trains."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import widerf
from widerf import SparseConv2d

STEPS = 2


def model() -> nn.Module:
    """Dense, depthwise and strided layers, no batch norm: its statistics would be those of half of the batch."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.GELU(),
        nn.Conv2d(32, 16, 3, stride=2, padding=1, bias=False), nn.GELU(), nn.Conv2d(16, 8, 3, padding=1),
    )  # fmt: skip
    widerf.convert(net, extent=7, seed=0)
    assert sum(isinstance(module, SparseConv2d) for module in net) >= 3
    return net.to(memory_format=torch.channels_last)


def trained(called: nn.Module, share: slice) -> list[Tensor]:
    """Return the gradients of every step, then the parameters; the loss is a mean over the samples of the share."""
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(called.parameters(), lr=0.1, momentum=0.9)
    seen: list[Tensor] = []
    for _ in range(STEPS):
        x = torch.randn(4, 3, 13, 12, generator=draw).to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        called(x[share]).square().mean().backward()
        seen += [p.grad.clone() for p in called.parameters() if p.grad is not None]
        optimizer.step()
    return seen + [p.detach() for p in called.parameters()]


def rank_of_two(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message="Grad strides do not match")  # of another memory format than the weights
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = trained(DistributedDataParallel(model()), slice(2 * rank, 2 * rank + 2))
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_of_two, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    alone = trained(model(), slice(None))
    count = len(list(model().parameters()))
    assert len(alone) == (STEPS + 1) * count
    for rank in range(2):
        for found, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), alone, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
