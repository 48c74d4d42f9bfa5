"""Which input pixels each element of each tensor of a recording can see: the forward reading of the tape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from widerf.errors import UntreatedOperatorError
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
    """The forward reading: the map's field, united over its channels, and what was met on the way."""

    result: Field
    misaligned: dict[str, tuple[float, ...]] = field(default_factory=dict)


def read(tape: Tape) -> Reading:
    """Walk the tape forwards from the input, one box per pixel, to the map.

    Raises:
        UntreatedOperatorError: for an operator without a rule.
    """
    found = read_all(tape, [tape.target])[tape.target]
    if isinstance(found, UntreatedOperatorError):
        raise found
    return found


def read_all(tape: Tape, targets: Sequence[int]) -> dict[int, Reading | UntreatedOperatorError]:
    """Walk the tape once to several values; an operator without a rule is the answer for those behind it."""
    calls = tape.needed(targets)
    last_use = {value: index for index, call in enumerate(calls) for value in call.inputs.values()}
    image = tape.values[0]
    fields: dict[int, Field] = {0: Field(pixels(image), (1.0,) * (image.ndim - 2))}
    broken: dict[int, tuple[int, UntreatedOperatorError]] = {}
    shifts: list[tuple[Call, tuple[float, ...]]] = []
    united = {0: _united(fields[0])} if 0 in targets else {}
    for index, call in enumerate(calls):
        problems = [broken[value] for value in call.inputs.values() if value in broken]
        try:
            if problems:
                raise min(problems, key=lambda problem: problem[0])[1]
            made, shift = _made(call, tape, fields)
        except UntreatedOperatorError as error:
            first = min((at for at, _ in problems), default=index)
            broken |= {out: (first, error) for out in call.outputs if out is not None}
            continue
        if shift is not None:
            shifts.append((call, shift))
        fields |= made
        united |= {value: _united(made[value]) for value in made.keys() & set(targets)}
        for value in set(call.inputs.values()):
            if last_use[value] == index:
                fields.pop(value, None)
    return {
        value: broken[value][1] if value in broken else Reading(united[value], _on_the_way(tape, value, shifts))
        for value in targets
    }


def _united(field: Field) -> Field:
    """What all channels see together: ``(2·D, *spatial)``."""
    return Field(field.reach.amin((1, 2)), field.jump, field.global_paths)


def _on_the_way(tape: Tape, target: int, shifts: list[tuple[Call, tuple[float, ...]]]) -> dict[str, tuple[float, ...]]:
    """The shifts that were met on the way to a value: module → the first."""
    needed = {id(call) for call in tape.needed([target])} if shifts else set()
    return {call.module: shift for call, shift in reversed(shifts) if id(call) in needed}


def _made(call: Call, tape: Tape, fields: dict[int, Field]) -> tuple[dict[int, Field], tuple[float, ...] | None]:
    """What the outputs of a call see, and by how much the paths that it joins are shifted."""
    rule = rule_of(call.op)
    if rule is None:
        raise call.untreated("receptive_field")
    inputs = {position: fields[value] for position, value in call.inputs.items() if value in fields}
    if not inputs:
        return {}, None
    reaches, shift = [f.reach for f in inputs.values()], None
    if len(inputs) > 1 and rule.joins is not None and rule.joins(call, call.arguments(tape.values), reaches):
        shift = misalignment(reaches)
    return _advance(call, rule, tape, inputs, tuple(tape.values[0].shape[2:])), shift


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
