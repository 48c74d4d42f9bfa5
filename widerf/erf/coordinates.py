"""Which input pixels each element of each tensor of a recording can see: the forward reading of the tape."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from widerf.operators import rule_of
from widerf.operators.boxes import EMPTY, merges_positions, misalignment, pixels, scaled
from widerf.operators.rule import Rule
from widerf.trace.tape import Call, Tape


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
    calls = tape.needed()
    last_use = {value: index for index, call in enumerate(calls) for value in call.inputs.values()}
    image = tape.values[0]
    spatial = tuple(image.shape[2:])
    fields: dict[int, Field] = {0: Field(pixels(image), (1.0,) * len(spatial))}
    misaligned: dict[str, tuple[float, ...]] = {}
    for index, call in enumerate(calls):
        rule = rule_of(call.op)
        if rule is None:
            raise call.untreated("receptive_field")
        inputs = {position: fields[value] for position, value in call.inputs.items() if value in fields}
        if inputs:
            shift = misalignment([f.reach for f in inputs.values()]) if rule.joins and len(inputs) > 1 else None
            if shift is not None:
                misaligned.setdefault(call.module, shift)
            fields.update(_advance(call, rule, tape, inputs, spatial))
        for value in set(call.inputs.values()):
            if last_use[value] == index and value != tape.target:
                fields.pop(value, None)
    return Reading(fields[tape.target], misaligned)


def _advance(
    call: Call, rule: Rule, tape: Tape, inputs: dict[int, Field], spatial: tuple[int, ...]
) -> dict[int, Field]:
    jump = tuple(max(jumps) for jumps in zip(*(f.jump for f in inputs.values()), strict=True))
    paths = frozenset[str]().union(*(f.global_paths for f in inputs.values()))
    shapes = [tuple(tape.values[out].shape) if out is not None else None for out in call.outputs]
    arguments = call.arguments(tape.values)
    before = tuple(next(iter(inputs.values())).reach.shape[1:])
    after = next(shape for shape in shapes if shape is not None)
    reaches = rule.boxes(call, arguments, {i: f.reach for i, f in inputs.items()}, shapes, jump)
    jump = scaled(jump, rule.jump(call, arguments, before, after))
    if rule.mixes:
        outputs = [r for r in reaches if r is not None]
        if merges_positions(outputs, [f.reach for f in inputs.values()], spatial, jump):
            paths |= {call.module}
            reaches = [None if r is None else torch.full_like(r, EMPTY) for r in reaches]
    if rule.over_space is not None and rule.over_space(call, arguments):
        paths |= {call.module}
    return {
        out: Field(reach, jump, paths) for out, reach in zip(call.outputs, reaches, strict=False)
        if out is not None and reach is not None
    }  # fmt: skip
