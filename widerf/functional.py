"""Convolution with taps at any integer offsets, one set of taps per group of input channels: the pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from widerf._checks import require, require_known
from widerf.geometry import Size, ntuple
from widerf.kernels import columns
from widerf.kernels.op import convolve, memory_format
from widerf.kernels.plan import Layout, Taps, make_layout, origin


def read_taps(offsets: Tensor) -> Taps:
    """Return the offsets as nested tuples of integers, [group][tap][axis]."""
    return tuple(tuple(tuple(tap) for tap in group) for group in offsets.tolist())


def check_offsets(offsets: object, taps: int, rank: int) -> Tensor:
    """Return ``offsets`` as an int64 tensor (groups, taps, D) if it is one.

    Raises:
        TypeError: if it is not a tensor of integers.
        ValueError: if the shape is wrong or a group holds a tap twice.
    """
    rule = f"be an integer tensor of shape (groups, {taps}, {rank})"
    require(isinstance(offsets, Tensor), "offsets", rule, type(offsets).__name__, TypeError)
    assert isinstance(offsets, Tensor)
    integer = not (offsets.is_floating_point() or offsets.is_complex() or offsets.dtype == torch.bool)
    require(integer, "offsets", rule, offsets.dtype, TypeError)
    shaped = offsets.dim() == 3 and offsets.shape[0] >= 1 and tuple(offsets.shape[1:]) == (taps, rank)
    require(shaped, "offsets", rule, tuple(offsets.shape))
    for number, group in enumerate(read_taps(offsets)):
        twice = sorted({tap for tap in group if group.count(tap) > 1})
        require(not twice, f"offsets[{number}]", "hold no tap twice", twice)
    return offsets.to(torch.int64)


def resolve_padding(
    padding: str | Size, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return the padding (before, after) per axis, by the rules of PyTorch's convolutions.

    Raises:
        ValueError: if ``padding`` is neither "same", "valid" nor non-negative integers, or "same" meets a stride.

    Example:
        >>> resolve_padding("same", (4,), (1,), (1,))
        ((1, 2),)
    """
    if isinstance(padding, str):
        require_known(padding, ("same", "valid"), "padding")
        require(padding == "valid" or all(s == 1 for s in stride), "stride", "be 1 with padding='same'", stride)
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    values = ntuple(padding, len(kernel_size), "padding")
    require(all(p >= 0 for p in values), "padding", "not be negative", padding)
    return tuple((p, p) for p in values)


def _outside(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Extend one axis without end: reflections of reflections, the border pixel, or the image again and again."""
    n = x.shape[axis]
    index = torch.arange(-before, n + after, device=x.device)
    if mode == "circular":
        index = index.remainder(n)
    elif mode == "replicate":
        index = index.clamp(0, n - 1)
    else:
        period = max(1, 2 * (n - 1))
        index = index.remainder(period)
        index = torch.minimum(index, period - index) if n > 1 else index * 0
    return x.index_select(axis, index)


def extend(x: Tensor, pads: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """Return ``x``, whose last axes are spatial, with pixels added (before, after) on each of them.

    ``F.pad`` where it can; its modes other than zeros refuse to pad by more than the image (reflect: one pixel less),
    which a wide window on a small image needs. There the image goes on reflecting (repeating) as often as necessary.
    """
    if not any(map(any, pads)):
        return x
    rank = len(pads)
    room = {"replicate": None, "reflect": 1, "circular": 0}[mode]
    if room is None or all(max(p) <= n - room for p, n in zip(pads, x.shape[-rank:], strict=True)):
        return F.pad(x, [p for pair in reversed(pads) for p in pair], mode=mode)
    for axis, (before, after) in enumerate(pads):
        x = _outside(x, axis - rank, before, after, mode)
    return x


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> None:
    """Raise what PyTorch's convolutions raise, RuntimeError, if the tensors do not fit each other and the taps."""
    rank, groups = len(layout.kernel_size), layout.whole.groups
    if tuple(weight.shape[2:]) != layout.kernel_size:
        raise RuntimeError(
            f"weight must have shape (out, in/groups, {', '.join(map(str, layout.kernel_size))}), one number for each "
            f"tap, got {list(weight.shape)}"
        )
    if weight.shape[0] % groups or weight.shape[1] * groups != layout.whole.channels:
        raise RuntimeError(
            f"weight must have shape (a multiple of groups={groups}, {layout.whole.channels // groups}, …), "
            f"got {list(weight.shape)}"
        )
    if x.dim() not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to sparse_conv{rank}d, "
            f"but got input of size: {list(x.shape)}"
        )
    channels = x.shape[-rank - 1]
    if channels != weight.shape[1] * groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight.shape)}, expected input{list(x.shape)} to have "
            f"{weight.shape[1] * groups} channels, but got {channels} channels instead"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise RuntimeError(f"bias must have shape ({weight.shape[0]},), got {list(bias.shape)}")


