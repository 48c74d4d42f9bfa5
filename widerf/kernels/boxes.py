"""A sparse convolution as boxes of its image: which box times which rows of the weight a tile adds up. Integers only.

Where neighbouring channels share their taps, a tap of such a block of channels is the block's image, shifted. A *tile*
is (images, rows, columns) of output pixels; its work is a list of *steps*, each a shifted box of the image times rows
of the weight. Boxes that lie wholly outside the image are left out: on small maps that is most of a wide window.

A stride takes the image apart: (batch, rows, columns, channels) is read as (batch, rows/s, s, columns/s, s·channels),
which costs nothing. Then a tap of a strided layer is one box too, and so is one of its transpose, whose output is
taken apart instead, into one *part* for each row and column of a stride. `widerf.kernels.box_kernels` computes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.int64]]
WIDTHS = (
    256,
    128,
    64,
    32,
    16,
)  # channels of a block that share their taps, best first; a tensor core takes 16 at least
FURTHEST = 1 << 15  # taps are packed into 16 bits an axis


class Tile(NamedTuple):
    """Output pixels that one program computes."""

    images: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Grid:
    """Tiles of (rows, columns) that cover a map."""

    tile: Tile
    rows: int  # tiles along each axis
    columns: int
    images: int

    @property
    def count(self) -> int:
        """Number of tiles."""
        return self.rows * self.columns * self.images


def ceil_div(a: int, b: int) -> int:
    """Return a/b, rounded up."""
    return -(-a // b)


def power(n: int) -> int:
    """Return the least power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache(maxsize=512)
