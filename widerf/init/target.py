"""Strengths for a wanted gain of the whole network: the least total change that predicts it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from widerf._checks import require
from widerf.convolutions.convolution import Kernel
from widerf.convolutions.sensitivity import sensitivity
from widerf.init.plan import plan
from widerf.init.rescale import execute
from widerf.profile.network import allocate, largest_gain
from widerf.profile.single import strength_of
from widerf.trace.sandbox import untouched

# What a kernel is to get: relative energies and strength, or why it is left alone.
Shapes: TypeAlias = Callable[[Kernel], "tuple[Tensor, float] | str"]

_CLOSE = 1e-3  # relative error of the predicted gain that ends the search
_TRIALS = 12
_OFF = "widening it does not widen the network's ERF"


@dataclass(frozen=True)
class Weighted:
    """The network's variance as a linear function of its kernels' variances: docs/theory.md (4).

    Attributes:
        kernels: those whose widening widens the network.
        weights: network variance per variance of the kernel, in input pixels² per tap².
        variance: of the network now.
    """

    kernels: list[Kernel]
    weights: list[float]
    variance: float

    def cells(self) -> tuple[list[tuple[int, ...]], list[float]]:
        """Return sizes and weights of all cells: output phases of a transposed kernel count as kernels of their own."""
        sizes = [cell.size for kernel in self.kernels for cell in kernel.cells]
        pairs = zip(self.kernels, self.weights, strict=True)
        return sizes, [weight / len(kernel.cells) for kernel, weight in pairs for _ in kernel.cells]

    def fixed(self) -> float:
        """Return the part of the variance that no kernel here carries."""
        sizes, weights = self.cells()
        own = sum(w * sum((k**2 - 1) / 12 for k in size) / len(size) for size, w in zip(sizes, weights, strict=True))
        return max(self.variance - own, 0.0)

    def shapes(self, gain: float, cap: float) -> Shapes:
        """Return the relative energies of least total KL for a gain of the linear model."""
        sizes, weights = self.cells()
        limit = largest_gain(sizes, weights, cap=cap, fixed=self.fixed())
        profiles = iter(allocate(sizes, weights, min(gain, limit), cap=cap, fixed=self.fixed()))
        found: dict[str, tuple[Tensor, float]] = {}
        for kernel in self.kernels:
            own = [next(profiles) for _ in kernel.cells]
            strength = sum(map(strength_of, own)) / len(own)
            found[kernel.name] = (kernel.assemble(own), strength)
        return lambda kernel: found.get(kernel.name, _OFF)


def weigh(model: nn.Module, kernels: Sequence[Kernel], input_size: Sequence[int]) -> Weighted:
    """Return how much each kernel's variance counts in the network's.

    The share of paths that go through a layer, its jump and its dilation are all in one number: by how much the
    predicted variance answers if the layer's tap energies move from uniform towards soft corners (:func:`sensitivity`).
    """
    found = sensitivity(model, input_size, kernels)
    kept, weights = [], []
    for kernel in kernels:
        if kernel.offsets is not None or kernel.nothing_to_gain() is not None or kernel.name not in found.slopes:
            continue
        half = kernel.shape(0.5)
        answer = float((found.slopes[kernel.name] * (half - 1)).sum())
        spread = sum((x**2 for x in kernel.spacing), start=0.0) / kernel.rank
        widening = (kernel.std(half) ** 2 - kernel.std(kernel.shape(0.0)) ** 2) / spread
        if answer > 1e-9 * found.variance:
            kept.append(kernel)
            weights.append(answer / widening)
    return Weighted(kept, weights, found.variance)


def predicted_std(model: nn.Module, input_size: Sequence[int]) -> float:
    """Return the predicted std of the network's ERF; the warning about clipping is the caller's to give."""
    from widerf.erf.prediction import predict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(predict(model, input_size).std)


def _trial(model: nn.Module, kernels: Sequence[Kernel], chosen: set[str], shapes: Shapes, size: Sequence[int]) -> float:
    """Return the predicted std of the model as ``shapes`` would make it; the model comes back as it was."""
    with untouched(model):
        for step in plan(list(kernels), chosen, True, shapes, None):
            execute(step, None, None, dry_run=False)
        return predicted_std(model, size)


def shapes_for(
    model: nn.Module,
    kernels: Sequence[Kernel],
    chosen: set[str],
    target: float,
    input_size: Sequence[int],
    cap: float = 1.0,
) -> Shapes:
    """Return the profiles of least total KL with which the predicted std of the network is ``target`` times today's.

    :func:`widerf.profile.allocate` solves the linear model; the network's answer is not quite linear, so the gain asked
    of the model is corrected until the prediction for the re-weighted network is right to 0.1 %.

    Raises:
        ValueError: if ``target`` is below 1 or above what the network can have at strength ``cap``.
    """
    require(isinstance(target, (int, float)) and math.isfinite(target), "target", "be a number", target, TypeError)
    require(target >= 1.0, "target", "be at least 1: a ratio of stds", target)
    with torch.no_grad():
        weighted = weigh(model, [kernel for kernel in kernels if kernel.name in chosen], input_size)
    today = predicted_std(model, input_size)
    highest = largest_gain(*weighted.cells(), cap=cap, fixed=weighted.fixed()) if weighted.kernels else 1.0

    def reached(gain: float) -> float:
        return _trial(model, kernels, chosen, weighted.shapes(gain, cap), input_size) / today

    limit = reached(highest) if weighted.kernels else 1.0
    rule = f"be at most {limit:.3f}, the largest gain that this network can have at strength {cap:g}"
    require(target <= limit * (1 + _CLOSE), "target", rule, target)
    if target >= limit:
        return weighted.shapes(highest, cap)
    low, high, at_low, at_high = 1.0, highest, 1.0, limit
    asked = target if low < target < high else (low + high) / 2
    for _ in range(_TRIALS):
        got = reached(asked)
        if abs(got / target - 1) < _CLOSE:
            break
        if got < target:
            low, at_low = asked, got
        else:
            high, at_high = asked, got
        line = low + (high - low) * (target - at_low) / (at_high - at_low) if at_high > at_low else low
        asked = min(max(line, low + 0.05 * (high - low)), high - 0.05 * (high - low))
    return weighted.shapes(asked, cap)
