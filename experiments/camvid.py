"""Does a pattern beat the grid? Small networks that differ in their taps alone label street scenes.

``python -m experiments.camvid --data-dir DIR --out FOLDER``. CamVid frames of ``--size`` (label maps by nearest
neighbour), six 3×3 layers of ``--channels`` with batch norm at full resolution and a 1×1 readout. Every arm has the
same weights, the same multiplications and, seed by seed, the same initial weights and batches; only the offsets differ.
The first layer is dense in every arm with one extent. Of the 367 training frames 60 are held out (every sixth) and
choose learning rates and count steps; the 101 ``val`` frames are looked at once, after training. The learning rate of
each arm is tuned on one shared grid with seeds that are not used again, then ``--seeds`` paired runs follow. Runs that
are finished are kept: a second call does what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import widerf
from experiments.data import cache_dir, default_dir, to_float
from experiments.harness import (
    InputError,
    Record,
    main_guard,
    paired_difference,
    paired_ratio,
    run_all,
    write_jsonl,
    write_whole,
)
from experiments.rewire import Rewirer, one_row_each

CLASSES, VOID, LAYERS = 11, 11, 6
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
class Frames:
    """Images uint8 (n, 3, height, width) and labels uint8 (n, height, width), 11 is void."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]


def load(data_dir: Path | None, size: tuple[int, int]) -> Frames:
    """Read ``camvid.tar`` under ``data_dir`` at ``size`` (height, width); decoded frames are cached elsewhere.

    Raises:
        InputError: there is no such file.
    """
    path = None if data_dir is None else data_dir / "camvid.tar"
    if path is None or not path.is_file():
        raise InputError(f"--data-dir (or WIDERF_DATA) must hold camvid.tar, got {str(data_dir)!r}")
    key = hashlib.sha256(f"{path.resolve()} {path.stat().st_size} {size}".encode()).hexdigest()[:16]
    cached = cache_dir() / f"camvid-{key}.npz"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(".part.npz")
        np.savez(part, **_decode(path, size))
        part.replace(cached)
    with np.load(cached) as file:
        a = {name: torch.from_numpy(file[name]) for name in file.files}
    held = torch.arange(len(a["train"])) % 6 == 0
    held &= held.cumsum(0) <= 60
    return Frames(
        (a["train"][~held], a["trainannot"][~held]),
        (a["train"][held], a["trainannot"][held]),
        (a["val"], a["valannot"]),
    )


def _decode(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    arrays: dict[str, list[Any]] = {"train": [], "trainannot": [], "val": [], "valannot": []}
    with tarfile.open(path) as tar:
        for member in sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name):
            folder = Path(member.name).parent.name
            file = tar.extractfile(member)
            if folder not in arrays or file is None:
                continue
            labels = folder.endswith("annot")
            image = Image.open(io.BytesIO(file.read()))
            way = Image.Resampling.NEAREST if labels else Image.Resampling.BOX
            small = np.asarray((image if labels else image.convert("RGB")).resize(size[::-1], way))
            arrays[folder].append(small if labels else small.transpose(2, 0, 1))
    return {name: np.stack(frames) for name, frames in arrays.items()}


def network(arm: str, seed: int, channels: int) -> nn.Sequential:
    """Return the network of an arm; the weights depend on the seed alone."""
    pattern, extents = ARMS[arm]
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for depth, extent in enumerate(extents):
        named = "mixed" if pattern == "rewired" else pattern
        taps = {"extent": extent, "pattern": named, "seed": 100 * seed + depth}
        conv = widerf.SparseConv2d(3 if depth == 0 else channels, channels, 3, padding=1, bias=False, **taps)  # type: ignore[arg-type]
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        conv = one_row_each(conv) if pattern == "rewired" else conv
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, CLASSES, 1))


