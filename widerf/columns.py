"""The pure PyTorch engine: shifted slices of the extended image as columns, and one matrix product.

Each input channel gives as many columns as the kernel has weights, however wide the taps are spread, so the work is that
of the plain convolution. The columns are built a few samples at a time, so that they stay in the processor's cache.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Taps = tuple[tuple[tuple[int, ...], ...], ...]  # [group][tap][axis]
BLOCK_BYTES = 2**23  # columns built at a time on the CPU: about what the last cache holds
NATIVE_CHANNELS = 16  # a grid of fewer channels is no faster in PyTorch's own convolution than as columns
_scratch = threading.local()


class Run(NamedTuple):
    """Input channels ``start … stop − 1`` of a repeat, which share the offsets ``taps``."""

    start: int
    stop: int
    taps: tuple[tuple[int, ...], ...]


class Piece(NamedTuple):
    """Neighbouring input channels that are computed together, ``channels`` of them.

    If all read the same grid, ``spacing`` and its first offset ``corner`` say which, and PyTorch's own dilated convolution
    computes them. Otherwise they become columns: ``runs`` laid out ``repeats`` times, so that a depthwise layer that cycles
    through P patterns costs P slices per tap, not one per channel.
    """

    channels: int
    runs: tuple[Run, ...]
    repeats: int = 1
    corner: tuple[int, ...] | None = None
    spacing: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """Where every connection of one layer lands: all that the computation needs beside the tensors."""

    pieces: tuple[Piece, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]  # pixels added before the image, per axis
    after: tuple[int, ...]
    first: tuple[int, ...]  # index in the extended image of offset 0 for output 0
    dilation: tuple[int, ...]
    groups: int


def _grid(taps: tuple[tuple[int, ...], ...], kernel_size: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """Return (corner, spacing) if the taps are a grid in C order, else None."""
    axes: list[list[int]] = [sorted({t[axis] for t in taps}) for axis in range(len(kernel_size))]
    if [len(a) for a in axes] != list(kernel_size) or list(itertools.product(*axes)) != list(taps):
        return None
    steps = [{q - p for p, q in itertools.pairwise(a)} or {1} for a in axes]
    if any(len(s) > 1 for s in steps):
        return None
    return tuple(a[0] for a in axes), tuple(s.pop() for s in steps)


def _runs(taps: Taps, channels: int) -> tuple[list[Run], int]:
    """Split the channels into runs of equal taps, and find how often the sequence of runs repeats."""
    row = [c * len(taps) // channels for c in range(channels)]
    names: dict[tuple[tuple[int, ...], ...], int] = {}
    sequence = [names.setdefault(taps[r], len(names)) for r in row]
    period = next(p for p in range(1, channels + 1) if channels % p == 0 and sequence == sequence[:p] * (channels // p))
    runs: list[Run] = []
    for c in range(period):
        if runs and runs[-1].taps == taps[row[c]]:
            runs[-1] = runs[-1]._replace(stop=c + 1)
        else:
            runs.append(Run(c, c + 1, taps[row[c]]))
    return runs, channels // period


def _pieces(taps: Taps, channels: int, kernel_size: tuple[int, ...], groups: int) -> tuple[Piece, ...]:
    """Give grids to PyTorch's own convolution where that pays, all else to columns."""
    runs, repeats = _runs(taps, channels)
    if len(runs) == 1 and (grid := _grid(runs[0].taps, kernel_size)):
        return (Piece(channels, (), 1, *grid),)
    if groups > 1 or repeats > 1:
        return (Piece(channels, tuple(runs), repeats),)
    pieces: list[Piece] = []
    for run in runs:
        width = run.stop - run.start
        if width >= NATIVE_CHANNELS and (grid := _grid(run.taps, kernel_size)):
            pieces.append(Piece(width, (), 1, *grid))
            continue
        last = pieces.pop() if pieces and pieces[-1].corner is None else Piece(0, ())
        moved = Run(last.channels, last.channels + width, run.taps)
        pieces.append(Piece(last.channels + width, (*last.runs, moved)))
    return tuple(pieces)


