"""Sparse layers, images and their dense twins, for the tests of SparseConv."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.reference import scattered_convolution
from widerf import SparseConv2d


def make(seed: int | None = 0, **arguments: Any) -> SparseConv2d:
    """A layer of 8 to 6 channels, 3 taps."""
    torch.manual_seed(0)
    return SparseConv2d(8, 6, 3, padding=1, seed=seed, **arguments)


def image(*shape: int) -> Tensor:
    """A fixed random batch."""
    return torch.randn(*(shape or (2, 8, 10, 9)), generator=torch.Generator().manual_seed(1))


def twin_of(layer: Any, x: Tensor) -> Tensor:
    """What the layer should compute, by the dense convolution."""
    return scattered_convolution(
        x, layer.weight, layer.bias, layer.offsets, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def right(layer: Any, x: Tensor | None = None) -> None:
    """The layer computes what its own buffers say."""
    x = image() if x is None else x
    torch.testing.assert_close(layer(x), twin_of(layer, x), rtol=1e-4, atol=1e-5)
