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
measured one on some small transformers); batch statistics, and squeeze-excite beside them, are treated. And branches
without weights that are more than element-wise count as if weights lay in them: PoolFormer's pool(x) − x, the quotient
of linear attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from widerf.operators.common_mode import Flow, batch_statistics, split_common
from widerf.operators.energy_rules import RULES
from widerf.operators.names import Kind, kind_of
from widerf.trace.tape import Step, Tape

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
    return _Pass(tape).run(energy)


def backpropagate_scaled(tape: Tape, energy: Tensor) -> tuple[Tensor, float]:
    """Like :func:`backpropagate`, with the logarithm of the factor that brings the result to its true scale."""
    backward = _Pass(tape)
    return backward.run(energy), backward.log_scale


class _Pass:
    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.log_scale = 0.0
        self.steps = tape.needed()
        self.producer = {out: step for step in self.steps for out in step.outputs if out is not None}
        joints = {tape.target}
        for step in self.steps:
            if kind_of(step.op) != "pointwise":
                joints.update(step.inputs.values())
        # Between joints only element-wise operators lie: what is not a joint is differentiated within its group.
        self.joints = joints
        self.follow_common = any(batch_statistics(step, tape) for step in self.steps)

    def run(self, energy: Tensor) -> Tensor:
        flows: dict[int, Flow] = {self.tape.target: Flow(energy)}
        for step in reversed(self.steps):
            outputs = [flows.pop(out, None) if out is not None else None for out in step.outputs]
            if all(out is None for out in outputs):
                continue
            kind = kind_of(step.op)
            if kind is None:
                raise step.untreated("predict")
            for value, part in (
                self._pointwise(step, outputs) if kind == "pointwise" else self._rule(step, kind, outputs)
            ):
                flows[value] = flows[value].joined(part) if value in flows else part
            if kind in ("convolution", "matmul", "normalisation"):
                self.log_scale += math.log(_rescale(flows, step.inputs.values()))
        return flows[0].total() if 0 in flows else torch.zeros_like(self.tape.values[0])

    def _rule(self, step: Step, kind: Kind, outputs: list[Flow | None]) -> Iterator[tuple[int, Flow]]:
        arguments = step.arguments(self.tape.values)
        inputs = {position: self.tape.values[value] for position, value in step.inputs.items()}
        energies = [None if flow is None else flow.energy for flow in outputs]
        if self.follow_common:
            commons = [None if flow is None else flow.common for flow in outputs]
            energies, parts = split_common(step, kind, arguments, inputs, energies, commons)
            for position, flow in parts:
                yield step.inputs[position], flow
        if any(energy is not None for energy in energies):
            for position, part in RULES[kind](step, arguments, inputs, energies):
                yield step.inputs[position], Flow(part)

    def _pointwise(self, root: Step, outputs: list[Flow | None]) -> Iterator[tuple[int, Flow]]:
        flow = outputs[0]
        assert flow is not None
        group = self._group(root)
        inner = {out for step in group for out in step.outputs if out is not None}
        sources = sorted({value for step in group for value in step.inputs.values()} - inner)
        shapes = {value: self.tape.values[value].shape for value in sources}
        if len(group) == 1 and _is_plain_sum(root):
            for value in sources:
                yield value, flow.times(None, shapes[value])
            return
        if len(group) == 1 and root.name == "relu":  # the most frequent one, without autograd
            yield sources[0], flow.times((self.tape.values[sources[0]] > 0).to(flow.energy.dtype), shapes[sources[0]])
            return
        with torch.enable_grad():
            tensors = {v: self.tape.values[v].detach().expand(flow.energy.shape).requires_grad_() for v in sources}
            known = dict(tensors)
            for step in group:
                outs = step.call({position: known[value] for position, value in step.inputs.items()})
                known.update({value: out for value, out in zip(step.outputs, outs, strict=True) if value is not None})
            last = known[next(out for out in root.outputs if out is not None)]
            if not last.requires_grad:  # a step function: flat almost everywhere
                return
            derivatives = torch.autograd.grad(last.sum(), list(tensors.values()), allow_unused=True)
        for value, derivative in zip(sources, derivatives, strict=True):
            if derivative is not None:
                yield value, flow.times(derivative, shapes[value])

    def _group(self, root: Step) -> list[Step]:
        """The element-wise operators that lead to ``root`` from the nearest joints, in order."""
        found: dict[int, Step] = {}
        open_steps = [root]
        while open_steps:
            step = open_steps.pop()
            if id(step) in found:
                continue
            found[id(step)] = step
            for value in step.inputs.values():
                maker = self.producer.get(value)
                if value not in self.joints and maker is not None and kind_of(maker.op) == "pointwise":
                    open_steps.append(maker)
        if len(found) == 1:
            return [root]
        return [step for step in self.steps if id(step) in found]


def _is_plain_sum(step: Step) -> bool:
    values = list(step.inputs.values())
    scaled = any(leaf not in (None, 1) for leaf in step.leaves[2:])
    return step.name == "add" and not scaled and len(set(values)) == len(values)


def _rescale(flows: dict[int, Flow], changed: Iterable[int]) -> float:
    """Bring all energies back to 1 where they leave the range; return what they were divided by."""
    largest = max((float(flows[value].energy.detach().max()) for value in changed if value in flows), default=1.0)
    if not largest > 0 or _SMALL < largest < _LARGE:
        return 1.0
    for value, flow in flows.items():
        flows[value] = flow.scaled(1 / largest)
    return largest