def make_plan(
    taps: Taps,
    channels: int,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Plan:
    """Lay out one layer; ``padding`` holds (before, after) per axis, as of the plain convolution."""
    before, after, first = [], [], []
    for axis, (k, d, (low, high)) in enumerate(zip(kernel_size, dilation, padding, strict=True)):
        offsets = [tap[axis] for group in taps for tap in group]
        h = (k - 1) // 2
        before.append(max(0, low - d * (h + min(offsets))))
        after.append(max(0, high + d * (max(offsets) - (k - 1 - h))))
        first.append(before[-1] - low + d * h)
    pieces = _pieces(taps, channels, kernel_size, groups)
    return Plan(pieces, kernel_size, stride, tuple(before), tuple(after), tuple(first), dilation, groups)


def _slices(plan: Plan, size: Sequence[int], tap: Sequence[int], spacing: Sequence[int] | None = None) -> Any:
    """Return where ``tap`` of all output units lies in the extended image, one slice per axis.

    With ``spacing``, the part of the image that the grid with its corner at ``tap`` reads.
    """
    starts = [f + d * o for f, d, o in zip(plan.first, plan.dilation, tap, strict=True)]
    if spacing is None:
        return tuple(slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, plan.stride, size, strict=True))
    reach = [d * g * (k - 1) for d, g, k in zip(plan.dilation, spacing, plan.kernel_size, strict=True)]
    return tuple(
        slice(a, a + s * (n - 1) + r + 1) for a, s, n, r in zip(starts, plan.stride, size, reach, strict=True)
    )


