"""Tensor descriptors of images and weights, as `widerf.kernels.box_kernels` reads and writes them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Describe:
    """Makes the descriptors of tensors of one shape and width of numbers, whose addresses are multiples of 16 bytes.

    Triton checks the first; the others differ in nothing but the tensor, and are not checked again.
    """

    def __init__(self, shape: list[int], strides: list[int], box: list[int]) -> None:
        self._sizes = (shape, strides, box)
        self._checked: dict[str, Any] | None = None

    def __call__(self, base: Tensor) -> Any:
        """Return the descriptor of ``base``."""
        if self._checked is None:
            first = _descriptor()(base, *self._sizes)
            self._checked = {**vars(first), "base": None}  # it must not keep the tensor
            return first
        made = object.__new__(_descriptor())
        vars(made).update(self._checked, base=base)
        return made


@functools.lru_cache(maxsize=1)
def _descriptor() -> Any:
    return importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor


@functools.lru_cache(maxsize=1)
def available() -> bool:
    """Whether this Triton has tensor descriptors."""
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def dense(x: Tensor, stride: Sequence[int] = (1, 1)) -> Tensor:
    """Return x in channels_last, its sides multiples of the stride, its address one of 16 bytes: itself if it is."""
    if stride != (1, 1):
        short = [-n % s for n, s in zip(x.shape[2:], stride, strict=True)]
        if any(short):
            x = F.pad(x, (0, short[1], 0, short[0]))
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)


def by_taps(weight: Tensor, outs_last: bool) -> Tensor:
    """Return a weight (outs, ins, *taps) as (outs, *taps, ins) or (ins, *taps, outs), its address one of 16 bytes.

    The former is how channels_last keeps it, and not copied.
    """
    taps = range(2, weight.dim())
    turned = weight.permute((1, *taps, 0) if outs_last else (0, *taps, 1)).contiguous()
    return turned if turned.data_ptr() % 16 == 0 else turned.clone()


def of_image(shape: Sequence[int], stride: Sequence[int], box: Sequence[int]) -> Describe:
    """Describe dense channels_last images taken apart by a stride; ``box``: (images, rows, columns, channels)."""
    (b, c, h, w), (sy, sx) = shape, stride
    strides = [h * w * c, sy * w * c, w * c, sx * c, 1]
    return Describe([b, h // sy, sy, w // sx, sx * c], strides, [box[0], box[1], 1, box[2], box[3]])


def of_weight(outer: int, taps: int, inner: int, flat: bool, box: Sequence[int]) -> Describe:
    """Describe dense weights (outer, taps, inner), ``flat`` as a matrix (outer, taps·inner); ``box``: outer, inner."""
    if flat:
        return Describe([outer, taps * inner], [taps * inner, 1], list(box))
    return Describe([outer, taps, inner], [taps * inner, inner, 1], [box[0], 1, box[1]])