def cover(batch: int, rows: int, columns: int, pixels: int) -> Grid:
    """Cover ``batch`` maps by tiles of ``pixels`` pixels, a power of two, with the least waste, then the squarest.

    Example:
        >>> cover(128, 7, 7, 128).tile
        Tile(images=128, rows=1, columns=1)
        >>> cover(1, 20, 20, 128).tile
        Tile(images=1, rows=32, columns=4)
    """
    sides = [1 << i for i in range(7)]
    grids = [
        Grid(Tile(pixels // (h * w), h, w), ceil_div(rows, h), ceil_div(columns, w), ceil_div(batch, pixels // (h * w)))
        for w in sides
        for h in sides
        if 1 <= pixels // (h * w) <= 256
    ]
    fitting = [g for g in grids if g.tile.images <= power(batch)] or grids
    return min(fitting, key=lambda g: (g.count, abs(g.tile.columns - g.tile.rows), g.tile.images))


def block_of(shifts: np.ndarray[Any, Any]) -> int:
    """Return the widest of `WIDTHS` by which blocks of neighbouring channels share their taps; 0 if none does.

    Args:
        shifts: (channels, taps, 2).

    Example:
        >>> block_of(np.repeat(np.arange(6).reshape(3, 1, 2), 32, axis=0))
        32
    """
    for width in WIDTHS:
        if len(shifts) % width == 0:
            blocks = shifts.reshape(len(shifts) // width, width, -1)
            if (blocks == blocks[:, :1]).all():
                return width
    return 0


def _touches(first: Integers, tiles: int, size: int, length: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Say whether tile i of ``size`` pixels, shifted by ``first``, meets an axis of ``length``: (shifts, tiles)."""
    start = first[:, None] + np.arange(tiles) * size
    return np.asarray((start < length) & (start + size > 0))


class Steps(NamedTuple):
    """The work of all tiles.

    A row of ``steps`` is (row · 2¹⁶ | column of the box's shift, row within a stride · 2²⁴ | first channel of the box,
    tap · 2¹⁶ | first channel of the weight); a row of ``spans`` is (first, last + 1) of the steps of one
    (pattern, part, row tile, column tile).
    """

    steps: np.ndarray[Any, np.dtype[np.int32]]
    spans: np.ndarray[Any, np.dtype[np.int32]]
    parts: int


def _pack(high: Any, low: Any, bits: int) -> Integers:
    return (np.asarray(high, np.int64) << bits) | (np.asarray(low, np.int64) & ((1 << bits) - 1))


def _lists(rows: Integers, live: np.ndarray[Any, np.dtype[np.bool_]], start: int) -> tuple[Integers, Integers]:
    """Return the steps of all tiles, equal lists once, and their spans: ``live`` is (tiles, steps)."""
    if not live.shape[1]:
        return rows, np.full((len(live), 2), start, np.int64)
    kinds, which = np.unique(live, axis=0, return_inverse=True)
    ends = np.cumsum(kinds.sum(1)) + start
    spans = np.stack([ends - kinds.sum(1), ends], 1)[which.reshape(-1)]
    return np.concatenate([rows[kind] for kind in kinds]), spans


def _taps_of_part(shifts: Integers, stride: Sequence[int], part: tuple[int, int], transposed: bool) -> Any:
    """Return, for the taps that this part takes: their numbers, the shift in strided cells, and the cell within.

    Forward, tap d reads cell d // s, at d mod s within. Backward, pixel s·v + p got tap d from output (s·v + p − d)/s.
    """
    step = np.asarray(stride)
    if not transposed:
        return np.arange(len(shifts)), shifts // step, shifts % step
    moved = np.asarray(part) - shifts
    taken = np.flatnonzero((moved % step == 0).all(1))
    return taken, moved[taken] // step, np.zeros((len(taken), 2), np.int64)


def _all_steps(
    shifts: Integers, stride: Sequence[int], part: tuple[int, int], chunks: Integers, channels: int, transposed: bool
) -> tuple[Integers, Integers]:
    """Return the steps of a tile that meets every box, as rows of `Steps`, and their shifts; ``shifts`` by chunk."""
    taps, rows, moves = [], [], []
    for own, first in zip(shifts, chunks, strict=True):
        tap, cell, within = _taps_of_part(own, stride, part, transposed)
        place = _pack(within[:, 0], within[:, 1] * channels + first, 24)
        taps.append(tap)
        rows.append(np.stack((_pack(cell[:, 0], cell[:, 1], 16), place, _pack(tap, first, 16)), 1))
        moves.append(cell)
    order = np.argsort(np.concatenate(taps), kind="stable")  # tap by tap, for the cache
    return np.concatenate(rows)[order], np.concatenate(moves)[order]


def make_steps(
    shifts: np.ndarray[Any, Any],
    stride: Sequence[int],
    size: Sequence[int],
    grid: Grid,
    channels: int,
    chunk: int,
    transposed: bool,
) -> Steps:
    """List the steps of the layer, or with ``transposed`` of the gradient of its input.

    Args:
        shifts: (blocks of channels, taps, 2); of the input's channels, which the transpose writes.
        stride: of the layer.
        size: rows and columns of the image that is read, in cells of the stride that takes it apart.
        grid: tiles of the output, in cells of the stride that takes it apart.
        channels: of the image that is read.
        chunk: channels of one step.
        transposed: whether the image that is read is the output's gradient.
    """
    shifts = np.asarray(shifts, np.int64)
    parts = [(y, x) for y in range(stride[0]) for x in range(stride[1])] if transposed else [(0, 0)]
    chunks = np.arange(0, channels, chunk)
    steps: list[Integers] = []
    spans: list[Integers] = []
    done = 0
    for pattern in range(len(shifts) if transposed else 1):
        for part in parts:
            # Forward, a chunk of channels has the taps of its own block; backward, all channels have the output's.
            blocks = [pattern] * len(chunks) if transposed else chunks // (channels // len(shifts))
            row, move = _all_steps(shifts[blocks], stride, part, chunks, channels, transposed)
            y = _touches(move[:, 0], grid.rows, grid.tile.rows, size[0])
            x = _touches(move[:, 1], grid.columns, grid.tile.columns, size[1])
            live = (y[:, :, None] & x[:, None, :]).reshape(len(row), grid.rows * grid.columns).T
            found, span = _lists(row, live, done)
            done += len(found)
            steps.append(found)
            spans.append(span)
    steps.append(np.zeros((1, 3), np.int64))  # read ahead, never used
    packed = np.concatenate(steps).astype(np.uint32).view(np.int32)
    return Steps(packed, np.concatenate(spans).astype(np.int32), len(parts))


class Reads(NamedTuple):
    """What a weight gradient reads: of each (block, tap) the shift, as in `Steps`, and the tiles that it meets."""

    shifts: np.ndarray[Any, np.dtype[np.int32]]  # (blocks · taps, 2)
    tiles: np.ndarray[Any, np.dtype[np.int32]]
    spans: np.ndarray[Any, np.dtype[np.int32]]  # (blocks · taps, 2): first and last + 1 of its ``tiles``


def make_reads(
    shifts: np.ndarray[Any, Any], stride: Sequence[int], size: Sequence[int], grid: Grid, channels: int
) -> Reads:
    """List what each tap of each block of channels reads; arguments as in `make_steps`."""
    flat = np.asarray(shifts, np.int64).reshape(-1, 2)
    _, cell, within = _taps_of_part(flat, stride, (0, 0), False)
    y = _touches(cell[:, 0], grid.rows, grid.tile.rows, size[0])
    x = _touches(cell[:, 1], grid.columns, grid.tile.columns, size[1])
    live = (y[:, :, None] & x[:, None, :]).reshape(len(flat), grid.rows * grid.columns)
    tiles, spans = _lists(np.arange(live.shape[1]), live, 0)
    packed = np.stack([_pack(cell[:, 0], cell[:, 1], 16), _pack(within[:, 0], within[:, 1] * channels, 24)], 1)
    return Reads(packed.astype(np.uint32).view(np.int32), np.append(tiles, 0).astype(np.int32), spans.astype(np.int32))


def share_of_work(shifts: np.ndarray[Any, Any], batch: int, size: Sequence[int], pixels: int = 128) -> float:
    """Return the share of all (tile, tap) pairs of a layer of stride 1 whose box meets the image.

    Example:
        >>> corners = np.array([[[-7, -7], [0, 0], [7, 7]]])
        >>> round(share_of_work(corners, 128, (7, 7)), 2)
        0.33
    """
    grid = cover(batch, size[0], size[1], pixels)
    live = make_reads(shifts, (1, 1), size, grid, 16).spans
    return float((live[:, 1] - live[:, 0]).mean()) / (grid.rows * grid.columns)
