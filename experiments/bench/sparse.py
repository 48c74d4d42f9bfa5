"""What SparseConv2d costs: oneDNN's dense 3×3 on the same input is 1, in the same run, arms in turn, round after round.

``python -m experiments.bench sparse`` (8 minutes on two cores; leave the machine alone) writes
``docs/results/sparse_speed.md``, ``.csv`` (every timing) and ``.png`` (cost against extent). Rivals: the dense k×k, the
dilated k×k of the same extent, the dense S×S, ``torchvision.ops.deform_conv2d`` and DCLS (``pip install dcls``).
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import widerf
from experiments.bench.sparse_page import BASE, Row, load, save, write
from experiments.harness.ledger import RESULTS
from widerf import SparseConv2d, kernels, patterns

SHAPES = ((8, 64, 56), (8, 128, 28), (8, 256, 14), (32, 64, 32))  # batch, channels, side
EXTENTS = (7, 15, 31)
WIDER = (7, 15, 31, 47, 63)


@dataclass(frozen=True)
class Arm:
    """One layer or network to time; slow ones get fewer rounds."""

    name: str
    model: Callable[[Tensor], Tensor]
    extent: int = 3
    path: str = ""  # as in ``WIDERF_KERNELS``
    rounds: int | None = None


def once(arm: Arm, x: Tensor) -> tuple[float, float]:
    """Return the seconds of one forward pass, and of forward and backward to weights and input."""
    x = x.detach().requires_grad_()
    if isinstance(arm.model, nn.Module):
        arm.model.zero_grad(set_to_none=True)
    with kernels.use(arm.path):
        start = time.perf_counter()
        y = arm.model(x)
        middle = time.perf_counter()
        y.backward(torch.ones_like(y))
        return middle - start, time.perf_counter() - start


def race(section: str, arms: Sequence[Arm], x: Tensor, rounds: int, threads: int = 1, shape: str = "") -> list[Row]:
    """Time the arms in turn, ``rounds`` times after one round to warm up; the first arm is the base."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    shape = shape or f"{x.shape[0]}×{x.shape[1]}@{x.shape[2]}²"
    rows = []
    torch.set_num_threads(threads)
    for number in range(-1, rounds):
        base = (0.0, 0.0)
        for arm in arms:
            if number >= (arm.rounds or rounds) or (number < 0 and arm.rounds == 1):
                continue
            took = once(arm, x)
            base = took if arm is arms[0] else base
            layout = "channels_last" if last else "NCHW"
            if number >= 0:
                rows.append(Row(section, shape, layout, threads, arm.name, arm.extent, number, *took, *base))
    torch.set_num_threads(1)
    return rows


def image(batch: int, channels: int, side: int, last: bool = False) -> Tensor:
    """Return a random image."""
    x = torch.randn(batch, channels, side, side)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def sparse(channels: int, extent: int, pattern: str = "mixed", k: int = 3, groups: int = 1) -> SparseConv2d:
    """Return a layer; "shared" is one random pattern for all channels, "own" is one for each."""
    offsets: Any = pattern
    if pattern in ("shared", "own"):
        count = channels if pattern == "own" else 1
        offsets = patterns.random(k, extent, count, torch.Generator().manual_seed(0))
    return SparseConv2d(
        channels, channels, k, padding=k // 2, groups=groups, bias=False, extent=extent, pattern=offsets, seed=0
    )


