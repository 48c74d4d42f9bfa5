"""What the image border cuts off an effective receptive field."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from widerf.geometry import marginal, moments


def clipped_share(
    share: Tensor,
    center: Sequence[float],
    trf_size: Sequence[int] | None,
    jump: Sequence[float] | None = None,
) -> float:
    """Estimate the share of an ERF's mass that the image border cuts off.

    A side of the image that the TRF does not cross cuts nothing. On a side that it crosses by L pixels the marginal of
    the map is continued beyond the border by the exponential through its two outermost bands, up to L. For a map with a
    log-concave marginal, as the ERF of a convolutional network has nearly, that continuation is an upper bound. With no
    known TRF, L is the image's own length: a flat map, saturated by global paths, is flagged.

    Args:
        share: energy map that sums to 1.
        center: centre of the TRF per axis.
        trf_size: pixels per axis of the TRF, or None.
        jump: input pixels between neighbouring units; the bands are whole multiples of it, so that the pattern that
            strides leave on the map cancels.

    Returns:
        cut / (1 + cut), where cut is the mass of all continuations.

    Example:
        >>> import torch
        >>> flat = torch.full((9,), 1 / 9)
        >>> clipped_share(flat, (4,), (9,)), round(clipped_share(flat, (4,), (11,)), 3)
        (0.0, 0.182)
    """
    cut = 0.0
    for axis, n in enumerate(share.shape):
        line = marginal(share, axis)
        step = 1 if jump is None else max(round(jump[axis]), 1)
        # Half a standard deviation: narrow enough to follow the tail.
        band = min(step * max(round(float(moments(line).variance.sqrt()) / (2 * step)), 1), n // 2)
        half = math.inf if trf_size is None else (trf_size[axis] - 1) / 2
        for values, inside in ((line, center[axis]), (line.flip(0), n - 1 - center[axis])):
            beyond = min(half - inside, float(n))
            if beyond > 0 and band > 0:
                cut += _continuation(float(values[:band].mean()), float(values[band : 2 * band].mean()), band, beyond)
    return cut / (1 + cut)


def _continuation(outer: float, inner: float, band: int, length: float) -> float:
    """Mass over ``length`` beyond the border of the exponential through the means of the two outermost bands."""
    if outer <= 0:
        return 0.0
    rate = math.log(inner / outer) / band if inner > outer else 0.0
    edge = outer * math.exp(-rate * band / 2)
    return edge * length if rate * length < 1e-9 else edge * -math.expm1(-rate * length) / rate


def clipped_message(share: Tensor, trf_size: tuple[int, ...] | None, clipped: float) -> str:
    """Say what share of an ERF the border cuts off, and which input would hold all of it."""
    text = f"the image border cuts off about {clipped:.1%} of the ERF, so that its figures are those of a clipped map"
    if trf_size is None:
        return f"{text}; the unit sees the whole image at any size"
    wide = tuple(max(t, n) for t, n in zip(trf_size, share.shape, strict=True))
    return f"{text}; a spatial input size of {wide} or more would hold all of it"
