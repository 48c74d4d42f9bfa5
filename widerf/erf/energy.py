r"""The expected energy of a gradient, carried back through a recording.

By docs/theory.md (13), for y = f(x) with Jacobian J and a gradient g at y of uncorrelated elements of mean zero,

.. math:: E[(J^T g)_i^2] = \sum_j J_{ji}^2 \, E[g_j^2],

so every rule multiplies by the *squared* Jacobian of its operator, at the recorded activations. Random weights of mean
zero make gradients uncorrelated; where no weights lie between two operators (x·σ(x), relu(x + f(x))) they are not, and
such element-wise operators are differentiated together, as one function, before the square is taken. Left out is,
where a normalisation over n elements is written out in single operators, the correlation of an element's direct
path with that through the mean (2/n of the energy; the norms that torch knows as such are exact). Left out, too, is
what attention and the statistics of a group or an instance make common to all positions: further layers of that kind
hand it on whole, while uncorrelated parts average out, so that the prediction is too narrow (std 0.5 to 0.9 of the
measured one on some small transformers); batch statistics, and squeeze-excite beside them, are treated. Averages in a
row that no weights part are one map (:mod:`widerf.operators.averages`). But branches without weights that are more than
element-wise count as if weights lay in them: PoolFormer's pool(x) − x, the quotient of linear attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from widerf.operators import averages, rule_of
from widerf.operators.flow import Flow, Slope
from widerf.operators.normalisation import batch_statistics
from widerf.operators.pointwise import slopes
from widerf.operators.rule import Rule
from widerf.trace.ambient import plain_arithmetic
from widerf.trace.tape import Call, Tape

_HALVES = (torch.float16, torch.bfloat16)
_LARGE, _SMALL = 1e12, 1e-12  # energies are brought back to 1 when they leave this range: deep stacks would overflow


def backpropagate(tape: Tape, energy: Tensor) -> Tensor:
    """Carry the energy of a gradient at the map back to the input.

    Args:
        tape: the recording.
        energy: ``(batch, channels, *spatial)``, expected squared gradient at each element of the map.

    Returns:
        ``(batch, channels, *spatial)`` of the input, expected squared gradient up to one common factor.

    Raises:
        UntreatedOperatorError: for an operator without a rule; the message names it and its module.
    """
    return Backward(tape).to_input(tape.target, energy)[0]


class Backward:
    """Passes back over one recording, from as many of its values as one likes.

    Args:
        tape: the recording.
        several: whether what does not depend on where a pass begins (squared weights, slopes of activations) is
            computed once and kept for further passes, at the price of about twice the recording's memory.
    """

    def __init__(self, tape: Tape, several: bool = False) -> None:
        self.tape, self.several = _in_single_precision(tape), several
        self._arguments: dict[int, dict[str, Any]] = {}
        self._slopes: dict[tuple[int, ...], list[Slope | None]] = {}
        self._averages: dict[tuple[int, ...], list[Tensor] | None] = {}

    def to_input(self, target: int, energy: Tensor) -> tuple[Tensor, float]:
        """Carry the energy at one value back, see :func:`backpropagate`.

        Returns:
            The energy at the input, and the logarithm of the factor that brings it to its true scale.
        """
        with plain_arithmetic():
            one = _Pass(replace(self.tape, target=target), self)
            wide = energy.float() if energy.dtype in _HALVES else energy
            return one.run(wide), one.log_scale

    def arguments(self, call: Call) -> dict[str, Any]:
        """The call's arguments by name, at the recorded values."""
        found = self._arguments.get(id(call)) or call.arguments(self.tape.values)
        if self.several:
            self._arguments[id(call)] = found
        return found

    def slopes(self, group: list[Call], sources: list[int], shape: torch.Size) -> list[Slope | None]:
        """Derivative of what the last call of an element-wise group gives, to each of the group's sources."""
        key = tuple(map(id, group))
        found = self._slopes.get(key) or self._differentiated(group, sources, shape)
        if self.several:
            self._slopes[key] = found
        return found

    def averages(self, row: averages.Row) -> list[Tensor] | None:
        """Matrices of a row of fixed averages, one a spatial axis; ``None`` where it has none."""
        key = tuple(map(id, row.calls))
        if key not in self._averages:
            self._averages[key] = averages.matrices(row, self.tape.values[row.source])
        return self._averages[key]

    def _differentiated(self, group: list[Call], sources: list[int], shape: torch.Size) -> list[Slope | None]:
        values = self.tape.values
        if len(group) == 1 and group[0].name == "relu":  # the most frequent one, without autograd; 0 and 1 are squares
            step = (values[sources[0]] > 0).to(values[sources[0]].dtype)
            return [Slope(step, step)]
        inputs = {value: values[value].expand(shape) for value in sources}
        found = slopes(group, inputs, next(out for out in group[-1].outputs if out is not None))
        return [None if slope is None else Slope(slope, slope.square()) for slope in found]


