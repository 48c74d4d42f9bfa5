"""Faults that a kernel could have, each with a layer of several tiles that has to show it.

A fault is one place of one kernel's source, changed. Masks are dropped where the image lies within a larger one of
NaNs, so that what is read outside is certain to be seen.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """In the source of ``kernel``, ``old`` becomes ``new``; the layer ``case`` of `tiles.FAST` has to show it."""

    kernel: str
    fault: str
    old: str
    new: str
    case: str


MIXED = "wide and narrow runs, sliced"
DEPTHWISE, DEPTHWISE_LAST = "depthwise, sliced", "depthwise, runs, channels_last"
OWN, GROUPS = "each channel its own, sliced", "groups, sliced"

OUTSIDE = "(row == row) & (column == column) & live"  # true outside the image too, of the same shape

PRODUCT = (
    ("shift negated", "row0 + dy, column0 + dx", "row0 - dy, column0 + dx", MIXED),
    ("mask dropped", "inside = inside & live\n", f"inside = {OUTSIDE}\n", MIXED),
    ("tile off by 32", "m = tile * BM +", "m = tile * (BM + 32) +", MIXED),
    ("first block of outputs again", "n = _arange(n0, BN, BIG)", "n = _arange(n0 * 0, BN, BIG)", GROUPS),
    ("first image again", "here = _across(image * xb", "here = _across(image * 0", MIXED),
    ("remainder of the sum left out", "channels * taps, BK)", "channels * taps - BK + 1, BK)", GROUPS),
)
WEIGHT = (
    ("chunk starts off by 32", "range(split * chunk, end, BM)", "range(split * (chunk + 32), end, BM)", MIXED),
    ("chunk ends off by 32", "split * chunk + chunk, pixels", "split * chunk + chunk + 32, pixels", MIXED),
    ("shift negated", "CHANNELS_LAST) + dx\n", "CHANNELS_LAST) - dx\n", MIXED),
    ("mask dropped", "inside = inside & live &", f"inside = {OUTSIDE} &", MIXED),
    ("first block of outputs again", "// k_blocks * BN", "// k_blocks * 0", OWN),
    ("first image again", "image * gb", "image * 0", MIXED),
)  # fmt: skip
SUM = (
    ("shift negated", "row0 + dy", "row0 - dy", DEPTHWISE),
    ("mask dropped", "mask=inside & live,", f"mask={OUTSIDE},", DEPTHWISE),
    ("tile off by 32", "m = tile * BM +", "m = tile * (BM + 32) +", DEPTHWISE),
    ("first block of channels again", "% row_blocks * BC", "% row_blocks * 0", DEPTHWISE_LAST),
    ("first tap again", "t * xt", "0 * xt", MIXED),
)
DEPTHWISE_WEIGHT = (
    ("chunk starts off by 32", "range(split * chunk, end, BM)", "range(split * (chunk + 32), end, BM)", DEPTHWISE),
    ("chunk ends off by 32", "split * chunk + chunk, pixels", "split * chunk + chunk + 32, pixels", DEPTHWISE),
    ("shift negated", "CHANNELS_LAST) + dy\n", "CHANNELS_LAST) - dy\n", DEPTHWISE),
    ("mask dropped", "mask=inside & live,", f"mask={OUTSIDE},", DEPTHWISE),
    ("first block of channels again", "% row_blocks * BC", "% row_blocks * 0", DEPTHWISE_LAST),
)
FAULTS = {"implicit_gemm": PRODUCT, "weight_gemm": WEIGHT, "tap_sum": SUM, "tap_weight": DEPTHWISE_WEIGHT}
MUTANTS = [Mutant(kernel, *fault) for kernel, faults in FAULTS.items() for fault in faults]
