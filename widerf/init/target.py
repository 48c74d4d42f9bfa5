"""Strengths for a wanted gain of the whole network: the least total change that predicts it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from widerf._checks import require
from widerf.convolutions.convolution import Convolution
from widerf.convolutions.sensitivity import sensitivity
from widerf.init.outlook import Outlook
from widerf.init.plan import plan, solve_ahead
from widerf.init.rescale import execute
from widerf.init.verdict import NO_EFFECT
from widerf.profile.network import allocate, largest_gain
from widerf.profile.single import strength_of
from widerf.report import Verdict
from widerf.trace.sandbox import untouched
from widerf.trace.scene import Scene

# What a kernel is to get: relative energies and strength, or why it is left alone.
Shapes: TypeAlias = Callable[[Convolution], "tuple[Tensor, float] | Verdict"]

_CLOSE = 1e-3  # relative error of the predicted gain that ends the search
_TRIALS = 12
_PROBE = 0.5  # strength towards which a layer's part in the network's variance is taken


@dataclass(frozen=True)
class Weighted:
    """The network's variance as a linear function of its kernels' variances: docs/theory.md (4).

    Attributes:
        kernels: those whose widening widens the network.
        weights: network variance per variance of the kernel, in input pixels² per tap².
        variance: of the network now.
    """

    kernels: list[Convolution]
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
        return lambda kernel: found.get(kernel.name, NO_EFFECT)


def weigh(scene: Scene, kernels: Sequence[Convolution]) -> Weighted:
    """Return how much each kernel's variance counts in the network's.

    The share of paths that go through a layer, its jump and its dilation are all in one number: by how much the
    predicted variance answers if the layer's tap energies move from uniform towards soft corners (:func:`sensitivity`).
    """
    found = sensitivity(scene, kernels)
    solve_ahead(kernels, _PROBE)
    kept, weights = [], []
    for kernel in kernels:
        if kernel.offsets is not None or kernel.nothing_to_gain() is not None or kernel.name not in found.slopes:
            continue
        half = kernel.target_energies(_PROBE)
        answer = float((found.slopes[kernel.name] * (half - 1)).sum())
        spread = sum((x**2 for x in kernel.spacing), start=0.0) / kernel.rank
        widening = (kernel.std(half) ** 2 - kernel.std(kernel.target_energies(0.0)) ** 2) / spread
        if answer > 1e-9 * found.variance:
            kept.append(kernel)
            weights.append(answer / widening)
    return Weighted(kept, weights, found.variance)


def _trial(outlook: Outlook, kernels: Sequence[Convolution], chosen: set[str], shapes: Shapes) -> float:
    """Return the predicted std of the model as ``shapes`` would make it; the model comes back as it was."""
    with untouched(outlook.scene.model):
        changes = plan(kernels, chosen, True, shapes, None)
        for change in changes:
            execute(change, None, None, dry_run=False)
        std, problem = outlook.after(changes)
    if std is None:
        raise ValueError(f"target must leave a model whose ERF can be predicted: {problem}")
    return std


def shapes_for(
    outlook: Outlook, kernels: Sequence[Convolution], chosen: set[str], target: float, cap: float = 1.0
) -> Shapes:
    """Return the profiles of least total KL with which the predicted std of the network is ``target`` times today's.

    :func:`widerf.profile.allocate` solves the linear model; the network's answer is not quite linear, so the gain asked
    of the model is corrected until the prediction for the re-weighted network is right to 0.1 %.

    Raises:
        ValueError: if ``target`` is below 1 or above what the network can have at strength ``cap``.
    """
    require(isinstance(target, (int, float)) and math.isfinite(target), "target", "be a number", target, TypeError)
    require(target >= 1.0, "target", "be at least 1: a ratio of stds", target)
    if outlook.std is None:
        raise ValueError(f"target must be given for a model whose ERF can be predicted: {outlook.problem}")
    today = outlook.std
    weighted = weigh(outlook.scene, [kernel for kernel in kernels if kernel.name in chosen])
    highest = largest_gain(*weighted.cells(), cap=cap, fixed=weighted.fixed()) if weighted.kernels else 1.0

    def reached(gain: float) -> float:
        return _trial(outlook, kernels, chosen, weighted.shapes(gain, cap)) / today

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
