"""What all launches of Triton kernels share: on which device, interpreted or compiled, in which precision."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor


def interpreted() -> bool:
    """Whether Triton interprets kernels, on CPU tensors; it decides that when it is imported."""
    from widerf.kernels import triton_kernels

    return type(triton_kernels.implicit_gemm).__name__ == "InterpretedFunction"


def precision(dtype: torch.dtype) -> str:
    """Return Triton's name of the precision in which PyTorch's own convolutions multiply float32."""
    if dtype != torch.float32:
        return "ieee"
    conv = getattr(torch.backends.cudnn, "conv", None)
    tf32 = conv.fp32_precision == "tf32" if conv is not None else torch.backends.cudnn.allow_tf32
    return "tf32" if tf32 else "ieee"


@functools.lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability; of the newest kind where no GPU is asked."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of ``like``."""
    away = like.is_cuda and like.device.index != torch.cuda.current_device()
    with torch.cuda.device(like.device) if away else contextlib.nullcontext():
        kernel[grid](*arguments, **options)
