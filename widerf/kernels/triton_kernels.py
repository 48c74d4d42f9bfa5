# mypy: ignore-errors
"""Device code of the CUDA path, in Triton: the maps of ``csrc/sparse_conv.h``, launched by `widerf.kernels.cuda`.

All kernels compute on images through their strides, NCHW and channels_last alike, accumulate in float32 and use no
atomic operation: the same input gives the same bits. ``CHANNELS_LAST`` turns the tiles, so that neighbouring threads
read neighbouring addresses: pixels in NCHW, channels in channels_last. With ``BIG`` the addresses are 64-bit.

The numbers are checked with Triton's interpreter, the code by compiling it for sm_80 and sm_90. On one H100 20 random
layers were right in all maps but the depthwise weight gradient, mended since, and took 7 to 24 times cuDNN's 3×3.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # an installation of PyTorch without CUDA: nothing here is called then, but imported by collectors
    tl = None

    def jit(function):
        """Leave the function as it is."""
        return function


@jit
def _across(values, CHANNELS_LAST: tl.constexpr):
    """Lay the pixels of a tile out: down in channels_last, along in NCHW."""
    return values[:, None] if CHANNELS_LAST else values[None, :]


@jit
def _unit(pixels, height, width):
    """Split flat indices of units into (image, row, column)."""
    image = pixels // (height * width)
    rest = pixels - image * (height * width)
    row = rest // width
    return image, row, rest - row * width


@jit
def _arange(start, N: tl.constexpr, BIG: tl.constexpr):
    """Return start … start + N − 1, in 64 bits if addresses need them."""
    numbers = tl.arange(0, N)
    if BIG:
        numbers = numbers.to(tl.int64)
    return start + numbers


@jit
def _inside(row, column, height, width, divisor_y, divisor_x, DIVIDE: tl.constexpr):
    """Divide positions by the stride of the layer they go back through; say which are pixels of the image."""
    if DIVIDE:
        fits = (row % divisor_y == 0) & (column % divisor_x == 0)
        row = row // divisor_y
        column = column // divisor_x
        inside = fits & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    else:
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return row, column, inside


@jit
def _tap(table, k0, channels, taps, base, step, BK: tl.constexpr, UNIFORM: tl.constexpr, BIG: tl.constexpr):
    """Channel within the group and shift of the elements k0 … k0 + BK of the reduction, which runs tap by tap.

    ``UNIFORM`` promises that these channels belong to one tap and share its shift, which then is a scalar.
    """
    if UNIFORM:
        t = k0 // channels
        channel = _arange(k0 - t * channels, BK, BIG)
        at = table + 2 * (base + (k0 - t * channels) * step + t)
        known = channel < channels
        dy = tl.load(at)
        dx = tl.load(at + 1)
    else:
        k = _arange(k0, BK, BIG)
        t = k // channels
        channel = k - t * channels
        known = k < channels * taps
        at = table + 2 * (base + channel * step + t)
        dy = tl.load(at, mask=known, other=0)
        dx = tl.load(at + 1, mask=known, other=0)
    return channel, dy, dx, known


@jit
def implicit_gemm(
    x, w, y, table, blocks, n_blocks,
    pixels, channels, taps, step,
    height, width, out_height, out_width, stride_y, stride_x, divisor_y, divisor_x,
    xb, xc, xh, xw, yb, yc, yh, yw,
    CHANNELS_LAST: tl.constexpr, UNIFORM: tl.constexpr, DIVIDE: tl.constexpr, BIG: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[b, n, u, v] = Σ_{c, t} w[n, t, c] · x[b, first + c, (stride (u, v) + table[base + c·step + t]) / divisor]``.

    A matrix product of a tile of output pixels (BM), a block of output channels (BN) and all (tap, channel) pairs, the
    image gathered on the way; positions that the divisor does not divide, or outside the image, count as zero. A row of
    ``blocks`` is (first output channel, their number, group, base), ``first`` the group's first channel.
    Forward: step = taps, divisor 1. Gradient of the input, of channels that share their taps: stride 1, the layer's
    stride as divisor, step 0.
    """
    program = tl.program_id(0)
    entry = blocks + 4 * (program % n_blocks)
    n0 = tl.load(entry)
    first = tl.load(entry + 2) * channels
    base = tl.load(entry + 3)
    tile = program // n_blocks
    if BIG:
        tile = tile.to(tl.int64)
    m = tile * BM + tl.arange(0, BM)
    n = _arange(n0, BN, BIG)
    wanted = n < n0 + tl.load(entry + 1)
    image, u, v = _unit(m, out_height, out_width)
    live = _across(m < pixels, CHANNELS_LAST)
    here = _across(image * xb, CHANNELS_LAST)
    row0 = _across(u * stride_y, CHANNELS_LAST)
    column0 = _across(v * stride_x, CHANNELS_LAST)
    acc = tl.zeros((BM, BN), dtype=tl.float32) if CHANNELS_LAST else tl.zeros((BN, BM), dtype=tl.float32)
    for k0 in range(0, channels * taps, BK):
        channel, dy, dx, known = _tap(table, k0, channels, taps, base, step, BK, UNIFORM, BIG)
        if not UNIFORM:
            dy = _across(dy, not CHANNELS_LAST)
            dx = _across(dx, not CHANNELS_LAST)
        row, column, inside = _inside(row0 + dy, column0 + dx, height, width, divisor_y, divisor_x, DIVIDE)
        at = here + row * xh + column * xw + _across((first + channel) * xc, not CHANNELS_LAST)
        inside = inside & live
        if not UNIFORM:
            inside = inside & _across(known, not CHANNELS_LAST)
        values = tl.load(x + at, mask=inside, other=0.0)
        k = k0 + tl.arange(0, BK)
        if CHANNELS_LAST:
            weights = tl.load(
                w + n[None, :] * (channels * taps) + k[:, None], mask=wanted[None, :] & known[:, None], other=0.0
            )
        else:
            weights = tl.load(
                w + n[:, None] * (channels * taps) + k[None, :], mask=wanted[:, None] & known[None, :], other=0.0
            )
        if WIDEN:
            values = values.to(tl.float32)
            weights = weights.to(tl.float32)
        if CHANNELS_LAST:
            acc = tl.dot(values, weights, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(weights, values, acc, input_precision=PRECISION)
    to = _across(image * yb + u * yh + v * yw, CHANNELS_LAST) + _across(n * yc, not CHANNELS_LAST)
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=live & _across(wanted, not CHANNELS_LAST))


