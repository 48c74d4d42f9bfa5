"""The tasks of the main job: what is learnt, from which images, by which network."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.compare.far_pair import far_pair
from experiments.compare.task import VALIDATION_SEED, Batch, Conv, Task, named
from experiments.harness import data
from experiments.harness.inputs import InputError

Options = Mapping[str, Any]
TASKS = ("far-pair", "cifar10", "plain20")


def make(name: str, *, data_dir: Path | None = None, options: Options | None = None, **overrides: object) -> Task:
    """Return the task of that name.

    Args:
        name: one of ``TASKS``, or ``module:callable`` for one of your own: called with ``options``, it returns a
            :class:`Task`.
        data_dir: folder that holds the images; unused by generated tasks and by your own.
        options: of that task, such as ``{"radius": 4, "depth": 6}`` for far-pair.
        overrides: fields of the task to replace; None leaves a field.

    Raises:
        InputError: unknown task, or data that cannot be read.
    """
    given = dict(options or {})
    if ":" in name:
        task = _own(name, given)
    elif name == "far-pair":
        task = far_pair(**{"radius": 4, **given})
    elif name in TASKS:
        task = (cifar10 if name == "cifar10" else plain20)(data_dir, **given)
    else:
        raise InputError(f"task must be one of {', '.join(TASKS)}, or module:callable, got {name!r}")
    return dataclasses.replace(task, **{key: value for key, value in overrides.items() if value is not None})  # type: ignore[arg-type]


def _own(name: str, options: Options) -> Task:
    module, _, attribute = name.partition(":")
    try:
        task = getattr(importlib.import_module(module), attribute)(**options)
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"task must be module:callable that returns a Task, got {name!r} ({error})") from error
    if not isinstance(task, Task):
        raise InputError(f"task must be module:callable that returns a Task, got a {type(task).__name__} from {name!r}")
    return task


def cifar10(data_dir: Path | None) -> Task:
    """Build the CIFAR-10 task: six 3×3 layers with batch normalisation, three scales, global average pooling."""

    def network(conv: Conv) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inner, outer, stride in ((3, 24, 2), (24, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 48, 1)):
            layers += [conv(inner, outer, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        return named(nn.Sequential(*layers), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)))

    return _on_cifar10(data_dir, "cifar10", network, target=0.5, steps=600)


def plain20(data_dir: Path | None, kernel: int = 3, width: int = 16, stem: int = 1) -> Task:
    """Build plain-20 on CIFAR-10, see :func:`plain20_network`."""
    return _on_cifar10(data_dir, "plain20", plain20_network(kernel, width, stem), target=0.3, steps=400)


def plain20_network(kernel: int = 3, width: int = 16, stem: int = 1) -> Callable[[Conv], nn.Sequential]:
    """Build plain-20 of He et al. (2016, § 4.2), without batch normalisation and without shortcuts.

    Args:
        kernel: taps on an axis of every convolution.
        width: channels of the first of three scales; the others have twice and four times as many.
        stem: stride of the first layer; 1 as in the paper, 2 for a quarter of the multiplications.

    Raises:
        InputError: an even kernel, or one of a single tap.
    """
    if kernel % 2 == 0 or kernel < 3:
        raise InputError(f"--kernel must be odd and at least 3, got {kernel}")

    def network(conv: Conv) -> nn.Sequential:
        layers: list[nn.Module] = []
        channels = 3
        for index in range(19):
            scale, first = (0, index == 0) if index < 7 else ((index - 1) // 6, (index - 1) % 6 == 0)
            stride, outer = (stem if index == 0 else 2 if first else 1), width * 2**scale
            layers += [conv(channels, outer, kernel, stride=stride, padding=kernel // 2), nn.ReLU()]
            channels = outer
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
        return named(nn.Sequential(*layers), head)

    return network


def _on_cifar10(
    data_dir: Path | None, name: str, network: Callable[[Conv], nn.Sequential], target: float, steps: int
) -> Task:
    images = data.cifar10(data_dir)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(VALIDATION_SEED))
    held_out, kept = order[:1000], order[1000:]

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in kept[torch.randperm(len(kept), generator=generator)].split(64)[:-1]:
                yield data.to_float(images.train[index]), images.train_labels[index]

    validation = data.to_float(images.train[held_out]), images.train_labels[held_out]
    return Task(
        name=name,
        network=network,
        batches=batches,
        validation=validation,
        test=(data.to_float(images.test), images.test_labels),
        erf_size=(3, 32, 32),
        erf_inputs=validation[0][:64],
        target=target,
        steps=steps,
        every=25,
        stop_at_target=False,
        lr=2e-3,
    )


@functools.lru_cache(maxsize=1)
def cached(
    name: str, data_dir: Path | None, options: tuple[tuple[str, Any], ...], overrides: tuple[tuple[str, Any], ...]
) -> Task:
    """``make``, once a process."""
    return make(name, data_dir=data_dir, options=dict(options), **dict(overrides))
