"""Faults that a kernel could have, each with a layer of several tiles that has to show it.

A fault is one place of one kernel's source, changed. Masks are dropped where the image lies within a larger one of
NaNs, or by one pixel: what is read outside is certain to be seen, and within the memory of the process. The kernels of
boxes have no masks but these: what their descriptors cut off is done by the hardware.
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
BLOCKS, STRIDED, NARROW = "three blocks, sliced", "three blocks, strided", "window wider than the map, sliced"
PARTS = "three blocks, strided channels_last"
BORDER, BORDERED = "depthwise with a border, sliced", "depthwise with a border, strided channels_last"
BY_BLOCKS, HALVES = "depthwise by blocks, channels_last", "depthwise, half a block a program, sliced"

BOX_PRODUCT = (
    ("shift negated", "row + (shift >> 16)", "row - (shift >> 16)", BLOCKS),
    ("shift without its sign", "((shift << 16) >> 16)", "(shift & 0xFFFF)", BLOCKS),
    ("step left out", "tl.minimum(s + 1, stop - 1)", "tl.minimum(s + 2, stop - 1)", BLOCKS),
    ("tile off by a row", "row = tile_y * BH", "row = tile_y * (BH + 1)", BLOCKS),
    ("list of another tile", "* column_tiles + tile_x)", "* column_tiles)", NARROW),
    ("list of another block", "n0 // per_pattern * parts", "0 * parts", BLOCKS),
    ("first image again", "rest // row_tiles * BB", "rest // row_tiles * 0", NARROW),
    ("first block of outputs again", "program % n_blocks * BN", "program % n_blocks * 0", BLOCKS),
    ("row within the stride lost", "place >> 24", "0", STRIDED),
    ("column part lost", "part % COLUMN_PARTS * outs", "0 * outs", PARTS),
)
BOX_WEIGHT = (
    ("chunk starts off by one tile", "range(split,", "range(split + 1,", BLOCKS),
    ("chunk ends off by one image tile", "met * image_tiles", "met * (image_tiles - 1)", NARROW),
    ("tile read ahead is another's", "(i + splits) % met", "(i + splits + 1) % met", BLOCKS),
    ("shift negated", "column + x1", "column - x1", BLOCKS),
    ("second tap is the first", "tl.minimum(t0 + 1,", "tl.minimum(t0,", BLOCKS),
    ("third tap is the second", "tl.minimum(t0 + 2,", "tl.minimum(t0 + 1,", NARROW),
    ("list of another group of taps", "(taps, TAPS) + group)", "(taps, TAPS))", NARROW),
    ("list of another block", "block * tl.cdiv", "0 * tl.cdiv", NARROW),
    ("mask off by one", "(n < outs)", "(n < outs - 1)", BLOCKS),
    ("first block of inputs again", "// n_blocks % c_blocks * BC", "// n_blocks % c_blocks * 0", BLOCKS),
)
BOX_DEPTHWISE = (
    ("shift negated", "row * stride_y + dy", "row * stride_y - dy", BY_BLOCKS),
    ("shift into the border negated", "(dy * row_step", "(-dy * row_step", BORDER),
    ("mask of rows off by one", "row < out_height", "row < out_height - 1", BY_BLOCKS),
    ("taps of the first block", "c0 // per_block * taps", "0 * taps", BY_BLOCKS),
    ("first block of channels again", "program % c_blocks * BC", "program % c_blocks * 0", BY_BLOCKS),
    ("first tile again", "_pixels(program // c_blocks,", "_pixels(program // c_blocks * 0,", HALVES),
)
BOX_SHIFTED = (
    ("mask dropped before", "(column >= 0)", "(column >= -1)", BY_BLOCKS),
    ("mask dropped behind", "(column < width)", "(column < width + 1)", HALVES),
)
BOX_WITHIN = (("stride lost", "out_width - 1) * stride_x", "out_width - 1)", BORDERED),)
BOX_DEPTHWISE_WEIGHT = (
    ("chunk starts off by one tile", "range(tl.program_id(1),", "range(tl.program_id(1) + 1,", BY_BLOCKS),
    ("chunk ends off by one tile", "tiles, tl.num", "tiles - 1, tl.num", BY_BLOCKS),
    ("shift negated", "u + x2", "u - x2", BY_BLOCKS),
    ("mask dropped", "(column < out_width)", "(column < out_width + 1)", HALVES),
    ("shift into the border negated", "(y1 * row_step", "(-y1 * row_step", BORDER),
    ("third tap is the second", "tl.minimum(t0 + 2,", "tl.minimum(t0 + 1,", HALVES),
    ("first block of channels again", "c0 = program % c_blocks * BC", "c0 = program % c_blocks * 0", BY_BLOCKS),
)  # fmt: skip
FAULTS = {
    "implicit_gemm": PRODUCT,
    "weight_gemm": WEIGHT,
    "tap_sum": SUM,
    "tap_weight": DEPTHWISE_WEIGHT,
    "product": BOX_PRODUCT,
    "weight_product": BOX_WEIGHT,
    "depthwise_sum": BOX_DEPTHWISE,
    "_shifted": BOX_SHIFTED,
    "_within": BOX_WITHIN,
    "depthwise_weight": BOX_DEPTHWISE_WEIGHT,
}
MUTANTS = [Mutant(kernel, *fault) for kernel, faults in FAULTS.items() for fault in faults]
