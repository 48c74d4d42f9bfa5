"""Compiled kernels of the sparse convolution, and the choice between them."""

from __future__ import annotations

from types import ModuleType

import torch

from widerf import columns


def choose(device: str, dtype: torch.dtype, rank: int) -> ModuleType:
    """Return the module that computes convolutions of ``rank`` axes on tensors of this kind."""
    return columns


def compiled(device: str, dtype: torch.dtype, rank: int) -> bool:
    """Whether a kernel that takes all channels at once computes them."""
    return choose(device, dtype, rank) is not columns
