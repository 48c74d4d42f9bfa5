"""Training made for a card: images stay there as bytes, are augmented there, and a step is one CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.harness import data
from experiments.harness.device import StepClock, autocast

VOID = 11  # label of pixels that are not scored; no class of images of things has it
_WARM = 3  # steps before a graph is captured, as torch asks


class Stepper:
    """Training steps of a model on buffers that stay where they are: on CUDA one graph, replayed; elsewhere plain.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> step = Stepper(net, torch.optim.Adam(net.parameters()), F.cross_entropy)
        >>> step(torch.ones(4, 3), torch.zeros(4, dtype=torch.long)).shape
        torch.Size([])
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.device = next(model.parameters()).device
        self._taken, self._graph = 0, None
        self._images: Tensor | None = None
        self._labels: Tensor | None = None
        self._value: Tensor = torch.zeros((), device=self.device)

    def _plain(self, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.device):
            value = self.loss(self.model(images), labels)
        self.optimizer.zero_grad(set_to_none=False)
        value.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return value.detach()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take one step and return its loss."""
        self._taken += 1
        if self.device.type != "cuda":
            return self._plain(images, labels)
        if self._images is None or self._labels is None:
            self._images, self._labels = images.clone(), labels.clone()
        self._images.copy_(images)
        self._labels.copy_(labels)
        if self._taken <= _WARM:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._value = self._plain(self._images, self._labels)
            torch.cuda.current_stream().wait_stream(stream)
            return self._value
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._value = self._plain(self._images, self._labels)
        self._graph.replay()
        return self._value


@dataclass(frozen=True)
class Pictures:
    """Images and labels on the device: uint8 (n, 3, h, w), and int64 (n,) or uint8 (n, h, w)."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    shift: int

    def to(self, device: torch.device) -> Pictures:
        """Return the same on ``device``."""
        train, test = (tuple(part.to(device) for part in side) for side in (self.train, self.test))
        return Pictures(train, test, self.shift)  # type: ignore[arg-type]


def batches(pictures: Pictures, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end, mirrored and shifted on the device; the same for the same seed in every arm.

    What is drawn comes from a generator on the CPU, so that it does not depend on the card.
    """
    images, labels = pictures.train
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(images), generator=generator).split(size)[:-1]:
            mirrored = bool(torch.rand(1, generator=generator) < 0.5)
            by = torch.randint(-pictures.shift, pictures.shift + 1, (2,), generator=generator).tolist()
            there = index.to(images.device)
            x, y = images[there].roll(by, (2, 3)), labels[there]
            y = y.roll(by, (1, 2)) if y.ndim > 1 else y
            if mirrored:
                x, y = x.flip(-1), y.flip(-1) if y.ndim > 1 else y
            yield data.to_float(x).contiguous(memory_format=torch.channels_last), y.long()


@torch.no_grad()
def score(net: nn.Module, images: Tensor, labels: Tensor, classes: int) -> float:
    """Percent of images that are named right, or mean intersection over union of pixels, void left out."""
    net.eval()
    confusion = torch.zeros(classes**2, dtype=torch.int64, device=images.device)
    for x, y in zip(images.split(100), labels.split(100), strict=True):
        with autocast(images.device):
            guess = net(data.to_float(x).contiguous(memory_format=torch.channels_last)).argmax(1)
        seen = y.long() != VOID
        confusion += torch.bincount(y[seen].long() * classes + guess[seen], minlength=classes**2)
    net.train()
    table = confusion.view(classes, classes).double()
    if labels.ndim == 1:
        return 100 * float(table.diag().sum() / table.sum())
    union = table.sum(0) + table.sum(1) - table.diag()
    return 100 * float((table.diag()[union > 0] / union[union > 0]).mean())


@dataclass(frozen=True)
class Outcome:
    """What one training gave: last score, scores on the way, last loss (None: no number), seconds of a step."""

    score: float
    curve: list[float]
    loss: float | None
    seconds_a_step: float | None


def train(
    net: nn.Module, pictures: Pictures, *, steps: int, size: int, rate: float, seed: int, classes: int, looks: int = 6
) -> Outcome:
    """Train with AdamW, the rate rising over a seventh of the steps and falling by a half cosine.

    A loss that is no number ends the training at the next look; it is an outcome, not an error.
    """
    device = pictures.train[0].device
    net = net.to(device, memory_format=torch.channels_last).train()
    # A rate that lives on the device can change between replays of one graph.
    lr = torch.tensor(rate, device=device)
    card = device.type == "cuda"
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.02, capturable=card, foreach=card)
    step = Stepper(net, optimizer, lambda out, y: F.cross_entropy(out.float(), y, ignore_index=VOID))
    clock, curve, value = StepClock(device), list[float](), float("nan")
    for number, (x, y) in zip(range(1, steps + 1), batches(pictures, size, seed), strict=False):
        share = number / steps
        lr.fill_(rate * min(1.0, 7 * share) * 0.5 * (1 + math.cos(math.pi * max(0.0, share - 1 / 7) * 7 / 6)))
        with clock:
            loss = step(x, y)
        if number % max(1, steps // looks) == 0 or number == steps:
            value = float(loss)
            curve.append(round(score(net, *pictures.test, classes), 3))
            if not math.isfinite(value):
                break
    return Outcome(curve[-1], curve, value if math.isfinite(value) else None, clock.seconds_a_step)
