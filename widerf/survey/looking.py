"""Which layers of a recording change what is seen, and which can still be heard at its end."""

from __future__ import annotations

import math
from collections.abc import Collection

from torch import Tensor, nn

from widerf.operators import rule_of
from widerf.trace.tape import Call, Tape


def looking(tape: Tape, model: nn.Module, global_paths: Collection[str]) -> set[str]:
    """Return the modules of a recording that change what is seen.

    They convolve with taps or strides, pool, resample, see the whole image (``global_paths``), lay different paths on
    each other, or do something that has no rule.
    """
    joining = {name for name, module in model.named_modules() if next(module.children(), None) is not None}
    found = {call.module for call in tape.needed() if _looks(call, tape) or (call.module in joining and _joins(call))}
    return found | set(global_paths)


def _looks(call: Call, tape: Tape) -> bool:
    rule = rule_of(call.op)
    if rule is None or rule.kind == "pooling":
        return True
    arguments = call.arguments(tape.values)
    if rule.kind == "convolution" and math.prod(arguments["weight"].shape[2:]) > 1:
        return True
    before = tuple(tape.values[next(iter(call.inputs.values()))].shape)
    after = next((tuple(tape.values[out].shape) for out in call.outputs if out is not None), before)
    return any(factor != 1 for factor in rule.jump(call, arguments, before, after) or ())


def _joins(call: Call) -> bool:
    rule = rule_of(call.op)
    return rule is not None and rule.joins is not None and len(set(call.inputs.values())) > 1


def heard(tape: Tape, model: nn.Module, silent: Collection[str]) -> set[int]:
    """Return the values that reach the map by some path that no scale named in ``silent`` is on."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    scales = {parameters[name].data_ptr() for name in silent if name in parameters}
    alive = {tape.target}
    for call in reversed(tape.calls):
        if not any(out in alive for out in call.outputs):
            continue
        if not any(isinstance(leaf, Tensor) and leaf.data_ptr() in scales for leaf in call.leaves):
            alive.update(call.inputs.values())
    return alive
