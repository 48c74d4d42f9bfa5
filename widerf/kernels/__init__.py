"""Compiled kernels of the sparse convolution, and the choice between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from widerf.kernels import cpu
from widerf.kernels.cpu import VARIABLE
from widerf.report import Report

HALF = (torch.bfloat16, torch.float16)
STOCK = "PyTorch's operators"


@lru_cache(maxsize=64)
def path(device: torch.device, dtype: torch.dtype, rank: int) -> tuple[str, str]:
    """Return what computes sparse convolutions of ``rank`` axes on tensors of this kind: (path, why that).

    The path is "cpu" (C++), "cuda" (Triton) or "torch" (PyTorch's operators).
    """
    if os.environ.get(VARIABLE) == "torch":
        return "torch", f"{VARIABLE}=torch"
    if dtype not in (torch.float32, *HALF) or rank > 2:
        return "torch", "the compiled kernels take float32, bfloat16 and float16 with one or two axes"
    if device.type == "cpu":
        if cpu.library() is None:
            return "torch", "no compiled kernels: widerf was installed without a C++ compiler"
        return "cpu", "computed in float32" if dtype in HALF else ""
    if device.type == "cuda":
        from widerf.kernels import cuda

        sample = torch.empty(0, dtype=dtype, device=device)
        why_not = cuda.unsupported(sample, sample)
        return ("cuda", "") if why_not is None else ("torch", why_not)
    return "torch", f"no kernels for {device.type}"


def compiled(device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    """Whether compiled kernels compute such convolutions, all channels at once."""
    return path(device, dtype, rank)[0] != "torch"


compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the compiler asks once and keeps the answer


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Compute by one path within the block, for comparisons: the environment variable ``WIDERF_KERNELS`` for a while.

    Args:
        choice: "torch" (PyTorch's operators), "plain", "avx2" or "avx512" (C++ for that instruction set), or "" (the
            best there is).

    Raises:
        ValueError: if the processor does not have that instruction set.

    Example:
        >>> with use("torch"):
        ...     info()["cpu float32"].path
        "PyTorch's operators"
    """
    before = os.environ.get(VARIABLE, "")
    try:
        _force(choice)
        yield
    finally:
        _force(before)


def _force(choice: str) -> None:
    os.environ[VARIABLE] = choice
    cpu.chosen.cache_clear()
    path.cache_clear()
    cpu.chosen()


@dataclass(frozen=True)
class Path:
    """What computes one kind of tensors, and why."""

    name: str
    path: str
    why: str


@dataclass(frozen=True)
class Info(Report[Path]):
    """Which kernels are in use; prints as a table."""

    columns: ClassVar[Mapping[str, str | Callable[[Any], object]]] = {"tensors": "name", "path": "path", "why": "why"}


def info() -> Info:
    """Say which kernels compute sparse convolutions here, and why.

    C++ kernels are chosen by the instruction sets of the processor; the environment variable ``WIDERF_KERNELS``, read
    once, forces one of them ("avx512", "avx2", "plain") or PyTorch's operators ("torch"), on every device.
    ``torch.compile`` uses the kernels too. Exporters, tracers, ``torch.func`` and forward-mode derivatives always get
    PyTorch's operators, and layers whose taps are one grid are PyTorch's own dilated convolution on every path.

    Returns:
        A table, one row per kind of tensors.

    Example:
        >>> table = info()
        >>> [row.name for row in table]
        ['cpu float32', 'cpu bfloat16, float16', 'cuda float32, bfloat16, float16', '3 axes, float64, other devices']
        >>> table["3 axes, float64, other devices"].path
        "PyTorch's operators"
    """
    rows = []
    for device, dtypes in (("cpu", (torch.float32,)), ("cpu", HALF), ("cuda", (torch.float32, *HALF))):
        name = f"{device} {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
        if device == "cuda" and not torch.cuda.is_available():
            rows.append(Path(name, STOCK, "no CUDA device here"))
            continue
        kind, why = path(torch.device(device), dtypes[0], 2)
        shown = {"torch": STOCK, "cuda": "Triton", "cpu": f"C++ for {(cpu.chosen() or ('',))[0]}"}[kind]
        if kind == "cpu":
            forced = os.environ.get(VARIABLE)
            choice = f"{VARIABLE}={forced}" if forced else f"best of {', '.join(cpu.runnable())}, which this CPU runs"
            why = f"{why}; {choice}" if why else choice
        rows.append(Path(name, shown, why))
    rows.append(Path("3 axes, float64, other devices", STOCK, "no compiled kernels for them"))
    return Info(tuple(rows))


__all__ = ["info", "use"]
