"""CamVid: frames of street scenes with a label for each pixel, small enough to train on two cores."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from experiments.harness.data import cache_dir, to_float
from experiments.harness.inputs import InputError

CLASSES, VOID = 11, 11


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
