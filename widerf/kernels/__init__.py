"""Compiled kernels of the sparse convolution, and the choice between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from widerf.kernels import cpu
from widerf.kernels.cpu import VARIABLE
from widerf.report import Report

HALF = (torch.bfloat16, torch.float16)
STOCK = "PyTorch's operators"
BY_BOXES, GATHERED = "Triton, by boxes", "Triton, gathered"
OTHER_TAPS = "cuda, other groupings of the taps"


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


def shown(kind: str) -> str:
    """Return what `path` found in words."""
    return {"torch": STOCK, "cuda": "Triton", "cpu": f"C++ for {(cpu.chosen() or ('',))[0]}"}[kind]


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


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _on_cuda(name: str) -> list[Path]:
    """Return the rows for CUDA: layers whose taps come in blocks, and the others."""
    if not torch.cuda.is_available():
        return [Path(n, STOCK, "no CUDA device here") for n in (name, OTHER_TAPS)]
    kind, why = path(torch.device("cuda"), torch.float32, 2)
    if kind != "cuda":
        return [Path(n, shown(kind), why) for n in (name, OTHER_TAPS)]
    new = torch.cuda.get_device_capability() >= (9, 0)
    fast = "neighbouring channels share their taps: blocks of 16, 32 or 64"
    old = "only depthwise layers: tensor descriptors need compute capability 9.0"
    return [Path(name, BY_BOXES, fast if new else old), Path(OTHER_TAPS, GATHERED, "right, several times slower")]


def path_of(layer: Any, input: Tensor) -> Path:
    """Say what computes a sparse layer on such an input, and why nothing faster does.

    Args:
        layer: a `SparseConv1d`, `SparseConv2d` or `SparseConv3d`.
        input: a tensor as the layer will get it; its device and the autocast in force count.

    Raises:
        TypeError: if ``layer`` is no sparse layer or ``input`` no tensor.

    Example:
        >>> from widerf import SparseConv3d
        >>> path_of(SparseConv3d(4, 4, 3, seed=0), torch.zeros(1, 4, 9, 9, 9)).path
        "PyTorch's operators"
    """
    return Path(type(layer).__name__, *describe(layer, input))


def info() -> Info:
    """Say which kernels compute sparse convolutions here, and why.

    C++ kernels are chosen by the instruction sets of the processor; the environment variable ``WIDERF_KERNELS``, read
    once, forces one of them ("avx512", "avx2", "plain") or PyTorch's operators ("torch"), on every device.
    On CUDA a layer is fast where channels share their taps in blocks of 16, 32 or 64 neighbours ("Triton, by boxes");
    the others are right and several times slower ("Triton, gathered"): `path_of` says which path a layer gets.
    ``torch.compile`` uses the kernels too. Exporters, tracers, ``torch.func`` and forward-mode derivatives always get
    PyTorch's operators, and layers whose taps are one grid are PyTorch's own dilated convolution on every path.

    Returns:
        A table, one row per kind of tensors.

    Example:
        >>> table = info()
        >>> [row.name for row in table]
        ['cpu float32', 'cpu bfloat16, float16', 'cuda float32, bfloat16, float16', 'cuda, other groupings of the taps',
         '3 axes, float64, other devices']
        >>> table["3 axes, float64, other devices"].path
        "PyTorch's operators"
    """
    rows = []
    for dtypes in ((torch.float32,), HALF):
        kind, why = path(torch.device("cpu"), dtypes[0], 2)
        if kind == "cpu":
            forced = os.environ.get(VARIABLE)
            choice = f"{VARIABLE}={forced}" if forced else f"best of {', '.join(cpu.runnable())}, which this CPU runs"
            why = f"{why}; {choice}" if why else choice
        rows.append(Path(f"cpu {_names(dtypes)}", shown(kind), why))
    rows += _on_cuda(f"cuda {_names((torch.float32, *HALF))}")
    rows.append(Path("3 axes, float64, other devices", STOCK, "no compiled kernels for them"))
    return Info(tuple(rows))


from widerf.kernels.tuning import describe, tune  # noqa: E402  # it asks this module which path a layer gets

__all__ = ["info", "path_of", "tune", "use"]
