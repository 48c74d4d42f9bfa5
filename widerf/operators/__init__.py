"""What each kind of ATen operator does to boxes of pixels, to energies and to what positions have in common.

One file a kind, each with the names that it treats. An operator that is in no file has no rule, and both readings of a
recording refuse it by name: nothing is guessed.
"""

from __future__ import annotations

from typing import Any

import torch

from widerf.operators import convolution, matmul, moves, normalisation, pointwise, reduction, resampling
from widerf.operators.rule import Rule, joined
from widerf.trace.tape import operator_name

TABLE: dict[str, Rule] = joined(
    room.NAMES for room in (pointwise, moves, convolution, matmul, resampling, reduction, normalisation)
)


def rule_of(op: Any) -> Rule | None:
    """Rule of an aten operator, ``None`` for one that has none.

    Example:
        >>> aten = torch.ops.aten
        >>> [rule and rule.kind for rule in map(rule_of, (aten.gelu.default, aten.mm.default, aten.fft_fft.default))]
        ['pointwise', 'matmul', None]
    """
    name = operator_name(op)
    rule = TABLE.get(f"{name}.{op._overloadname}", TABLE.get(name))  # an overload may be of another kind than the rest
    if rule is None and torch.Tag.pointwise in op.tags:
        return pointwise.RULE
    return rule
