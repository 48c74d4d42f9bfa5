"""What ``widerf.init.apply`` costs on resnet50: time beside ``timm.create_model``, extra memory beside a layer."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn

RUNS = 7
NAME = "resnet50"
GOAL = 0.10


def build() -> nn.Module:
    """Return the network that is timed."""
    import timm

    model: nn.Module = timm.create_model(NAME)
    return model


def times() -> list[tuple[float, float]]:
    """Return seconds of (``create_model``, ``apply`` on that model), in turn; cvxpy is loaded and warm before."""
    import widerf
    from widerf import profile
    from widerf.convolutions import convolution as convolutions

    widerf.init.apply(build(), 0.3)
    found = []
    for _ in range(RUNS):
        gc.collect()
        start = time.perf_counter()
        model = build()
        built = time.perf_counter()
        profile._axis_profiles.clear()  # the programmes are solved anew each time
        convolutions._soft_corners.cache_clear()
        widerf.init.apply(model, 0.5)
        found.append((built - start, time.perf_counter() - built))
    return found


def _peak(queue: Any) -> None:
    """Put by how many bytes ``apply`` raises the peak of this process, and the bytes of the largest layer."""
    import widerf

    torch.set_num_threads(1)
    widerf.init.apply(
        nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 7)), 0.5
    )  # cvxpy loaded, both programmes solved
    model = build()
    largest = max(p.numel() * p.element_size() for p in model.parameters() if p.ndim == 4)
    # Raise the peak to what is in use now: pages that building freed would else hide what apply takes.
    filler = []
    while _in_use() >= _highest():
        filler.append(torch.ones(1 << 18))
    while _highest() > _in_use() + (1 << 18):
        filler.append(torch.ones(1 << 16))
    before = _highest()
    widerf.init.apply(model, 0.5)
    queue.put((_highest() - before, largest))


def _highest() -> int:
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _in_use() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:  # noqa: PTH123
        return int(stream.read().split()[1]) * resource.getpagesize()


def extra_memory() -> tuple[int, int] | None:
    """Return (peak extra bytes, bytes of the largest layer), in a process of its own; ``None`` without /proc."""
    if not sys.platform.startswith("linux"):
        return None
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(queue,))
    process.start()
    extra, largest = queue.get(timeout=600)
    process.join()
    return int(extra), int(largest)


def main() -> None:
    """Print both figures and whether they hold."""
    torch.set_num_threads(1)
    found = times()
    ratios = [applied / built for built, applied in found]
    create, apply = (statistics.median(column) for column in zip(*found, strict=True))
    print(f"apply on {NAME}: {1e3 * apply:.0f} ms, create_model: {1e3 * create:.0f} ms")
    spread = f"range {min(ratios):.3f} to {max(ratios):.3f}, n = {RUNS}"
    print(f"ratio {statistics.median(ratios):.3f} ({spread}), goal {GOAL:.2f}")
    memory = extra_memory()
    if memory is not None:
        extra, largest = memory
        print(f"peak extra memory: {extra / 1e6:.1f} MB, largest layer: {largest / 1e6:.1f} MB")
        print(f"ratio {extra / largest:.2f}, goal 1")


if __name__ == "__main__":
    main()
