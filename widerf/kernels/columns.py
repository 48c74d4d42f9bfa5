"""The pure PyTorch engine: shifted slices of the extended image as columns, and one matrix product.

Each input channel gives as many columns as the kernel has weights, however wide the taps are spread, so the work is
that of the plain convolution. The columns are built a few samples at a time, so that they stay in the processor's
cache.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from widerf.kernels.plan import Plan, read_plan, slices

BLOCK_BYTES = 2**23  # columns built at a time on the CPU: about what the last cache holds
ARENA_BYTES = 2**24
_scratch = threading.local()


class Block(NamedTuple):
    """Work space for a few samples, and the views of it that a layer needs, tap by tap."""

    wide: Tensor  # (samples, channels, *extended): the image and its zero border
    inside: Tensor  # the view of `wide` that is the image
    reads: list[Tensor]  # views of `wide`, what each tap of each run reads: (samples, repeats, channels, *size)
    columns: Tensor  # (samples, channels·taps, pixels)
    slots: list[Tensor]  # views of `columns`, where what was read is put


def _by_repeat(x: Tensor, plan: Plan) -> Tensor:
    return torch.unflatten(x, 1, (plan.repeats, x.shape[1] // plan.repeats))


def pad(x: Tensor, plan: Plan) -> Tensor:
    """Add the zeros around the image that the taps read."""
    pairs = zip(reversed(plan.before), reversed(plan.after), strict=True)
    return F.pad(x, [p for pair in pairs for p in pair])


def plain(x: Tensor, weight: Tensor, plan: Plan, size: Sequence[int]) -> Tensor:
    """Convolve by columns through ordinary differentiable operators: for tracers and transforms.

    Args:
        x: image, (batch, channels, *spatial).
        weight: (out, channels/groups, *kernel).
        plan: the layout.
        size: spatial output size.

    Returns:
        (batch, out, *size)
    """
    parts = _by_repeat(pad(x, plan), plan)
    columns = []
    for run in plan.runs:
        part = parts[:, :, run.start : run.stop]
        columns.append(torch.stack([part[slices(plan, size, shift)] for shift in run.shifts], dim=3))
    return _weigh(torch.cat(columns, dim=2), weight, plan, size)  # (batch, repeats, channels/repeats, taps, *size)


def _by_place(text: str) -> tuple[Any, ...]:
    """Sort the taps of all channels by where they read along the last axis.

    Returns:
        (place, number of taps) for each place; of the taps in this order the channel, then the shift along each of the
        other axes; and where in this order the taps are in that of the channels.
    """
    taps = [(s[-1], channel, *s[:-1]) for channel, shifts in enumerate(read_plan(text).shifts) for s in shifts]
    order = sorted(range(len(taps)), key=taps.__getitem__)
    place, *lines = zip(*(taps[i] for i in order), strict=True)
    counts = tuple((p, place.count(p)) for p in dict.fromkeys(place))
    return counts, tuple(lines), tuple(sorted(range(len(taps)), key=order.__getitem__))


_by_place._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the compiler takes the answer as it is


def exportable(x: Tensor, weight: Tensor, plan: Plan, size: Sequence[int]) -> Tensor:
    """Convolve as `plain` does by fewer operators, for exporters: `plain` has several for each tap of each pattern.

    Lines of the image that are read at the same place along the last axis are gathered at once.
    """
    counts, (channel, *shifts), back = _by_place(plan.text)
    wide, index = pad(x, plan), torch.tensor(channel, device=x.device)
    for axis, shift in enumerate(shifts):
        start = torch.tensor(shift, device=x.device) + plan.before[axis]
        line = index * wide.shape[2 + axis] + start.view(-1, *(1,) * axis)
        index = line.unsqueeze(-1) + plan.stride[axis] * torch.arange(size[axis], device=x.device)
    lines = wide.flatten(1, -2) if shifts else wide
    columns, done = [], 0
    for place, count in counts:
        at = slices(plan, size, (*(0,) * len(shifts), place))[-1]
        columns.append(lines[..., at].index_select(1, index[done : done + count].flatten()))
        done += count
    every = torch.cat(columns, dim=1).reshape(x.shape[0], done, math.prod(size))
    return _weigh(every.index_select(1, torch.tensor(back, device=x.device)), weight, plan, size)


def gathered(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    plan: Plan,
    origin: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
) -> Tensor:
    """Convolve as `plain` does by offsets in a tensor (groups, taps, D), whose values need not be known.

    Only the channels, the groups and the stride are read from the plan. Several times slower than the rest.
    """
    channels, rank = x.shape[1], len(size)
    row = torch.arange(channels, device=x.device) * offsets.shape[-3] // channels
    taps = offsets[row].flatten(0, 1)  # (channels·taps, D)
    index: Any = 0
    inside: Any = True
    for axis, (n, m, step) in enumerate(zip(x.shape[2:], size, plan.stride, strict=True)):
        start = origin[axis] + dilation[axis] * taps[:, axis]
        place = start.unsqueeze(1) + step * torch.arange(m, device=x.device)  # (channels·taps, m)
        shape = (-1, *(m if a == axis else 1 for a in range(rank)))
        index = index * n + place.clamp(0, n - 1).reshape(shape)
        inside = inside & ((place >= 0) & (place < n)).reshape(shape)
    read = x.flatten(2).gather(2, index.reshape(1, channels, -1).expand(x.shape[0], -1, -1))
    columns = torch.where(inside.reshape(1, channels, -1), read, read.new_zeros(()))  # (batch, channels, taps·pixels)
    return _weigh(columns.reshape(x.shape[0], channels * plan.taps, -1), weight, plan, size)


def _weigh(columns: Tensor, weight: Tensor, plan: Plan, size: Sequence[int]) -> Tensor:
    flat = columns.reshape(columns.shape[0], -1, math.prod(size))
    out = F.conv1d(flat, weight.reshape(weight.shape[0], -1, 1), groups=plan.groups)
    return torch.unflatten(out, 2, tuple(size))


def _arena(needed: int) -> Tensor:
    """Return this thread's work space, always the same: fresh pages would cost as much as filling them."""
    held: Tensor | None = getattr(_scratch, "arena", None)
    if held is None:
        held = _scratch.arena = torch.empty(ARENA_BYTES, dtype=torch.uint8)
    return held[:needed]


