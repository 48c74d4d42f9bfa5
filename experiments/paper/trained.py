"""Figure 3: the ERF before and after training, on CIFAR-10 and CamVid.

``python -m experiments.paper.trained cifar10 --data-dir DIR``, ``python -m experiments.paper.trained camvid --data-dir
DIR --batch 4``; the networks are in ``networks.py``. The paper gives no schedule: Adam, half a cosine. Hours on a CPU:
a checkpoint is kept after every epoch, and the same command goes on from there. A finished run is a row of
``paper-trained.jsonl``, which the page of ``python -m experiments.paper`` reads.
"""

from __future__ import annotations

import argparse
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import widerf
from experiments.compare.training import accuracy
from experiments.harness import camvid, data
from experiments.harness.device import pick_device
from experiments.harness.inputs import main_guard
from experiments.harness.ledger import RESULTS, Ledger
from experiments.harness.runs import Record, replacing
from experiments.paper.networks import BLOCKS, Setting, network
from experiments.patterns.command import Problem, batches, problem

KEY = tuple(field.name for field in fields(Setting))


def look(net: nn.Sequential, images: Tensor) -> Record:
    """Measure the ERF of the last map's centre unit on held-out images, in eval mode."""
    net.eval()
    erf = widerf.measure(net, tuple(images.shape[1:]), layer="0", inputs=images, samples=len(images))
    net.train()
    return {"std": erf.std, "std_interval": erf.interval("std"), "size": erf.size(), "trf": erf.trf_size}


def score(net: nn.Sequential, task: str, part: tuple[Tensor, Tensor], device: torch.device) -> float:
    """Accuracy, or the mean intersection over union."""
    if task == "cifar10":
        return accuracy(net, data.to_float(part[0]), part[1], device)
    found = camvid.miou(net.cpu(), part)
    net.to(device)
    return found


def run(about: Problem, setting: Setting, checkpoint: Path, device: torch.device) -> Record:
    """Train, or go on from the checkpoint; every epoch has a seed of its own, so that both give the same."""
    net = network(setting).to(device)
    optimizer = torch.optim.Adam(net.parameters(), setting.rate)
    per_epoch = max(1, len(about.train[0]) // setting.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, per_epoch * setting.epochs)
    images = data.to_float(about.held_out[0][:32]).to(device)
    parts: dict[str, Any] = {"net": net, "optimizer": optimizer, "schedule": schedule}
    state: dict[str, Any] = {"before": None, "curve": []}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        state = saved.pop("state")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    state["before"] = state["before"] or look(net, images)
    for epoch in range(len(state["curve"]), setting.epochs):
        stream = batches(about.train, 1000 * setting.seed + epoch, min(setting.batch, len(about.train[0])))
        for _, (x, y) in zip(range(per_epoch), stream, strict=False):
            loss = F.cross_entropy(net(x.to(device)), y.to(device), ignore_index=camvid.VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        state["curve"].append([loss.item(), score(net, setting.task, about.held_out, device)])
        with replacing(checkpoint) as part:
            torch.save({"state": state} | {name: kept.state_dict() for name, kept in parts.items()}, part)
    return state | {"after": look(net, images), "test_score": score(net, setting.task, about.test, device)}


def ledger(folder: Path) -> Ledger:
    """Return the table of finished runs."""
    return Ledger(folder / "paper-trained.jsonl", KEY)


def main() -> None:
    """Train what has no row yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("task", choices=list(BLOCKS))
    parser.add_argument("--data-dir", type=Path, default=data.default_dir(), help="folder of the data (or WIDERF_DATA)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/paper"), help="folder of unfinished runs")
    parser.add_argument("--device", default="auto")
    for field in fields(Setting)[1:]:
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    options = parser.parse_args()
    setting = Setting(*(getattr(options, name) for name in KEY))
    device = pick_device(options.device)
    about = problem(setting.task, options.data_dir, (setting.height, setting.width))
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    file = options.checkpoints / ("-".join(map(str, astuple(setting))) + ".pt")
    ledger(options.out).fill({astuple(setting): setting}, lambda todo: run(about, todo, file, device))


if __name__ == "__main__":
    main_guard(main)
