"""Where the connections of a sparse layer land: integers only, worked out once per layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Taps = tuple[tuple[tuple[int, ...], ...], ...]  # [group][tap][axis]
NATIVE_CHANNELS = 16  # a grid of fewer channels is no faster in PyTorch's own convolution than as columns


class Run(NamedTuple):
    """Input channels ``start … stop − 1`` of a repeat, which share the offsets ``taps``."""

    start: int
    stop: int
    taps: tuple[tuple[int, ...], ...]


class Piece(NamedTuple):
    """Neighbouring input channels that are computed together, ``channels`` of them.

    If all read the same grid, ``spacing`` and its first offset ``corner`` say which, and PyTorch's own dilated
    convolution computes them. Otherwise they become columns: ``runs`` laid out ``repeats`` times, so that a depthwise
    layer that cycles through P patterns costs P slices per tap, not one per channel.
    """

    channels: int
    runs: tuple[Run, ...]
    repeats: int = 1
    corner: tuple[int, ...] | None = None
    spacing: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """Where every connection of one piece lands: all that the computation needs beside the tensors."""

    piece: Piece
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]  # pixels added before the image, per axis
    after: tuple[int, ...]
    first: tuple[int, ...]  # index in the extended image of offset 0 for output 0
    dilation: tuple[int, ...]
    groups: int
    blocks: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # work space, see `columns.Block`


def _grid(taps: tuple[tuple[int, ...], ...], kernel_size: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """Return (corner, spacing) if the taps are a grid in C order, else None."""
    axes: list[list[int]] = [sorted({t[axis] for t in taps}) for axis in range(len(kernel_size))]
    if [len(a) for a in axes] != list(kernel_size) or list(itertools.product(*axes)) != list(taps):
        return None
    steps = [{q - p for p, q in itertools.pairwise(a)} or {1} for a in axes]
    if any(len(s) > 1 for s in steps):
        return None
    return tuple(a[0] for a in axes), tuple(s.pop() for s in steps)


def _runs(taps: Taps, channels: int) -> tuple[list[Run], int]:
    """Split the channels into runs of equal taps, and find how often the sequence of runs repeats."""
    row = [c * len(taps) // channels for c in range(channels)]
    names: dict[tuple[tuple[int, ...], ...], int] = {}
    sequence = [names.setdefault(taps[r], len(names)) for r in row]
    period = next(p for p in range(1, channels + 1) if channels % p == 0 and sequence == sequence[:p] * (channels // p))
    runs: list[Run] = []
    for c in range(period):
        if runs and runs[-1].taps == taps[row[c]]:
            runs[-1] = runs[-1]._replace(stop=c + 1)
        else:
            runs.append(Run(c, c + 1, taps[row[c]]))
    return runs, channels // period


def _pieces(taps: Taps, channels: int, kernel_size: tuple[int, ...], groups: int) -> tuple[Piece, ...]:
    """Give grids to PyTorch's own convolution where that pays, all else to columns."""
    runs, repeats = _runs(taps, channels)
    if len(runs) == 1 and (grid := _grid(runs[0].taps, kernel_size)):
        return (Piece(channels, tuple(runs), 1, *grid),)
    if groups > 1 or repeats > 1:
        return (Piece(channels, tuple(runs), repeats),)
    pieces: list[Piece] = []
    for run in runs:
        width = run.stop - run.start
        if width >= NATIVE_CHANNELS and (grid := _grid(run.taps, kernel_size)):
            pieces.append(Piece(width, (run,), 1, *grid))
            continue
        last = pieces.pop() if pieces and pieces[-1].corner is None else Piece(0, ())
        moved = Run(last.channels, last.channels + width, run.taps)
        pieces.append(Piece(last.channels + width, (*last.runs, moved)))
    return tuple(pieces)


def reach(
    offsets: Sequence[tuple[int, ...]],
    kernel_size: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return how many pixels before and after the image the taps read, per axis."""
    before, after = [], []
    for axis, (k, d, (low, high)) in enumerate(zip(kernel_size, dilation, padding, strict=True)):
        along, h = [o[axis] for o in offsets], (k - 1) // 2
        before.append(max(0, low - d * (h + min(along))))
        after.append(max(0, high + d * (max(along) - (k - 1 - h))))
    return tuple(before), tuple(after)


def make_plans(
    taps: Taps,
    channels: int,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Plan, ...]:
    """Lay out one layer, piece by piece; ``padding`` is (before, after) per axis, as of the plain convolution."""
    plans = []
    for piece in _pieces(taps, channels, kernel_size, groups):
        offsets = [tap for run in piece.runs for tap in run.taps]
        before, after = reach(offsets, kernel_size, padding, dilation)
        origin = zip(before, padding, dilation, kernel_size, strict=True)
        first = tuple(b - low + d * ((k - 1) // 2) for b, (low, _), d, k in origin)
        plans.append(Plan(piece, kernel_size, stride, before, after, first, dilation, groups))
    return tuple(plans)


def slices(plan: Plan, size: Sequence[int], tap: Sequence[int], spacing: Sequence[int] | None = None) -> Any:
    """Return the index of what ``tap`` of all output units reads in the extended image, on its last axes.

    With ``spacing``, of the part of the image that the grid with its corner at ``tap`` reads.
    """
    starts = [f + d * o for f, d, o in zip(plan.first, plan.dilation, tap, strict=True)]
    if spacing is None:
        return (..., *(slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, plan.stride, size, strict=True)))
    far = [d * g * (k - 1) for d, g, k in zip(plan.dilation, spacing, plan.kernel_size, strict=True)]
    return (
        ...,
        *(slice(a, a + s * (n - 1) + r + 1) for a, s, n, r in zip(starts, plan.stride, size, far, strict=True)),
    )
