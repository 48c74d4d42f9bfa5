"""What a sparse layer is beside its tensors and taps, and the pure functions that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from widerf.functional import apply_layout, extend, read_taps, resolve_padding
from widerf.kernels.plan import Layout, Taps, make_layout, overhang

Pairs = tuple[tuple[int, int], ...]


class LayerSpec(NamedTuple):
    """What a layer computes with beside its tensors and its taps."""

    channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str


def borders(spec: LayerSpec, taps: Sequence[tuple[int, ...]]) -> tuple[Pairs, Pairs]:
    """Return the padding that the layer works with, and what to add to the image beforehand, so that ``taps`` fit."""
    pads = resolve_padding(spec.padding, spec.kernel_size, spec.stride, spec.dilation)
    added: Pairs = ((0, 0),) * len(pads)
    if spec.padding_mode != "zeros":
        added = tuple(zip(*overhang(taps, spec.kernel_size, pads, spec.dilation), strict=True))
        pads = tuple((low - a, high - b) for (low, high), (a, b) in zip(pads, added, strict=True))
    return pads, added


def lay_out(spec: LayerSpec, taps: Taps) -> tuple[Layout, Pairs, Pairs]:
    """Return the layout, the padding it works with, and what to add to the image beforehand."""
    pads, added = borders(spec, [tap for group in taps for tap in group])
    layout = make_layout(taps, spec.channels, spec.kernel_size, spec.stride, pads, spec.dilation, spec.groups)
    return layout, pads, added


def convolve_as(input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, *spec: Any) -> Tensor:
    """Convolve as a layer with these tensors and this `LayerSpec` does: for graphs that hold functions, not layers."""
    one = LayerSpec(*spec)
    layout, pads, added = lay_out(one, read_taps(offsets))
    return apply_layout(extend(input, added, one.padding_mode), weight, bias, layout, pads, one.dilation)
