"""What a kind of operator means: four pure functions in one record, and the table of the names that obey it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from widerf.operators.boxes import Jump
from widerf.operators.flow import Energies, Flow, scattered
from widerf.trace.tape import Call

Kind = Literal[
    "pointwise", "moves", "convolution", "matmul", "pooling", "resampling", "reduction", "normalisation", "softmax",
    "dropout",
]  # fmt: skip
Arguments = dict[str, Any]
Inputs = dict[int, Tensor]
Shape = tuple[int, ...]
Parts = Iterator[tuple[int, Tensor]]
CommonParts = tuple[Energies, Iterator[tuple[int, Flow]]]


def by_sizes(call: Call, arguments: Arguments, before: Shape, after: Shape) -> Jump | None:
    """The arguments tell nothing: positions may be laid out anew."""
    return None


def in_place(call: Call, arguments: Arguments, before: Shape, after: Shape) -> Jump | None:
    """Each position stays where it is, unless the input was broadcast."""
    return tuple(1.0 for _ in before[2:]) if before[2:] == after[2:] else None


def always(call: Call, arguments: Arguments, reaches: list[Tensor]) -> bool:
    """All inputs meet."""
    return True


def once(arguments: Arguments, name: str, make: Callable[[], Any]) -> Any:
    """What follows from a call's arguments alone: made when first asked for, and kept beside them for later passes."""
    key = f"{name} of the arguments"
    if key not in arguments:
        arguments[key] = make()
    return arguments[key]


@dataclass(frozen=True)
class Rule:
    """What one kind of operator does to what its tracked inputs see, and to the gradients of its outputs.

    All functions are pure. The first two arguments are the recorded call and its arguments by name.

    Attributes:
        kind: the kind's name.
        boxes: ``(call, arguments, reaches, shapes, jump)`` → what each output sees. ``reaches`` holds the boxes of the
            tracked leaves by position (:mod:`widerf.operators.boxes`), ``shapes`` the shape of each output, ``jump``
            that of the inputs.
        energy: ``(call, arguments, inputs, energies)`` → per tracked leaf its position and energy, by the squared
            Jacobian at ``inputs``. ``None`` for element-wise operators, which are differentiated in groups.
        common: ``(call, arguments, inputs, energies, commons)`` → the energies left to ``energy``, and the flows at
            the leaves (:mod:`widerf.operators.flow`).
        jump: ``(call, arguments, before, after)`` → by how much the distance of neighbours grows per spatial axis from
            an input of shape ``before`` to an output of shape ``after``; ``None`` where only the sizes tell.
        mixes: whether an output element may see all positions of its input: a global path is looked for.
        distributes: whether the boxes of a union are the union of the boxes, input by input and term by term.
        joins: ``(call, arguments, reaches)`` → whether inputs meet at the same positions, so that paths which are
            shifted against each other are reported; parts that are put side by side do not.
        over_space: ``(call, arguments)`` → whether statistics over the positions of one image enter.
    """

    kind: Kind
    boxes: Callable[[Call, Arguments, Inputs, list[Any], Jump], list[Tensor | None]]
    energy: Callable[[Call, Arguments, Inputs, Energies], Parts] | None
    common: Callable[[Call, Arguments, Inputs, Energies, Energies], CommonParts] = scattered
    jump: Callable[[Call, Arguments, Shape, Shape], Jump | None] = by_sizes
    mixes: bool = False
    distributes: bool = False
    joins: Callable[[Call, Arguments, list[Tensor]], bool] | None = None
    over_space: Callable[[Call, Arguments], bool] | None = None


def named(rule: Rule, names: str) -> dict[str, Rule]:
    """The table of one rule; ``names`` are separated by blanks.

    Raises:
        ValueError: if a name is given twice.
    """
    return joined({name: rule} for name in names.split())


def joined(tables: Iterable[Mapping[str, Rule]]) -> dict[str, Rule]:
    """Several tables in one.

    Raises:
        ValueError: if two of them hold one name.
    """
    whole: dict[str, Rule] = {}
    for table in tables:
        twice = sorted(whole.keys() & table.keys())
        if twice:
            raise ValueError(f"operators must have one rule each, got two for {', '.join(twice)}")
        whole.update(table)
    return whole
