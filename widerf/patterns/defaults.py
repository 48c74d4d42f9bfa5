"""Which pattern a layer gets if nobody names one: the one table that evidence changes."""

from __future__ import annotations

from collections.abc import Sequence

# kind of layer → pattern
DEFAULTS = {
    "small": "mixed",
    "wide": "mixed",
    "depthwise": "mixed",
}
_WIDE = 5  # taps per axis from which a kernel counts as wide


def default_pattern(kernel_size: Sequence[int], depthwise: bool = False) -> str:
    """Return the pattern for a kind of layer.

    Args:
        kernel_size: taps per axis.
        depthwise: whether each channel has a kernel of its own.

    Example:
        >>> default_pattern((3, 3))
        'mixed'
    """
    return DEFAULTS["depthwise" if depthwise else "wide" if max(kernel_size) >= _WIDE else "small"]
