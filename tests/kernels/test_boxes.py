"""Lists of boxes, carried out number by number, give the convolution and its transposes; none of them is idle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from widerf.kernels import boxes, configurations
from widerf.kernels.boxes import Grid, ceil_div

Numbers = np.ndarray[Any, Any]
CHUNK, WIDTH = 2, 4  # channels of a step, and of a block that shares its taps


def problems() -> Any:
    """(shifts, stride, size, batch, pixels of a tile, seed)"""
    shift = st.tuples(st.integers(-9, 9), st.integers(-9, 9))
    block = st.lists(shift, min_size=3, max_size=3)
    return st.tuples(
        st.lists(block, min_size=1, max_size=2).map(np.array),
        st.tuples(st.integers(1, 3), st.integers(1, 2)),
        st.tuples(st.integers(1, 7), st.integers(1, 7)),
        st.integers(1, 3),
        st.sampled_from((4, 8, 16)),
        st.integers(0, 99),
    )


def decoded(step: Numbers) -> tuple[int, int, int, int, int]:
    """(rows, columns, row within the stride, first channel, tap and first channel of the weight) of a step."""
    shift, place, at = (int(n) for n in step)
    return shift >> 16, ((shift & 0xFFFF) ^ 0x8000) - 0x8000, place >> 24, place & 0xFFFFFF, at


def tiles_of(grid: Grid) -> list[tuple[int, int, int, list[tuple[int, int, int]]]]:
    """(number of the tile on the map, first row, first column, its (image, row, column)) of all tiles."""
    t = grid.tile
    return [
        (v * grid.columns + u, v * t.rows, u * t.columns,
         [(b * t.images + i, j, k) for i in range(t.images) for j in range(t.rows) for k in range(t.columns)])
        for b in range(grid.images) for v in range(grid.rows) for u in range(grid.columns)
    ]  # fmt: skip


def carried_out(steps: boxes.Steps, list_of: int, grid: Grid, x: Numbers, w: Numbers, size: tuple[int, int]) -> Numbers:
    """What one (pattern, part) adds up to; x is (batch, rows, s, columns, s·channels), w (taps, channels)."""
    y = np.zeros((len(x), *size), np.int64)
    for number, row, column, pixels in tiles_of(grid):
        start, stop = steps.spans[list_of * grid.rows * grid.columns + number]
        for step in steps.steps[start:stop]:
            dy, dx, within, channel, at = decoded(step)
            met = False
            for b, j, k in pixels:
                r, c = row + j + dy, column + k + dx
                if 0 <= r < x.shape[1] and 0 <= c < x.shape[3]:
                    met = True
                    if b < len(x) and row + j < size[0] and column + k < size[1]:
                        values, first = x[b, r, within, c, channel : channel + CHUNK], at & 0xFFFF
                        y[b, row + j, column + k] += values @ w[at >> 16, first : first + CHUNK]
            assert met, "a step whose box lies outside the image"
    return y


@given(problems())
@settings(max_examples=40, deadline=None)
def test_the_steps_of_a_layer_are_its_convolution(problem: Any) -> None:
    shifts, (sy, sx), (h, w), batch, pixels, seed = problem
    channels = WIDTH * len(shifts)
    draw = np.random.default_rng(seed)
    x = draw.integers(-9, 9, (batch, h * sy, w * sx, channels))
    weight = draw.integers(-9, 9, (3, channels))
    grid = boxes.cover(batch, h, w, pixels)
    steps = boxes.make_steps(shifts, (sy, sx), (h, w), grid, channels, CHUNK, False)
    found = carried_out(steps, 0, grid, x.reshape(batch, h, sy, w, sx * channels), weight, (h, w))
    wanted = np.zeros_like(found)
    for v, u, t, c in np.ndindex(h, w, 3, channels):
        r, q = sy * v + shifts[c // WIDTH, t, 0], sx * u + shifts[c // WIDTH, t, 1]
        if 0 <= r < h * sy and 0 <= q < w * sx:
            wanted[:, v, u] += weight[t, c] * x[:, r, q, c]
    assert (found == wanted).all()


@given(problems())
@settings(max_examples=40, deadline=None)
def test_the_steps_of_the_transpose_send_every_output_back(problem: Any) -> None:
    shifts, (sy, sx), (h, w), batch, pixels, seed = problem
    draw = np.random.default_rng(seed)
    grad = draw.integers(-9, 9, (batch, h, w, WIDTH))
    weight = draw.integers(-9, 9, (3, WIDTH))  # (taps, outputs) of one input channel a block
    grid = boxes.cover(batch, h, w, pixels)
    steps = boxes.make_steps(shifts, (sy, sx), (h, w), grid, WIDTH, CHUNK, True)
    assert steps.parts == sy * sx
    for block in range(len(shifts)):
        found = np.zeros((batch, h * sy, w * sx), np.int64)
        for part in range(sy * sx):
            found[:, part // sx :: sy, part % sx :: sx] = carried_out(
                steps, block * steps.parts + part, grid, grad.reshape(batch, h, 1, w, WIDTH), weight, (h, w)
            )
        wanted = np.zeros_like(found)
        for v, u, t in np.ndindex(h, w, 3):
            r, q = sy * v + shifts[block, t, 0], sx * u + shifts[block, t, 1]
            if 0 <= r < h * sy and 0 <= q < w * sx:
                wanted[:, r, q] += grad[:, v, u] @ weight[t]
        assert (found == wanted).all()


@given(problems())
@settings(max_examples=40, deadline=None)
def test_a_weight_gradient_reads_the_tiles_whose_boxes_meet_the_image_and_no_others(problem: Any) -> None:
    shifts, stride, (h, w), batch, pixels, _ = problem
    grid = boxes.cover(batch, h, w, pixels)
    reads = boxes.make_reads(shifts, stride, (h, w), grid, WIDTH)
    for entry, tap in enumerate(shifts.reshape(-1, 2)):
        dy, dx, within, channel, _ = decoded(np.append(reads.shifts[entry], 0))
        assert (stride[0] * dy + within, stride[1] * dx + channel // WIDTH) == tuple(tap)
        start, stop = reads.spans[entry]
        met = {
            number
            for number, row, column, cells in tiles_of(grid)
            if any(0 <= row + j + dy < h and 0 <= column + k + dx < w for _, j, k in cells)
        }
        assert sorted(reads.tiles[start:stop]) == sorted(met)


@given(st.integers(1, 200), st.integers(1, 70), st.integers(1, 70), st.sampled_from((16, 64, 128, 256)))
def test_tiles_cover_the_map_once(batch: int, rows: int, columns: int, pixels: int) -> None:
    grid = boxes.cover(batch, rows, columns, pixels)
    tile = grid.tile
    assert tile.images * tile.rows * tile.columns == pixels
    assert max(tile) <= 256  # the longest side of a box that the hardware copies
    for tiles, side, length in zip((grid.images, grid.rows, grid.columns), tile, (batch, rows, columns), strict=True):
        assert tiles == ceil_div(length, side)


@pytest.mark.parametrize(("side", "extent", "share"), [(7, 7, 0.58), (7, 15, 0.22), (14, 15, 0.6), (56, 15, 1.0)])
def test_on_small_maps_most_boxes_of_a_wide_window_are_left_out(side: int, extent: int, share: float) -> None:
    draw = np.random.default_rng(0)
    cells = [draw.permutation(extent**2)[:9] for _ in range(30)]
    taps = [np.stack([c // extent, c % extent], 1) - extent // 2 for c in cells]
    found = np.mean([boxes.share_of_work(t[None], 128, (side, side)) for t in taps])
    assert found == pytest.approx(share, abs=0.04)


def test_the_widest_block_of_equal_taps_is_found() -> None:
    taps = np.arange(24).reshape(4, 3, 2)
    for width, block in ((64, 64), (48, 16), (32, 32), (16, 16), (8, 0), (80, 16)):
        assert boxes.block_of(taps.repeat(width, axis=0)) == block
    assert boxes.block_of(taps[[0, 0, 1, 1]].repeat(32, axis=0)) == 64
    assert boxes.block_of(taps[[0, 0, 1, 1]].repeat(64, axis=0)) == 128
    assert boxes.block_of(taps[[0, 0, 0]].repeat(64, axis=0)) == 64  # a power of two
    uneven = taps.repeat([16, 48, 64, 64], axis=0)
    assert boxes.block_of(uneven) == 16


@pytest.mark.parametrize("numbers", ["16-bit", "tf32", "float32"])
@pytest.mark.parametrize("name", ["forward", "grad_input", "grad_weight"])
def test_configurations_fit_a_multiprocessor(name: str, numbers: str) -> None:
    width = 2 if numbers == "16-bit" else 4
    for outs in (16, 64, 512):
        shape = configurations.Shape(name, numbers, 64, outs, 128, 784, outs)
        for c in configurations.candidates(shape):
            step = c.pixels * (c.ins + c.outs) if name == "grad_weight" else c.ins * (c.pixels + c.outs)
            assert step * width * (c.stages - 1) <= 227 * 1024, c
            assert min(c.outs, c.ins) >= 16 and c.pixels >= 16


def test_few_pixels_get_smaller_tiles() -> None:
    many = configurations.from_table(configurations.Shape("forward", "16-bit", 64, 64, 128, 3136, 64))
    few = configurations.from_table(configurations.Shape("forward", "16-bit", 64, 64, 1, 196, 64))
    assert (many.pixels, few.pixels) == (128, 64)
