r"""The part of a gradient that all positions of a channel share, which batch statistics make and remove.

Backwards through batch statistics, g ↦ (g − mean g − x̂ mean(g x̂))/std adds to every position the same random number,
−mean g. Its energy is small, 1/n of that at the unit for n positions, but it lies everywhere, so that far pixels get it
all; and it does not add up like the energy of uncorrelated gradients, since the next batch statistics remove what is
common to a channel. A mean over all positions (squeeze-excite, global pooling) spreads its gradient in the same way.

It is carried beside the energy as one signed pattern u per channel: the gradient has a part A·u(position), E[A²] = 1.
Element-wise operators and batch statistics act on u exactly. Random weights keep u's mean over positions common and
scatter the rest, which joins the energy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from widerf.operators.names import Kind, kind_of
from widerf.trace.tape import Step, Tape, transposed_jacobian

Energies = list["Tensor | None"]


class Flow(NamedTuple):
    """Expected squared gradient at each element of a tensor.

    Attributes:
        energy: that of the part without correlations between elements.
        common: pattern u of the part that a channel's positions share; its energy is u².
    """

    energy: Tensor
    common: Tensor | None = None

    def joined(self, other: Flow) -> Flow:
        """Sum of two gradients that are not correlated with each other."""
        if self.common is None or other.common is None:
            return Flow(self.energy + other.energy, other.common if self.common is None else self.common)
        return Flow(self.energy + other.energy, root(self.common.square() + other.common.square()))

    def times(self, derivative: Tensor | None, shape: tuple[int, ...]) -> Flow:
        """Through an element-wise derivative (None: 1), summed over the axes that were broadcast from ``shape``."""
        energy = self.energy if derivative is None else derivative.square() * self.energy
        common = self.common if derivative is None or self.common is None else derivative * self.common
        return Flow(energy.sum_to_size(shape), None if common is None else common.sum_to_size(shape))

    def scaled(self, factor: float) -> Flow:
        """The flow with all energies times ``factor``."""
        return Flow(self.energy * factor, None if self.common is None else self.common * math.sqrt(factor))

    def total(self) -> Tensor:
        """Energy of both parts."""
        return self.energy if self.common is None else self.energy + self.common.square()


def root(energy: Tensor) -> Tensor:
    """√ with derivative 0 at 0."""
    positive = energy > 0
    return torch.where(positive, energy, 1.0).sqrt() * positive


def batch_statistics(step: Step, tape: Tape) -> bool:
    """Whether a step normalises by the statistics of all positions of a channel."""
    if kind_of(step.op) != "normalisation" or "batch_norm" not in step.name:
        return False
    return bool(step.arguments(tape.values).get("training", "no_training" not in step.name))


def split_common(
    step: Step, kind: Kind, arguments: dict[str, Any], inputs: dict[int, Tensor], energies: Energies, commons: Energies
) -> tuple[Energies, Iterator[tuple[int, Flow]]]:
    """Treat the common part of the outputs' gradients.

    Returns:
        Energies of the outputs that are left to the ordinary rule, and the flows at the tracked leaves by position.
    """
    if kind == "reduction" or (kind == "resampling" and step.name.startswith(("_adaptive", "adaptive"))):
        if _is_global(energies, inputs):
            return [None for _ in energies], _global_mean(step, inputs, energies, commons)
        return energies, _linear(step, inputs, commons)
    if kind in ("moves", "pooling", "resampling"):
        return energies, _linear(step, inputs, commons)
    if kind == "convolution" and commons[0] is not None and set(inputs) == {0} and not arguments["transposed"]:
        return _convolution(arguments, inputs[0], energies, commons[0])
    if kind == "normalisation" and arguments.get("training") and energies[0] is not None:
        return [None for _ in energies], _batch_norm(step, arguments, inputs[0], energies[0], commons[0])
    # Elsewhere the pattern is taken to scatter.
    return [e if e is None or u is None else e + u.square() for e, u in zip(energies, commons, strict=True)], iter(())


def _is_global(energies: Energies, inputs: dict[int, Tensor]) -> bool:
    whole = next(iter(inputs.values()))
    outputs = [energy for energy in energies if energy is not None]
    return whole.ndim > 2 and all(math.prod(e.shape[2:]) == 1 and e.shape[:2] == whole.shape[:2] for e in outputs)


def _global_mean(
    step: Step, inputs: dict[int, Tensor], energies: Energies, commons: Energies
) -> Iterator[tuple[int, Flow]]:
    totals = [None if e is None else root(Flow(e, u).total()) for e, u in zip(energies, commons, strict=True)]
    for position, pattern in transposed_jacobian(step, inputs, totals).items():
        yield position, Flow(torch.zeros_like(pattern), pattern)


def _linear(step: Step, inputs: dict[int, Tensor], commons: Energies) -> Iterator[tuple[int, Flow]]:
    if any(u is not None for u in commons):
        for position, pattern in transposed_jacobian(step, inputs, commons).items():
            yield position, Flow(torch.zeros_like(pattern), pattern)


def _convolution(
    arguments: dict[str, Any], image: Tensor, energies: Energies, common: Tensor
) -> tuple[Energies, Iterator[tuple[int, Flow]]]:
    """The mean over positions stays common; of a stride s, whose phases meet different taps, 1/s of it per axis."""
    weight, groups = arguments["weight"], arguments["groups"]
    rank = weight.ndim - 2
    spatial = tuple(range(2, common.ndim))
    mean = common.mean(spatial, keepdim=True)
    (energy,) = energies
    assert energy is not None
    power = weight.square().sum(tuple(range(2, weight.ndim))).view(groups, -1, weight.shape[1])
    grouped = mean.square().reshape(mean.shape[0], groups, -1)
    carried = torch.einsum("bgo,goi->bgi", grouped, power).reshape(mean.shape[0], -1, *(1 for _ in range(rank)))
    kept, shares = 1.0, 1.0
    for axis in range(rank):
        share = _met(image.shape[2 + axis], common.shape[2 + axis], weight.shape[2 + axis], arguments, axis)
        kept *= share**2  # energy of the mean over positions
        shares *= share  # mean over positions of the energy
    pattern = (carried.sqrt() if not carried.requires_grad else root(carried)) * math.sqrt(kept)
    rest = carried * max(shares - kept, 0.0)
    flow = Flow(rest.expand(image.shape), pattern.expand(image.shape))
    return [energy + (common - mean).square()], iter([(0, flow)])


def _met(n_in: int, n_out: int, kernel: int, arguments: dict[str, Any], axis: int) -> float:
    """Mean over taps of the share of input positions that a tap of the sliding window meets."""

    def of(name: str) -> int:
        values = arguments[name]
        return int(values[axis] if len(values) > 1 else values[0])

    places = [o * of("stride") - of("padding") + t * of("dilation") for o in range(n_out) for t in range(kernel)]
    return sum(0 <= place < n_in for place in places) / (kernel * n_in)


def _batch_norm(
    step: Step, arguments: dict[str, Any], x: Tensor, energy: Tensor, common: Tensor | None
) -> Iterator[tuple[int, Flow]]:
    r"""J = (δ_ij − (1 + x̂_i x̂_j)/n)·γ/std. The term in 1 makes the common part, all else is energy."""
    if set(step.inputs) != {0}:
        raise step.untreated("predict (scale or shift that depends on the input)")
    dims = (0, *range(2, x.ndim))
    n = x.numel() // x.shape[1]
    weight: Tensor | None = arguments.get("weight")
    eps: Any = arguments.get("eps", arguments.get("epsilon"))
    middle = x.mean(dims, keepdim=True)
    scale = ((x - middle).square().mean(dims, keepdim=True) + eps).rsqrt()
    z = (x - middle) * scale
    if weight is not None:
        scale = scale * weight.view(1, -1, *(1 for _ in range(x.ndim - 2)))
    along = (energy * z.square()).sum(dims, keepdim=True)
    local = energy * (1 - 2 * (1 + z.square()) / n).clamp(min=0) + z.square() * along / n**2
    if common is not None:  # exactly, but for the sign of what is left, which random weights scatter
        left = common - common.mean(dims, keepdim=True) - z * (common * z).mean(dims, keepdim=True)
        local = local + left.square()
    pattern = root(energy.sum(dims, keepdim=True)) / n * scale.abs()
    yield 0, Flow(local * scale.square(), pattern.expand_as(x))
