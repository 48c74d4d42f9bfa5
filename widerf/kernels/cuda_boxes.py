"""The sparse convolution on CUDA where neighbouring channels share their taps: launches of `box_kernels`.

The three maps are those of `widerf.kernels.cuda`, on images in channels_last; others are copied, as cuDNN does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from widerf.kernels import boxes, configurations, descriptors, device
from widerf.kernels.boxes import ceil_div
from widerf.kernels.configurations import Configuration, Shape
from widerf.kernels.cuda_tables import Shifts
from widerf.kernels.descriptors import Describe, by_taps, dense

SCRATCH = 1 << 23  # float32 numbers of the parts of a weight gradient: 32 MiB
UNROLL = 9  # most taps of a depthwise layer whose loads are under way at once: more of them spill registers
TOGETHER = 7  # most taps of a program of a depthwise weight gradient
TURNED = 128  # fewest outputs of a forward product that reads 16-bit weights as channels_last keeps them
NO_LIMIT = 1 << 30

Size: TypeAlias = tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def why_not(shifts: Shifts, itemsize: int, stride: Sequence[int], outs: int, groups: int) -> str | None:
    """Say why a layer cannot be computed by boxes; None if it can."""
    channels = shifts.channels
    if not shifts.block:
        return "its channels do not share their taps in blocks of 16, 32 or 64 neighbours"
    if groups not in (1, channels) or (groups > 1 and outs != channels):
        return f"it has {groups} groups of several channels"
    if groups == 1 and not descriptors.available():
        return "this Triton has no tensor descriptors"
    if groups == 1 and outs * itemsize % 16:
        return f"its {outs} outputs are no multiple of {16 // itemsize}, which tensor descriptors need"
    if max(channels, outs) >= 1 << 16 or shifts.taps >= 1 << 15:
        return "it has more channels or taps than 16 bits count"
    if shifts.farthest >= boxes.FURTHEST or max(stride) >= 128 or channels * stride[1] >= 1 << 24:
        return "its taps reach too far for 16 bits"
    return None


@functools.lru_cache(maxsize=1)
def _kernels() -> Any:
    from widerf.kernels import box_kernels

    return box_kernels


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(*shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _numbers(x: Tensor) -> str:
    return "16-bit" if x.dtype != torch.float32 else configurations.numbers_of(4, device.precision(x.dtype))


def _put(numbers: np.ndarray[Any, Any], where: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(where)


class Launch(NamedTuple):
    """What of a launch shapes decide: worked out once for each of them."""

    grid: Size
    describe: tuple[Describe, ...]  # the tensors, in the order of the kernel's arguments
    numbers: tuple[Any, ...]  # the arguments behind them: tables and integers
    options: dict[str, Any]
    turned: bool = False  # whether weights are read as (outs, taps, ins) of the product
    scratch: Size = ()  # of a weight gradient: (parts, taps, ins, outs)


@functools.lru_cache(maxsize=1024)
def _table(shifts: Shifts, negated: bool, where: torch.device) -> Tensor:
    return _put(-shifts.by_block if negated else shifts.by_block, where)


@functools.lru_cache(maxsize=1024)
def _product_shape(numbers: str, x: Size, y: Size, block: int, stride: Size, transposed: bool) -> Shape:
    """Return the shape class of a product of ``x`` that gives ``y``, both (images, channels, rows, columns)."""
    cells = [ceil_div(n, s) if transposed else n for n, s in zip(y[2:], stride, strict=True)]
    ins, most = (x[1], block) if transposed else (block, y[1])
    name = "grad_input" if transposed else "forward"
    images = x[0] * (stride[0] * stride[1] if transposed else 1)
    return Shape(name, numbers, ins, most, images, cells[0] * cells[1], y[1])


@functools.lru_cache(maxsize=1024)
def _plan_product(
    c: Configuration, numbers: str, x: Size, y: Size, shifts: Shifts, stride: Size, transposed: bool, at: torch.device
) -> Launch:
    channels, outs = x[1], y[1]
    apart_x, apart_y = ((1, 1), stride) if transposed else (stride, (1, 1))
    cells = [n // s for n, s in zip(y[2:], apart_y, strict=True)]
    grid = boxes.cover(x[0], cells[0], cells[1], c.pixels)
    read = tuple(n // s for n, s in zip(x[2:], apart_x, strict=True))
    found = boxes.make_steps(shifts.by_block, stride, read, grid, channels, c.ins, transposed)
    # Tensor cores take float32 by columns only. With few outputs a row of the weight's transpose is the faster box:
    # 86 µs against 101 at 64 outputs on an H200, seen once, with other tiles than today's.
    turned = numbers != "16-bit" or (not transposed and outs >= TURNED)
    sides = (outs, shifts.taps, channels) if turned else (channels, shifts.taps, outs)
    tile, blocks = grid.tile, ceil_div(outs, c.outs)
    describe = (
        descriptors.of_image(x, apart_x, (*tile, c.ins)),
        descriptors.of_weight(*sides, turned, (c.outs, c.ins) if turned else (c.ins, c.outs)),
        descriptors.of_image(y, apart_y, (*tile, c.outs)),
    )
    pattern = shifts.block if transposed else NO_LIMIT
    sizes = (blocks, grid.columns, grid.rows, found.parts, pattern, channels, outs)
    options = {"BB": tile.images, "BH": tile.rows, "BW": tile.columns, "BC": c.ins, "BN": c.outs}
    options |= {"COLUMN_PARTS": apart_y[1], "TURN": turned, **_options(c, numbers)}
    tables = (_put(found.steps, at), _put(found.spans, at))
    return Launch((blocks * found.parts * grid.count,), describe, (*tables, *sizes), options, turned)


def _options(c: Configuration, numbers: str) -> dict[str, Any]:
    precision = "tf32" if numbers == "tf32" else "ieee"
    return {"PRECISION": precision, "WIDEN": device.interpreted(), "num_warps": c.warps, "num_stages": c.stages}


def _product(x: Tensor, weight: Tensor, y: Tensor, shifts: Shifts, stride: Size, transposed: bool) -> None:
    """Compute y of x, both dense; ``weight`` is (out, in, *taps) of the layer."""
    numbers = _numbers(x)
    c = configurations.choose(_product_shape(numbers, x.shape, y.shape, shifts.block, stride, transposed))
    found = _plan_product(c, numbers, x.shape, y.shape, shifts, stride, transposed, x.device)
    w = by_taps(weight, outs_last=transposed == found.turned)
    tensors = [describe(t) for describe, t in zip(found.describe, (x, w, y), strict=True)]
    device.launch(_kernels().product, found.grid, x, *tensors, *found.numbers, **found.options)


def _depthwise_tile(pixels: int, columns: int) -> tuple[int, int]:
    """Return (rows, columns) of a tile of one image: wide, for the cache, unless the map is narrow."""
    width = min(16, boxes.power(columns))
    return pixels // width, width


@functools.lru_cache(maxsize=1024)
def _depthwise_shape(name: str, numbers: str, block: int, y: Size) -> Shape:
    """Return the shape class of a depthwise map; ``y``: (images, channels, rows, columns) of the output."""
    return Shape(name, numbers, block, 1, y[0], y[2] * y[3], y[1])


@functools.lru_cache(maxsize=1024)
def _plan_depthwise(
    c: Configuration, x: Size, y: Size, shifts: Shifts, stride: Size, transposed: bool, at: torch.device
) -> Launch:
    height, width = _depthwise_tile(c.pixels, y[3])
    blocks, columns, rows = ceil_div(x[1], c.ins), ceil_div(y[3], width), ceil_div(y[2], height)
    steps, divisor = ((1, 1), stride) if transposed else (stride, (1, 1))
    sizes = (blocks, columns, rows, *x[2:], *y[2:], x[1], shifts.block, *steps, *divisor, shifts.taps)
    options = {"UNROLL": max(n for n in range(1, UNROLL + 1) if shifts.taps % n == 0), "DIVIDE": divisor != (1, 1)}
    options |= {"BH": height, "BW": width, "BC": c.ins, "num_warps": c.warps}
    return Launch((blocks * columns * rows * x[0],), (), (_table(shifts, transposed, at), *sizes), options)


def _depthwise(x: Tensor, weight: Tensor, y: Tensor, shifts: Shifts, stride: Size, transposed: bool) -> None:
    """Compute y of x, both dense; ``weight`` is (channels, 1, *taps) of the layer."""
    c = configurations.choose(_depthwise_shape("depthwise", _numbers(x), shifts.block, y.shape))
    found = _plan_depthwise(c, x.shape, y.shape, shifts, stride, transposed, x.device)
    w = by_taps(weight, outs_last=True)
    device.launch(_kernels().depthwise_sum, found.grid, x, x, w, y, *found.numbers, **found.options)


def forward(x: Tensor, weight: Tensor, shifts: Shifts, stride: Size, groups: int, size: Size) -> Tensor:
    """Return y in channels_last; arguments as in `widerf.kernels.cuda.forward`."""
    y = _empty(x, (x.shape[0], weight.shape[0], *size))
    if groups > 1:
        _depthwise(dense(x), weight, y, shifts, stride, False)
    else:
        _product(dense(x, stride), weight, y, shifts, stride, False)
    return y


def grad_input(grad_y: Tensor, weight: Tensor, shifts: Shifts, stride: Size, groups: int, size: Size) -> Tensor:
    """Return the gradient of the input in channels_last; arguments as in `widerf.kernels.cuda.grad_input`."""
    ins = weight.shape[1] * groups
    if groups > 1:
        grad_x = _empty(grad_y, (grad_y.shape[0], ins, *size))
        _depthwise(dense(grad_y), weight, grad_x, shifts, stride, True)
        return grad_x
    whole = size if stride == (1, 1) else tuple(ceil_div(n, s) * s for n, s in zip(size, stride, strict=True))
    grad_x = _empty(grad_y, (grad_y.shape[0], ins, *whole))
    _product(dense(grad_y), weight, grad_x, shifts, stride, True)
    return grad_x if whole == size else grad_x[:, :, : size[0], : size[1]]


@functools.lru_cache(maxsize=1024)
def _plan_fold(splits: int, taps: int, ins: int, outs: int, last: bool) -> Launch:
    """Few parts are folded in wide tiles: there writing the result is most of the work."""
    together = min(8, boxes.power(splits))
    width = min(64 // together, boxes.power(ins))
    n_blocks, c_blocks = ceil_div(outs, 64), ceil_div(ins, width)
    steps = (1, ins) if last else (taps, 1)
    sizes = (splits, taps, ins, outs, n_blocks, c_blocks, *steps)
    options = {"BS": together, "BC": width, "BN": 64, "num_warps": 4}
    return Launch((taps * n_blocks * c_blocks,), (), sizes, options)


def _folded(scratch: Tensor, dtype: torch.dtype, last: bool) -> Tensor:
    """Return the sum (outs, ins, taps) of the parts of a weight gradient, (parts, taps, ins, outs).

    With ``last`` in the memory of channels_last: (outs, taps, ins).
    """
    _, taps, ins, outs = scratch.shape
    found = _plan_fold(*scratch.shape, last)
    result = torch.empty(outs, *((taps, ins) if last else (ins, taps)), dtype=dtype, device=scratch.device)
    device.launch(_kernels().fold, found.grid, scratch, scratch, result, *found.numbers, **found.options)
    return result.transpose(1, 2) if last else result


def _splits(most: int, programs: int, wanted: int, numbers: int) -> int:
    """Return into how many parts a weight gradient of ``numbers`` is cut, of which each has ``programs`` programs."""
    return max(1, min(most, ceil_div(wanted, programs), SCRATCH // numbers))


@functools.lru_cache(maxsize=1024)
def _weight_shape(numbers: str, block: int, g: Size) -> Shape:
    return Shape("grad_weight", numbers, block, g[1], g[0], g[2] * g[3], g[1])


@functools.lru_cache(maxsize=1024)
def _plan_weight(
    c: Configuration, numbers: str, x: Size, g: Size, shifts: Shifts, stride: Size, at: torch.device
) -> Launch:
    ins, outs, taps = x[1], g[1], shifts.taps
    grid = boxes.cover(g[0], g[2], g[3], c.pixels)
    read = tuple(n // s for n, s in zip(x[2:], stride, strict=True))
    found = boxes.make_reads(shifts.by_block, stride, read, grid, ins)
    tile, n_blocks, c_blocks = grid.tile, ceil_div(outs, c.outs), ceil_div(ins, c.ins)
    programs = n_blocks * c_blocks * taps
    splits = _splits(grid.count, programs, c.programs, taps * ins * outs)
    describe = (
        descriptors.of_image(x, stride, (*tile, c.ins)),
        descriptors.of_image(g, (1, 1), (*tile, c.outs)),
    )
    sizes = (n_blocks, c_blocks, grid.columns, grid.images, ins, outs, taps, shifts.block)
    options = {"BB": tile.images, "BH": tile.rows, "BW": tile.columns, "BC": c.ins, "BN": c.outs}
    options |= {"SWAP": c.ins < 64 <= c.outs, **_options(c, numbers)}
    tables = [_put(table, at) for table in (found.shifts, found.tiles, found.spans)]
    return Launch((programs, splits), describe, (*tables, *sizes), options, scratch=(splits, taps, ins, outs))


def grad_weight(x: Tensor, grad_y: Tensor, shifts: Shifts, stride: Size, groups: int, last: bool) -> Tensor:
    """Return the gradient (out, in/groups, taps) of the weight; arguments as in `widerf.kernels.cuda.grad_weight`."""
    if groups > 1:
        return _depthwise_weight(dense(x), dense(grad_y), shifts, stride)
    x, g, numbers = dense(x, stride), dense(grad_y), _numbers(x)
    c = configurations.choose(_weight_shape(numbers, shifts.block, g.shape))
    found = _plan_weight(c, numbers, x.shape, g.shape, shifts, stride, x.device)
    scratch = x.new_empty(found.scratch, dtype=torch.float32)
    tensors = [describe(t) for describe, t in zip(found.describe, (x, g), strict=True)]
    kernel = _kernels().weight_product
    device.launch(kernel, found.grid, x, *tensors, scratch, *found.numbers, **found.options)
    return _folded(scratch, x.dtype, last)


def taps_together(taps: int) -> int:
    """Return how many taps of a depthwise weight gradient one program computes: with the fewest loads of all.

    Example:
        >>> [taps_together(k * k) for k in (1, 3, 5, 7)]
        [1, 3, 5, 7]
    """
    return min(range(1, TOGETHER + 1), key=lambda n: (ceil_div(taps, n) * (n + 1), n))


@functools.lru_cache(maxsize=1024)
def _plan_depthwise_weight(
    c: Configuration, x: Size, g: Size, shifts: Shifts, stride: Size, at: torch.device
) -> Launch:
    channels, taps = x[1], shifts.taps
    height, width = _depthwise_tile(c.pixels, g[3])
    blocks, columns, rows = ceil_div(channels, c.ins), ceil_div(g[3], width), ceil_div(g[2], height)
    together = taps_together(taps)
    tiles, programs = columns * rows * g[0], blocks * ceil_div(taps, together)
    splits = _splits(tiles, programs, c.programs, taps * channels)
    sizes = (blocks, tiles, columns, rows, *x[2:], *g[2:], channels, shifts.block, *stride, taps)
    options = {"TAPS": together, "BH": height, "BW": width, "BC": c.ins, "num_warps": c.warps}
    tables = (_table(shifts, False, at),)
    return Launch((programs, splits), (), (*tables, *sizes), options, scratch=(splits, taps, 1, channels))


def _depthwise_weight(x: Tensor, g: Tensor, shifts: Shifts, stride: Size) -> Tensor:
    c = configurations.choose(_depthwise_shape("depthwise_weight", _numbers(x), shifts.block, g.shape))
    found = _plan_depthwise_weight(c, x.shape, g.shape, shifts, stride, x.device)
    scratch = x.new_empty(found.scratch, dtype=torch.float32)
    device.launch(_kernels().depthwise_weight, found.grid, x, x, g, scratch, *found.numbers, **found.options)
    return _folded(scratch, x.dtype, False)
