"""Recurrent layers that torch computes in one operator, step by step: the steps are operators that have rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LSTM = 2  # torch's number for this kind


def _lstm_layer(
    input: Tensor, w_input: Tensor, w_hidden: Tensor, b_input: Tensor, b_hidden: Tensor, hidden: Tensor, cell: Tensor,
    reverse: bool, batch_sizes: list[int], mode: int, size: int, layers: int, has_biases: bool, *rest: Any,
) -> Any:  # fmt: skip
    """One direction of one layer: ``input`` is (steps, batch, channels)."""
    if mode != _LSTM or batch_sizes:
        return NotImplemented
    bias = b_input + b_hidden if has_biases else input.new_zeros(4 * size)
    outputs: list[Tensor] = []
    hidden, cell = hidden.reshape(-1, hidden.shape[-1]), cell.reshape(-1, cell.shape[-1])
    for step in reversed(range(len(input))) if reverse else range(len(input)):
        gates = input[step].mm(w_input.t()) + hidden.mm(w_hidden.t()) + bias
        entry, forget, content, out = torch.split(gates, size, -1)
        cell = forget.sigmoid() * cell + entry.sigmoid() * content.tanh()
        hidden = out.sigmoid() * cell.tanh()
        outputs.append(hidden)
    states = (state.reshape(1, *state.shape) for state in (hidden, cell))
    return torch.stack(outputs[::-1] if reverse else outputs), *states, input.new_empty(0)


# Name of an operator → the same in steps, or NotImplemented for arguments that it does not take apart.
IN_STEPS: dict[str, Callable[..., Any]] = {"mkldnn_rnn_layer": _lstm_layer}