def output_size(
    spatial: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """Return the output size of the plain convolution.

    Raises:
        RuntimeError: if the dense kernel does not fit on the padded image.
    """
    axes = zip(spatial, kernel_size, stride, padding, dilation, strict=True)
    size = tuple((n + before + after - d * (k - 1) - 1) // s + 1 for n, k, s, (before, after), d in axes)
    if not all(n > 0 for n in size):
        padded = [n + sum(p) for n, p in zip(spatial, padding, strict=True)]
        span = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
        raise RuntimeError(
            f"Calculated padded input size per channel: {padded}. Kernel size: {span}. "
            "Kernel size can't be greater than actual input size"
        )
    return size


def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# The compiler of torch 2.11 cannot look inside: it asks once and keeps the answer.
_knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _autocast(x: Tensor) -> Tensor:
    """Cast as autocast does for convolutions; it leaves double precision alone."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


def apply_layout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    offsets: Tensor | None = None,
) -> Tensor:
    """Convolve by a layout that is made already: what the functions and the modules share.

    With ``offsets`` the taps are there, not where the layout has them, and may differ along a batch of `torch.vmap`.
    """
    plan = layout.whole
    _check_shapes(x, weight, bias, layout)
    rank, device = weight.dim() - 2, x.device.type
    if _knows_autocast(device) and torch.is_autocast_enabled(device):
        x, weight = _autocast(x), _autocast(weight)
        bias = None if bias is None else _autocast(bias)
    batched = x if x.dim() == rank + 2 else x.unsqueeze(0)
    size = output_size(batched.shape[2:], weight.shape[2:], plan.stride, padding, dilation)
    if offsets is None:
        y = convolve(batched, weight, bias, layout, size)
    else:
        y = columns.gathered(
            batched, weight, offsets, plan, origin(weight.shape[2:], padding, dilation), dilation, size
        )
        y = y if bias is None else y + bias.view(-1, *(1,) * rank)
    if not torch.compiler.is_compiling():
        y = y.contiguous(memory_format=memory_format(batched))
    return y if x.dim() == rank + 2 else y.squeeze(0)


def _sparse_conv(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    stride: Size,
    padding: str | Size,
    dilation: Size,
    groups: int,
) -> Tensor:
    require(weight.dim() == rank + 2, "weight", f"have {rank + 2} axes", tuple(weight.shape))
    kernel_size = tuple(weight.shape[2:])
    steps, spread = ntuple(stride, rank, "stride"), ntuple(dilation, rank, "dilation")
    require(all(s >= 1 for s in steps), "stride", "be positive", stride)
    require(all(d >= 1 for d in spread), "dilation", "be positive", dilation)
    require(groups >= 1 and weight.shape[0] % groups == 0, "groups", f"divide the {weight.shape[0]} outputs", groups)
    taps = read_taps(check_offsets(offsets, weight[0, 0].numel(), rank))
    channels = weight.shape[1] * groups
    require(len(taps) <= channels, "offsets", f"have no more groups than the {channels} input channels", len(taps))
    pads = resolve_padding(padding, kernel_size, steps, spread)
    layout = make_layout(taps, channels, kernel_size, steps, pads, spread, groups)
    return apply_layout(input, weight, bias, layout, pads, spread)


def sparse_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve a signal with taps at ``offsets``: `sparse_conv2d` with one axis.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
        >>> sparse_conv1d(x, torch.ones(1, 1, 2), None, torch.tensor([[[0], [2]]]))
        tensor([[ 5., 10.,  4.]])
    """
    return _sparse_conv(1, input, weight, bias, offsets, stride, padding, dilation, groups)


def sparse_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve an image with taps at ``offsets`` from the kernel's centre.

        y[b, o, u] = bias[o] + Σ_c Σ_t weight[o, c, t] · x[b, c, s·u − p + d·(h + offsets[g(c), t])]

    with u the output index (a vector of D integers), s, p, d the stride, padding and dilation of each axis, h = (k −
    1)//2 the dense kernel's centre tap, and x zero outside the image. Channel c of C lies in pattern group g(c) =
    ⌊c·G/C⌋: equal stretches of channels, or as equal as can be if G does not divide C. With
    ``offsets = patterns.dense_taps(kernel_size)[None]`` it is ``F.conv2d``.

    Args:
        input: (batch, in, H, W) or (in, H, W).
        weight: (out, in/groups, kH, kW); element [o, c, i, j] multiplies the tap ``offsets[g, i·kW + j]``.
        bias: (out,) or None.
        offsets: integers (pattern groups, kH·kW, 2), in taps from the kernel's centre (y, x).
        stride: output step in pixels, per axis.
        padding: pixels on each side, per axis, "same" or "valid", meant for the dense kernel: the taps may span
            further and read zeros there.
        dilation: pixels between two offsets that differ by 1.
        groups: blocks of connections, as in ``F.conv2d``.

    Returns:
        (batch, out, H', W') or (out, H', W'), of the size that ``F.conv2d`` gives for the same arguments.

    Raises:
        TypeError: if the offsets are not integers.
        ValueError: if an argument breaks a rule named in the message.
        RuntimeError: if the tensors do not fit each other, as in ``F.conv2d``.

    Example:
        >>> x, w = torch.randn(1, 8, 5, 5), torch.randn(4, 8, 3, 3)
        >>> from widerf.patterns import dense_taps, partition
        >>> torch.allclose(sparse_conv2d(x, w, None, dense_taps(3)[None]), F.conv2d(x, w), atol=1e-5)
        True
        >>> sparse_conv2d(x, w, None, partition(3, 9, groups=8), padding=1).shape
        torch.Size([1, 4, 5, 5])
    """
    return _sparse_conv(2, input, weight, bias, offsets, stride, padding, dilation, groups)


def sparse_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve a volume with taps at ``offsets``: `sparse_conv2d` with three axes.

    Example:
        >>> from widerf.patterns import partition
        >>> x, w = torch.randn(2, 4, 5, 6, 7), torch.randn(3, 4, 3, 3, 3)
        >>> sparse_conv3d(x, w, None, partition((3, 3, 3), 7, groups=4), padding="same").shape
        torch.Size([2, 3, 5, 6, 7])
    """
    return _sparse_conv(3, input, weight, bias, offsets, stride, padding, dilation, groups)
