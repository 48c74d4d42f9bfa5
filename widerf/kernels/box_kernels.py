# mypy: ignore-errors
"""Device code for channels in blocks that share their taps, in Triton; launched by `widerf.kernels.cuda_boxes`.

The matrix products read boxes of the image through tensor descriptors: from compute capability 9.0 on these are copies
by the hardware (TMA), zeros outside the image included; on 8.0 the compiler makes masked loads of them. What a tile
adds up is a list of boxes, see `widerf.kernels.boxes`. All accumulate in float32 and use no atomic operation.

The numbers are checked with Triton's interpreter, the code by compiling it for sm_90 (depthwise: sm_80 too). These
kernels have **not run on a GPU**; a prototype of the products has, see docs/sparse.md.

A load of a scalar that a load of a box waits for stops the compiler's pipelining: each step reads what the next one
needs ("ahead").
"""

from __future__ import annotations

from widerf.kernels.triton_kernels import jit, tl


@jit
def product(
    x, w, y, steps, spans, n_blocks, column_tiles, row_tiles, parts, per_pattern, outs,
    BB: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    COLUMN_PARTS: tl.constexpr, TURN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add up, for a tile of BB × BH × BW pixels and BN outputs, the boxes of x times rows of w that its list names.

    ``x`` and ``y`` describe images taken apart by a stride, (batch, rows, s, columns, s·channels), ``w`` the matrix
    (taps·channels, outs), its transpose with ``TURN``. A block of ``per_pattern`` outputs has a list of its own.
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
        weights = w.load([n0, at]).T if TURN else w.load([at, n0])
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
def _shift_of(shifts, entry):
    """Row, column, row within the stride and first channel of the box of one (block, tap)."""
    shift = tl.load(shifts + 2 * entry)
    place = tl.load(shifts + 2 * entry + 1)
    return shift >> 16, (shift << 16) >> 16, place >> 24, place & 0xFFFFFF


@jit
def _add_product(
    acc, x, grads, image, row, cell, column, channel,
    PIXELS: tl.constexpr, BC: tl.constexpr, SWAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add to ``acc`` the product of a box of x, as pixels × channels, and of the gradients of the same pixels."""
    values = tl.reshape(x.load([image, row, cell, column, channel]), (PIXELS, BC))
    if WIDEN:
        values = values.to(tl.float32)
    if SWAP:
        return tl.dot(tl.trans(grads), values, acc, input_precision=PRECISION)
    return tl.dot(tl.trans(values), grads, acc, input_precision=PRECISION)


@jit
def weight_product(
    x, g, scratch, shifts, tiles, spans, n_blocks, c_blocks, column_tiles, image_tiles, ins, outs, taps, per_block,
    BB: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, TAPS: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """``scratch[s, t, c, n] = Σ x[pixel + shift, c] · g[pixel, n]`` over the s-th part of the tiles that tap t meets.

    A program computes ``TAPS`` taps, 1 to 3, that share the gradients it loads; ``spans`` are of such groups of taps.
    Where a block has fewer left, its last tap is computed more than once, and the same numbers written.
    Grid: (groups of taps × blocks of inputs × blocks of outputs, parts). The parts are added up by a second pass, in
    order. With ``SWAP`` the transpose is computed: the tensor cores of 9.0 want 64 rows or more.
    """
    program = tl.program_id(0)
    n0 = program % n_blocks * BN
    c0 = program // n_blocks % c_blocks * BC
    group = program // (n_blocks * c_blocks)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    block = c0 // per_block
    t0 = group * TAPS
    t1 = tl.minimum(t0 + 1, taps - 1)
    t2 = tl.minimum(t0 + 2, taps - 1)
    y0, x0, cell0, at0 = _shift_of(shifts, block * taps + t0)
    y1, x1, cell1, at1 = _shift_of(shifts, block * taps + t1)
    y2, x2, cell2, at2 = _shift_of(shifts, block * taps + t2)
    span = spans + 2 * (block * tl.cdiv(taps, TAPS) + group)
    start = tl.load(span)
    met = tl.load(span + 1) - start
    ROWS: tl.constexpr = BN if SWAP else BC
    COLUMNS: tl.constexpr = BC if SWAP else BN
    a0 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if TAPS > 1:
        a1 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if TAPS > 2:
        a2 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    PIXELS: tl.constexpr = BB * BH * BW
    tile = tl.load(tiles + start + split % tl.maximum(met, 1))
    for i in range(split, met * image_tiles, splits):
        row = tile // column_tiles * BH
        column = tile % column_tiles * BW
        image = i // met * BB
        grads = tl.reshape(g.load([image, row, 0, column, n0]), (PIXELS, BN))
        tile = tl.load(tiles + start + (i + splits) % met)
        if WIDEN:
            grads = grads.to(tl.float32)
        a0 = _add_product(
            a0, x, grads, image, row + y0, cell0, column + x0, at0 + c0, PIXELS, BC, SWAP, PRECISION, WIDEN
        )
        if TAPS > 1:
            a1 = _add_product(
                a1, x, grads, image, row + y1, cell1, column + x1, at1 + c0, PIXELS, BC, SWAP, PRECISION, WIDEN
            )
        if TAPS > 2:
            a2 = _add_product(
                a2, x, grads, image, row + y2, cell2, column + x2, at2 + c0, PIXELS, BC, SWAP, PRECISION, WIDEN
            )
    c = c0 + tl.arange(0, BC)
    n = n0 + tl.arange(0, BN)
    inside = (c < ins)[:, None] & (n < outs)[None, :]
    to = scratch + (split * taps * ins + c).to(tl.int64)[:, None] * outs + n[None, :]
    step = tl.cast(ins, tl.int64) * outs
    tl.store(to + t0 * step, tl.trans(a0) if SWAP else a0, mask=inside)
    if TAPS > 1:
        tl.store(to + t1 * step, tl.trans(a1) if SWAP else a1, mask=inside)
    if TAPS > 2:
        tl.store(to + t2 * step, tl.trans(a2) if SWAP else a2, mask=inside)


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
def _within(x, channels, row, column, out_height, out_width, stride_y, stride_x, row_step, column_step):
    """Addresses of the channels of strided pixels; pixels beyond the map are its last row and column."""
    v = tl.minimum(row, out_height - 1) * stride_y
    u = tl.minimum(column, out_width - 1) * stride_x
    return x + (v * row_step + u * column_step)[:, None] + channels[None, :]


@jit
def depthwise_sum(
    x, w, y, shifts, c_blocks, column_tiles, row_tiles,
    height, width, out_height, out_width, channels, per_block, stride_y, stride_x, divisor_y, divisor_x, taps,
    UNROLL: tl.constexpr, DIVIDE: tl.constexpr, PADDED: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``y[b, u, v, c] = Σ_t w[t, c] · x[b, (stride (u, v) + shifts[block of c, t]) / divisor, c]``, channels_last.

    The loads of ``UNROLL`` taps, a divisor of their number, are under way at once. With ``PADDED`` x has a border wide
    enough for all taps, and pixels of a tile beyond the map read what its last row and column do.
    """
    program = tl.program_id(0)
    c0 = program % c_blocks * BC
    c = c0 + tl.arange(0, BC)
    row, column, image = _pixels(program // c_blocks, column_tiles, row_tiles, BH, BW)
    source = x + image * height * width * channels
    acc = tl.zeros((BH * BW, BC), dtype=tl.float32)
    first = shifts + 2 * (c0 // per_block * taps)
    row_step = width * channels
    if PADDED:
        at = _within(source, c, row, column, out_height, out_width, stride_y, stride_x, row_step, channels)
    for t0 in range(0, taps, UNROLL):
        for j in tl.static_range(UNROLL):
            dy = tl.load(first + 2 * (t0 + j))
            dx = tl.load(first + 2 * (t0 + j) + 1)
            if PADDED:
                values = tl.load(at + (dy * row_step + dx * channels)).to(tl.float32)
            else:
                v = row * stride_y + dy
                u = column * stride_x + dx
                values = _shifted(source, c, v, u, height, width, row_step, channels, divisor_y, divisor_x, DIVIDE)
            acc += values * tl.load(w + (t0 + j) * channels + c).to(tl.float32)[None, :]
    to = y + image * out_height * out_width * channels + ((row * out_width + column) * channels)[:, None] + c[None, :]
    tl.store(to, acc.to(y.dtype.element_ty), mask=((row < out_height) & (column < out_width))[:, None])


@jit
def depthwise_weight(
    x, g, scratch, shifts, c_blocks, tiles, column_tiles, row_tiles,
    height, width, out_height, out_width, channels, per_block, stride_y, stride_x, taps,
    PADDED: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``scratch[s, t, c] = Σ x[pixel + shift, c] · g[pixel, c]`` over the s-th part of the tiles, three taps a program.

    Products are kept for each pixel of a tile and folded once, at the end; three taps share a loaded gradient.
    ``PADDED`` as in `depthwise_sum`.
    Grid: (blocks of channels × threes of taps, parts).
    """
    program = tl.program_id(0)
    c0 = program % c_blocks * BC
    c = c0 + tl.arange(0, BC)
    t0 = program // c_blocks * 3
    t1 = tl.minimum(t0 + 1, taps - 1)
    t2 = tl.minimum(t0 + 2, taps - 1)
    first = shifts + 2 * (c0 // per_block * taps)
    y0 = tl.load(first + 2 * t0)
    x0 = tl.load(first + 2 * t0 + 1)
    y1 = tl.load(first + 2 * t1)
    x1 = tl.load(first + 2 * t1 + 1)
    y2 = tl.load(first + 2 * t2)
    x2 = tl.load(first + 2 * t2 + 1)
    a0 = tl.zeros((BH * BW, BC), dtype=tl.float32)
    a1 = tl.zeros((BH * BW, BC), dtype=tl.float32)
    a2 = tl.zeros((BH * BW, BC), dtype=tl.float32)
    row_step = width * channels
    for i in range(tl.program_id(1), tiles, tl.num_programs(1)):
        row, column, image = _pixels(i, column_tiles, row_tiles, BH, BW)
        inside = ((row < out_height) & (column < out_width))[:, None]
        at = ((row * out_width + column) * channels)[:, None] + c[None, :]
        grads = tl.load(g + image * out_height * out_width * channels + at, mask=inside, other=0.0).to(tl.float32)
        source = x + image * height * width * channels
        if PADDED:
            there = _within(source, c, row, column, out_height, out_width, stride_y, stride_x, row_step, channels)
            a0 += grads * tl.load(there + (y0 * row_step + x0 * channels)).to(tl.float32)
            a1 += grads * tl.load(there + (y1 * row_step + x1 * channels)).to(tl.float32)
            a2 += grads * tl.load(there + (y2 * row_step + x2 * channels)).to(tl.float32)
        else:
            v = row * stride_y
            u = column * stride_x
            a0 += grads * _shifted(source, c, v + y0, u + x0, height, width, row_step, channels, 1, 1, False)
            a1 += grads * _shifted(source, c, v + y1, u + x1, height, width, row_step, channels, 1, 1, False)
            a2 += grads * _shifted(source, c, v + y2, u + x2, height, width, row_step, channels, 1, 1, False)
    to = scratch + tl.program_id(1) * taps * channels + c
    tl.store(to + t0 * channels, tl.sum(a0, axis=0))
    tl.store(to + t1 * channels, tl.sum(a1, axis=0), mask=(c >= 0) & (t0 + 1 < taps))
    tl.store(to + t2 * channels, tl.sum(a2, axis=0), mask=(c >= 0) & (t0 + 2 < taps))
