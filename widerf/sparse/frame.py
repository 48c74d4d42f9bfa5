"""What a sparse layer is beside its tensors and taps, and the pure functions that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from widerf.functional import apply_layout, extend, read_taps, resolve_padding
from widerf.kernels.plan import Layout, Taps, make_layout, reach

Pairs = tuple[tuple[int, int], ...]


class Frame(NamedTuple):
    """What a layer computes with beside its tensors and its taps."""

    channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str


def borders(frame: Frame, taps: Sequence[tuple[int, ...]]) -> tuple[Pairs, Pairs]:
    """Return the padding that the layer works with, and what to add to the image beforehand, so that ``taps`` fit."""
    pads = resolve_padding(frame.padding, frame.kernel_size, frame.stride, frame.dilation)
    added: Pairs = ((0, 0),) * len(pads)
    if frame.padding_mode != "zeros":
        added = tuple(zip(*reach(taps, frame.kernel_size, pads, frame.dilation), strict=True))
        pads = tuple((low - a, high - b) for (low, high), (a, b) in zip(pads, added, strict=True))
    return pads, added


def lay_out(frame: Frame, taps: Taps) -> tuple[Layout, Pairs, Pairs]:
    """Return the layout, the padding it works with, and what to add to the image beforehand."""
    pads, added = borders(frame, [tap for group in taps for tap in group])
    layout = make_layout(taps, frame.channels, frame.kernel_size, frame.stride, pads, frame.dilation, frame.groups)
    return layout, pads, added


def convolve_as(input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, *frame: Any) -> Tensor:
    """Convolve as a layer with these tensors and this `Frame` does: for graphs that hold functions, not layers."""
    one = Frame(*frame)
    layout, pads, added = lay_out(one, read_taps(offsets))
    return apply_layout(extend(input, added, one.padding_mode), weight, bias, layout, pads, one.dilation)