def _by_repeat(x: Tensor, piece: Piece) -> Tensor:
    return x.unflatten(1, (piece.repeats, x.shape[1] // piece.repeats))


def plain(x: Tensor, weight: Tensor, plan: Plan, size: Sequence[int]) -> Tensor:
    """Convolve by columns through ordinary differentiable operators: for compilers, exporters and transforms.

    Args:
        x: extended image, (batch, channels, *extended).
        weight: (out, channels/groups, *kernel).
        plan: the layout; of one piece.
        size: spatial output size.

    Returns:
        (batch, out, *size)
    """
    parts = _by_repeat(x, plan.pieces[0])
    columns = torch.cat(
        [
            torch.stack([parts[:, :, run.start : run.stop][(..., *_slices(plan, size, t))] for t in run.taps], dim=3)
            for run in plan.pieces[0].runs
        ],
        dim=2,
    )  # (batch, repeats, channels/repeats, taps, *size)
    flat = columns.reshape(x.shape[0], -1, math.prod(size))
    out = F.conv1d(flat, weight.reshape(weight.shape[0], -1, 1), groups=plan.groups)
    return out.unflatten(2, tuple(size))


def _fill(columns: Tensor, x: Tensor, plan: Plan, size: Sequence[int]) -> None:
    """Write the columns of ``x``: columns (batch, channels·taps, pixels)."""
    parts = _by_repeat(x, plan.pieces[0])
    into = columns.view(x.shape[0], plan.pieces[0].repeats, parts.shape[2], -1, *size)
    for run in plan.pieces[0].runs:
        for t, tap in enumerate(run.taps):
            into[:, :, run.start : run.stop, t] = parts[:, :, run.start : run.stop][(..., *_slices(plan, size, tap))]


def _scatter(x: Tensor, columns: Tensor, plan: Plan, size: Sequence[int]) -> None:
    """Add the columns back to the pixels that they came from: the transpose of `_fill`."""
    parts = _by_repeat(x, plan.pieces[0])
    out_of = columns.view(x.shape[0], plan.pieces[0].repeats, parts.shape[2], -1, *size)
    for run in plan.pieces[0].runs:
        for t, tap in enumerate(run.taps):
            parts[:, :, run.start : run.stop][(..., *_slices(plan, size, tap))] += out_of[:, :, run.start : run.stop, t]


def _buffer(x: Tensor, count: int, rows: int, pixels: int) -> Tensor:
    """Return memory for columns; on the CPU the same one again, since fresh pages cost as much as filling them."""
    if x.device.type != "cpu" or type(x) is not Tensor:
        return x.new_empty(count, rows, pixels)
    needed = count * rows * pixels * x.element_size()
    held: Tensor | None = getattr(_scratch, "bytes", None)
    if held is None or held.numel() < needed:
        with torch.inference_mode(False):
            held = torch.empty(needed, dtype=torch.uint8)
        if needed <= 2 * BLOCK_BYTES:
            _scratch.bytes = held
    return held[:needed].view(x.dtype).view(count, rows, pixels)


def _blocks(x: Tensor, weight: Tensor, pixels: int) -> tuple[Tensor, list[slice]]:
    """Return a buffer for the columns of a few samples, and which samples to take at a time."""
    rows = x.shape[1] * math.prod(weight.shape[2:])
    budget = BLOCK_BYTES if x.device.type == "cpu" else 32 * BLOCK_BYTES
    count = max(1, min(x.shape[0], budget // max(1, rows * pixels * x.element_size())))
    return _buffer(x, count, rows, pixels), [slice(i, min(i + count, x.shape[0])) for i in range(0, x.shape[0], count)]


def _product(w: Tensor, columns: Tensor, out: Tensor) -> None:
    """Write w · columns for each sample and group: w (groups, m, n), columns (batch, groups·n, pixels), out likewise."""
    if len(w) == 1:
        torch.bmm(w.expand(len(columns), -1, -1), columns, out=out)
        return
    for c, o in zip(columns.unflatten(1, (len(w), -1)), out.unflatten(1, (len(w), -1)), strict=True):
        torch.bmm(w, c, out=o)


def _forward(x: Tensor, weight: Tensor, plan: Plan, size: Sequence[int]) -> Tensor:
    pixels, groups = math.prod(size), plan.groups
    w = weight.reshape(groups, weight.shape[0] // groups, -1)
    out = x.new_empty(x.shape[0], weight.shape[0], pixels)
    buffer, blocks = _blocks(x, weight, pixels)
    for block in blocks:
        columns = buffer[: block.stop - block.start]
        _fill(columns, x[block], plan, size)
        _product(w, columns, out[block])
    return out.view(x.shape[0], -1, *size)


def _grad_input(grad: Tensor, weight: Tensor, plan: Plan, shape: Sequence[int]) -> Tensor:
    size, groups = grad.shape[2:], plan.groups
    w = weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    x = grad.new_zeros(*shape)
    g = grad.reshape(*grad.shape[:2], math.prod(size))
    buffer, blocks = _blocks(x, weight, math.prod(size))
    for block in blocks:
        columns = buffer[: block.stop - block.start]
        _product(w, g[block], columns)
        _scatter(x[block], columns, plan, size)
    return x


def _grad_weight(x: Tensor, grad: Tensor, plan: Plan, shape: Sequence[int]) -> Tensor:
    size, groups = grad.shape[2:], plan.groups
    weight = grad.new_zeros(*shape)
    w = weight.view(groups, shape[0] // groups, -1)
    g = grad.reshape(grad.shape[0], groups, -1, math.prod(size))
    buffer, blocks = _blocks(x, weight, math.prod(size))
    for block in blocks:
        columns = buffer[: block.stop - block.start]
        _fill(columns, x[block], plan, size)
        for i, c in zip(g[block], columns.unflatten(1, (groups, -1)), strict=True):
            w.baddbmm_(i, c.transpose(1, 2))
    return weight


# The convolution f(x, w) is bilinear, and so are its two transposes; the three are closed under differentiation, so
# that derivatives of any order stay on the blocked path.
def _vmap_by(function: Any) -> Any:
    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        return torch.vmap(function, in_dims=in_dims, randomness="error")(*args), 0

    return staticmethod(rule)


def _plain_grad_input(grad: Tensor, weight: Tensor, plan: Plan, shape: Sequence[int]) -> Tensor:
    zero = grad.new_zeros(*shape)
    return torch.func.vjp(lambda x: plain(x, weight, plan, grad.shape[2:]), zero)[1](grad)[0]  # type: ignore[no-any-return]


def _plain_grad_weight(x: Tensor, grad: Tensor, plan: Plan, shape: Sequence[int]) -> Tensor:
    zero = grad.new_zeros(*shape)
    return torch.func.vjp(lambda w: plain(x, w, plan, grad.shape[2:]), zero)[1](grad)[0]  # type: ignore[no-any-return]


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    first, second, ctx.plan, ctx.arg = inputs
    ctx.save_for_backward(first, second)
    ctx.save_for_forward(first, second)


def _jvp_of(cls: Any) -> Any:
    def jvp(ctx: Any, first_t: Tensor | None, second_t: Tensor | None, *_: None) -> Tensor | None:
        first, second = ctx.saved_tensors
        parts = []
        if first_t is not None:
            parts.append(cls.apply(first_t, second, ctx.plan, ctx.arg))
        if second_t is not None:
            parts.append(cls.apply(first, second_t, ctx.plan, ctx.arg))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    return jvp


class _Columns(torch.autograd.Function):
    """(x, weight) ↦ y."""

    forward = staticmethod(_forward)
    setup_context = staticmethod(_setup)
    vmap = _vmap_by(plain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gx = _GradInput.apply(grad, weight, ctx.plan, x.shape) if ctx.needs_input_grad[0] else None
        gw = _GradWeight.apply(x, grad, ctx.plan, weight.shape) if ctx.needs_input_grad[1] else None
        return gx, gw, None, None


class _GradInput(torch.autograd.Function):
    """(∂/∂y, weight) ↦ ∂/∂x."""

    forward = staticmethod(_grad_input)
    setup_context = staticmethod(_setup)
    vmap = _vmap_by(_plain_grad_input)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        grad, weight = ctx.saved_tensors
        gg = _Columns.apply(u, weight, ctx.plan, grad.shape[2:]) if ctx.needs_input_grad[0] else None
        gw = _GradWeight.apply(u, grad, ctx.plan, weight.shape) if ctx.needs_input_grad[1] else None
        return gg, gw, None, None


class _GradWeight(torch.autograd.Function):
    """(x, ∂/∂y) ↦ ∂/∂weight."""

    forward = staticmethod(_grad_weight)
    setup_context = staticmethod(_setup)
    vmap = _vmap_by(_plain_grad_weight)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        x, grad = ctx.saved_tensors
        gx = _GradInput.apply(grad, u, ctx.plan, x.shape) if ctx.needs_input_grad[0] else None
        gg = _Columns.apply(x, u, ctx.plan, grad.shape[2:]) if ctx.needs_input_grad[1] else None
        return gx, gg, None, None


for _cls in (_Columns, _GradInput, _GradWeight):
    _cls.jvp = staticmethod(_jvp_of(_cls))  # type: ignore[method-assign]


def _convolve_piece(x: Tensor, weight: Tensor, plan: Plan, size: Sequence[int]) -> Tensor:
    piece = plan.pieces[0]
    if piece.corner is not None and piece.spacing is not None:
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
        dilation = tuple(d * g for d, g in zip(plan.dilation, piece.spacing, strict=True))
        part = x[(..., *_slices(plan, size, piece.corner, piece.spacing))]
        return convolution(part, weight, None, plan.stride, 0, dilation, plan.groups)
    if torch.compiler.is_compiling():
        return plain(x, weight, plan, size)
    return _Columns.apply(x, weight, plan, tuple(size))  # type: ignore[no-any-return]


def convolve(x: Tensor, weight: Tensor, plan: Plan, size: Sequence[int]) -> Tensor:
    """Convolve the extended image ``x`` (batch, channels, *extended); returns (batch, out, *size)."""
    if len(plan.pieces) == 1:
        return _convolve_piece(x, weight, plan, size)
    widths = [p.channels for p in plan.pieces]
    parts = zip(x.split(widths, dim=1), weight.split(widths, dim=1), plan.pieces, strict=True)
    outputs = [_convolve_piece(a, w, replace(plan, pieces=(p,)), size) for a, w, p in parts]
    return torch.stack(outputs).sum(0) if len(outputs) > 2 else outputs[0] + outputs[1]
