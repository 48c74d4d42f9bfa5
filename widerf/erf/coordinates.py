"""Which input pixels each element of each tensor of a recording can see: the forward reading of the tape."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from widerf.operators.box_rules import MIXING, RULES, normalises_space
from widerf.operators.boxes import EMPTY, merges_positions, misalignment, pixels
from widerf.operators.names import kind_of
from widerf.trace.tape import Step, Tape


@dataclass(frozen=True, eq=False)
class Field:
    """What the elements of one tensor see.

    Attributes:
        reach: ``(2·D, *shape)``, boxes, see :mod:`widerf.operators.boxes`.
        jump: input pixels between neighbours per axis, as the strides say; used where a single unit tells nothing.
        global_paths: modules through which the tensor sees the whole image besides its boxes.
    """

    reach: Tensor
    jump: tuple[float, ...]
    global_paths: frozenset[str] = frozenset()


@dataclass
class Reading:
    """The forward reading: the map's field, and what was met on the way."""

    result: Field
    misaligned: dict[str, tuple[float, ...]] = field(default_factory=dict)


def read(tape: Tape) -> Reading:
    """Walk the tape forwards from the input, one box per pixel, to the map.

    Raises:
        UntreatedOperatorError: for an operator without a rule.
    """
    steps = tape.needed()
    last_use = {value: index for index, step in enumerate(steps) for value in step.inputs.values()}
    image = tape.values[0]
    spatial = tuple(image.shape[2:])
    fields: dict[int, Field] = {0: Field(pixels(image), (1.0,) * len(spatial))}
    misaligned: dict[str, tuple[float, ...]] = {}
    for index, step in enumerate(steps):
        kind = kind_of(step.op)
        if kind is None or kind not in RULES:
            raise step.untreated("receptive_field")
        inputs = {position: fields[value] for position, value in step.inputs.items() if value in fields}
        if inputs:
            shift = misalignment([f.reach for f in inputs.values()]) if len(inputs) > 1 else None
            if shift is not None and kind in ("pointwise", "moves"):
                misaligned.setdefault(step.module, shift)
            fields.update(_advance(step, kind, tape, inputs, spatial))
        for value in set(step.inputs.values()):
            if last_use[value] == index and value != tape.target:
                fields.pop(value, None)
    return Reading(fields[tape.target], misaligned)


def _advance(step: Step, kind: str, tape: Tape, inputs: dict[int, Field], spatial: tuple[int, ...]) -> dict[int, Field]:
    jump = tuple(max(jumps) for jumps in zip(*(f.jump for f in inputs.values()), strict=True))
    paths = frozenset[str]().union(*(f.global_paths for f in inputs.values()))
    shapes = [tuple(tape.values[out].shape) if out is not None else None for out in step.outputs]
    arguments = step.arguments(tape.values)
    reaches, jump = RULES[kind](step, arguments, {i: f.reach for i, f in inputs.items()}, shapes, jump)
    if kind in MIXING:
        outputs = [r for r in reaches if r is not None]
        if merges_positions(outputs, [f.reach for f in inputs.values()], spatial, jump):
            paths |= {step.module}
            reaches = [None if r is None else torch.full_like(r, EMPTY) for r in reaches]
    if kind == "normalisation" and normalises_space(step, arguments):
        paths |= {step.module}
    return {
        out: Field(reach, jump, paths) for out, reach in zip(step.outputs, reaches, strict=False)
        if out is not None and reach is not None
    }  # fmt: skip
