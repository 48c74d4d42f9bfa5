# mypy: ignore-errors
"""Device code for channels in blocks that share their taps, in Triton; launched by `widerf.kernels.cuda_boxes`.

The matrix products read boxes of the image through tensor descriptors: from compute capability 9.0 on these are copies
by the hardware (TMA), zeros outside the image included; on 8.0 the compiler makes masked loads of them. What a tile
adds up is a list of boxes, see `widerf.kernels.boxes`. All accumulate in float32 and use no atomic operation.

The numbers are checked with Triton's interpreter, the code by compiling it for sm_90 (depthwise: sm_80 too), and both
on an H200: docs/results/gpu-nvidia-h200.md.

A load of a scalar that a load of a box waits for stops the compiler's pipelining: each step reads what the next one
needs ("ahead").
"""

from __future__ import annotations

from widerf.kernels.triton_kernels import jit, tl


@jit
def product(
    x, w, y, steps, spans, n_blocks, column_tiles, row_tiles, parts, per_pattern, ins, outs,
    BB: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    COLUMN_PARTS: tl.constexpr, TURN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add up, for a tile of BB × BH × BW pixels and BN outputs, the boxes of x times rows of w that its list names.

    ``x`` and ``y`` describe images taken apart by a stride, (batch, rows, s, columns, s·channels), ``w`` the weight as
    (ins, taps, outs), with ``TURN`` as (outs, taps·ins). A block of ``per_pattern`` outputs has a list of its own.
    """
    program = tl.program_id(0)
    n0 = program % n_blocks * BN
    rest = program // n_blocks
    part = rest % parts
    rest = rest // parts
    tile_x = rest % column_tiles
    rest = rest // column_tiles
    tile_y = rest % row_tiles
    image = rest // row_tiles * BB
    row = tile_y * BH
    column = tile_x * BW
    span = spans + 2 * (((n0 // per_pattern * parts + part) * row_tiles + tile_y) * column_tiles + tile_x)
    start = tl.load(span)
    stop = tl.load(span + 1)
    shift = tl.load(steps + 3 * start)
    place = tl.load(steps + 3 * start + 1)
    at = tl.load(steps + 3 * start + 2)
    acc = tl.zeros((BB * BH * BW, BN), dtype=tl.float32)
    for s in range(start, stop):
        box = x.load([image, row + (shift >> 16), place >> 24, column + ((shift << 16) >> 16), place & 0xFFFFFF])
        values = tl.reshape(box, (BB * BH * BW, BC))
        if TURN:
            weights = w.load([n0, (at >> 16) * ins + (at & 0xFFFF)]).T
        else:
            weights = tl.reshape(w.load([at & 0xFFFF, at >> 16, n0]), (BC, BN))
        ahead = tl.minimum(s + 1, stop - 1)
        shift = tl.load(steps + 3 * ahead)
        place = tl.load(steps + 3 * ahead + 1)
        at = tl.load(steps + 3 * ahead + 2)
        if WIDEN:
            values = values.to(tl.float32)
            weights = weights.to(tl.float32)
        acc = tl.dot(values, weights, acc, input_precision=PRECISION)
    result = tl.reshape(acc.to(y.dtype), (BB, BH, 1, BW, BN))
    y.store([image, row, part // COLUMN_PARTS, column, part % COLUMN_PARTS * outs + n0], result)


@jit
def weight_product(
    x, g, scratch, shifts, tiles, spans, n_blocks, c_blocks, column_tiles, image_tiles, ins, outs, taps, per_block,
    BB: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``scratch[s, t, c, n] = Σ x[pixel + shift, c] · g[pixel, n]`` over the s-th part of the tiles that tap t meets.

    Grid: (taps × blocks of inputs × blocks of outputs, parts). The parts are added up by a second pass, in order.
    With ``SWAP`` the transpose is computed: the tensor cores of 9.0 want 64 rows or more.
    """
    program = tl.program_id(0)
    n0 = program % n_blocks * BN
    c0 = program // n_blocks % c_blocks * BC
    t = program // (n_blocks * c_blocks)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    entry = c0 // per_block * taps + t
    shift = tl.load(shifts + 2 * entry)
    place = tl.load(shifts + 2 * entry + 1)
    dy = shift >> 16
    dx = (shift << 16) >> 16
    start = tl.load(spans + 2 * entry)
    met = tl.load(spans + 2 * entry + 1) - start
    acc = tl.zeros((BN, BC), dtype=tl.float32) if SWAP else tl.zeros((BC, BN), dtype=tl.float32)
    tile = tl.load(tiles + start + split % tl.maximum(met, 1))
    for i in range(split, met * image_tiles, splits):
        row = tile // column_tiles * BH
        column = tile % column_tiles * BW
        image = i // met * BB
        box = x.load([image, row + dy, place >> 24, column + dx, (place & 0xFFFFFF) + c0])
        values = tl.reshape(box, (BB * BH * BW, BC))
        grads = tl.reshape(g.load([image, row, 0, column, n0]), (BB * BH * BW, BN))
        tile = tl.load(tiles + start + (i + splits) % met)
        if WIDEN:
            values = values.to(tl.float32)
            grads = grads.to(tl.float32)
        if SWAP:
            acc = tl.dot(tl.trans(grads), values, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(values), grads, acc, input_precision=PRECISION)
    c = c0 + tl.arange(0, BC)
    n = n0 + tl.arange(0, BN)
    to = ((split * taps + t) * ins + c).to(tl.int64)[:, None] * outs + n[None, :]
    total = tl.trans(acc) if SWAP else acc
    tl.store(scratch + to, total, mask=(c < ins)[:, None] & (n < outs)[None, :])


@jit
def _pixels(program, column_tiles, row_tiles, BH: tl.constexpr, BW: tl.constexpr):
    """Rows and columns of the pixels of a tile of one image, and the image."""
    m = tl.arange(0, BH * BW)
    column = program % column_tiles * BW + m % BW
    row = program // column_tiles % row_tiles * BH + m // BW
    return row, column, (program // (column_tiles * row_tiles)).to(tl.int64)


@jit
def _shifted(
    x, channels, row, column, height, width, row_step, column_step, divisor_y, divisor_x, DIVIDE: tl.constexpr
):
    """Load the channels of pixels (row, column) / divisor as float32; zeros outside the image and between."""
    inside = (row >= 0) & (column >= 0)
    if DIVIDE:
        inside = inside & (row % divisor_y == 0) & (column % divisor_x == 0)
        row = row // divisor_y
        column = column // divisor_x
    inside = inside & (row < height) & (column < width)
    at = (row * row_step + column * column_step)[:, None] + channels[None, :]
    return tl.load(x + at, mask=inside[:, None], other=0.0).to(tl.float32)


@jit
def depthwise_sum(
    x, w, y, shifts, c_blocks, column_tiles, row_tiles,
    height, width, out_height, out_width, channels, per_block, stride_y, stride_x, divisor_y, divisor_x, taps,
    UNROLL: tl.constexpr, DIVIDE: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``y[b, u, v, c] = Σ_t w[t, c] · x[b, (stride (u, v) + shifts[block of c, t]) / divisor, c]``, channels_last.

    The loads of ``UNROLL`` taps, a divisor of their number, are under way at once.
    """
    program = tl.program_id(0)
    c0 = program % c_blocks * BC
    c = c0 + tl.arange(0, BC)
    row, column, image = _pixels(program // c_blocks, column_tiles, row_tiles, BH, BW)
    source = x + image * height * width * channels
    acc = tl.zeros((BH * BW, BC), dtype=tl.float32)
    first = shifts + 2 * (c0 // per_block * taps)
    for t0 in range(0, taps, UNROLL):
        for j in tl.static_range(UNROLL):
            at_y = row * stride_y + tl.load(first + 2 * (t0 + j))
            at_x = column * stride_x + tl.load(first + 2 * (t0 + j) + 1)
            values = _shifted(
                source, c, at_y, at_x, height, width, width * channels, channels, divisor_y, divisor_x, DIVIDE
            )
            acc += values * tl.load(w + (t0 + j) * channels + c).to(tl.float32)[None, :]
    to = y + image * out_height * out_width * channels + ((row * out_width + column) * channels)[:, None] + c[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=((row < out_height) & (column < out_width))[:, None])


@jit
def _tap(shifts, first, number, taps):
    """Row and column of a tap of a block; of the last one beyond it."""
    at = shifts + 2 * (first + tl.minimum(number, taps - 1))
    return tl.load(at), tl.load(at + 1)


@jit
def depthwise_weight(
    x, g, scratch, shifts, c_blocks, tiles, column_tiles, row_tiles,
    height, width, out_height, out_width, channels, per_block, stride_y, stride_x, taps,
    TAPS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``scratch[s, t, c] = Σ x[pixel + shift, c] · g[pixel, c]`` over the s-th part of the tiles, ``TAPS`` a program.

    Products are kept for each pixel of a tile and folded once, at the end; up to seven taps share a loaded gradient.
    Where fewer are left, the last one is computed more than once, and the same numbers written.
    Grid: (blocks of channels × groups of taps, parts).
    """
    program = tl.program_id(0)
    c0 = program % c_blocks * BC
    c = c0 + tl.arange(0, BC)
    t0 = program // c_blocks * TAPS
    first = c0 // per_block * taps
    rows = ()
    columns = ()
    sums = ()
    for k in tl.static_range(TAPS):
        at_y, at_x = _tap(shifts, first, t0 + k, taps)
        rows += (at_y,)
        columns += (at_x,)
        sums += (tl.zeros((BH * BW, BC), dtype=tl.float32),)
    step = width * channels
    for i in range(tl.program_id(1), tiles, tl.num_programs(1)):
        row, column, image = _pixels(i, column_tiles, row_tiles, BH, BW)
        inside = ((row < out_height) & (column < out_width))[:, None]
        at = ((row * out_width + column) * channels)[:, None] + c[None, :]
        grads = tl.load(g + image * out_height * out_width * channels + at, mask=inside, other=0.0).to(tl.float32)
        there = x + image * height * width * channels
        v = row * stride_y
        u = column * stride_x
        more = ()
        for k in tl.static_range(TAPS):
            read = _shifted(there, c, v + rows[k], u + columns[k], height, width, step, channels, 1, 1, False)
            more += (sums[k] + grads * read,)
        sums = more
    to = scratch + tl.program_id(1) * taps * channels + c
    for k in tl.static_range(TAPS):
        tl.store(to + tl.minimum(t0 + k, taps - 1) * channels, tl.sum(sums[k], axis=0))


@jit
def fold(
    scratch, out, splits, taps, ins, outs, n_blocks, c_blocks, c_step, t_step,
    BS: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``out[n, c, t] = Σ_s scratch[s, t, c, n]``, the parts in order, ``BS`` at a time.

    Steps of c and t in ``out`` are given: with 1 for c, as channels_last has it, writes are contiguous.
    """
    program = tl.program_id(0)
    n = program % n_blocks * BN + tl.arange(0, BN)
    c = program // n_blocks % c_blocks * BC + tl.arange(0, BC)
    t = program // (n_blocks * c_blocks)
    inside = (c < ins)[:, None] & (n < outs)[None, :]
    at = (t * ins + c).to(tl.int64)[:, None] * outs + n[None, :]
    step = tl.cast(taps, tl.int64) * ins * outs
    total = tl.zeros((BC, BN), dtype=tl.float32)
    for s0 in range(0, splits, BS):
        s = s0 + tl.arange(0, BS)
        live = (s < splits)[:, None, None] & inside[None, :, :]
        total += tl.sum(tl.load(scratch + (s * step)[:, None, None] + at[None, :, :], mask=live, other=0.0), axis=0)
    to = n.to(tl.int64)[None, :] * (ins * taps) + (c * c_step)[:, None] + t * t_step
    tl.store(out + to, total.to(out.dtype.element_ty), mask=inside)
