"""Does a pattern beat the grid? Small networks that differ in their taps alone, on three tasks.

``python -m experiments.patterns TASK --data-dir DIR --out FOLDER``. Tasks: ``camvid`` labels the pixels of street
scenes (frames of ``--size``, a 1×1 readout), ``cifar10`` names images at full resolution and ``cifar10-down`` with two
strides of 2 (both with global average pooling). Six 3×3 layers of ``--channels`` with batch norm. Every arm has the
same weights, the same multiplications and, seed by seed, the same initial weights and batches; only the offsets differ.
The first layer is dense in every arm with one extent, and no window is wider than its map.

Part of the training images is held out (CamVid: 60 of 367, every sixth; CIFAR-10: 1,000); they choose learning rates
and count steps. The test images (CamVid: the 101 ``val`` frames; CIFAR-10: every fifth, 2,000) are looked at once,
after training. The learning rate of each arm is tuned on one shared grid with seeds that are not used again, then
``--seeds`` paired runs follow. Runs that are finished are kept: a second call does what is missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import widerf
from experiments.compare.task import Batch
from experiments.compare.training import accuracy
from experiments.harness import camvid, data
from experiments.harness.inputs import InputError
from experiments.harness.runs import Record, run_all, write_jsonl, write_whole
from experiments.patterns.page import best_rates, summary
from experiments.patterns.rewire import Rewirer, one_row_each

TASKS = ("camvid", "cifar10", "cifar10-down")
LAYERS = 6
RATES = (1e-3, 3e-3, 1e-2)
TUNE_SEEDS = (1001, 1002)
# Extents of the six layers, the first one next to the image. A grid of spacing d has extent 2d + 1; stratified
# patterns of extent 3d have the same blocks as that grid, each tap anywhere in its block. "rewired" starts as mixed and
# moves its taps while it trains.
ARMS: dict[str, tuple[str, tuple[int, ...]]] = {
    "dense": ("grid", (3,) * 6),
    "grid-1-2-5": ("grid", (3, 5, 11, 3, 5, 11)),
    "grid-growing": ("grid", (3, 5, 5, 9, 9, 15)),
    "mixed-9": ("mixed", (3, 9, 9, 9, 9, 9)),
    "mixed-growing": ("mixed", (5, 5, 9, 9, 15, 15)),
    "stratified-growing": ("stratified", (3, 7, 7, 11, 13, 21)),
    "rings-growing": ("rings", (3, 5, 9, 11, 13, 15)),
    "multiscale-growing": ("multiscale", (3, 5, 9, 11, 15, 15)),
    "rewired-growing": ("rewired", (5, 5, 9, 9, 15, 15)),
}


@dataclass(frozen=True)
class Problem:
    """What is learnt: uint8 images and their labels in three parts, the network around the arm's layers, the score.

    Attributes:
        train: images (n, 3, height, width) and labels, (n,) or (n, height, width).
        held_out: chooses learning rates and counts steps.
        test: looked at once.
        strides: of the six layers.
        head: from the number of channels to what follows them.
        score: of a network on held-out or test images; larger is better.
    """

    train: Batch
    held_out: Batch
    test: Batch
    strides: tuple[int, ...]
    head: Callable[[int], nn.Module]
    score: Callable[[nn.Module, Batch], float]


@functools.lru_cache(maxsize=1)
def problem(task: str, data_dir: Path | None, size: tuple[int, int]) -> Problem:
    """Return the task of that name, read once a process.

    Raises:
        InputError: its data are not there.
    """
    if task == "camvid":
        frames = camvid.load(data_dir, size)
        head: Callable[[int], nn.Module] = lambda channels: nn.Conv2d(channels, camvid.CLASSES, 1)  # noqa: E731
        return Problem(frames.train, frames.held_out, frames.val, (1,) * LAYERS, head, camvid.miou)
    images = data.cifar10(data_dir)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(20161))
    held, kept = order[:1000], order[1000:]
    return Problem(
        (images.train[kept], images.train_labels[kept]),
        (images.train[held], images.train_labels[held]),
        (images.test[::5], images.test_labels[::5]),
        (2, 1, 1, 2, 1, 1) if task == "cifar10-down" else (1,) * LAYERS,
        lambda channels: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)),
        lambda net, batch: accuracy(net, data.to_float(batch[0]), batch[1], torch.device("cpu")),
    )


def network(arm: str, seed: int, channels: int, about: Problem) -> nn.Sequential:
    """Return the network of an arm; the weights depend on the seed alone."""
    pattern, extents = ARMS[arm]
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    side = min(about.train[0].shape[-2:])
    for depth, (extent, stride) in enumerate(zip(extents, about.strides, strict=True)):
        conv = widerf.SparseConv2d(
            3 if depth == 0 else channels,
            channels,
            3,
            stride,
            padding=1,
            bias=False,
            extent=min(extent, side - 1 + side % 2),
            pattern="mixed" if pattern == "rewired" else pattern,
            seed=100 * seed + depth,
        )
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [one_row_each(conv) if pattern == "rewired" else conv, nn.BatchNorm2d(channels), nn.ReLU()]
        side = -(-side // stride)
    return nn.Sequential(*layers, about.head(channels))


def batches(images: Batch, seed: int, batch: int) -> Iterator[Batch]:
    """Yield images in a random order, epoch after epoch, half of them mirrored."""
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = images
    while True:
        for index in torch.randperm(len(pixels), generator=generator).split(batch):
            if len(index) < batch:
                continue
            x, y = data.to_float(pixels[index]), labels[index].long()
            mirror = torch.rand(batch, generator=generator) < 0.5
            x = torch.where(mirror.view(-1, 1, 1, 1), x.flip(-1), x)
            yield x, (torch.where(mirror.view(-1, 1, 1), y.flip(-1), y) if y.dim() == 3 else y)


def erf(net: nn.Module, images: Tensor, samples: int) -> Record:
    """Measure the ERF of the centre unit of the last map on held-out images."""
    inputs = data.to_float(images[:samples])
    layer = str(3 * LAYERS - 1)
    found = widerf.measure(net.eval(), tuple(inputs.shape[1:]), layer=layer, inputs=inputs, samples=samples)
    net.train()
    return {"std": found.std, "size": found.size(), "excess_kurtosis": found.excess_kurtosis}


@dataclass(frozen=True)
class Job:
    """One training."""

    task: str
    arm: str
    rate: float
    seed: int
    steps: int
    every: int
    batch: int
    erf_samples: int
    last_look: bool
    size: tuple[int, int]
    channels: int
    data_dir: str | None

    def __str__(self) -> str:
        return f"{self.arm}-lr{self.rate:g}-seed{self.seed}" + ("-last" if self.last_look else "")


def work(job: Job) -> Record:
    """Train one network: Adam, half a cosine; the score of the held-out images along the way."""
    about = problem(job.task, None if job.data_dir is None else Path(job.data_dir), job.size)
    started = time.perf_counter()
    net = network(job.arm, job.seed, job.channels, about)
    before = erf(net, about.held_out[0], job.erf_samples) if job.last_look else None
    optimizer = torch.optim.Adam(net.parameters(), job.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)
    rewirer = Rewirer(net, optimizer, job.steps) if ARMS[job.arm][0] == "rewired" else None
    curve: dict[str, list[float]] = {"step": [], "loss": [], "score": []}
    for step, (x, y) in zip(range(1, job.steps + 1), batches(about.train, job.seed, job.batch), strict=False):
        with rewirer.after(step) if rewirer else nullcontext():
            loss = F.cross_entropy(net(x), y, ignore_index=camvid.VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if step % job.every == 0 or step == job.steps:
            curve["step"].append(step)
            curve["loss"].append(loss.item())
            curve["score"].append(about.score(net, about.held_out))
    return {
        "arm": job.arm,
        "rate": job.rate,
        "seed": job.seed,
        "weights": sum(p.numel() for p in net.parameters()),
        "curve": curve,
        "score": curve["score"][-1],
        "test_score": about.score(net, about.test) if job.last_look else None,
        "erf_before": before,
        "erf_after": erf(net, about.held_out[0], job.erf_samples) if job.last_look else None,
        "seconds": round(time.perf_counter() - started, 1),
    }


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data-dir", type=Path, default=data.default_dir(), help="folder of the data (or WIDERF_DATA)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=8, help="paired seeds per arm")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--tune-steps", type=int, default=200, help="steps of the runs that choose the learning rate")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="shared grid of learning rates")
    parser.add_argument("--size", type=int, nargs=2, default=(45, 60), metavar=("HEIGHT", "WIDTH"), help="of a frame")
    parser.add_argument("--channels", type=int, default=24, help="of every layer")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every", type=int, default=50, help="steps between two looks at the held-out images")
    parser.add_argument("--erf-samples", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tune-only", action="store_true", help="stop when the learning rates are chosen")
    options = parser.parse_args()
    if options.seeds < 1 or options.steps < 1:
        raise InputError(f"--seeds and --steps must be at least 1, got {options.seeds} and {options.steps}")
    return options


def main() -> None:
    """Tune, train, sum up."""
    options = parse()
    size = tuple(options.size)
    problem(options.task, options.data_dir, size)  # decode once, and complain before the first run
    shared = {key: getattr(options, key) for key in ("task", "batch", "erf_samples", "channels")}
    shared |= {"size": size, "data_dir": options.data_dir and str(options.data_dir)}
    aside = ("data_dir", "out", "workers", "seeds", "arms", "tune_only")
    settings = {key: value for key, value in vars(options).items() if key not in aside}
    short = options.tune_steps
    tuning = [
        Job(arm=arm, rate=rate, seed=seed, steps=short, every=short, last_look=False, **shared)
        for arm in options.arms
        for rate in options.rates
        for seed in TUNE_SEEDS
    ]
    tuned = run_all(tuning, work, options.out / "tune", workers=options.workers, settings=settings)
    rates = best_rates(tuned)
    write_jsonl(options.out / "tune.jsonl", tuned)
    print(json.dumps(rates))
    if options.tune_only:
        return
    jobs = [
        Job(arm=arm, rate=rates[arm], seed=seed, steps=options.steps, every=options.every, last_look=True, **shared)
        for seed in range(options.seeds)
        for arm in options.arms
    ]
    records = run_all(jobs, work, options.out / "train", workers=options.workers, settings=settings)
    page = summary(options.task, records, tuned, settings)
    write_jsonl(options.out / "runs.jsonl", records)
    write_whole(options.out / "summary.md", page)
    print(page)
