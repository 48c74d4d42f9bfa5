"""Operators by which each input element has a part in one output element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widerf.operators.boxes import EMPTY, Jump, thin
from widerf.operators.flow import Energies, averaged
from widerf.operators.rule import Arguments, Inputs, Parts, Rule, joined, named
from widerf.trace.tape import Call, transposed_jacobian


def reduced_dims(arguments: Arguments, ndim: int) -> tuple[int, ...]:
    """The axes that a reduction runs over, from its arguments; all of them where none is given."""
    dims = arguments.get("dim")
    if dims is None or (isinstance(dims, Sequence) and len(dims) == 0):
        return tuple(range(ndim))
    return tuple(d % ndim for d in ([dims] if isinstance(dims, int) else dims))


def _boxes(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> list[Tensor | None]:
    (reach,) = reaches.values()
    dims = reduced_dims(arguments, reach.ndim - 1)
    kept = [1 if dim in dims else n for dim, n in enumerate(reach.shape[1:])]
    union = thin(reach).amin(tuple(dim + 1 for dim in dims), keepdim=True).expand(-1, *kept)
    return [None if shape is None else union.reshape(-1, *shape) for shape in shapes]


def _folded(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> list[Tensor | None]:
    """Overlapping patches, laid side by side as columns, are put back: a pixel sees what all of its patches see."""
    (columns,) = reaches.values()
    height, width = shapes[0][-2:]
    pixels = torch.arange(1.0, height * width + 1).view(1, 1, height, width)  # 0 is the padding
    geometry = [arguments[name] for name in ("kernel_size", "dilation", "padding", "stride")]
    target = torch.nn.functional.unfold(pixels, *geometry).long().flatten()
    count = math.prod(shapes[0][:-2])
    flat = columns.reshape(columns.shape[0], count, len(target))
    folded = torch.full((columns.shape[0], count, height * width + 1), EMPTY)
    folded = folded.scatter_reduce(2, target.expand_as(flat), flat, "amin")
    return [folded[..., 1:].reshape(-1, *shapes[0])]


def _energy(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies) -> Parts:
    """Each input enters one element of an output, with derivative d: d² · energy = (Jᵀ1)(Jᵀ energy)."""
    for index, energy in enumerate(energies):
        if energy is None:
            continue
        alone: Energies = [None] * len(energies)
        alone[index] = torch.ones_like(energy)
        slopes = transposed_jacobian(call, inputs, alone)
        alone[index] = energy
        for position, part in transposed_jacobian(call, inputs, alone).items():
            yield position, slopes[position] * part


NAMES = joined(
    [
        named(
            Rule("reduction", _boxes, _energy, averaged, mixes=True, distributes=True),
            "mean sum amax amin max min var std var_mean std_mean logsumexp linalg_vector_norm norm prod",
        ),
        named(Rule("reduction", _folded, _energy, averaged, mixes=True), "col2im"),
    ]
)
