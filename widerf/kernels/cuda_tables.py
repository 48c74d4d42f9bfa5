"""What the CUDA kernels of the sparse convolution read beside the tensors: worked out once per layer and device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widerf.kernels.boxes import block_of

REDUCTION = 32  # (tap, channel) pairs of one step of the matrix product
WIDE = 16  # fewest channels of equal taps whose input gradient is one matrix product: the least width of a tensor core


def width_of_tile(columns: int) -> int:
    """Return how many output channels a tile of a matrix product has, of ``columns``."""
    return next((n for n in (16, 32) if columns <= n), 64)


@dataclass(frozen=True)
class Shifts:
    """Where the taps of a layer read: integers (channels, taps, 2) as bytes, which caches know it by."""

    data: bytes
    channels: int
    taps: int

    @functools.cached_property
    def table(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The integers, (channels, taps, 2)."""
        return np.frombuffer(self.data, np.int32).reshape(self.channels, self.taps, 2)

    @functools.cached_property
    def block(self) -> int:
        """How many neighbouring channels share their taps, see `widerf.kernels.boxes.block_of`; 0: too few."""
        return block_of(self.table)

    @functools.cached_property
    def farthest(self) -> int:
        """The greatest shift along an axis."""
        return int(np.abs(self.table).max(initial=0))

    @property
    def by_block(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The integers of each block, (blocks, taps, 2)."""
        return self.table[:: self.block]


def read_shifts(shifts: Any) -> Shifts:
    """Return the shifts that an integer tensor (channels, taps, 2) or nested sequence holds; `Shifts` as they are."""
    if isinstance(shifts, Shifts):
        return shifts
    integers = torch.as_tensor(shifts).to("cpu", torch.int32).contiguous()
    return Shifts(integers.numpy().tobytes(), int(integers.shape[0]), int(integers.shape[1]))


@dataclass(frozen=True)
class Tables:
    """What the kernels read beside the tensors, on the device: shifts, and which channels go together.

    A row of ``forward``, ``wide`` and ``columns`` is one block of output channels of `triton_kernels.implicit_gemm`.
    """

    table: Tensor  # (channels, taps, 2)
    negated: Tensor
    rows: Tensor  # 0 … channels − 1
    uniform: int  # 32 or 64: blocks of that many channels share their taps everywhere; 0: they do not
    forward: Tensor
    wide: Tensor  # channels in runs of at least WIDE with equal taps
    widest: int  # of these runs
    runs: Tensor  # (runs, taps, 2), negated
    narrow: Tensor  # numbers of the other channels
    columns: Tensor  # their (channel, tap) pairs
    narrow_table: Tensor  # (narrow, taps, 2), negated
    zero: Tensor  # the shift of a 1×1 convolution


def _blocks(segments: Sequence[tuple[int, int, int, int]], step: int, device: torch.device) -> Tensor:
    """Cut (start, stop, group, base) into blocks of at most ``step`` output channels."""
    rows = [(n, min(step, stop - n), g, base) for start, stop, g, base in segments for n in range(start, stop, step)]
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 4)


def _segments(table: np.ndarray[Any, Any], per_group: int) -> list[tuple[int, int]]:
    """Return (start, stop) of the runs of channels of one group with equal taps."""
    cuts = [c for c in range(len(table)) if c % per_group == 0 or (table[c] != table[c - 1]).any()]
    return list(zip(cuts, [*cuts[1:], len(table)], strict=True))


@functools.lru_cache(maxsize=512)
def read(shifts: Shifts, outs: int, groups: int, device: torch.device) -> Tables:
    """Return the tables of these shifts."""
    table, channels, taps = shifts.table, shifts.channels, shifts.taps
    per_group, n = channels // groups, outs // groups
    runs = _segments(table, per_group)
    uniform = next((u for u in (64, REDUCTION) if all((b - a) % u == 0 for a, b in runs)), 0)
    wide = [(a, b) for a, b in runs if b - a >= WIDE]
    narrow = [c for a, b in runs if b - a < WIDE for c in range(a, b)]
    starts = np.searchsorted(narrow, np.arange(groups + 1) * per_group) * taps
    group = width_of_tile(n), [(g * n, (g + 1) * n, g, g * per_group * taps) for g in range(groups)]
    widest = max((b - a for a, b in wide), default=0)
    pairs = [(int(starts[g]), int(starts[g + 1]), g, 0) for g in range(groups)]
    put = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    return Tables(
        table=put(table),
        negated=put(-table),
        rows=put(range(channels)),
        uniform=uniform,
        forward=_blocks(group[1], group[0], device),
        wide=_blocks(
            [(a, b, a // per_group, i * taps) for i, (a, b) in enumerate(wide)], width_of_tile(widest), device
        ),
        widest=widest,
        runs=put(-table[[a for a, _ in wide]]),
        narrow=put(narrow),
        columns=_blocks(pairs, 64, device),
        narrow_table=put(-table[narrow]),
        zero=put([[0, 0]]),
    )
