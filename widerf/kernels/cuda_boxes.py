"""The sparse convolution on CUDA where neighbouring channels share their taps: launches of `box_kernels`.

The three maps are those of `widerf.kernels.cuda`, on images in channels_last; others are copied, as cuDNN does.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from widerf.kernels import boxes, configurations, device
from widerf.kernels.boxes import Grid, ceil_div
from widerf.kernels.configurations import Configuration, Shape
from widerf.kernels.cuda_tables import Shifts

SCRATCH = 1 << 23  # float32 numbers of the parts of a weight gradient: 32 MiB
UNROLL = 9  # most taps of a depthwise layer whose loads are under way at once: more of them spill registers
TOGETHER = 7  # most taps of a program of a depthwise weight gradient
NO_LIMIT = 1 << 30


@functools.lru_cache(maxsize=1)
def descriptors() -> bool:
    """Whether this Triton has tensor descriptors."""
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def why_not(shifts: Shifts, itemsize: int, stride: Sequence[int], outs: int, groups: int) -> str | None:
    """Say why a layer cannot be computed by boxes; None if it can."""
    channels = shifts.channels
    if not shifts.block:
        return "its channels do not share their taps in blocks of 16, 32 or 64 neighbours"
    if groups not in (1, channels) or (groups > 1 and outs != channels):
        return f"it has {groups} groups of several channels"
    if groups == 1 and not descriptors():
        return "this Triton has no tensor descriptors"
    if groups == 1 and outs * itemsize % 16:
        return f"its {outs} outputs are no multiple of {16 // itemsize}, which tensor descriptors need"
    if max(channels, outs) >= 1 << 16 or shifts.taps >= 1 << 15:
        return "it has more channels or taps than 16 bits count"
    if shifts.farthest >= boxes.FURTHEST or max(stride) >= 128 or channels * stride[1] >= 1 << 24:
        return "its taps reach too far for 16 bits"
    return None


def _kernels() -> Any:
    from widerf.kernels import box_kernels

    return box_kernels


def _dense(x: Tensor, stride: Sequence[int] = (1, 1)) -> Tensor:
    """Return x in channels_last, its sides multiples of the stride, its address one of 16 bytes: itself if it is."""
    short = [-n % s for n, s in zip(x.shape[2:], stride, strict=True)]
    if any(short):
        x = F.pad(x, (0, short[1], 0, short[0]))
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(*shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


@functools.lru_cache(maxsize=1)
def _descriptor() -> Any:
    return importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor


def _describe(*of: Any) -> Any:
    return _descriptor()(*of)


def _image(x: Tensor, stride: Sequence[int], box: tuple[int, int, int, int]) -> Any:
    """Describe a dense channels_last image taken apart by a stride; ``box``: (images, rows, columns, channels)."""
    (b, c, h, w), (sy, sx) = x.shape, stride
    shape, strides = [b, h // sy, sy, w // sx, sx * c], [h * w * c, sy * w * c, w * c, sx * c, 1]
    return _describe(x, shape, strides, [box[0], box[1], 1, box[2], box[3]])


def _aligned(w: Tensor) -> Tensor:
    """Return w dense, its address one of 16 bytes: itself if it is."""
    w = w.contiguous()
    return w if w.data_ptr() % 16 == 0 else w.clone()


def _weight(w: Tensor, transposed: bool, turn: bool, c: Configuration) -> Any:
    """Describe a weight (out, in, taps) as `box_kernels.product` takes it: in channels_last it is not copied.

    The tensor cores take float32 by columns only: its transpose is copied for the gradient of the input.
    """
    by_tap = w.permute(1, 2, 0) if transposed and turn else w.transpose(1, 2)
    flat = _aligned(by_tap)
    outer, taps, inner = flat.shape
    if turn:
        return _describe(flat.view(outer, taps * inner), [outer, taps * inner], [taps * inner, 1], [c.outs, c.ins])
    return _describe(flat, [outer, taps, inner], [taps * inner, inner, 1], [c.ins, 1, c.outs])


def _numbers(x: Tensor) -> str:
    return configurations.numbers_of(x.element_size(), device.precision(x.dtype))


def _put(numbers: np.ndarray[Any, Any], where: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(where)


@functools.lru_cache(maxsize=1024)
def _steps(
    shifts: Shifts,
    stride: Sequence[int],
    size: Sequence[int],
    grid: Grid,
    channels: int,
    chunk: int,
    transposed: bool,
    where: torch.device,
) -> tuple[Tensor, Tensor, int]:
    found = boxes.make_steps(shifts.by_block, stride, size, grid, channels, chunk, transposed)
    return _put(found.steps, where), _put(found.spans, where), found.parts


@functools.lru_cache(maxsize=1024)
def _reads(
    shifts: Shifts, stride: Sequence[int], size: Sequence[int], grid: Grid, channels: int, where: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    found = boxes.make_reads(shifts.by_block, stride, size, grid, channels)
    return _put(found.shifts, where), _put(found.tiles, where), _put(found.spans, where)


@functools.lru_cache(maxsize=1024)
def _table(shifts: Shifts, negated: bool, where: torch.device) -> Tensor:
    return _put(-shifts.by_block if negated else shifts.by_block, where)


def product_shape(
    x: Tensor, outs: int, block: int, stride: Sequence[int], size: Sequence[int], transposed: bool
) -> Shape:
    """Return the shape class of a product that reads ``x`` and gives ``outs`` channels of ``size``."""
    cells = [ceil_div(n, s) if transposed else n for n, s in zip(size, stride, strict=True)]
    ins, most = (x.shape[1], block) if transposed else (block, outs)
    name = "grad_input" if transposed else "forward"
    images = x.shape[0] * (stride[0] * stride[1] if transposed else 1)
    return Shape(name, _numbers(x), ins, most, images, cells[0] * cells[1], outs)


def _product(x: Tensor, weight: Tensor, y: Tensor, shifts: Shifts, stride: Sequence[int], transposed: bool) -> None:
    """Compute y of x, both dense; ``weight`` is (out, in, taps) of the layer."""
    channels, outs = x.shape[1], y.shape[1]
    apart_x, apart_y = ((1, 1), tuple(stride)) if transposed else (tuple(stride), (1, 1))
    c = configurations.choose(product_shape(x, outs, shifts.block, stride, y.shape[2:], transposed))
    cells = [n // s for n, s in zip(y.shape[2:], apart_y, strict=True)]
    grid = boxes.cover(x.shape[0], cells[0], cells[1], c.pixels)
    read = tuple(n // s for n, s in zip(x.shape[2:], apart_x, strict=True))
    steps, spans, parts = _steps(shifts, tuple(stride), read, grid, channels, c.ins, transposed, x.device)
    turn = not transposed or x.dtype == torch.float32
    w = _weight(weight, transposed, turn, c)
    tile, blocks = grid.tile, ceil_div(outs, c.outs)
    device.launch(
        _kernels().product, (blocks * parts * grid.count,), x,
        _image(x, apart_x, (*tile, c.ins)), w, _image(y, apart_y, (*tile, c.outs)), steps, spans,
        blocks, grid.columns, grid.rows, parts, shifts.block if transposed else NO_LIMIT, channels, outs,
        BB=tile.images, BH=tile.rows, BW=tile.columns, BC=c.ins, BN=c.outs, COLUMN_PARTS=apart_y[1], TURN=turn,
        PRECISION=device.precision(x.dtype), WIDEN=device.interpreted(), num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


def _depthwise_tile(pixels: int, columns: int) -> tuple[int, int]:
    """Return (rows, columns) of a tile of one image: wide, for the cache, unless the map is narrow."""
    width = min(16, boxes.power(columns))
    return pixels // width, width


def depthwise_shape(x: Tensor, block: int, y: Tensor, name: str) -> Shape:
    """Return the shape class of a depthwise map."""
    return Shape(name, _numbers(x), block, 1, y.shape[0], y.shape[2] * y.shape[3], y.shape[1])


def _depthwise(x: Tensor, weight: Tensor, y: Tensor, shifts: Shifts, stride: Sequence[int], transposed: bool) -> None:
    """Compute y of x, both dense; ``weight`` is (taps, channels)."""
    c = configurations.choose(depthwise_shape(x, shifts.block, y, "depthwise"))
    height, width = _depthwise_tile(c.pixels, y.shape[3])
    blocks = ceil_div(x.shape[1], c.ins)
    columns, rows, taps = ceil_div(y.shape[3], width), ceil_div(y.shape[2], height), len(weight)
    steps, divisor = ((1, 1), tuple(stride)) if transposed else (tuple(stride), (1, 1))
    device.launch(
        _kernels().depthwise_sum, (blocks * columns * rows * x.shape[0],), x,
        x, weight, y, _table(shifts, transposed, x.device), blocks, columns, rows,
        *x.shape[2:], *y.shape[2:], x.shape[1], shifts.block, *steps, *divisor, taps,
        UNROLL=max(n for n in range(1, UNROLL + 1) if taps % n == 0), DIVIDE=divisor != (1, 1),
        BH=height, BW=width, BC=c.ins, num_warps=c.warps,
    )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor, shifts: Shifts, stride: Sequence[int], groups: int, size: Sequence[int]
) -> Tensor:
    """Return y in channels_last; arguments as in `widerf.kernels.cuda.forward`."""
    outs = weight.shape[0]
    y = _empty(x, (x.shape[0], outs, *size))
    flat = weight.reshape(outs, -1, shifts.taps)
    if groups > 1:
        _depthwise(_dense(x), flat[:, 0].t().contiguous(), y, shifts, stride, False)
    else:
        _product(_dense(x, stride), flat, y, shifts, stride, False)
    return y


def grad_input(
    grad_y: Tensor, weight: Tensor, shifts: Shifts, stride: Sequence[int], groups: int, size: Sequence[int]
) -> Tensor:
    """Return the gradient of the input in channels_last; arguments as in `widerf.kernels.cuda.grad_input`."""
    outs, ins = weight.shape[0], weight.shape[1] * groups
    flat = weight.reshape(outs, -1, shifts.taps)
    if groups > 1:
        grad_x = _empty(grad_y, (grad_y.shape[0], ins, *size))
        _depthwise(_dense(grad_y), flat[:, 0].t().contiguous(), grad_x, shifts, stride, True)
        return grad_x
    whole = [ceil_div(n, s) * s for n, s in zip(size, stride, strict=True)]
    grad_x = _empty(grad_y, (grad_y.shape[0], ins, *whole))
    _product(_dense(grad_y), flat, grad_x, shifts, stride, True)
    return grad_x[:, :, : size[0], : size[1]]


def _folded(scratch: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum (outs, ins, taps) of the parts of a weight gradient, (parts, taps, ins, outs)."""
    splits, taps, ins, outs = scratch.shape
    result = torch.empty(outs, ins, taps, dtype=dtype, device=scratch.device)
    width = min(8, boxes.power(ins))
    n_blocks, c_blocks = ceil_div(outs, 64), ceil_div(ins, width)
    device.launch(
        _kernels().fold, (taps * n_blocks * c_blocks,), scratch,
        scratch, result, splits, taps, ins, outs, n_blocks, c_blocks, BS=8, BC=width, BN=64, num_warps=4,
    )  # fmt: skip
    return result


