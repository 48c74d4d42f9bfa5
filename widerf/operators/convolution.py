"""Convolutions, also transposed ones: torch has one operator for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from widerf.operators.boxes import Jump, per_axis, slide, slide_transposed, thin
from widerf.operators.flow import Energies, Flow, root, scattered
from widerf.operators.rule import Arguments, CommonParts, Inputs, Parts, Rule, Shape, named, once
from widerf.trace.tape import Call

_THIN = 4  # input channels, as of a stem
_WINDOW = 49  # taps beyond which a column per tap would take too much memory
_SMALL = 0.5  # share of a map below which only the part with energy is carried back


def _boxes(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> list[Tensor | None]:
    if 0 not in reaches:
        raise call.untreated("receptive_field (weights that depend on the input)")
    reach, weight, groups = reaches[0], arguments["weight"], arguments["groups"]
    kernel, spatial = list(weight.shape[2:]), shapes[0][2:]
    reach = thin(reach)
    components, batch, channels = reach.shape[:3]
    groups = 1 if channels == 1 else groups
    reach = reach.reshape(components, batch, groups, channels // groups, *reach.shape[3:]).amin(3)
    stride, padding, dilation = (per_axis(arguments[n], len(kernel)) for n in ("stride", "padding", "dilation"))
    window = slide_transposed if arguments["transposed"] else slide
    reach = window(reach, jump, kernel, stride, padding, dilation, spatial)
    if groups == 1:
        return [reach.expand(-1, *shapes[0])]
    return [reach.repeat_interleave(shapes[0][1] // groups, 2)]


def _energy(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies) -> Parts:
    (energy,) = energies
    assert energy is not None
    image, power = arguments["input"], once(arguments, "power", arguments["weight"].square)
    geometry = [arguments[k] for k in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")]
    wanted = [position in inputs for position in (0, 1, 2)]
    if wanted == [True, False, False]:
        region = _region(arguments, energy)
        if region is not None:
            yield 0, _energy_of_region(arguments, energy, region)
            return
        if _skips(arguments):
            yield 0, _energy_of_met(arguments, energy)
            return
        if _is_thin(arguments):
            yield 0, _energy_by_columns(arguments, energy)
            return
    parts = torch.ops.aten.convolution_backward(
        energy, image.square() if wanted[1] else image, power, [power.shape[0]], *geometry, wanted
    )
    for position in inputs:
        yield position, parts[position]


def _region(arguments: Arguments, energy: Tensor) -> list[tuple[int, int]] | None:
    """First and last place per axis where there is energy, if that is a small part of the map.

    ``None`` also where derivatives are wanted, since zeros have them too.
    """
    differentiated = torch.is_grad_enabled() and (energy.requires_grad or arguments["weight"].requires_grad)
    if arguments["transposed"] or differentiated:
        return None
    ends, lit = [], energy.amax((0, 1))  # over channels first: what is left is small
    for axis in range(lit.ndim):
        others = [a for a in range(lit.ndim) if a != axis]
        places = (lit.amax(others) if others else lit).nonzero()
        if not len(places):
            return None
        ends.append((int(places[0]), int(places[-1])))
    return ends if math.prod(b - a + 1 for a, b in ends) <= _SMALL * math.prod(energy.shape[2:]) else None


def _skips(arguments: Arguments) -> bool:
    """Whether a convolution with one tap and strides meets only some of the positions: torch is slow at that."""
    one = all(n == 1 for n in arguments["weight"].shape[2:])
    padded = any(n != 0 for n in arguments["padding"])
    return one and any(n != 1 for n in arguments["stride"]) and not padded and not arguments["transposed"]


def _energy_of_met(arguments: Arguments, energy: Tensor) -> Tensor:
    """The energy at the input of a convolution with one tap: as without strides, at the positions that it meets."""
    image, power = arguments["input"], once(arguments, "power", arguments["weight"].square)
    rank = power.ndim - 2
    source = image.new_empty((1,)).expand(*image.shape[:2], *energy.shape[2:])
    ones, none = [1 for _ in range(rank)], [0 for _ in range(rank)]
    geometry = (ones, none, ones, False, none, arguments["groups"], [True, False, False])
    whole = torch.zeros_like(image, dtype=energy.dtype)
    met: tuple[Any, ...] = (..., *(slice(None, None, step) for step in per_axis(arguments["stride"], rank)))
    whole[met] = torch.ops.aten.convolution_backward(energy, source, power, None, *geometry)[0]
    return whole


def _is_thin(arguments: Arguments) -> bool:
    """Whether a 2-D convolution reads so few channels that its backward is faster as one product of matrices."""
    _, channels, *kernel = arguments["weight"].shape
    few = channels <= _THIN and len(kernel) == 2 and math.prod(kernel) <= _WINDOW
    return few and arguments["groups"] == 1 and not arguments["transposed"]


def _energy_by_columns(arguments: Arguments, energy: Tensor) -> Tensor:
    """The energy at the input of a convolution, first per tap and then summed where taps meet."""
    power = once(arguments, "power", arguments["weight"].square)
    columns = power.flatten(1).T @ energy.flatten(2)
    geometry = [per_axis(arguments[name], 2) for name in ("dilation", "padding", "stride")]
    whole: Tensor = torch.ops.aten.col2im(columns, arguments["input"].shape[2:], power.shape[2:], *geometry)
    return whole


def _energy_of_region(arguments: Arguments, energy: Tensor, region: list[tuple[int, int]]) -> Tensor:
    """The energy at the input of a convolution, whose output has energy in ``region`` only."""
    image, weight = arguments["input"], once(arguments, "power", arguments["weight"].square)
    stride, padding, dilation = (
        per_axis(arguments[name], weight.ndim - 2) for name in ("stride", "padding", "dilation")
    )
    window, inside, part = [], [], energy
    for axis, (a, b) in enumerate(region):
        part = part.narrow(2 + axis, a, b - a + 1)
        first = a * stride[axis] - padding[axis]
        length = (b - a) * stride[axis] + dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        low, high = max(first, 0), min(first + length, image.shape[2 + axis])
        window.append(length)
        inside.append((low, high, low - first))
    whole = torch.zeros_like(image)
    if any(high <= low for low, high, _ in inside):  # it sees padding only
        return whole
    source = image.new_empty((1,)).expand(*image.shape[:2], *window)
    none = [0 for _ in window]
    geometry = (stride, none, dilation, False, none, arguments["groups"], [True, False, False])
    found = torch.ops.aten.convolution_backward(part, source, weight, None, *geometry)[0]
    here, there = whole, found
    for axis, (low, high, skipped) in enumerate(inside):
        here = here.narrow(2 + axis, low, high - low)
        there = there.narrow(2 + axis, skipped, high - low)
    here.copy_(there)
    return whole


def _jump(call: Call, arguments: Arguments, before: Shape, after: Shape) -> Jump:
    stride = per_axis(arguments["stride"], arguments["weight"].ndim - 2)
    return tuple(1.0 / s if arguments["transposed"] else float(s) for s in stride)


def _common(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies, commons: Energies) -> CommonParts:
    """The mean over positions stays common; of a stride s, whose phases meet different taps, 1/s of it per axis."""
    (energy,), (common,) = energies, commons
    if common is None or energy is None or set(inputs) != {0} or arguments["transposed"]:
        return scattered(call, arguments, inputs, energies, commons)
    mean = common.mean(tuple(range(2, common.ndim)), keepdim=True)
    return [energy + (common - mean).square()], _shared(arguments, inputs[0], common, mean)


def _shared(arguments: Arguments, image: Tensor, common: Tensor, mean: Tensor) -> Iterator[tuple[int, Flow]]:
    weight, groups = arguments["weight"], arguments["groups"]
    rank = weight.ndim - 2
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
    yield 0, Flow(rest.expand(image.shape), pattern.expand(image.shape))


def _met(n_in: int, n_out: int, kernel: int, arguments: Arguments, axis: int) -> float:
    """Mean over taps of the share of input positions that a tap of the sliding window meets."""

    def of(name: str) -> int:
        values = arguments[name]
        return int(values[axis] if len(values) > 1 else values[0])

    places = [o * of("stride") - of("padding") + t * of("dilation") for o in range(n_out) for t in range(kernel)]
    return sum(0 <= place < n_in for place in places) / (kernel * n_in)


NAMES = named(Rule("convolution", _boxes, _energy, _common, _jump), "convolution _convolution")