@jit
def weight_gemm(
    x, g, scratch, table,
    pixels, chunk, channels, taps, k_blocks, n_per_group, n_blocks,
    height, width, out_height, out_width, stride_y, stride_x,
    xb, xc, xh, xw, gb, gc, gh, gw,
    CHANNELS_LAST: tl.constexpr, UNIFORM: tl.constexpr, BIG: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``scratch[s, n, t, c] = Σ over the s-th chunk of pixels of g[b, n, u, v] · x[b, c, stride (u, v) + shift]``.

    Grid: (blocks of (tap, channel) pairs × blocks of output channels, group, chunk of pixels). The chunks are added up
    by a second pass, in a fixed order.
    """
    group = tl.program_id(1)
    split = tl.program_id(2)
    k0 = tl.program_id(0) % k_blocks * BK
    j = _arange(tl.program_id(0) // k_blocks * BN, BN, BIG)
    wanted = j < n_per_group
    n = group * n_per_group + j
    channel, dy, dx, known = _tap(table, k0, channels, taps, group * channels * taps, taps, BK, UNIFORM, BIG)
    if not UNIFORM:
        dy = _across(dy, not CHANNELS_LAST)
        dx = _across(dx, not CHANNELS_LAST)
    plane = _across((group * channels + channel) * xc, not CHANNELS_LAST)
    acc = tl.zeros((BN, BK), dtype=tl.float32)
    if BIG:
        split = split.to(tl.int64)
    end = tl.minimum(split * chunk + chunk, pixels)
    for m0 in range(split * chunk, end, BM):
        m = m0 + tl.arange(0, BM)
        image, u, v = _unit(m, out_height, out_width)
        live = _across(m < end, CHANNELS_LAST)
        row = _across(u * stride_y, CHANNELS_LAST) + dy
        column = _across(v * stride_x, CHANNELS_LAST) + dx
        row, column, inside = _inside(row, column, height, width, 1, 1, False)
        inside = inside & live & _across(known, not CHANNELS_LAST)
        values = tl.load(
            x + _across(image * xb, CHANNELS_LAST) + row * xh + column * xw + plane, mask=inside, other=0.0
        )
        at = _across(image * gb + u * gh + v * gw, CHANNELS_LAST) + _across(n * gc, not CHANNELS_LAST)
        grads = tl.load(g + at, mask=live & _across(wanted, not CHANNELS_LAST), other=0.0)
        if WIDEN:
            values = values.to(tl.float32)
            grads = grads.to(tl.float32)
        if CHANNELS_LAST:
            acc = tl.dot(tl.trans(grads), values, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(grads, tl.trans(values), acc, input_precision=PRECISION)
    k = k0 + tl.arange(0, BK)
    to = ((split * tl.num_programs(1) * n_per_group + n) * (channels * taps))[:, None] + k[None, :]
    tl.store(scratch + to, acc, mask=wanted[:, None] & known[None, :])


@jit
def tap_sum(
    x, w, y, table, rows, n_rows, row_blocks,
    pixels, taps,
    height, width, out_height, out_width, stride_y, stride_x, divisor_y, divisor_x,
    xb, xc, xt, xh, xw, yb, yc, yh, yw,
    CHANNELS_LAST: tl.constexpr, WEIGHTED: tl.constexpr, DIVIDE: tl.constexpr, BIG: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``y[b, rows[j], u, v] = Σ_t w[j, t] · x[b, (j, t), (stride (u, v) + table[j, t]) / divisor]``, by channel.

    A depthwise layer forward (divisor 1) and backward (stride 1, table negated, w the same). Without weights it folds
    the columns of a wider layer's gradient back into the image: ``x`` then has one plane per (channel, tap).
    """
    program = tl.program_id(0)
    tile = program // row_blocks
    j = _arange(program % row_blocks * BC, BC, BIG)
    known = j < n_rows
    if BIG:
        tile = tile.to(tl.int64)
    m = tile * BM + tl.arange(0, BM)
    image, u, v = _unit(m, out_height, out_width)
    live = _across(m < pixels, CHANNELS_LAST) & _across(known, not CHANNELS_LAST)
    here = _across(image * xb, CHANNELS_LAST) + _across(j * xc, not CHANNELS_LAST)
    row0 = _across(u * stride_y, CHANNELS_LAST)
    column0 = _across(v * stride_x, CHANNELS_LAST)
    acc = tl.zeros((BM, BC), dtype=tl.float32) if CHANNELS_LAST else tl.zeros((BC, BM), dtype=tl.float32)
    for t in range(0, taps):
        at = j * taps + t
        dy = _across(tl.load(table + 2 * at, mask=known, other=0), not CHANNELS_LAST)
        dx = _across(tl.load(table + 2 * at + 1, mask=known, other=0), not CHANNELS_LAST)
        row, column, inside = _inside(row0 + dy, column0 + dx, height, width, divisor_y, divisor_x, DIVIDE)
        values = tl.load(x + here + t * xt + row * xh + column * xw, mask=inside & live, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= _across(tl.load(w + at, mask=known, other=0.0).to(tl.float32), not CHANNELS_LAST)
        acc += values
    channel = tl.load(rows + j, mask=known, other=0)
    if BIG:
        channel = channel.to(tl.int64)
    to = _across(image * yb + u * yh + v * yw, CHANNELS_LAST) + _across(channel * yc, not CHANNELS_LAST)
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=live)


@jit
def tap_weight(
    x, g, scratch, table, channels, row_blocks,
    pixels, chunk, taps,
    height, width, out_height, out_width, stride_y, stride_x,
    xb, xc, xh, xw, gb, gc, gh, gw,
    CHANNELS_LAST: tl.constexpr, BIG: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``scratch[s, c, t] = Σ over the s-th chunk of pixels of g[b, c, u, v] · x[b, c, stride (u, v) + table[c, t]]``.

    The weight gradient of a depthwise layer. Grid: (blocks of channels × taps, chunk of pixels).
    """
    split = tl.program_id(1)
    t = tl.program_id(0) // row_blocks
    c = _arange(tl.program_id(0) % row_blocks * BC, BC, BIG)
    known = c < channels
    at = c * taps + t
    dy = _across(tl.load(table + 2 * at, mask=known, other=0), not CHANNELS_LAST)
    dx = _across(tl.load(table + 2 * at + 1, mask=known, other=0), not CHANNELS_LAST)
    if BIG:
        split = split.to(tl.int64)
    acc = tl.zeros((BM, BC), dtype=tl.float32) if CHANNELS_LAST else tl.zeros((BC, BM), dtype=tl.float32)
    end = tl.minimum(split * chunk + chunk, pixels)
    for m0 in range(split * chunk, end, BM):
        m = m0 + tl.arange(0, BM)
        image, u, v = _unit(m, out_height, out_width)
        live = _across(m < end, CHANNELS_LAST) & _across(known, not CHANNELS_LAST)
        row = _across(u * stride_y, CHANNELS_LAST) + dy
        column = _across(v * stride_x, CHANNELS_LAST) + dx
        row, column, inside = _inside(row, column, height, width, 1, 1, False)
        plane = _across(c * xc, not CHANNELS_LAST)
        place = _across(image * xb, CHANNELS_LAST) + row * xh + column * xw + plane
        values = tl.load(x + place, mask=inside & live, other=0.0)
        where = _across(image * gb + u * gh + v * gw, CHANNELS_LAST) + _across(c * gc, not CHANNELS_LAST)
        acc += values.to(tl.float32) * tl.load(g + where, mask=live, other=0.0).to(tl.float32)
    total = tl.sum(acc, axis=0) if CHANNELS_LAST else tl.sum(acc, axis=1)
    tl.store(scratch + split * channels * taps + at, total, mask=known)
