"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widerf.operators.boxes import EMPTY, Jump, union_of
from widerf.operators.moves import by
from widerf.operators.rule import Arguments, Inputs, Rule, always, in_place, joined, named
from widerf.trace.tape import Call, own_leaf


def _boxes(call: Call, arguments: Arguments, reaches: Inputs, shapes: list[Any], jump: Jump) -> list[Tensor | None]:
    union = union_of(list(reaches.values()), shapes[0])
    return [union if shape == shapes[0] else None for shape in shapes]


def _chosen(call: Call, arguments: Arguments, leaves: Inputs, shapes: list[Any]) -> tuple[Any, ...]:
    """By a mask the one or the other, by one that depends on the image both; constants see nothing."""
    nothing = torch.full((), EMPTY)
    one, other = leaves.get(1, nothing), leaves.get(2, nothing)
    chosen = torch.minimum(one, other) if call.data else torch.where(arguments["condition"], one, other)
    return (chosen.expand(shapes[0]),)


def slopes(calls: Sequence[Call], inputs: Inputs, last: int) -> list[Tensor | None]:
    """Derivative of one value of a group of element-wise calls with respect to each of the group's inputs.

    They are differentiated together, as one function, since no weights lie between them: x·σ(x), relu(x + f(x)).

    Args:
        calls: the group, in order.
        inputs: identity of each value that enters the group → its tensor, of the shape of the result.
        last: identity of the value that is differentiated.

    Returns:
        One derivative per input; ``None`` where there is none, as for a step function, flat almost everywhere.
    """
    with torch.enable_grad():
        known = {value: own_leaf(tensor) for value, tensor in inputs.items()}
        leaves = list(known.values())
        for call in calls:
            outs = call.run({position: known[value] for position, value in call.inputs.items()})
            known.update({value: out for value, out in zip(call.outputs, outs, strict=True) if value is not None})
        if not known[last].requires_grad:
            return [None for _ in leaves]
        further = any(tensor.requires_grad for tensor in inputs.values())  # the slopes may be differentiated
        return list(torch.autograd.grad(known[last].sum(), leaves, allow_unused=True, create_graph=further))


RULE = Rule("pointwise", _boxes, None, jump=in_place, distributes=True, joins=always)
# Operators that torch itself marks as such (torch.Tag.pointwise) need not be listed; torch 2.11 leaves some out.
NAMES = joined(
    [
        named(
            RULE,
            "hardswish _prelu_kernel masked_fill clamp clamp_min clamp_max hardtanh elu mish log_sigmoid_forward "
            "leaky_relu celu selu hardsigmoid max.other min.other",
        ),
        named(Rule("pointwise", by(_chosen), None, jump=in_place), "where"),
    ]
)
