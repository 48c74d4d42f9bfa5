"""The offsets of a layer as integers in Python, which slicing needs, kept equal to the buffer that is saved and moved.

What is compared are *values*: on the CPU at every call. Reading them from another device would wait for it at every
call; there the last tensor seen is held, and read again if it is another one or was written to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from widerf.kernels.gate import allocated
from widerf.kernels.plan import Taps
from widerf.trace.certain import certainly

_C: Any = torch._C
_functorch: Any = _C._functorch


def _mode() -> Any:
    return _get_current_dispatch_mode()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Compute with plain tensors within the block, whatever mode, trace or transform the caller is in.

    Offsets are facts about a layer. They are integers also where the layer's tensors are fake, traced or batched.
    """
    stack = contextlib.ExitStack()
    with certainly(stack.close):  # the recorder's mode has to be back before the recorder leaves
        if _mode() is not None:
            stack.enter_context(_disable_current_modes())
        if torch._C._are_functorch_transforms_active():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        tracing = torch._C._get_tracing_state()
        if tracing is not None:
            _C._set_tracing_state(None)
            stack.callback(_C._set_tracing_state, tracing)
        yield


def _is_watched() -> bool:
    return bool(
        _mode() is not None or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    )


def _real(t: Any) -> Tensor | None:
    """Return the tensor that ``t`` stands for: exporters and tracers put functional and fake ones into a model."""
    while torch._is_functional_tensor(getattr(t, "elem", t)):
        t = torch._from_functional_tensor(getattr(t, "elem", t))
    mode = getattr(t, "fake_mode", None)
    if mode is not None:
        memory = mode.fake_tensor_converter.meta_converter
        known = getattr(getattr(memory, "describer", None), "lookup_tensor", {})  # torch 2.4 and later
        t = next((real for real, number in known.items() if memory.tensor_memo.get(number) is t), None)
    return t if type(t) is Tensor and not t.is_meta else None


def read_members(offsets: Tensor) -> list[Tensor] | None:
    """Return the offsets of each member of an ensemble, plain and on the CPU; of one layer, a list of one.

    `torch.vmap` over stacked states hands a layer the offsets of all members at once. None: there are no values to
    read, because the tensor is on no device or fake.

    Raises:
        RuntimeError: if the memory of the tensor was freed.

    Example:
        >>> read_members(torch.zeros(1, 9, 2, dtype=torch.int64, device="meta")) is None
        True
    """
    with unwatched():
        batched = []
        while _functorch.is_functorch_wrapped_tensor(offsets):
            batched.append(_functorch.maybe_get_bdim(offsets))
            offsets = _functorch.get_unwrapped(offsets)
        real = _real(offsets)
        if real is None:
            return None
        if not allocated(real):
            raise RuntimeError(f"offsets must have memory for their {real.numel()} elements, got a freed storage")
        members = real.detach().cpu()
        done = 0
        for axis in reversed([axis for axis in batched if axis >= 0]):
            members = members.movedim(done + axis, 0)
            done += 1
        return list(members.flatten(0, done - 1)) if done else [members]


class Seen(NamedTuple):
    """What offsets were when they were last read: their values, and for other devices which tensor it was."""

    values: Tensor  # on the CPU
    tensor: Tensor | None  # held, so that no other tensor can take its place in memory
    version: int | None  # None: of inference mode, which counts none
    pointer: int


def _equal(a: Tensor, b: Tensor) -> bool:
    if _is_watched():
        with unwatched():
            return torch.equal(a, b)
    return torch.equal(a, b)


def version_of(t: Tensor) -> int | None:
    """Return how often ``t`` was written to in place, or None if it does not count."""
    return None if t.is_inference() else t._version


def look(offsets: Tensor, values: Tensor) -> Seen:
    """Return what to compare ``offsets`` with later; ``values`` are they, on the CPU."""
    held = None if offsets.device.type == "cpu" else offsets
    if held is None:
        return Seen(values, None, None, 0)
    return Seen(values, held, version_of(held), held.data_ptr())


def unchanged(offsets: Tensor, seen: Seen | None) -> bool:
    """Whether ``offsets`` hold what they held when they were ``seen``."""
    if seen is None or type(offsets) is not Tensor or _functorch.is_functorch_wrapped_tensor(offsets):
        return False
    if offsets.device.type == "cpu":
        return offsets.dtype == seen.values.dtype and allocated(offsets) and _equal(offsets, seen.values)
    if offsets is not seen.tensor or seen.version is None:
        return False
    return offsets._version == seen.version and offsets.data_ptr() == seen.pointer


def averaged(new: Taps, old: Taps, witness: list[int]) -> bool:
    """Whether ``new`` is what a running average of the model has made of ``old``, by what it made of the witness.

    Averages over integer buffers truncate: 0.999·3 + 0.001·3 may be 2.9999998, which becomes 2. The witness is a buffer
    that held 0, 1, 2, …; an average does to its numbers what it does to the same numbers among the offsets, and nobody
    else does.

    Example:
        >>> averaged((((2,), (-3,)),), (((3,), (-3,)),), [0, 1, 2, 2]), averaged((((2,),),), (((3,),),), [0, 1, 2, 3])
        (False, False)
        >>> averaged((((2,), (-2,)),), (((3,), (-3,)),), [0, 1, 2, 2])
        True
    """
    if not shortened(new, old) or any(not 0 <= i - n <= 1 for i, n in enumerate(witness)):
        return False
    return all(abs(n) == witness[abs(o)] for n, o in _pairs(new, old))


def _pairs(new: Taps, old: Taps) -> Iterator[tuple[int, int]]:
    for group, before in zip(new, old, strict=True):
        for tap, place in zip(group, before, strict=True):
            yield from zip(tap, place, strict=True)


def shortened(new: Taps, old: Taps) -> bool:
    """Whether each number of ``new`` is that of ``old`` or the next one towards zero."""
    return len(new) == len(old) and all(n in (o, o - (o > 0) + (o < 0)) for n, o in _pairs(new, old))
