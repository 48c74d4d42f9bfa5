"""Train a stack of far-pair networks: one convolution of S groups does the work of S."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.compare.curve import BUDGET, Curve
from experiments.compare.far_pair import Stack
from experiments.compare.task import Batch, Task


def train(nets: Sequence[nn.Sequential], task: Task, seeds: Sequence[int]) -> tuple[list[Curve], float]:
    """Train network i on the batches of ``seeds[i]``, as ``training.train`` does one by one, in place.

    A run that has ended (at the target, or its loss is no number) leaves the stack. The learning rate is constant, as
    it is for every task that ends at its target.

    Returns:
        The curves, and the seconds of a training step of one network, looks left out.
    """
    streams, live = [task.batches(seed) for seed in seeds], list(range(len(nets)))
    curves, stack = [Curve(task.target) for _ in nets], Stack(nets).to(next(nets[0].parameters()).device)
    optimizer = torch.optim.Adam(stack.parameters(), task.lr)
    seconds, done, taken = 0.0, 0, 0
    while live:
        count = min(task.every, task.steps - done)
        started = time.perf_counter()
        losses = _steps(stack, optimizer, [streams[run] for run in live], count)
        seconds, done, taken = seconds + time.perf_counter() - started, done + count, taken + count * len(live)
        for run, loss, right in zip(live, losses.tolist(), _accuracies(stack, task.validation), strict=True):
            curves[run].look(done, right, loss)
        going = [i for i, run in enumerate(live) if curves[run].outcome == BUDGET and done < task.steps]
        for i in set(range(len(live))) - set(going):
            stack.unstack(i, nets[live[i]])
        if len(going) < len(live):
            _keep(stack, optimizer, going)
            live = [live[i] for i in going]
    return curves, seconds / taken


def _steps(stack: Stack, optimizer: torch.optim.Optimizer, streams: list[Iterator[Batch]], count: int) -> Tensor:
    """Take some steps and return the last loss of each network."""
    for _ in range(count):
        batches = [next(stream) for stream in streams]
        images = torch.cat([x for x, _ in batches], 1)
        labels = torch.stack([y for _, y in batches], 1)
        parameter = next(stack.parameters())
        logits = stack(images.to(parameter))
        losses = F.cross_entropy(logits.transpose(1, 2), labels.to(parameter.device), reduction="none").mean(0)
        optimizer.zero_grad()
        losses.sum().backward()  # no network's parameters are in another one's loss
        optimizer.step()
    return losses.detach()


@torch.no_grad()
def _accuracies(stack: Stack, validation: Batch) -> list[float]:
    """Return the share of images that each network classifies right."""
    right, parameter = 0, next(stack.parameters())
    for images, labels in zip(validation[0].split(64), validation[1].split(64), strict=True):
        guess = stack(images.to(parameter).expand(-1, stack.size, -1, -1)).argmax(2)
        right = right + (guess == labels.to(guess.device)[:, None]).sum(0)
    return (torch.as_tensor(right).double() / len(validation[1])).tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def _keep(stack: Stack, optimizer: torch.optim.Optimizer, index: list[int]) -> None:
    """Leave only these networks in the stack, with their moments in Adam."""
    for parameter in stack.parameters():
        parameter.grad, parameter.data = None, parameter.data[index]
        state = optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name][index]
    stack.size = len(index)
