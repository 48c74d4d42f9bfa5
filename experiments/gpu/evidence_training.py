"""Training made for a card: images stay there as bytes, are augmented there, and a step of all arms is one graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.harness import data
from experiments.harness.device import StepClock, autocast

VOID = 11  # label of pixels that are not scored; no class of images of things has it
_WARM = 3  # steps before a graph is captured, as torch asks


Loss = Callable[[Tensor, Tensor], Tensor]


class Stepper:
    """Training steps of models side by side on one batch, on buffers that stay: on CUDA one graph, elsewhere plain.

    Each model has a stream of its own within the graph: small ones fill the device together.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> step = Stepper([net], [torch.optim.Adam(net.parameters())], F.cross_entropy)
        >>> step(torch.ones(4, 3), torch.zeros(4, dtype=torch.long)).shape
        torch.Size([1])
    """

    def __init__(self, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], loss: Loss) -> None:
        self.models, self.optimizers, self.loss = list(models), list(optimizers), loss
        self.device = next(self.models[0].parameters()).device
        self._taken, self._graph = 0, None
        self._images: Tensor | None = None
        self._labels: Tensor | None = None
        self._values: Tensor = torch.zeros(len(self.models), device=self.device)
        count = len(self.models) if self.device.type == "cuda" else 0
        self._streams = [torch.cuda.Stream(self.device) for _ in range(count)]

    def _one(self, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(self.device):
            value = self.loss(model(images), labels)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return value.detach()

    def _all(self, images: Tensor, labels: Tensor) -> Tensor:
        pairs = list(zip(self.models, self.optimizers, strict=True))
        if not self._streams:
            return torch.stack([self._one(*pair, images, labels) for pair in pairs])
        here, values = torch.cuda.current_stream(self.device), []
        for pair, stream in zip(pairs, self._streams, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                values.append(self._one(*pair, images, labels))
        for stream in self._streams:
            here.wait_stream(stream)
        return torch.stack(values)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take one step with every model and return their losses."""
        self._taken += 1
        if self.device.type != "cuda":
            return self._all(images, labels)
        if self._images is None or self._labels is None:
            self._images, self._labels = images.clone(), labels.clone()
        self._images.copy_(images)
        self._labels.copy_(labels)
        if self._taken <= _WARM:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self._values = self._all(self._images, self._labels)
            torch.cuda.current_stream(self.device).wait_stream(side)
            return self._values
        if self._graph is None:
            torch.cuda.synchronize(self.device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._values = self._all(self._images, self._labels)
        self._graph.replay()
        return self._values


@dataclass(frozen=True)
class Pictures:
    """Images and labels on the device: uint8 (n, 3, h, w), and int64 (n,) or uint8 (n, h, w).

    Attributes:
        held_out: is looked at on the way, and chooses rates.
        test: is looked at once, at the end.
        shift: pixels by which images are shifted at most.
    """

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    shift: int

    def to(self, device: torch.device) -> Pictures:
        """Return the same on ``device``."""
        sides = (self.train, self.held_out, self.test)
        train, held_out, test = (tuple(part.to(device) for part in side) for side in sides)
        return Pictures(train, held_out, test, self.shift)  # type: ignore[arg-type]


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
    """What one training gave.

    Attributes:
        score: on the test images, None if they were not looked at.
        curve: scores on held-out images along the way; it ends where the loss was no number.
        loss: the last one; None if it is no number.
    """

    score: float | None
    curve: list[float]
    loss: float | None


@dataclass(frozen=True)
class Plan:
    """What trainings have in common."""

    steps: int
    size: int
    classes: int
    looks: int = 6
    last_look: bool = True


def _stepper(nets: Sequence[nn.Module], lrs: Sequence[Tensor]) -> Stepper:
    """Return the steps of networks on one device: AdamW, cross entropy without void."""
    card = lrs[0].device.type == "cuda"
    optimizers = [
        torch.optim.AdamW(net.parameters(), lr, weight_decay=0.02, capturable=card, foreach=card)
        for net, lr in zip(nets, lrs, strict=True)
    ]
    return Stepper(nets, optimizers, lambda out, y: F.cross_entropy(out.float(), y, ignore_index=VOID))


def train(
    nets: Sequence[nn.Module], pictures: Pictures, plan: Plan, rates: Sequence[float], seed: int
) -> list[Outcome]:
    """Train networks side by side on the same batches with AdamW, each at its own rate.

    A rate rises over a seventh of the steps and falls by a half cosine. A loss that is no number is an outcome, not an
    error: that network's curve ends, and the others go on.
    """
    device = pictures.train[0].device
    nets = [net.to(device, memory_format=torch.channels_last).train() for net in nets]
    # A rate that lives on the device can change between replays of one graph.
    lrs = [torch.tensor(rate, device=device) for rate in rates]
    step = _stepper(nets, lrs)
    curves: list[list[float]] = [[] for _ in nets]
    last = [0.0] * len(nets)
    for number, (x, y) in zip(range(1, plan.steps + 1), batches(pictures, plan.size, seed), strict=False):
        share = number / plan.steps
        factor = min(1.0, 7 * share) * 0.5 * (1 + math.cos(math.pi * max(0.0, share - 1 / 7) * 7 / 6))
        for lr, rate in zip(lrs, rates, strict=True):
            lr.fill_(rate * factor)
        losses = step(x, y)
        if number % max(1, plan.steps // plan.looks) == 0 or number == plan.steps:
            before, last = last, losses.tolist()
            for net, curve, value in zip(nets, curves, before, strict=True):
                if math.isfinite(value):
                    curve.append(round(score(net, *pictures.held_out, plan.classes), 3))
    scores = [score(net, *pictures.test, plan.classes) if plan.last_look else None for net in nets]
    return [
        Outcome(None if value is None else round(value, 4), curve, loss if math.isfinite(loss) else None)
        for value, curve, loss in zip(scores, curves, last, strict=True)
    ]


def seconds_a_step(net: nn.Module, pictures: Pictures, plan: Plan) -> float | None:
    """Measure the mean seconds of a training step of a network that has the device to itself."""
    device = pictures.train[0].device
    net = net.to(device, memory_format=torch.channels_last).train()
    step = _stepper([net], [torch.tensor(1e-3, device=device)])
    x, y = next(batches(pictures, plan.size, 0))
    for _ in range(_WARM + 2):
        step(x, y)
    clock = StepClock(device)
    for _ in range(plan.steps):
        with clock:
            step(x, y)
    return clock.seconds_a_step
