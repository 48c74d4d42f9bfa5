"""A CIFAR-10 of twenty images a split."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, classes: int = 10) -> Path:
    for split, label in itertools.product(("train", "test"), range(classes)):
        path = folder / "cifar10" / split / f"class{label}"
        path.mkdir(parents=True)
        for n in range(2):
            Image.fromarray(np.full((32, 32, 3), 20 * label + n, np.uint8)).save(path / f"{n}.png")
    return folder
