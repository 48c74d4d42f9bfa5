"""The sparse convolution on CUDA: by boxes where channels share their taps, by gathering where they do not.

The three functions compute the bilinear maps of ``csrc/sparse_conv.h``, with its arguments. Channels in blocks of equal
taps go to `widerf.kernels.cuda_boxes` (see `why_not_boxes`); the other layers are gathered pixel by pixel, by
`widerf.kernels.triton_kernels`, which is right and several times slower. Triton comes with PyTorch's CUDA builds; it
is imported by the first call, and a machine without it uses the other paths (see `unsupported`).

Convolutions in float32 round their factors to TF32 exactly if PyTorch's own do, that is if
``torch.backends.cudnn.conv.fp32_precision == "tf32"`` (before PyTorch 2.9: ``torch.backends.cudnn.allow_tf32``).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widerf.kernels import cuda_boxes, device
from widerf.kernels.cuda_tables import REDUCTION, Tables, read, read_shifts, width_of_tile

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = 1 << 23  # float32 numbers of scratch for the columns of the other channels: 32 MiB stay in an L2 cache
PROGRAMS = 512  # a weight gradient is cut into so many parts at least, if there are pixels enough
ADDRESSES = 1 << 31  # what a signed 32-bit address holds
BOXES = True  # whether layers that can be are computed by boxes
PIXELS = 32  # pixels of one step of the weight gradient


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Say why these kernels cannot take ``x`` (batch, channels, height, width) and ``weight``; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not x.is_cuda and not (x.device.type == "cpu" and device.interpreted()):
        return f"the input is on {x.device.type}, not on cuda"
    if torch.version.hip:
        return "the kernels have not been compiled for AMD GPUs"
    if x.dtype not in DTYPES or x.dtype != weight.dtype:
        return f"dtypes {x.dtype} and {weight.dtype}: one of float32, bfloat16, float16 for both is needed"
    if x.is_cuda and device.capability(x.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@functools.lru_cache(maxsize=1)
def _kernels() -> Any:
    from widerf.kernels import triton_kernels

    return triton_kernels


def why_not_boxes(shifts: Any, x: Tensor, stride: Sequence[int], outs: int, groups: int) -> str | None:
    """Say why such a layer on tensors like ``x`` is gathered and not computed by boxes; None if it is by boxes.

    Example:
        >>> shifts = torch.arange(40).repeat_interleave(8).reshape(-1, 1, 2)
        >>> why_not_boxes(shifts, torch.empty(1, 160, 4, 4), (1, 1), 64, 1)
        'its channels do not share their taps in blocks of 16, 32 or 64 neighbours'
    """
    if not BOXES:
        return "switched off"
    if groups == 1 and device.capability(x.device) < (9, 0):
        return "tensor descriptors need a GPU of compute capability 9.0"
    return cuda_boxes.why_not(read_shifts(shifts), x.element_size(), tuple(stride), outs, groups)


def _tiles(dtype: torch.dtype, columns: int, pixels: int, reduction: int) -> dict[str, Any]:
    """Return the tile sizes and launch options of a matrix product.

    Full float32 has no tensor cores and gets half the tile; a whole tile of 64 columns needs 8 warps' registers.
    """
    kind, width = device.precision(dtype), width_of_tile(columns)
    part = 2 if dtype == torch.float32 and kind == "ieee" else 1
    warps = 8 if width == 64 and part == 1 else 4
    sizes = {"BM": pixels // part, "BN": width, "BK": reduction // part}
    return {**sizes, "PRECISION": kind, "num_warps": warps, "num_stages": 3}


def _last(x: Tensor, wanted: bool | None) -> bool:
    return (x.stride(1) == 1 and x.stride(3) != 1) if wanted is None else wanted


def _empty(x: Tensor, shape: Sequence[int], last: bool, dtype: torch.dtype | None = None) -> Tensor:
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(*shape, dtype=dtype or x.dtype, device=x.device, memory_format=form)


def _formed(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _big(*tensors: Tensor) -> bool:
    """Say whether an address within one of the tensors, or a tile beyond its end, exceeds 32 bits."""
    far = [sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    return max(far) + (1 << 20) >= ADDRESSES


def _product(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    table: Tensor,
    blocks: Tensor,
    width: int,
    stride: Sequence[int],
    divisor: Sequence[int],
    step: int,
    uniform: bool,
    last: bool,
) -> None:
    """Launch `triton_kernels.implicit_gemm`; ``weight`` is (output channels, taps, input channels per group)."""
    divided, big = tuple(divisor) != (1, 1), _big(x, y, weight)
    # Dividing by a stride and 64-bit addresses take registers: half the tile, or they spill.
    options = _tiles(x.dtype, width, 64 if divided or big else 128, REDUCTION)
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    grid = (-(-pixels // options["BM"]) * len(blocks),)
    sizes = (*x.shape[2:], *y.shape[2:], *stride, *divisor, *x.stride(), *y.stride())
    shape = (pixels, weight.shape[2], weight.shape[1], step)
    device.launch(
        _kernels().implicit_gemm, grid, x, x, weight, y, table, blocks, len(blocks), *shape, *sizes,
        CHANNELS_LAST=last, UNIFORM=uniform, DIVIDE=divided, BIG=big,
        WIDEN=not x.is_cuda, **options,
    )  # fmt: skip


def _sum_taps(
    x: Tensor,
    weight: Tensor | None,
    y: Tensor,
    table: Tensor,
    rows: Tensor,
    strides: Sequence[int],
    stride: Sequence[int],
    divisor: Sequence[int],
    last: bool,
) -> None:
    """Launch `triton_kernels.tap_sum`; ``strides`` of ``x`` are those of (image, channel, tap, row, column)."""
    options = {"BM": 32, "BC": 32} if last else {"BM": 512, "BC": 1}
    pixels = y.shape[0] * y.shape[2] * y.shape[3]
    row_blocks = -(-len(rows) // options["BC"])
    grid = (-(-pixels // options["BM"]) * row_blocks,)
    sizes = (*x.shape[2:], *y.shape[2:], *stride, *divisor, *strides, *y.stride())
    device.launch(
        _kernels().tap_sum, grid, x, x, x if weight is None else weight, y, table, rows, len(rows), row_blocks,
        pixels, table.shape[1], *sizes,
        CHANNELS_LAST=last, WEIGHTED=weight is not None, DIVIDE=tuple(divisor) != (1, 1), BIG=_big(x, y), **options,
    )  # fmt: skip


def forward(
    x: Tensor,
    weight: Tensor,
    shifts: Any,
    stride: Sequence[int],
    groups: int,
    out_size: Sequence[int],
    channels_last: bool | None = None,
) -> Tensor:
    """Return y (batch, out, *out_size) of ``csrc/sparse_conv.h``.

    Args:
        x: (batch, in, height, width), of any strides.
        weight: (out, in/groups, *kernel); the taps are its last axes, flattened.
        shifts: integers (in, taps, 2) in CPU memory: row and column, padding and dilation folded in.
        stride: of the layer, (rows, columns).
        groups: as in `torch.nn.Conv2d`.
        out_size: height and width of y.
        channels_last: memory format of the result; by default that of ``x``.
    """
    outs, last = weight.shape[0], _last(x, channels_last)
    if x.numel() == 0 or x.shape[0] * outs * out_size[0] * out_size[1] == 0:
        return _empty(x, (x.shape[0], outs, *out_size), last).zero_()
    read_at = read_shifts(shifts)
    if why_not_boxes(shifts, x, stride, outs, groups) is None:
        return _formed(cuda_boxes.forward(x, weight, read_at, tuple(stride), groups, tuple(out_size)), last)
    tables, taps = read(read_at, outs, groups, x.device), read_at.taps
    y = _empty(x, (x.shape[0], outs, *out_size), last)
    flat = weight.reshape(outs, -1, taps)
    if x.shape[1] == outs == groups:
        strides = (x.stride(0), x.stride(1), 0, x.stride(2), x.stride(3))
        _sum_taps(x, flat.contiguous(), y, tables.table, tables.rows, strides, stride, (1, 1), last)
        return y
    by_tap = flat.transpose(1, 2).contiguous()
    uniform = tables.uniform > 0
    _product(x, by_tap, y, tables.table, tables.forward, outs // groups, stride, (1, 1), taps, uniform, last)
    return y


def grad_input(
    grad_y: Tensor,
    weight: Tensor,
    shifts: Any,
    stride: Sequence[int],
    groups: int,
    size: Sequence[int],
    channels_last: bool | None = None,
) -> Tensor:
    """Return the gradient (batch, in, *size) of the input, by no atomic operation.

    Channels in runs of equal taps gather what their pixels received, one matrix product for all. For the others a
    1×1 convolution computes what each tap of each channel sends, and a second kernel folds these columns, of as many
    images as ``COLUMNS`` allows at a time. Arguments as in `forward`; ``size``: height and width of the input.
    """
    outs, last = weight.shape[0], _last(grad_y, channels_last)
    ins = weight.shape[1] * groups
    grad_x = _empty(grad_y, (grad_y.shape[0], ins, *size), last)
    if grad_y.numel() == 0 or grad_x.numel() == 0:
        return grad_x.zero_()
    read_at = read_shifts(shifts)
    if why_not_boxes(shifts, grad_y, stride, outs, groups) is None:
        return _formed(cuda_boxes.grad_input(grad_y, weight, read_at, tuple(stride), groups, tuple(size)), last)
    tables, taps = read(read_at, outs, groups, grad_y.device), read_at.taps
    g = grad_y
    if ins == outs == groups:
        flat = weight.reshape(outs, taps).contiguous()
        strides = (g.stride(0), g.stride(1), 0, g.stride(2), g.stride(3))
        _sum_taps(g, flat, grad_x, tables.negated, tables.rows, strides, (1, 1), stride, last)
        return grad_x
    by_tap = weight.reshape(groups, outs // groups, -1, taps).permute(0, 2, 3, 1).reshape(ins, taps, -1).contiguous()
    uniform = (outs // groups) % REDUCTION == 0
    if len(tables.wide):
        _product(g, by_tap, grad_x, tables.runs, tables.wide, tables.widest, (1, 1), stride, 0, uniform, last)
    if len(tables.narrow):
        _fold(g, by_tap[tables.narrow.long()], grad_x, tables, stride, uniform, last)
    return grad_x


def _fold(
    g: Tensor, weight: Tensor, grad_x: Tensor, tables: Tables, stride: Sequence[int], uniform: bool, last: bool
) -> None:
    """Compute the input gradient of the narrow channels, whose weights (narrow, taps, out/groups) are given."""
    count, taps, outs = weight.shape
    images = max(1, COLUMNS // (count * taps * g.shape[2] * g.shape[3]))
    for part, into in zip(torch.split(g, images), torch.split(grad_x, images), strict=True):
        columns = _empty(g, (len(part), count * taps, *g.shape[2:]), last, torch.float32)
        one = weight.reshape(count * taps, 1, outs)
        _product(part, one, columns, tables.zero, tables.columns, 64, (1, 1), (1, 1), 0, uniform, last)
        b, c, h, w = columns.stride()
        _sum_taps(columns, None, into, tables.narrow_table, tables.narrow, (b, c * taps, c, h, w), (1, 1), stride, last)


def _chunks(pixels: int, step: int, programs: int, numbers: int) -> tuple[int, int]:
    """Return (chunk, number of chunks) of the pixels of a weight gradient that ``programs`` programs compute.

    A chunk is whole steps of ``step`` pixels: part of a step costs what a whole one does.
    """
    most = min(-(-PROGRAMS // programs), -(-pixels // max(8 * PIXELS, step)), max(1, COLUMNS // numbers))
    chunk = -(-pixels // (most * step)) * step
    return chunk, -(-pixels // chunk)


def grad_weight(
    x: Tensor,
    grad_y: Tensor,
    shifts: Any,
    stride: Sequence[int],
    groups: int,
    channels_last: bool | None = None,
) -> Tensor:
    """Return the gradient (out, in/groups, taps) of the weight, the pixels cut into chunks that are added up in order.

    Arguments as in `forward`; ``channels_last``: whether the result lies in memory as (out, taps, in/groups).
    """
    outs, ins, last, as_last = grad_y.shape[1], x.shape[1], _last(x, None), _last(x, channels_last)
    read_at = read_shifts(shifts)
    taps = read_at.taps
    per_group, n, g = ins // groups, outs // groups, grad_y
    pixels = g.shape[0] * g.shape[2] * g.shape[3]
    if pixels * outs * per_group * taps == 0 or x.numel() == 0:
        return x.new_zeros(outs, per_group, taps)
    if why_not_boxes(shifts, x, stride, outs, groups) is None:
        return cuda_boxes.grad_weight(x, grad_y, read_at, tuple(stride), groups, as_last)
    tables = read(read_at, outs, groups, x.device)
    sizes = (*x.shape[2:], *g.shape[2:], *stride, *x.stride(), *g.stride())
    if ins == outs == groups:
        options = {"BM": 32, "BC": 32} if last else {"BM": 512, "BC": 1}
        row_blocks = -(-ins // options["BC"])
        chunk, splits = _chunks(pixels, options["BM"], row_blocks * taps, ins * taps)
        scratch = x.new_empty(splits, ins, 1, taps, dtype=torch.float32)
        device.launch(
            _kernels().tap_weight, (row_blocks * taps, splits), x, x, g, scratch, tables.table, ins, row_blocks,
            pixels, chunk, taps, *sizes, CHANNELS_LAST=last, BIG=_big(x, g), **options,
        )  # fmt: skip
        return scratch.sum(0).to(x.dtype)
    big = _big(x, g)
    options = _tiles(x.dtype, n, PIXELS, 32 if big else 64)
    k_blocks, n_blocks = -(-per_group * taps // options["BK"]), -(-n // options["BN"])
    chunk, splits = _chunks(pixels, options["BM"], k_blocks * n_blocks * groups, outs * per_group * taps)
    scratch = x.new_empty(splits, outs, taps, per_group, dtype=torch.float32)
    device.launch(
        _kernels().weight_gemm, (k_blocks * n_blocks, groups, splits), x, x, g, scratch, tables.table,
        pixels, chunk, per_group, taps, k_blocks, n, n_blocks, *sizes,
        CHANNELS_LAST=last, UNIFORM=tables.uniform == 64, BIG=_big(x, g, scratch),
        WIDEN=not x.is_cuda, **options,
    )  # fmt: skip
    summed = scratch.sum(0).transpose(1, 2).to(x.dtype)
    return summed if as_last else summed.contiguous()
