"""The tasks of the main job: what is learnt, from which images, by which network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from experiments.compare.far_pair import far_pair
from experiments.compare.task import VALIDATION_SEED, Batch, Conv, Task, named
from experiments.harness import data
from experiments.harness.inputs import InputError

TASKS = ("far-pair", "cifar10")


def make(name: str, *, data_dir: Path | None = None, radius: int = 4, depth: int = 6, **overrides: object) -> Task:
    """Return the task of that name; ``overrides`` that are not None replace its fields.

    Raises:
        InputError: unknown task, or data that cannot be read.
    """
    if name not in TASKS:
        raise InputError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    task = far_pair(radius, depth) if name == "far-pair" else cifar10(data_dir)
    return dataclasses.replace(task, **{key: value for key, value in overrides.items() if value is not None})  # type: ignore[arg-type]


def cifar10(data_dir: Path | None) -> Task:
    """Build the CIFAR-10 task: six 3×3 layers with batch normalisation, three scales, global average pooling."""
    images = data.cifar10(data_dir)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(VALIDATION_SEED))
    held_out, kept = order[:1000], order[1000:]

    def network(conv: Conv) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inner, outer, stride in ((3, 24, 2), (24, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 48, 1)):
            layers += [conv(inner, outer, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        return named(nn.Sequential(*layers), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)))

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in kept[torch.randperm(len(kept), generator=generator)].split(64)[:-1]:
                yield data.to_float(images.train[index]), images.train_labels[index]

    validation = data.to_float(images.train[held_out]), images.train_labels[held_out]
    return Task(
        name="cifar10",
        network=network,
        batches=batches,
        validation=validation,
        test=(data.to_float(images.test), images.test_labels),
        erf_size=(3, 32, 32),
        erf_inputs=validation[0][:64],
        target=0.5,
        steps=600,
        every=25,
        stop_at_target=False,
        lr=2e-3,
    )


@functools.lru_cache(maxsize=1)
def cached(name: str, data_dir: Path | None, radius: int, overrides: tuple[tuple[str, object], ...]) -> Task:
    """``make``, once a process."""
    return make(name, data_dir=data_dir, radius=radius, **dict(overrides))
