"""Real images, read once into a cache outside the project."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.harness import archives
from experiments.harness.inputs import InputError

_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Images:
    """Labelled images: uint8 (n, 3, height, width) and int64 (n,), for training and for the last look."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def default_dir() -> Path | None:
    """Return the data directory that the environment names, if it names one."""
    return Path(os.environ["WIDERF_DATA"]) if os.environ.get("WIDERF_DATA") else None


def cache_dir() -> Path:
    """Return where decoded and downloaded images are kept: ``$XDG_CACHE_HOME/widerf``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "widerf"


def to_float(images: Tensor) -> Tensor:
    """From uint8 to float32 of about zero mean and unit variance: (x/255 − 0.5) / 0.25."""
    return (images.float() / 255 - 0.5) / 0.25


def cifar10(data_dir: Path | None) -> Images:
    """Return CIFAR-10 from a folder tree or tar under ``data_dir``, or by torchvision's download without one.

    The tree is ``[cifar10/]{train,test}/<class>/<image>``, as torchvision's ``ImageFolder`` reads it; a tar holds the
    same.

    Raises:
        InputError: nothing of that layout is there, or an image cannot be read.
    """
    if data_dir is None:
        return _download_cifar10()
    source = _find(data_dir)
    stamp = source.stat()
    key = hashlib.sha256(f"{source.resolve()} {stamp.st_size} {stamp.st_mtime_ns}".encode()).hexdigest()[:16]
    cached = cache_dir() / f"cifar10-{key}.npz"
    # A folder's own time does not change with the images deep inside it: only a tar is taken from the cache.
    if not source.is_file():
        return _decode(source)
    names = list(Images.__dataclass_fields__)
    arrays = archives.cached(cached, names, lambda: {k: v.numpy() for k, v in vars(_decode(source)).items()})
    return Images(*(torch.from_numpy(arrays[name]) for name in names))


def _find(data_dir: Path) -> Path:
    if not data_dir.is_dir():
        raise InputError(f"--data-dir must be an existing folder, got {str(data_dir)!r}")
    for folder in (data_dir / "cifar10", data_dir):
        if all((folder / split).is_dir() for split in _SPLITS):
            return folder
    for tar in sorted(data_dir.glob("cifar10*.tar*")):
        return tar
    raise InputError(
        f"--data-dir must hold cifar10/train and cifar10/test with a folder a class, or cifar10.tar(.gz, .xz), "
        f"got {str(data_dir)!r}"
    )


def _decode(source: Path) -> Images:
    found: dict[str, list[tuple[str, str, np.ndarray]]] = {split: [] for split in _SPLITS}
    for name, content in tqdm(archives.read_files(source), desc=f"reading {source.name}", unit="image", disable=None):
        parts = Path(name).parts
        if len(parts) < 3 or parts[-3] not in _SPLITS or parts[-1].startswith("."):
            continue
        image = np.asarray(archives.read_image(content, name, source, (32, 32)).convert("RGB"))
        found[parts[-3]].append((parts[-2], name, image))
    classes = sorted({label for label, _, _ in found["train"]})
    if len(classes) != 10 or {label for label, _, _ in found["test"]} != set(classes):
        raise InputError(f"train and test must hold the same 10 classes, got {classes} in {str(source)!r}")
    tensors: list[Tensor] = []
    for split in _SPLITS:
        rows = sorted(found[split], key=lambda row: row[1])
        tensors.append(torch.from_numpy(np.stack([image for _, _, image in rows])).permute(0, 3, 1, 2).contiguous())
        tensors.append(torch.tensor([classes.index(label) for label, _, _ in rows]))
    return Images(*tensors)


def _download_cifar10() -> Images:
    from torchvision.datasets import CIFAR10

    tensors: list[Tensor] = []
    for train in (True, False):
        try:
            split = CIFAR10(str(cache_dir()), train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"CIFAR-10 could not be downloaded ({error}); give --data-dir or WIDERF_DATA a folder that holds it"
            ) from error
        tensors += [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)]
    return Images(*tensors)
