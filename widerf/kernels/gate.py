"""The one gate before all kernels: what a call must be, on every path, before anything takes a pointer.

The operators are public (``torch.ops.widerf``), and weights come from checkpoints, parametrisations and
``functional_call``: nothing of what arrives here is taken on trust.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from widerf._checks import require
from widerf.kernels.plan import Plan, read_plan

OPERANDS = {"forward": ("input", "weight"), "grad_input": ("grad", "weight"), "grad_weight": ("input", "grad")}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

LARGEST = 1 << 27  # what size + stride · output size may be on an axis: the kernels have tables that long
COUNTED = 1 << 31  # more than they count taps to


def allocated(t: Tensor) -> bool:
    """Whether the storage of ``t`` holds all of its elements: FSDP and others free storages and keep the tensors.

    Example:
        >>> x = torch.ones(2)
        >>> _ = x.untyped_storage().resize_(0)
        >>> allocated(x)
        False
    """
    count = t.numel()
    if count == 0:
        return True
    if not (t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last))):
        count = 1 + sum([(n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)])
    return bool((t.storage_offset() + count) * t.element_size() <= t.untyped_storage().nbytes())


def check_kinds(name: str, first: Tensor, second: Tensor) -> None:
    """Raise unless the two tensors are of one kind that a kernel takes.

    Raises:
        TypeError: if they are not dense and real.
        RuntimeError: if they differ in dtype or device, as PyTorch's convolutions say it.
    """
    for argument, t in zip(OPERANDS[name], (first, second), strict=True):
        if t.layout != torch.strided:
            raise TypeError(f"{argument} must be a dense (strided) tensor, got {t.layout}")
    if first.dtype != second.dtype or first.device != second.device:
        raise RuntimeError(
            "sparse_conv expects its tensors to have one dtype and device, "
            f"but got {first.dtype} on {first.device} and {second.dtype} on {second.device}"
        )
    if first.dtype not in DTYPES:
        raise TypeError(
            f"{OPERANDS[name][0]} must be of dtype float32, float64, bfloat16 or float16, got {first.dtype}"
        )


def shapes(
    name: str, first: Sequence[int], second: Sequence[int], shape: Sequence[int]
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Return the shapes of input, weight and output of the convolution that a call of ``name`` belongs to."""
    if name == "forward":
        return first, second, (*first[:1], *second[:1], *shape)
    return (shape, second, first) if name == "grad_input" else (first, shape, second)


def check_channels(plan: Plan, x: Sequence[int], weight: Sequence[int], y: Sequence[int]) -> None:
    """Raise ValueError unless input, weight and output have the axes, channels and taps of the plan."""
    axes, groups, channels = len(plan.stride) + 2, plan.groups, plan.channels
    for argument, value in (("input", x), ("weight", weight), ("output", y)):
        require(len(value) == axes, argument, f"have {axes} axes, as the plan", tuple(value))
    require(x[1] == channels, "input", f"have the {channels} channels of the plan", tuple(x))
    rule = f"be (out, {channels // groups}, *kernel) of {plan.taps} taps, out a multiple of groups={groups}"
    fits = weight[1] * groups == channels and math.prod(weight[2:]) == plan.taps and weight[0] % groups == 0
    require(bool(fits), "weight", rule, tuple(weight))
    require(y[1] == weight[0], "output", f"have the {weight[0]} channels that the weight gives", tuple(y))


def check_sizes(plan: Plan, x: Sequence[int], y: Sequence[int]) -> None:
    """Raise ValueError unless the batches agree and the taps stay within the border that the plan reckons with."""
    require(min(*x, *y) >= 0, "shape", "have no negative size", (tuple(x), tuple(y)))
    require(x[0] == y[0], "batch", "be the same for input and output", (x[0], y[0]))
    for axis, (n, m, stride) in enumerate(zip(x[2:], y[2:], plan.stride, strict=True)):
        first = plan.before[axis] + plan.lowest[axis]
        last = plan.highest[axis] + stride * (m - 1) - n - plan.after[axis]
        rule = f"let the taps stay on axis {axis} within the plan's border of the input's {n} pixels"
        require(m == 0 or (first >= 0 and last < 0), "size", rule, tuple(y[2:]))


class Admitted(NamedTuple):
    """What a call has been found to be."""

    result: tuple[int, ...]  # shape
    empty: bool  # there is nothing to sum
    small: bool  # the integers of the compiled kernels hold all that it makes them compute


def check(name: str, first: Sequence[int], second: Sequence[int], plan: Plan, shape: Sequence[int]) -> Admitted:
    """Check the shapes of a call, as `admit` does.

    Example:
        >>> from widerf.kernels.plan import make_layout
        >>> plan = make_layout((((0,),),), 4, (1,), (1,), ((0, 0),), (1,), 1).whole
        >>> check("grad_weight", (2, 4, 9), (2, 3, 9), plan, (3, 4, 1))
        Admitted(result=(3, 4, 1), empty=False, small=True)
    """
    x, weight, y = shapes(name, first, second, shape)
    check_channels(plan, x, weight, y)
    check_sizes(plan, x, y)
    empty = 0 in (math.prod(x), math.prod(weight), math.prod(y))
    extents = [n + s * m for n, m, s in zip(x[2:], y[2:], plan.stride, strict=True)]
    small = max(extents) <= LARGEST and plan.channels * plan.taps < COUNTED
    return Admitted(tuple({"forward": y, "grad_input": x, "grad_weight": weight}[name]), empty, small)


@lru_cache(maxsize=4096)
def _checked(name: str, first: tuple[int, ...], second: tuple[int, ...], plan: str, shape: tuple[int, ...]) -> Admitted:
    return check(name, first, second, read_plan(plan), shape)


def narrow(shift: int) -> int:
    """Return ``shift`` as 32 bits hold it: one beyond them lies outside every image on the same side.

    Example:
        >>> narrow(-(2**40)), narrow(7)
        (-2147483648, 7)
    """
    return min(max(shift, -(1 << 31)), (1 << 31) - 1)


def admit(name: str, first: Tensor, second: Tensor, plan: str, shape: Sequence[int]) -> Admitted:
    """Check a call of one of the three maps, whatever path will compute it.

    Args:
        name: "forward", "grad_input" or "grad_weight".
        first: first tensor of the call.
        second: second tensor of the call.
        plan: text of the plan.
        shape: spatial size of the output, or shape of the gradient.

    Raises:
        TypeError: if a tensor is not dense, or not of a real floating dtype.
        ValueError: if shapes, plan and tensors do not fit each other, or a size is negative.
        RuntimeError: if dtypes or devices differ, or the memory of a tensor was freed.

    Example:
        >>> from widerf.kernels.plan import make_layout
        >>> plan = make_layout((((0,),),), 4, (1,), (1,), ((0, 0),), (1,), 1).whole
        >>> admit("forward", torch.ones(2, 4, 9), torch.ones(3, 4, 2), plan.text, [9])
        Traceback (most recent call last):
        ...
        ValueError: weight must be (out, 4, *kernel) of 1 taps, out a multiple of groups=1, got (3, 4, 2)
    """
    check_kinds(name, first, second)
    found = _checked(name, first.shape, second.shape, plan, tuple(shape))
    for argument, t in zip(OPERANDS[name], (first, second), strict=True):
        if not allocated(t):
            raise RuntimeError(
                f"{argument} must have memory for its {t.numel()} elements, "
                f"got a storage of {t.untyped_storage().nbytes()} bytes (freed?)"
            )
    return found
