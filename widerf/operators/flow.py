r"""The expected squared gradient at a tensor, and the part of a gradient that all positions of a channel share.

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

from widerf.trace.tape import Call, transposed_jacobian

Energies = list["Tensor | None"]


class Slope(NamedTuple):
    """An element-wise derivative and its square."""

    derivative: Tensor
    square: Tensor


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

    def times(self, slope: Slope | None, shape: tuple[int, ...]) -> Flow:
        """Through an element-wise derivative (None: 1), summed over the axes that were broadcast from ``shape``."""
        energy = self.energy if slope is None else slope.square * self.energy
        common = self.common if slope is None or self.common is None else slope.derivative * self.common
        if energy.shape == shape:
            return Flow(energy, common)
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


def scattered(
    call: Call, arguments: dict[str, Any], inputs: dict[int, Tensor], energies: Energies, commons: Energies
) -> tuple[Energies, Iterator[tuple[int, Flow]]]:
    """The pattern is taken to scatter: it joins the energy."""
    return [e if e is None or u is None else e + u.square() for e, u in zip(energies, commons, strict=True)], iter(())


def carried(
    call: Call, arguments: dict[str, Any], inputs: dict[int, Tensor], energies: Energies, commons: Energies
) -> tuple[Energies, Iterator[tuple[int, Flow]]]:
    """Through a linear operator without weights the pattern goes exactly."""
    if all(u is None for u in commons):
        return energies, iter(())
    patterns = transposed_jacobian(call, inputs, commons)
    return energies, ((position, Flow(torch.zeros_like(u), u)) for position, u in patterns.items())


def averaged(
    call: Call, arguments: dict[str, Any], inputs: dict[int, Tensor], energies: Energies, commons: Energies
) -> tuple[Energies, Iterator[tuple[int, Flow]]]:
    """Through a mean: one over all positions makes a pattern of the whole gradient, others carry patterns on."""
    whole = next(iter(inputs.values()))
    outputs = [energy for energy in energies if energy is not None]
    if whole.ndim <= 2 or any(math.prod(e.shape[2:]) != 1 or e.shape[:2] != whole.shape[:2] for e in outputs):
        return carried(call, arguments, inputs, energies, commons)
    totals = [None if e is None else root(Flow(e, u).total()) for e, u in zip(energies, commons, strict=True)]
    patterns = transposed_jacobian(call, inputs, totals)
    return [None for _ in energies], ((position, Flow(torch.zeros_like(u), u)) for position, u in patterns.items())
