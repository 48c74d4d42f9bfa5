"""Products of matrices and vectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from widerf.operators.boxes import Jump, thin, union_of
from widerf.operators.flow import Energies
from widerf.operators.rule import Arguments, Inputs, Parts, Rule, named
from widerf.trace.tape import Call

# Names of the arguments: what is added to the product or None, the left and the right factor.
_FACTORS: dict[str, tuple[str | None, str, str]] = {
    "mm": (None, "self", "mat2"),
    "bmm": (None, "self", "mat2"),
    "mv": (None, "self", "vec"),
    "dot": (None, "self", "tensor"),
    "addmm": ("self", "mat1", "mat2"),
    "baddbmm": ("self", "batch1", "batch2"),
}


def _boxes(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> list[Tensor | None]:
    """Element (i, k) of a product sees what row i of the left and column k of the right factor see."""
    added, left, right = _FACTORS[call.name]
    row, column = arguments[left].ndim > 1, arguments[right].ndim > 1
    parts = []
    for position, reach in reaches.items():
        reach = thin(reach)  # noqa: PLW2901
        name = call.op._schema.arguments[position].name
        if name == added:
            parts.append(reach)
        elif name == left:
            parts.append(reach.amin(-1, keepdim=row and column))
        else:
            parts.append(reach.amin(-2 if column else -1, keepdim=row))
    return [union_of(parts, shapes[0])]


def _energy(call: Call, arguments: Arguments, inputs: Inputs, energies: Energies) -> Parts:
    """Each factor's energy is the product of the outputs' with the square of the other factor."""
    (energy,) = energies
    assert energy is not None
    added, left, right = _FACTORS[call.name]
    product, a, b = _as_matrices(energy, arguments[left], arguments[right])
    scale = float(arguments.get("alpha", 1)) ** 2
    for position in inputs:
        name = call.op._schema.arguments[position].name
        shape = arguments[name].shape
        if name == added:
            yield position, (float(arguments["beta"]) ** 2 * energy).sum_to_size(shape)
        elif name == left:
            yield position, (scale * product @ b.square().mT).reshape(shape)
        else:
            yield position, (scale * a.square().mT @ product).reshape(shape)


def _as_matrices(product: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A vector is one row on the left, one column on the right."""
    if right.ndim == 1:
        product, right = product.unsqueeze(-1), right.unsqueeze(-1)
    if left.ndim == 1:
        product, left = product.unsqueeze(-2), left.unsqueeze(-2)
    return product, left, right


NAMES = named(Rule("matmul", _boxes, _energy, mixes=True, distributes=True), " ".join(_FACTORS))