def _make_block(plan: Plan, samples: int, shape: Sequence[int], size: Sequence[int], like: Tensor, keep: bool) -> Block:
    extended = [a + n + b for a, n, b in zip(plan.before, shape[1:], plan.after, strict=True)]
    count = samples * shape[0] * math.prod(extended)
    total = count + samples * shape[0] * plan.taps * math.prod(size)
    memory = _arena(total * like.element_size()).view(like.dtype) if keep else like.new_empty(total)
    wide = memory[:count].view(samples, shape[0], *extended)
    image: Any = (..., *(slice(a, a + n) for a, n in zip(plan.before, shape[1:], strict=True)))
    inside = wide[image]
    parts = _by_repeat(wide, plan)
    columns = memory[count:].view(samples, -1, math.prod(size))
    into = columns.view(samples, plan.repeats, parts.shape[2], -1, *size)
    taps = [(slice(run.start, run.stop), t, tap) for run in plan.runs for t, tap in enumerate(run.shifts)]
    reads = [parts[:, :, run][slices(plan, size, tap)] for run, _, tap in taps]
    return Block(wide, inside, reads, columns, [into[:, :, run, t] for run, t, _ in taps])


def _blocks(plan: Plan, x_shape: Sequence[int], size: Sequence[int], like: Tensor) -> Iterator[tuple[slice, Block]]:
    """Yield which samples to take at a time, and the work space for them.

    On the CPU the views are kept with the plan: cutting them takes Python longer than a small network takes to run.
    """
    batch, *shape = x_shape
    extended = math.prod(a + n + b for a, n, b in zip(plan.before, shape[1:], plan.after, strict=True))
    each = shape[0] * (extended + plan.taps * math.prod(size)) * like.element_size()
    cpu = like.device.type == "cpu"
    most = max(1, (BLOCK_BYTES if cpu else 32 * BLOCK_BYTES) // max(1, each))
    count = math.ceil(batch / math.ceil(batch / most)) if batch else 1
    for start in range(0, batch, count):
        samples = min(count, batch - start)
        key = (threading.get_ident(), samples, *shape, *size, like.dtype)
        block = plan.blocks.get(key) if cpu else None
        if block is None:
            keep = cpu and samples * each <= ARENA_BYTES
            with torch.inference_mode(False), torch.no_grad():
                block = _make_block(plan, samples, shape, size, like, keep)
            if keep:
                while len(plan.blocks) >= 8:
                    plan.blocks.pop(next(iter(plan.blocks)), None)  # another thread may have been first
                plan.blocks[key] = block
        yield slice(start, start + samples), block


def _fill(block: Block, x: Tensor) -> Tensor:
    """Write the columns of ``x`` and return them."""
    block.wide.zero_()
    block.inside.copy_(x)
    if x.device.type == "cpu":
        torch._foreach_copy_(block.slots, block.reads)
    else:
        for slot, read in zip(block.slots, block.reads, strict=True):
            slot.copy_(read)
    return block.columns


def _scatter(block: Block, x: Tensor) -> None:
    """Add the columns back to the pixels that they came from and write those to ``x``: the transpose of `_fill`."""
    block.wide.zero_()
    for slot, read in zip(block.slots, block.reads, strict=True):  # in turn: the views overlap
        read.add_(slot)
    x.copy_(block.inside)


def _product(w: Tensor, columns: Tensor, out: Tensor) -> None:
    """Write w · columns for each sample and group: w (groups, m, n), columns (batch, groups·n, pixels)."""
    if len(w) == 1:
        torch.bmm(w.expand(len(columns), -1, -1), columns, out=out)
        return
    for c, o in zip(torch.unflatten(columns, 1, (len(w), -1)), torch.unflatten(out, 1, (len(w), -1)), strict=True):
        torch.bmm(w, c, out=o)


def forward(x: Tensor, weight: Tensor, plan: Plan, size: Sequence[int]) -> Tensor:
    """Return y, (batch, out, *size)."""
    w = weight.reshape(plan.groups, weight.shape[0] // plan.groups, -1)
    y = x.new_empty(x.shape[0], weight.shape[0], *size)
    flat = y.flatten(2)
    for samples, block in _blocks(plan, x.shape, size, x):
        _product(w, _fill(block, x[samples]), flat[samples])
    return y


def grad_input(grad: Tensor, weight: Tensor, plan: Plan, shape: Sequence[int]) -> Tensor:
    """Return ∂/∂x, of the given shape, for ``grad`` = ∂/∂y."""
    size = grad.shape[2:]
    w = weight.reshape(plan.groups, weight.shape[0] // plan.groups, -1).transpose(1, 2)
    x = grad.new_empty(*shape)
    g = grad.reshape(*grad.shape[:2], math.prod(size))
    for samples, block in _blocks(plan, shape, size, x):
        _product(w, g[samples], block.columns)
        _scatter(block, x[samples])
    return x


def grad_weight(x: Tensor, grad: Tensor, plan: Plan, shape: Sequence[int]) -> Tensor:
    """Return ∂/∂weight, of the given shape, for ``grad`` = ∂/∂y."""
    size, groups = grad.shape[2:], plan.groups
    weight = grad.new_zeros(*shape)
    w = weight.view(groups, shape[0] // groups, -1)
    g = grad.reshape(*grad.shape[:2], math.prod(size))
    for samples, block in _blocks(plan, x.shape, size, x):
        columns = _fill(block, x[samples]).transpose(1, 2)
        if groups == 1:
            w[0].addbmm_(g[samples], columns)
            continue
        for i, c in zip(
            torch.unflatten(g[samples], 1, (groups, -1)), torch.unflatten(columns, 2, (groups, -1)), strict=True
        ):
            w.baddbmm_(i, c.transpose(0, 1))
    return weight


def plain_grad_input(grad: Tensor, weight: Tensor, plan: Plan, shape: Sequence[int]) -> Tensor:
    """Return ∂/∂x of `plain`, through ordinary operators."""
    vjp: Any = torch.func.vjp(lambda x: plain(x, weight, plan, grad.shape[2:]), grad.new_zeros(*shape))[1]
    return torch.as_tensor(vjp(grad)[0])


def plain_grad_weight(x: Tensor, grad: Tensor, plan: Plan, shape: Sequence[int]) -> Tensor:
    """Return ∂/∂weight of `plain`, through ordinary operators."""
    vjp: Any = torch.func.vjp(lambda w: plain(x, w, plan, grad.shape[2:]), grad.new_zeros(*shape))[1]
    return torch.as_tensor(vjp(grad)[0])
