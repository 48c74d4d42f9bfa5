"""Train one network of one arm and look at it: accuracy, steps to the target, ERF before and after."""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import widerf
from experiments.compare.curve import ARRIVED, Curve
from experiments.compare.task import Task
from experiments.harness import distributed
from experiments.harness.device import StepClock, autocast
from experiments.harness.runs import Record
from widerf.errors import ClippedWarning, DeadUnitError


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    """Share of images classified right, in eval mode."""
    net.eval()
    right = 0
    with autocast(device):
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            right += int((net(x.to(device)).argmax(1).cpu() == y).sum())
    net.train()
    return right / len(labels)


def penalty(net: nn.Sequential, task: Task) -> Tensor | float:
    """Return the task's penalty on the ERF; nothing in a step whose unit is dead: it has no field to widen."""
    try:
        return task.penalty * widerf.erf_penalty(net, task.erf_size, layer="features")
    except DeadUnitError:
        return 0.0


def train(net: nn.Sequential, task: Task, seed: int, device: torch.device) -> tuple[Curve, float | None]:
    """Train with Adam on the batches of ``seed``.

    The learning rate falls by a half cosine over ``task.steps``; it stays where it is if the run ends at the target.
    A loss that is no number ends the run at the next look. The loss of the record is without ``task.penalty``'s part.

    Returns:
        The curve, and the seconds of a step: the first one (warm-up) and the looks are left out.
    """
    optimizer = torch.optim.Adam(net.parameters(), task.lr)
    floor = task.lr if task.stop_at_target else 0.0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps, eta_min=floor)
    curve, clock = Curve(task.target), StepClock(device)
    alone = net if task.faster is None else task.faster(net)
    model = distributed.spread(alone)
    model.train()
    for step, batch in zip(range(1, task.steps + 1), task.batches(seed), strict=False):
        x, y = map(distributed.share, batch)
        with clock:
            with autocast(device):
                loss = F.cross_entropy(model(x.to(device)), y.to(device))
            whole = loss + penalty(net, task) if task.penalty else loss
            optimizer.zero_grad()
            whole.backward()
            optimizer.step()
            schedule.step()
        if step % task.every == 0 or step == task.steps:
            curve.look(step, accuracy(alone, *task.validation, device), loss.item())
            if curve.diverged or (task.stop_at_target and curve.outcome == ARRIVED):
                break
    return curve, clock.seconds_a_step


def erf_of(net: nn.Module, task: Task, seed: int, samples: int) -> widerf.ERF | None:
    """Measure the ERF of the centre unit of the last map, on real images or on N(0, 1); None if the unit is dead."""
    device = next(net.parameters()).device
    inputs = task.erf_inputs[:samples].to(device) if task.erf_inputs is not None else None
    generator = torch.Generator(device).manual_seed(seed)
    net.eval()
    with warnings.catch_warnings():
        # How much the border cuts off is in the record and stands under each map of the report.
        warnings.simplefilter("ignore", ClippedWarning)
        try:
            return widerf.measure(
                net, task.erf_size, layer="features", inputs=inputs, samples=samples, generator=generator
            )
        except DeadUnitError:  # training can kill every ReLU on the way: an outcome, not an error
            return None


def figures(erf: widerf.ERF | None) -> Record | None:
    """Figures of an ERF for one line of results; None for a dead unit."""
    if erf is None:
        return None
    return {
        "std": erf.std,
        "two_sigma_size": erf.size(),
        "excess_kurtosis": erf.excess_kurtosis,
        "clipped": erf.clipped,
        "center": erf.center,
        "trf_size": erf.trf_size,
        "map": [[round(value, 8) for value in row] for row in erf.map.tolist()],
    }


def _whole_maps(net: nn.Sequential, task: Task, seed: int, device: torch.device) -> float | None:
    """Return the seconds of a step without ``task.faster``, which helps some arms alone: seconds are to be compared."""
    few = task.validation[0][:1], task.validation[1][:1]
    plain = dataclasses.replace(task, faster=None, validation=few, steps=8, every=9)
    return train(copy.deepcopy(net), plain, seed, device)[1]


def one_run(net: nn.Sequential, task: Task, seed: int, device: torch.device, erf_samples: int) -> Record:
    """Train and measure one network; the record holds everything that the report shows.

    However the run ends, there is a record: ``outcome`` is ``arrived``, ``budget`` or ``diverged``, and ``erf_after``
    is None where training left a dead unit.
    """
    started = time.perf_counter()
    net.to(device)
    before = figures(erf_of(net, task, seed, erf_samples))
    whole_maps = _whole_maps(net, task, seed, device) if task.faster is not None else None
    curve, seconds_a_step = train(net, task, seed, device)
    after = None if curve.diverged else figures(erf_of(net, task, seed, erf_samples))
    test = accuracy(net, *task.test, device) if task.test is not None else None
    return {
        **curve.record(),
        "test_accuracy": test,
        "erf_before": before,
        "erf_after": after,
        "seconds": {"step": whole_maps or seconds_a_step, "run": round(time.perf_counter() - started, 2)},
    }
