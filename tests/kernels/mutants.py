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
HALF = "three blocks, bfloat16"
BLOCKS, STRIDED, NARROW = "three blocks, sliced", "three blocks, strided", "window wider than the map, sliced"
PARTS = "three blocks, strided channels_last"
ELEVEN, FOLDED = "depthwise, thirteen taps, sliced", "parts and outputs of several blocks, sliced"
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
    ("row of the weight is the first tap's", "(at >> 16) * ins", "0 * ins", BLOCKS),
    ("column of the weight lost", "w.load([n0, ", "w.load([n0 * 0, ", BLOCKS),
    ("tap of the weight lost", "at >> 16, n0])", "0, n0])", HALF),
    ("row within the stride lost", "place >> 24", "0", STRIDED),
    ("column part lost", "part % COLUMN_PARTS * outs", "0 * outs", PARTS),
)
BOX_WEIGHT = (
    ("chunk starts off by one tile", "range(split,", "range(split + 1,", BLOCKS),
    ("chunk ends off by one image tile", "met * image_tiles", "met * (image_tiles - 1)", NARROW),
    ("tile read ahead is another's", "(i + splits) % met", "(i + splits + 1) % met", BLOCKS),
    ("shift negated", "column + dx", "column - dx", BLOCKS),
    ("mask off by one", "(n < outs)", "(n < outs - 1)", BLOCKS),
    ("first block of inputs again", "// n_blocks % c_blocks * BC", "// n_blocks % c_blocks * 0", BLOCKS),
)
BOX_DEPTHWISE = (
    ("shift negated", "row * stride_y + tl", "row * stride_y - tl", BY_BLOCKS),
    ("mask of rows off by one", "row < out_height", "row < out_height - 1", BY_BLOCKS),
    ("taps of the first block", "c0 // per_block * taps", "0 * taps", BY_BLOCKS),
    ("first block of channels again", "program % c_blocks * BC", "program % c_blocks * 0", BY_BLOCKS),
    ("first tile again", "_pixels(program // c_blocks,", "_pixels(program // c_blocks * 0,", HALVES),
)
BOX_SHIFTED = (
    ("mask dropped before", "(column >= 0)", "(column >= -1)", BY_BLOCKS),
    ("mask dropped behind", "(column < width)", "(column < width + 1)", HALVES),
)
BOX_DEPTHWISE_WEIGHT = (
    ("chunk starts off by one tile", "range(tl.program_id(1),", "range(tl.program_id(1) + 1,", BY_BLOCKS),
    ("chunk ends off by one tile", "tiles, tl.num", "tiles - 1, tl.num", BY_BLOCKS),
    ("mask dropped", "(column < out_width)", "(column < out_width + 1)", HALVES),
    ("first block of channels again", "c0 = program % c_blocks * BC", "c0 = program % c_blocks * 0", BY_BLOCKS),
    ("rows negated", "v + rows[k]", "v - rows[k]", HALVES),
    ("columns negated", "u + columns[k]", "u - columns[k]", ELEVEN),
    ("tap is the group's first", "first, t0 + k, taps", "first, t0, taps", BY_BLOCKS),
    ("tap kept elsewhere", "tl.minimum(t0 + k, taps - 1) *", "tl.minimum(t0, taps - 1) *", HALVES),
    ("sums of another tap", "(sums[k] + grads", "(sums[0] + grads", HALVES),
    ("sums of one step only", "sums = more", "sums = sums", HALVES),
    ("sums of one tap stored", "tl.sum(sums[k]", "tl.sum(sums[0]", HALVES),
)
BOX_TAP = (("last tap beyond a block is the next", "taps - 1", "taps", ELEVEN),)
BOX_FOLD = (
    ("parts beyond the first few lost", "range(0, splits, BS)", "range(0, tl.minimum(splits, BS), BS)", FOLDED),
    ("a part beyond the last", "(s < splits)", "(s < splits + 1)", FOLDED),
    ("first block of outputs again", "program % n_blocks * BN", "program % n_blocks * 0", FOLDED),
    ("first block of inputs again", "n_blocks % c_blocks * BC", "n_blocks % c_blocks * 0", FOLDED),
    ("tap of another", "+ t * t_step", "", FOLDED),
    ("tap of the other order", "t * t_step", "t", PARTS),
    ("input of the other order", "c * c_step", "c", FOLDED),
)
FAULTS = {
    "implicit_gemm": PRODUCT,
    "weight_gemm": WEIGHT,
    "tap_sum": SUM,
    "tap_weight": DEPTHWISE_WEIGHT,
    "product": BOX_PRODUCT,
    "weight_product": BOX_WEIGHT,
    "depthwise_sum": BOX_DEPTHWISE,
    "_shifted": BOX_SHIFTED,
    "depthwise_weight": BOX_DEPTHWISE_WEIGHT,
    "_tap": BOX_TAP,
    "fold": BOX_FOLD,
}
MUTANTS = [Mutant(kernel, *fault) for kernel, faults in FAULTS.items() for fault in faults]