def _in_single_precision(tape: Tape) -> Tape:
    """The recording of a half-precision model, so that energies, squares of small numbers, do not underflow."""
    if not any(value.dtype in _HALVES for value in tape.values):
        return tape

    def wide(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.float() if leaf.dtype in _HALVES else leaf
        return torch.float32 if leaf in _HALVES else leaf

    calls = [replace(call, leaves=tuple(map(wide, call.leaves))) for call in tape.calls]
    return replace(tape, calls=calls, values=[wide(value) for value in tape.values])


class _Pass:
    def __init__(self, tape: Tape, backward: Backward) -> None:
        self.tape, self.backward = tape, backward
        self.log_scale = 0.0
        self.calls = tape.needed()
        self.producer = {out: call for call in self.calls for out in call.outputs if out is not None}
        joints = {tape.target}
        for call in self.calls:
            if not _is_pointwise(call):
                joints.update(call.inputs.values())
            if call.detached:
                joints.update(out for out in call.outputs if out is not None)
        # Between joints only element-wise operators lie: what is not a joint is differentiated within its group.
        self.joints = joints
        self.follow_common = any(batch_statistics(call, tape) for call in self.calls)
        self.rows = {row.outcome: row for row in averages.rows(self.calls, tape)}

    def run(self, energy: Tensor) -> Tensor:
        flows: dict[int, Flow] = {self.tape.target: Flow(energy)}
        for call in reversed(self.calls):
            if self._averaged(call, flows):
                continue
            outputs = [flows.pop(out, None) if out is not None else None for out in call.outputs]
            if call.detached or all(out is None for out in outputs):
                continue
            rule = rule_of(call.op)
            if rule is None:
                raise call.untreated("predict")
            parts = self._pointwise(call, outputs) if rule.energy is None else self._ruled(call, rule, outputs)
            for value, part in parts:
                flows[value] = flows[value].joined(part) if value in flows else part
            if rule.kind in ("convolution", "matmul"):  # where energies grow or shrink; a norm alone stays in range
                self.log_scale += math.log(_rescale(flows, call.inputs.values()))
        return flows[0].total() if 0 in flows else torch.zeros_like(self.tape.values[0])

    def _averaged(self, last: Call, flows: dict[int, Flow]) -> bool:
        """Whether the call ends a row of fixed averages; if so, the flow goes through all of it as one map."""
        row = next((self.rows[out] for out in last.outputs if out in self.rows and out in flows), None)
        matrices = None if row is None else self.backward.averages(row)
        if row is None or matrices is None:
            return False
        part = averages.carried_back(flows.pop(row.outcome), matrices)
        flows[row.source] = flows[row.source].joined(part) if row.source in flows else part
        return True

    def _ruled(self, call: Call, rule: Rule, outputs: list[Flow | None]) -> Iterator[tuple[int, Flow]]:
        assert rule.energy is not None
        arguments = self.backward.arguments(call)
        inputs = {position: self.tape.values[value] for position, value in call.inputs.items()}
        energies = [None if flow is None else flow.energy for flow in outputs]
        if self.follow_common:
            commons = [None if flow is None else flow.common for flow in outputs]
            energies, parts = rule.common(call, arguments, inputs, energies, commons)
            for position, flow in parts:
                yield call.inputs[position], flow
        if any(energy is not None for energy in energies):
            for position, part in rule.energy(call, arguments, inputs, energies):
                yield call.inputs[position], Flow(part)

    def _pointwise(self, last: Call, outputs: list[Flow | None]) -> Iterator[tuple[int, Flow]]:
        flow = outputs[0]
        if flow is None:  # further outputs hold what only torch's own derivative reads
            return
        group = self._group(last)
        inner = {out for call in group for out in call.outputs if out is not None}
        sources = sorted({value for call in group for value in call.inputs.values()} - inner)
        shapes = {value: self.tape.values[value].shape for value in sources}
        if len(group) == 1 and _is_plain_sum(last):
            for value in sources:
                yield value, flow.times(None, shapes[value])
            return
        found = self.backward.slopes(group, sources, flow.energy.shape)
        for value, slope in zip(sources, found, strict=True):
            if slope is not None:
                yield value, flow.times(slope, shapes[value])

    def _group(self, last: Call) -> list[Call]:
        """The element-wise operators that lead to ``last`` from the nearest joints, in order."""
        found: dict[int, Call] = {}
        open_calls = [last]
        while open_calls:
            call = open_calls.pop()
            if id(call) in found:
                continue
            found[id(call)] = call
            for value in call.inputs.values():
                maker = self.producer.get(value)
                if value not in self.joints and maker is not None and _is_pointwise(maker):
                    open_calls.append(maker)
        if len(found) == 1:
            return [last]
        return [call for call in self.calls if id(call) in found]


def _is_pointwise(call: Call) -> bool:
    rule = rule_of(call.op)
    return rule is not None and rule.kind == "pointwise"


def _is_plain_sum(call: Call) -> bool:
    if call.name != "add" or any(leaf not in (None, 1) for leaf in call.leaves[2:]):
        return False
    values = list(call.inputs.values())
    return len(set(values)) == len(values)


def _rescale(flows: dict[int, Flow], changed: Iterable[int]) -> float:
    """Bring all energies back to 1 where they leave the range; return what they were divided by."""
    largest = max((float(flows[value].energy.detach().amax()) for value in changed if value in flows), default=1.0)
    if not largest > 0 or _SMALL < largest < _LARGE:
        return 1.0
    for value, flow in flows.items():
        flows[value] = flow.scaled(1 / largest)
    return largest
