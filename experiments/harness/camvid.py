"""CamVid: frames of street scenes with a label for each pixel, small enough to train on two cores."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from experiments.harness import archives
from experiments.harness.data import cache_dir, to_float
from experiments.harness.inputs import InputError

CLASSES, VOID = 11, 11
_FOLDERS = ("train", "trainannot", "val", "valannot")


@dataclass(frozen=True)
class Frames:
    """Images uint8 (n, 3, height, width) and labels uint8 (n, height, width), 11 is void."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]


def load(data_dir: Path | None, size: tuple[int, int]) -> Frames:
    """Read ``camvid.tar`` under ``data_dir`` at ``size`` (height, width); decoded frames are cached elsewhere.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    path = None if data_dir is None else data_dir / "camvid.tar"
    if path is None or not path.is_file():
        raise InputError(f"--data-dir (or WIDERF_DATA) must hold camvid.tar, got {str(data_dir)!r}")
    key = hashlib.sha256(f"{path.resolve()} {path.stat().st_size} {size}".encode()).hexdigest()[:16]
    cached = cache_dir() / f"camvid-{key}.npz"
    arrays = archives.cached(cached, _FOLDERS, lambda: _decode(path, size))
    a = {name: torch.from_numpy(array) for name, array in arrays.items()}
    held = torch.arange(len(a["train"])) % 6 == 0
    held &= held.cumsum(0) <= 60
    return Frames(
        (a["train"][~held], a["trainannot"][~held]),
        (a["train"][held], a["trainannot"][held]),
        (a["val"], a["valannot"]),
    )


def _decode(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    arrays: dict[str, list[Any]] = {folder: [] for folder in _FOLDERS}
    for name, content in archives.read_files(path):
        folder = Path(name).parent.name
        if folder not in arrays:
            continue
        labels = folder.endswith("annot")
        image = archives.read_image(content, name, path)
        way = Image.Resampling.NEAREST if labels else Image.Resampling.BOX
        small = np.asarray((image if labels else image.convert("RGB")).resize(size[::-1], way))
        arrays[folder].append((name, small if labels else small.transpose(2, 0, 1)))
    counts = {folder: len(frames) for folder, frames in arrays.items()}
    if not all(counts.values()) or any(counts[one] != counts[f"{one}annot"] for one in ("train", "val")):
        raise InputError(f"camvid.tar must hold as many labels as images, and some, got {counts} in {str(path)!r}")
    in_order = {folder: sorted(frames, key=lambda frame: frame[0]) for folder, frames in arrays.items()}
    return {folder: np.stack([frame for _, frame in frames]) for folder, frames in in_order.items()}


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