def batches(frames: tuple[Tensor, Tensor], seed: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield frames in a random order, epoch after epoch, half of them mirrored."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = frames
    while True:
        for index in torch.randperm(len(images), generator=generator).split(batch):
            if len(index) < batch:
                continue
            x, y = to_float(images[index]), labels[index].long()
            mirror = torch.rand(batch, generator=generator) < 0.5
            yield (
                torch.where(mirror.view(-1, 1, 1, 1), x.flip(-1), x),
                torch.where(mirror.view(-1, 1, 1), y.flip(-1), y),
            )


@torch.no_grad()
def miou(net: nn.Module, frames: tuple[Tensor, Tensor]) -> float:
    """Mean over the classes of intersection over union, void left out."""
    net.eval()
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for x, y in zip(frames[0].split(10), frames[1].split(10), strict=True):
        guess, truth = net(to_float(x)).argmax(1)[y != VOID], y[y != VOID].long()
        confusion += torch.bincount(truth * CLASSES + guess, minlength=CLASSES**2).view(CLASSES, CLASSES)
    net.train()
    both = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - both
    return float((both[union > 0] / union[union > 0]).mean())


def erf(net: nn.Module, frames: Frames, samples: int) -> Record:
    """Measure the ERF of the centre unit of the last map on held-out frames."""
    inputs = to_float(frames.held_out[0][:samples])
    found = widerf.measure(
        net.eval(), tuple(inputs.shape[1:]), layer=str(3 * LAYERS - 1), inputs=inputs, samples=samples
    )
    net.train()
    return {"std": found.std, "size": found.size(), "excess_kurtosis": found.excess_kurtosis}


@dataclass(frozen=True)
class Job:
    """One training."""

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
    data_dir: str

    def __str__(self) -> str:
        return f"{self.arm}-lr{self.rate:g}-seed{self.seed}" + ("-last" if self.last_look else "")


def work(job: Job) -> Record:
    """Train one network: Adam, half a cosine; mIoU of the held-out frames along the way."""
    frames, started = load(Path(job.data_dir), job.size), time.perf_counter()
    net = network(job.arm, job.seed, job.channels)
    before = erf(net, frames, job.erf_samples) if job.last_look else None
    optimizer = torch.optim.Adam(net.parameters(), job.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.steps)
    rewirer = Rewirer(net, optimizer, job.steps) if ARMS[job.arm][0] == "rewired" else None
    curve: dict[str, list[float]] = {"step": [], "loss": [], "miou": []}
    for step, (x, y) in zip(range(1, job.steps + 1), batches(frames.train, job.seed, job.batch), strict=False):
        with rewirer.after(step) if rewirer else nullcontext():
            loss = F.cross_entropy(net(x), y, ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if step % job.every == 0 or step == job.steps:
            curve["step"].append(step)
            curve["loss"].append(loss.item())
            curve["miou"].append(miou(net, frames.held_out))
    return {
        "arm": job.arm,
        "rate": job.rate,
        "seed": job.seed,
        "weights": sum(p.numel() for p in net.parameters()),
        "curve": curve,
        "miou": curve["miou"][-1],
        "val_miou": miou(net, frames.val) if job.last_look else None,
        "erf_before": before,
        "erf_after": erf(net, frames, job.erf_samples) if job.last_look else None,
        "seconds": round(time.perf_counter() - started, 1),
    }


def best_rates(records: Sequence[Record]) -> dict[str, float]:
    """Return for each arm the learning rate of the highest mean mIoU on the held-out frames."""
    scores: dict[str, dict[float, list[float]]] = {}
    for r in records:
        scores.setdefault(r["arm"], {}).setdefault(r["rate"], []).append(r["miou"])
    return {arm: max(by, key=lambda rate: sum(by[rate]) / len(by[rate])) for arm, by in scores.items()}


def steps_to(record: Record, target: float) -> float:
    """Return the first step at which the held-out mIoU was at ``target``; the last step if it never was."""
    curve = record["curve"]
    return float(next((s for s, m in zip(curve["step"], curve["miou"], strict=True) if m >= target), curve["step"][-1]))


def summary(records: Sequence[Record], arms: Sequence[str], settings: Record) -> str:
    """Return a table: each arm against dense and against the growing grid, seed by seed."""
    by = {arm: {r["seed"]: r for r in records if r["arm"] == arm} for arm in arms}
    seeds = sorted(set.intersection(*(set(runs) for runs in by.values())))
    lines = [
        "# CamVid: patterns against grids",
        "",
        f"`python -m experiments.camvid`, n = {len(seeds)} paired seeds,",
        f"{settings['steps']} steps of {settings['batch']} frames of {settings['size']}, {settings['channels']}",
        "channels. mIoU of the 101 `val` frames; differences and ratios with 95 % t-intervals over pairs. Steps to the",
        "final mIoU on the held-out frames that dense of the same seed ends with.",
        "",
        "| arm | lr | mIoU | − dense | − grid-growing | steps / dense | ERF std before | after |",
        "|---" * 8 + "|",
    ]
    for arm in arms:
        runs = [by[arm][s] for s in seeds]
        cells = [arm, f"{runs[0]['rate']:g}", f"{sum(r['val_miou'] for r in runs) / len(runs):.4f}"]
        for rival in ("dense", "grid-growing"):
            known = rival in by and rival != arm
            pairs = [by[rival][s]["val_miou"] for s in seeds] if known else []
            cells.append(str(paired_difference([r["val_miou"] for r in runs], pairs)) if known else "")
        if "dense" in by:
            targets = [by["dense"][s]["miou"] for s in seeds]
            steps = [steps_to(r, t) for r, t in zip(runs, targets, strict=True)]
            base = [steps_to(by["dense"][s], t) for s, t in zip(seeds, targets, strict=True)]
            cells.append(str(paired_ratio(steps, base)) if arm != "dense" else "")
        else:
            cells.append("")
        cells += [f"{sum(r[key]['std'] for r in runs) / len(runs):.2f}" for key in ("erf_before", "erf_after")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, default=default_dir(), help="folder with camvid.tar (or WIDERF_DATA)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=8, help="paired seeds per arm")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--tune-steps", type=int, default=200, help="steps of the runs that choose the learning rate")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="shared grid of learning rates")
    parser.add_argument("--size", type=int, nargs=2, default=(45, 60), metavar=("HEIGHT", "WIDTH"), help="of a frame")
    parser.add_argument("--channels", type=int, default=24, help="of every layer")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--every", type=int, default=50, help="steps between two looks at the held-out frames")
    parser.add_argument("--erf-samples", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Tune, train, sum up."""
    options = parse()
    size = tuple(options.size)
    load(options.data_dir, size)  # decode once, and complain before the first run
    shared = {key: getattr(options, key) for key in ("batch", "erf_samples", "channels")}
    shared |= {"size": size, "data_dir": str(options.data_dir)}
    settings = {
        key: value for key, value in vars(options).items() if key not in ("data_dir", "out", "workers", "seeds", "arms")
    }
    tuning = [
        Job(arm, rate, seed, options.tune_steps, options.tune_steps, last_look=False, **shared)
        for arm in options.arms
        for rate in options.rates
        for seed in TUNE_SEEDS
    ]
    if len(options.rates) > 1:
        tuned = run_all(tuning, work, options.out / "tune", workers=options.workers, settings=settings)
        rates = best_rates(tuned)
        write_jsonl(options.out / "tune.jsonl", tuned)
    else:
        rates = dict.fromkeys(options.arms, options.rates[0])
    jobs = [
        Job(arm, rates[arm], seed, options.steps, options.every, last_look=True, **shared)
        for seed in range(options.seeds)
        for arm in options.arms
    ]
    records = run_all(jobs, work, options.out / "train", workers=options.workers, settings=settings)
    write_jsonl(options.out / "camvid.jsonl", records)
    page = summary(records, options.arms, {**settings, "rates": rates})
    write_whole(options.out / "camvid.md", page)
    print(page)
    print(json.dumps(rates))


if __name__ == "__main__":
    main_guard(main)
