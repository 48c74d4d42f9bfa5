"""The compiled CPU kernels: which of them this processor runs, and calls on tensors.

Their sources (csrc/) know nothing of PyTorch: they take raw pointers through ctypes. float32, one or two spatial axes,
NCHW or channels_last, on as many threads as PyTorch uses.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from widerf.kernels.gate import narrow
from widerf.kernels.plan import Plan, read_plan

VARIABLE = "WIDERF_KERNELS"  # environment variable that overrides the choice
SETS = ("avx512", "avx2", "plain")  # instruction sets, best first


class _Problem(ctypes.Structure):
    """``widerf_problem`` of csrc/sparse_conv.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "in_channels", "out_channels", "groups", "height", "width", "out_height", "out_width"),
            *("taps", "stride_y", "stride_x", "channels_last", "threads"),
        )
    ]


def runnable() -> tuple[str, ...]:
    """Return the instruction sets that this processor has, best first."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": SETS, "AVX2": SETS[1:]}.get(capability, SETS[2:])


@lru_cache(maxsize=16)
def load(path: str | Path) -> ctypes.CDLL:
    """Open a library of kernels.

    Raises:
        OSError: if it cannot be opened.
    """
    library = ctypes.CDLL(str(path))
    for name in ("widerf_forward", "widerf_grad_input", "widerf_grad_weight"):
        function = getattr(library, name)
        function.restype = ctypes.c_int
        function.argtypes = [ctypes.POINTER(_Problem)] + [ctypes.c_void_p] * 4
    return library


def _find(name: str) -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_{name}{suffix}"
        if path.exists():
            try:
                return load(path)
            except (OSError, AttributeError):  # built for another machine
                return None
    return None


@lru_cache(maxsize=1)
def chosen() -> tuple[str, ctypes.CDLL] | None:
    """Return the instruction set in use and its library; None if none was built or ``WIDERF_KERNELS=torch``.

    Raises:
        ValueError: if ``WIDERF_KERNELS`` names no instruction set that this processor has.
    """
    forced = os.environ.get(VARIABLE, "")
    allowed = runnable()
    if forced not in ("", "torch", *allowed):
        raise ValueError(f"{VARIABLE} must be 'torch' or one of {allowed} on this processor, got {forced!r}")
    names = {"": allowed, "torch": ()}.get(forced, (forced,))
    return next(((name, found) for name in names if (found := _find(name))), None)


def library() -> ctypes.CDLL | None:
    """Return the library in use, or None."""
    found = chosen()
    return found and found[1]


def supported(device: str, dtype: torch.dtype, rank: int) -> bool:
    """Whether the kernels compute convolutions of ``rank`` axes on tensors of this kind."""
    return device == "cpu" and dtype == torch.float32 and rank in (1, 2) and library() is not None


@lru_cache(maxsize=1024)
def _shifts(text: str) -> tuple[ctypes.Array[ctypes.c_int32], int]:
    """Return the (y, x) of each channel and tap, and the number of taps."""
    plan = read_plan(text)
    places = [s for run in plan.runs for s in run.shifts * (run.stop - run.start)]
    once = [narrow(number) for s in places for number in (0, *s)[-2:]]
    flat = once * plan.repeats
    return (ctypes.c_int32 * len(flat))(*flat), len(plan.runs[0].shifts)


def _call(name: str, plan: Plan, x_shape: Sequence[int], y_shape: Sequence[int], last: bool, *data: Tensor) -> None:
    shifts, taps = _shifts(plan.text)
    image, size, stride = ((1, *v)[-2:] for v in (x_shape[2:], y_shape[2:], plan.stride))
    problem = _Problem(
        x_shape[0], x_shape[1], y_shape[1], plan.groups, *image, *size, taps, *stride, last, torch.get_num_threads()
    )
    failed = getattr(library(), name)(ctypes.byref(problem), shifts, *(t.data_ptr() for t in data))
    if failed:
        raise MemoryError(f"{name} found no memory for its work space")


_FORMAT = (torch.contiguous_format, torch.channels_last)


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=_FORMAT[last])


def forward(x: Tensor, weight: Tensor, plan: Plan, size: Sequence[int]) -> Tensor:
    """Convolve ``x`` (batch, channels, *spatial); returns (batch, out, *size) in the memory format of ``x``."""
    last = _channels_last(x)
    x, weight = _dense(x, last), weight.contiguous()
    y = torch.empty((x.shape[0], weight.shape[0], *size), dtype=x.dtype, memory_format=_FORMAT[last])
    _call("widerf_forward", plan, x.shape, y.shape, last, x, weight, y)
    return y


def grad_input(grad: Tensor, weight: Tensor, plan: Plan, shape: Sequence[int]) -> Tensor:
    """Return the gradient of the input, of shape ``shape``, from the output's."""
    last = _channels_last(grad)
    grad, weight = _dense(grad, last), weight.contiguous()
    x = torch.empty(tuple(shape), dtype=grad.dtype, memory_format=_FORMAT[last])
    _call("widerf_grad_input", plan, x.shape, grad.shape, last, grad, weight, x)
    return x


def grad_weight(x: Tensor, grad: Tensor, plan: Plan, shape: Sequence[int]) -> Tensor:
    """Return the gradient of the weight, of shape ``shape``, from the input and the output's gradient."""
    last = _channels_last(x)
    x, grad = _dense(x, last), _dense(grad, last)
    weight = torch.empty(tuple(shape), dtype=x.dtype)
    _call("widerf_grad_weight", plan, x.shape, grad.shape, last, x, grad, weight)
    return weight