def dense(channels: int, k: int = 3, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a plain layer that keeps the size."""
    return nn.Conv2d(channels, channels, k, padding=dilation * (k // 2), dilation=dilation, groups=groups, bias=False)


def layers(channels: int, extents: Iterable[int], pure: bool = True) -> list[Arm]:
    """Return the dense layer and the sparse ones, on the compiled path and (shared pattern) on the pure one."""
    arms = [Arm(BASE, dense(channels))]
    for extent in extents:
        arms += [Arm(pattern, sparse(channels, extent, pattern), extent) for pattern in ("mixed", "shared")]
        if pure:
            arms.append(Arm("shared, pure PyTorch", sparse(channels, extent, "shared"), extent, "torch"))
    return arms


def depthwise(channels: int, k: int) -> list[Arm]:
    """Return depthwise layers of k² taps: the dense one, the default pattern, and a pattern for each channel."""
    arms = [Arm(name, sparse(channels, 15, name, k, channels), 15) for name in ("mixed", "own")]
    return [Arm(BASE, dense(channels, k, groups=channels)), *arms]


def rivals(channels: int, side: int, batch: int, extent: int = 15) -> list[Arm]:
    """Return what else widens a kernel to ``extent``, beside the sparse layers."""
    from DCLS.construct.modules import Dcls2d
    from torchvision.ops import DeformConv2d

    # Whole offsets, the same for all pixels, and no gradient to them: the cheapest that deform_conv2d can have.
    draws = torch.Generator().manual_seed(0)
    offsets = torch.randint(-(extent // 2), extent // 2 + 1, (1, 18, 1, 1), generator=draws).float()
    offsets = offsets.expand(batch, 18, side, side).contiguous()
    deformable = DeformConv2d(channels, channels, 3, padding=1, bias=False)
    dcls = Dcls2d(channels, channels, 9, padding=extent // 2, dilated_kernel_size=extent, bias=False)
    return [
        *layers(channels, [extent], pure=False),
        Arm("dilated k×k", dense(channels, dilation=extent // 2), extent),
        Arm("dense S×S", dense(channels, extent), extent, rounds=2),
        Arm("deform_conv2d", lambda x: deformable(x, offsets), extent, rounds=2),
        Arm("DCLS", dcls, extent, rounds=1),
    ]


def networks() -> tuple[list[Arm], Tensor]:
    """Return resnet50 as it is and converted, and its input."""
    import timm

    plain, wide = timm.create_model("resnet50"), timm.create_model("resnet50")
    widerf.convert(wide, extent=15)
    arms = [Arm("resnet50", plain.train()), Arm("resnet50, converted", wide.train(), 15)]
    return arms, torch.randn(4, 3, 224, 224)


def timings() -> list[Row]:
    """Time everything; prints what is being timed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # DCLS reports at length that this machine has no GPU
    rows: list[Row] = []

    def add(*arguments: Any, **options: Any) -> None:
        start = time.perf_counter()
        rows.extend(race(*arguments, **options))
        print(f"  {rows[-1].section}, {rows[-1].shape}: {time.perf_counter() - start:.0f} s", flush=True)

    for shape in SHAPES:
        add("dense", layers(shape[1], EXTENTS), image(*shape), 7)
        add("dense, channels_last", layers(shape[1], [15], pure=False), image(*shape, last=True), 5)
        add("dense, two threads", layers(shape[1], [15]), image(*shape), 5, 2)
    for k in (3, 5):
        for shape in ((8, 96, 56), (8, 192, 28)):
            for last in (False, True):
                section = f"depthwise {k * k} taps" + ", channels_last" * last
                add(section, depthwise(shape[1], k), image(*shape, last=last), 11)
    add("rivals", rivals(64, 56, 8), image(8, 64, 56), 5)
    curve = layers(64, WIDER, pure=False)
    curve += [Arm("dilated k×k", dense(64, dilation=extent // 2), extent) for extent in WIDER]
    curve += [Arm("dense S×S", dense(64, extent), extent, rounds=1) for extent in (7, 15)]
    add("extent", curve, image(8, 64, 56), 5)
    arms, x = networks()
    add("network, two threads", arms, x, 5, 2, shape="4×3@224²")
    return rows


def _peak(queue: Any, kind: str) -> None:
    """Put by how many bytes a training step of six layers raises the memory of this process at its peak."""
    torch.set_num_threads(1)
    kernel = (lambda: dense(64)) if kind == "dense" else (lambda: sparse(64, 15))
    model = nn.Sequential(*(m for _ in range(6) for m in (kernel(), nn.BatchNorm2d(64), nn.ReLU())))
    nn.Sequential(dense(64), *model[1:3])(image(1, 64, 8)).sum().backward()  # loads the libraries, for all kinds
    x = image(8, 64, 56)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now what is in use
    with kernels.use("torch" if kind == "pure" else ""):
        before = _status("VmRSS")
        model(x).sum().backward()
    queue.put(_status("VmHWM") - before)


def _status(name: str) -> int:
    """Return an entry of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def memory() -> dict[str, int]:
    """Return peak extra bytes of a training step, each in a process of its own; Linux only."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for kind in ("dense", "mixed", "pure"):
        queue = context.Queue()
        process = context.Process(target=_peak, args=(queue, kind))
        process.start()
        found[kind] = int(queue.get(timeout=600))
        process.join()
    return found


def main(argv: list[str] | None = None) -> None:
    """Time everything and write the page, or write the page anew from the timings that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page, the timings and the plot")
    parser.add_argument("--table", action="store_true", help="write the page from the timings that are there")
    options = parser.parse_args([] if argv is None else argv)
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "sparse_speed.csv"
    if not options.table:
        print(kernels.info())
        rows, peaks = timings(), memory()
        base, shape = peaks["dense"], "6 layers, 8×64@56²"
        rows += [Row("memory", shape, "NCHW", 1, arm, 15, 0, 0, peak, 0, base) for arm, peak in peaks.items()]
        save(rows, table)
    print(write(load(table), options.out))


if __name__ == "__main__":
    main(sys.argv[1:])
