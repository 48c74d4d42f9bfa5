"""What a recording of a forward pass is: which operator made which tensor out of which, and in which module.

:func:`widerf.trace.recorder.record` takes it. Two readings of it exist: :func:`widerf.receptive_field` walks it
forwards with coordinates, :func:`widerf.predict` walks it backwards with energies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from widerf.errors import UntreatedOperatorError


def _copied(old: Tensor, new: Tensor, non_blocking: bool = False) -> Tensor:
    return new.to(old.dtype).expand_as(old)


def _shuffled(x: Tensor, groups: int) -> Tensor:
    batch, channels, *spatial = x.shape
    return x.reshape(batch, groups, channels // groups, *spatial).transpose(1, 2).reshape(x.shape)


def _filled(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value, x)


def _hard_sigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


# Operators whose derivative, or its own, torch does not know, or knows for a single value only, by others of the same
# meaning.
_IN_OTHER_WORDS: dict[str, Callable[..., Any]] = {
    "aten.copy.default": _copied,
    "aten.native_channel_shuffle.default": _shuffled,
    "aten.masked_fill.Tensor": _filled,
    "aten.hardsigmoid.default": _hard_sigmoid,
}


@dataclass(frozen=True, eq=False)
class Call:
    """One operator of the recording: which, on what, and where in the model.

    Attributes:
        op: the aten operator, without side effects on tensors that depend on the input.
        leaves: its arguments, flattened; in place of a tensor that depends on the input stands ``None``.
        spec: how to put the leaves together again.
        inputs: position among the leaves → identity of the value.
        outputs: identity of each output; ``None`` for what has no derivative (integers, masks).
        module: name of the innermost module whose forward ran.
        data: positions of further leaves that depend on the input, without a derivative: masks, indices.
        detached: whether the model computes this without derivatives, under a ``no_grad`` of its own.
    """

    op: Any
    leaves: tuple[Any, ...]
    spec: Any
    inputs: Mapping[int, int]
    outputs: tuple[int | None, ...]
    module: str
    data: frozenset[int] = frozenset()
    detached: bool = False

    @property
    def name(self) -> str:
        """Name of the operator without namespace and overload, e.g. ``"convolution"``."""
        return operator_name(self.op)

    def arguments(self, values: Mapping[int, Any] | list[Any]) -> dict[str, Any]:
        """Arguments by name, defaults filled in; ``values`` gives what stands for each value."""
        leaves = list(self.leaves)
        for position, value in self.inputs.items():
            leaves[position] = values[value]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        named: dict[str, Any] = {}
        for index, argument in enumerate(self.op._schema.arguments):
            default = argument.default_value if argument.has_default_value() else None
            named[argument.name] = args[index] if index < len(args) else kwargs.get(argument.name, default)
        return named

    def run(self, leaves: Mapping[int, Any]) -> tuple[Any, ...]:
        """Run the operator with other tensors at the positions of the tracked leaves; return its outputs as a tuple."""
        filled = list(self.leaves)
        for position, tensor in leaves.items():
            filled[position] = tensor
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        op = _IN_OTHER_WORDS.get(str(self.op), self.op)
        return tuple(pytree.tree_flatten(op(*args, **kwargs))[0])

    def untreated(self, purpose: str) -> UntreatedOperatorError:
        """The error for an operator that ``purpose`` has no rule for."""
        return UntreatedOperatorError(f"{purpose} has no rule for operator {self.op} in module {self.module!r}")


def own_leaf(tensor: Tensor) -> Tensor:
    """A tensor of the same values to differentiate by, for itself: one that hangs on others keeps hanging on them."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


Product = Callable[[Sequence["Tensor | None"]], dict[int, Tensor]]


def transposed_jacobian(
    call: Call, inputs: Mapping[int, Tensor], cotangents: Sequence[Tensor | None]
) -> dict[int, Tensor]:
    """Jᵀ times a cotangent per output, at the given inputs: position of a leaf → product."""
    return linearised(call, inputs)(cotangents)


def linearised(call: Call, inputs: Mapping[int, Tensor]) -> Product:
    """Run a call at the given inputs, and return what multiplies cotangents of its outputs by Jᵀ there."""
    with torch.enable_grad():
        tensors = {position: own_leaf(tensor) for position, tensor in inputs.items()}
        outs = call.run(tensors)

    def product(cotangents: Sequence[Tensor | None]) -> dict[int, Tensor]:
        pairs = [(o, c) for o, c in zip(outs, cotangents, strict=True) if c is not None and o.requires_grad]
        if not pairs:
            return {}
        with torch.enable_grad():
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                list(tensors.values()),
                [c.expand_as(o) for o, c in pairs],
                retain_graph=True,  # it may be asked again
                allow_unused=True,
                # The product itself may be differentiated.
                create_graph=any(t.requires_grad for t in (*(c for _, c in pairs), *inputs.values())),
            )
        return {position: g for position, g in zip(tensors, found, strict=True) if g is not None}

    return product


@dataclass
class Tape:
    """The operators of one forward pass in order, with the tensors that went through them.

    Attributes:
        calls: the operators that depend on the input, in the order in which they ran.
        values: each value's tensor; the input is value 0.
        target: identity of the map, laid out as (batch, channels, *spatial).
        shapes: module name → shapes of the first input and output tensor of its first call; a module that was still
            running when the map was reached has no output.
        marks: module name → identity of its map, for the maps on the way that were asked for and for the last one.
    """

    calls: list[Call] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    target: int = -1
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)

    def at(self, name: str) -> Tape:
        """The same recording as far as the map that is marked ``name``."""
        return replace(self, target=self.marks[name])

    def needed(self, targets: Iterable[int] | None = None) -> list[Call]:
        """The calls that lie on a path from the input to the map, or to any of several values, in order."""
        alive = {self.target} if targets is None else set(targets)
        calls = []
        for call in reversed(self.calls):
            if any(out in alive for out in call.outputs):
                alive.update(call.inputs.values())
                calls.append(call)
        return calls[::-1]

    @property
    def replayable(self) -> bool:
        """Whether no call reads a mask or an index that itself depends on the input: these are not run again."""
        return not any(call.data for call in self.calls)

    def replayed(self) -> Tape:
        """The recording with its constants as they are now: the same steps on the same input, run again.

        Weights that were changed in place are read anew; what was computed from weights outside the steps is not. An
        operator that writes (batch statistics) does so again: the caller keeps the model safe.
        """
        values = list(self.values)
        for call in self.needed():
            with torch.set_grad_enabled(torch.is_grad_enabled() and not call.detached):
                outputs = call.run({position: values[value] for position, value in call.inputs.items()})
            for value, output in zip(call.outputs, outputs, strict=False):
                if value is not None:
                    values[value] = output
        return replace(self, values=values)


def operator_name(op: Any) -> str:
    """Return an operator's name without namespace and overload."""
    return str(op._schema.name).split("::")[1]
