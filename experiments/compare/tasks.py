"""The tasks of the main job: what is learnt, from which images, by which network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.harness import data
from experiments.harness.inputs import InputError

Conv = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]
# Validation batches are drawn or held out once, the same for every run.
_VALIDATION_SEED = 20161


@dataclass(frozen=True)
class Task:
    """One task. ``Task.make(name, …)`` gives it ready for use.

    Attributes:
        name: as on the command line.
        network: from a convolution class to a network with the parts ``features`` (its output is the map whose ERF is
            measured) and ``head``.
        batches: from a seed to an endless stream of ``(images, labels)``.
        validation: held-out images and labels; the steps to the target are counted on them.
        test: images and labels that are looked at once, after training; None where data are generated without end.
        erf_size: (channels, height, width) of the input on which the ERF is measured, large enough for the dense TRF.
        erf_inputs: real images for the ERF, or None for N(0, 1).
        target: validation accuracy that counts as learnt.
        steps: longest training, in steps.
        every: steps between two looks at the validation accuracy.
        stop_at_target: end the run when the target is reached.
        lr: learning rate of Adam, the same in every arm.
    """

    name: str
    network: Callable[[Conv], nn.Sequential]
    batches: Callable[[int], Iterator[Batch]]
    validation: Batch
    test: Batch | None
    erf_size: tuple[int, int, int]
    erf_inputs: Tensor | None
    target: float
    steps: int
    every: int
    stop_at_target: bool
    lr: float

    @staticmethod
    def make(name: str, *, data_dir: Path | None = None, radius: int = 4, **overrides: object) -> Task:
        """Return the task of that name; ``overrides`` that are not None replace its fields.

        Raises:
            InputError: unknown task, or data that cannot be read.
        """
        if name not in TASKS:
            raise InputError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
        task = far_pair(radius) if name == "far-pair" else cifar10(data_dir)
        return dataclasses.replace(task, **{key: value for key, value in overrides.items() if value is not None})  # type: ignore[arg-type]


TASKS = ("far-pair", "cifar10")


class Centre(nn.Module):
    """Read out the centre unit of a map: (batch, channels, height, width) to (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the centre unit."""
        return x[:, :, x.shape[2] // 2, x.shape[3] // 2]


# ── far-pair ──────────────────────────────────────────────────────────────────────────────────────────────────────


def far_pair_batch(n: int, radius: int, side: int, generator: torch.Generator) -> Batch:
    """Draw n images of far-pair: do the two far markers bear the same sign?

    An image is N(0, 0.5²) noise with single pixels ±3 at centre + p and centre − p, p uniform over the offsets of
    maximum norm ``radius``. Neither marker alone says anything about the label.

    Returns:
        Images (n, 1, side, side) and labels (n,): 1 where the signs agree.

    Example:
        >>> x, y = far_pair_batch(4, radius=2, side=7, generator=torch.Generator().manual_seed(0))
        >>> x.shape, (x.abs() == 3).flatten(1).sum(1).tolist()
        (torch.Size([4, 1, 7, 7]), [2, 2, 2, 2])
    """
    images = torch.randn(n, 1, side, side, generator=generator) * 0.5
    axis = torch.arange(-radius, radius + 1)
    square = torch.cartesian_prod(axis, axis)
    ring = square[square.abs().amax(1) == radius]
    p = ring[torch.randint(len(ring), (n,), generator=generator)]
    signs = torch.randint(2, (n, 2), generator=generator) * 2 - 1
    centre, index = side // 2, torch.arange(n)
    for k, side_of in enumerate((1, -1)):
        at = centre + side_of * p
        images[index, 0, at[:, 0], at[:, 1]] = 3.0 * signs[:, k]
    return images, (signs[:, 0] == signs[:, 1]).long()


def far_pair(radius: int) -> Task:
    """Build the far-pair task, read out at the centre unit of six 3×3 layers of 16 channels."""
    if not 1 <= radius <= 6:
        raise InputError(f"--radius must be from 1 to 6, the reach of six 3×3 layers, got {radius}")
    side = 2 * radius + 3

    def network(conv: Conv) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (1, 16, 16, 16, 16, 16):
            layers += [conv(channels, 16, 3, padding=1), nn.ReLU()]
        return _named(nn.Sequential(*layers), nn.Sequential(Centre(), nn.Linear(16, 2)))

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield far_pair_batch(64, radius, side, generator)

    validation = far_pair_batch(500, radius, side, torch.Generator().manual_seed(_VALIDATION_SEED))
    return Task(
        name="far-pair",
        network=network,
        batches=batches,
        validation=validation,
        test=None,
        erf_size=(1, 41, 41),
        erf_inputs=None,
        target=0.9,
        steps=800,
        every=10,
        stop_at_target=True,
        lr=2e-3,
    )


# ── CIFAR-10 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def cifar10(data_dir: Path | None) -> Task:
    """Build the CIFAR-10 task: six 3×3 layers with batch normalisation, three scales, global average pooling."""
    images = data.cifar10(data_dir)
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(_VALIDATION_SEED))
    held_out, kept = order[:1000], order[1000:]

    def network(conv: Conv) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inner, outer, stride in ((3, 24, 2), (24, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 48, 1)):
            layers += [conv(inner, outer, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        return _named(nn.Sequential(*layers), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)))

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


def _named(features: nn.Module, head: nn.Module) -> nn.Sequential:
    net = nn.Sequential()
    net.add_module("features", features)
    net.add_module("head", head)
    return net


@functools.lru_cache(maxsize=1)
def cached(name: str, data_dir: Path | None, radius: int, overrides: tuple[tuple[str, object], ...]) -> Task:
    """``Task.make``, once a process."""
    return Task.make(name, data_dir=data_dir, radius=radius, **dict(overrides))
