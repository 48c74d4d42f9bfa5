"""In-place writes, in-place views and ``out=`` as what they are without side effects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from widerf.errors import UntreatedOperatorError
from widerf.trace.tape import operator_name


@dataclass(frozen=True)
class Write:
    """An in-place write: the value written and where it lies in its storage."""

    value: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def written_tensors(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator writes into."""
    if not func._schema.is_mutable:
        return []
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += [t for t in pytree.tree_flatten(value)[0] if isinstance(t, Tensor)]
    return written


def functional_form(func: Any) -> Any:
    """The operator that returns what another writes: ``aten.relu_`` → ``aten.relu``, ``add.out`` → ``add.Tensor``.

    Raises:
        UntreatedOperatorError: if torch has none.
    """
    name = operator_name(func)
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if packet is not None:
        if name.endswith("_") and func._overloadname in packet.overloads():
            return getattr(packet, func._overloadname)
        wanted = _plain_arguments(func)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if not op._schema.is_mutable and _plain_arguments(op) == wanted:
                return op
    raise UntreatedOperatorError(f"the recording has no form of operator {func} that leaves its input alone")


def out_arguments(func: Any) -> set[str]:
    """Names of the ``out=`` arguments of an operator."""
    return {argument.name for argument in func._schema.arguments if argument.is_out}


def _plain_arguments(func: Any) -> list[tuple[str, str]]:
    arguments = [a for a in func._schema.arguments if not a.is_out]
    return [(argument.name, str(argument.type)) for argument in arguments]


def source_of(tensor: Tensor, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    """For each element of a tensor: which element of another layout of its storage it is, −1 for none."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    places = torch.full((length,), -1, dtype=torch.int64, device=tensor.device)
    lying = torch.arange(math.prod(size), device=tensor.device).view(size)
    places.as_strided(size, stride, offset).copy_(lying)
    return places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def storage_of(tensor: Tensor) -> int:
    """Identity of the storage that a tensor lies in."""
    return int(tensor.untyped_storage()._cdata)