def _splits(most: int, programs: int, wanted: int, numbers: int) -> int:
    """Return into how many parts a weight gradient of ``numbers`` is cut, of which each has ``programs`` programs."""
    return max(1, min(most, ceil_div(wanted, programs), SCRATCH // numbers))


def grad_weight(x: Tensor, grad_y: Tensor, shifts: Shifts, stride: Sequence[int], groups: int) -> Tensor:
    """Return the gradient (out, in/groups, taps) of the weight; arguments as in `widerf.kernels.cuda.grad_weight`."""
    if groups > 1:
        return _depthwise_weight(_dense(x), _dense(grad_y), shifts, stride)
    x, g = _dense(x, stride), _dense(grad_y)
    ins, outs, taps = x.shape[1], g.shape[1], shifts.taps
    shape = Shape("grad_weight", _numbers(x), shifts.block, outs, g.shape[0], g.shape[2] * g.shape[3], outs)
    c = configurations.choose(shape)
    grid = boxes.cover(g.shape[0], g.shape[2], g.shape[3], c.pixels)
    read = tuple(n // s for n, s in zip(x.shape[2:], stride, strict=True))
    tables = _reads(shifts, tuple(stride), read, grid, ins, x.device)
    tile, n_blocks, c_blocks = grid.tile, ceil_div(outs, c.outs), ceil_div(ins, c.ins)
    programs = n_blocks * c_blocks * taps
    splits = _splits(grid.count, programs, c.programs, taps * ins * outs)
    scratch = x.new_empty(splits, taps, ins, outs, dtype=torch.float32)
    device.launch(
        _kernels().weight_product, (programs, splits), x,
        _image(x, stride, (*tile, c.ins)), _image(g, (1, 1), (*tile, c.outs)), scratch, *tables,
        n_blocks, c_blocks, grid.columns, grid.images, ins, outs, taps, shifts.block,
        BB=tile.images, BH=tile.rows, BW=tile.columns, BC=c.ins, BN=c.outs, SWAP=c.ins < 64 <= c.outs,
        PRECISION=device.precision(x.dtype), WIDEN=device.interpreted(), num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return _folded(scratch, x.dtype)


def taps_together(taps: int) -> int:
    """Return how many taps of a depthwise weight gradient one program computes: with the fewest loads of all.

    Example:
        >>> [taps_together(k * k) for k in (1, 3, 5, 7)]
        [1, 3, 5, 7]
    """
    return min(range(1, TOGETHER + 1), key=lambda n: (ceil_div(taps, n) * (n + 1), n))


def _depthwise_weight(x: Tensor, g: Tensor, shifts: Shifts, stride: Sequence[int]) -> Tensor:
    channels, taps = x.shape[1], shifts.taps
    c = configurations.choose(depthwise_shape(x, shifts.block, g, "depthwise_weight"))
    height, width = _depthwise_tile(c.pixels, g.shape[3])
    blocks, columns, rows = ceil_div(channels, c.ins), ceil_div(g.shape[3], width), ceil_div(g.shape[2], height)
    together = taps_together(taps)
    tiles, programs = columns * rows * g.shape[0], blocks * ceil_div(taps, together)
    splits = _splits(tiles, programs, c.programs, taps * channels)
    scratch = x.new_empty(splits, taps, channels, dtype=torch.float32)
    device.launch(
        _kernels().depthwise_weight, (programs, splits), x,
        x, g, scratch, _table(shifts, False, x.device), blocks, tiles, columns, rows,
        *x.shape[2:], *g.shape[2:], channels, shifts.block, *stride, taps, TAPS=together,
        BH=height, BW=width, BC=c.ins, num_warps=c.warps,
    )  # fmt: skip
    return _folded(scratch.view(splits, taps, 1, channels), x.dtype)
