"""Which input pixels each element of each tensor of a recording can see: the forward reading of the tape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from widerf.errors import UntreatedOperatorError
from widerf.operators import rule_of
from widerf.operators.boxes import Jump, Terms, apart, nothing, pixels, scaled, union_of
from widerf.operators.paths import merges_positions, misalignment
from widerf.operators.rule import Arguments, Rule
from widerf.trace.tape import Call, Tape


@dataclass(frozen=True, eq=False)
class Field:
    """What the elements of one tensor see.

    Attributes:
        terms: boxes ``(2·D, *shape)``, see :mod:`widerf.operators.boxes`; an element sees the union of its boxes in all
            of them. They are several where one would hold more numbers, as for products of matrices.
        jump: input pixels between neighbours per axis, as the strides say; used where a single unit tells nothing.
        global_paths: modules through which the tensor sees the whole image besides its boxes.
    """

    terms: Terms
    jump: tuple[float, ...]
    global_paths: frozenset[str] = frozenset()

    @property
    def reach(self) -> Tensor:
        """The boxes as one tensor."""
        if len(self.terms) == 1:
            return self.terms[0]
        return union_of(list(self.terms), tuple(self.terms[0].shape[1:]))


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
    fields: dict[int, Field] = {0: Field((pixels(image),), (1.0,) * (image.ndim - 2))}
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
    return Field((field.reach.amin((1, 2)),), field.jump, field.global_paths)


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
    shift = None
    if len(inputs) > 1 and rule.joins is not None:
        reaches = [f.reach for f in inputs.values()]
        shift = misalignment(reaches) if rule.joins(call, call.arguments(tape.values), reaches) else None
    return _advance(call, rule, tape, inputs, tuple(tape.values[0].shape[2:])), shift


def _advance(
    call: Call, rule: Rule, tape: Tape, inputs: dict[int, Field], spatial: tuple[int, ...]
) -> dict[int, Field]:
    jump = tuple(max(jumps) for jumps in zip(*(f.jump for f in inputs.values()), strict=True))
    paths = frozenset[str]().union(*(f.global_paths for f in inputs.values()))
    arguments = call.arguments(tape.values)
    seen = _seen(call, rule, arguments, tape, inputs, jump)
    before = tuple(next(iter(inputs.values())).terms[0].shape[1:])
    after = next(tuple(tape.values[out].shape) for out in call.outputs if out is not None)
    jump = scaled(jump, rule.jump(call, arguments, before, after))
    if rule.mixes and merges_positions(list(seen.values()), [f.terms for f in inputs.values()], spatial, jump):
        paths |= {call.module}
        seen = {out: (nothing(terms[0]),) for out, terms in seen.items()}
    if rule.over_space is not None and rule.over_space(call, arguments):
        paths |= {call.module}
    return {out: Field(terms, jump, paths) for out, terms in seen.items()}


def _seen(
    call: Call, rule: Rule, arguments: Arguments, tape: Tape, inputs: dict[int, Field], jump: Jump
) -> dict[int, Terms]:
    """What each output of a call sees; of a rule that distributes, term by term of each input."""
    shapes = [tuple(tape.values[out].shape) if out is not None else None for out in call.outputs]
    if rule.distributes:
        single = [{position: term} for position, field in inputs.items() for term in field.terms]
    else:
        single = [{position: field.reach for position, field in inputs.items()}]
    found = [rule.boxes(call, arguments, reaches, shapes, jump) for reaches in single]
    seen: dict[int, Terms] = {}
    for out, parts in zip(call.outputs, zip(*found, strict=True), strict=False):
        reaches = [part for part in parts if part is not None]
        if out is not None and reaches:
            seen[out] = apart(reaches)
    return seen
