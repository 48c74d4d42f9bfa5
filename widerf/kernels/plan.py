"""Where the connections of a sparse layer land: integers only, worked out once per layer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

Taps = tuple[tuple[tuple[int, ...], ...], ...]  # [group][tap][axis]
NATIVE_CHANNELS = 16  # a grid of fewer channels is no faster in PyTorch's own convolution than as columns


class Run(NamedTuple):
    """Input channels ``start … stop − 1`` of a repeat, whose taps are the same.

    Tap t reads pixel ``stride · u + shifts[t]`` for output u; that may lie outside the image.
    """

    start: int
    stop: int
    shifts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """Where every connection of neighbouring input channels lands: all that is computed with beside the tensors.

    ``runs`` are laid out ``repeats`` times, so that a depthwise layer that cycles through P patterns costs P slices per
    tap, not one per channel.
    """

    runs: tuple[Run, ...]
    repeats: int
    stride: tuple[int, ...]
    before: tuple[int, ...]  # pixels that the taps reach beyond the image, per axis: at its start, and at its end
    after: tuple[int, ...]
    groups: int
    spacing: tuple[int, ...] | None = None  # pixels between the taps if all channels read the same grid
    text: str = field(init=False, compare=False, repr=False)
    blocks: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # work space, see `columns.Block`

    def __post_init__(self) -> None:
        parts = (self.runs, self.repeats, self.stride, self.before, self.after, self.groups)
        object.__setattr__(self, "text", json.dumps(parts))

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return self.repeats * self.runs[-1].stop

    @property
    def taps(self) -> int:
        """Number of taps of a channel."""
        return len(self.runs[0].shifts)

    @property
    def shifts(self) -> list[tuple[tuple[int, ...], ...]]:
        """The shifts of each input channel: [channel][tap][axis]."""
        return [run.shifts for run in self.runs for _ in range(run.start, run.stop)] * self.repeats


@lru_cache(maxsize=1024)
def read_plan(text: str) -> Plan:
    """Return the plan that has this ``text``: the operators know a plan by what it says.

    So a compiled program that is kept in a cache means the same in another process.
    """
    runs, repeats, stride, before, after, groups = json.loads(text)
    kept = tuple(Run(start, stop, tuple(map(tuple, shifts))) for start, stop, shifts in runs)
    return Plan(kept, repeats, tuple(stride), tuple(before), tuple(after), groups)


class Layout(NamedTuple):
    """One layer, laid out in two ways."""

    whole: Plan  # all channels at once
    pieces: tuple[Plan, ...]  # grids for PyTorch's own convolution where that pays, and the rest; their results add up


def _grid(taps: tuple[tuple[int, ...], ...], kernel_size: Sequence[int]) -> tuple[int, ...] | None:
    """Return the spacing if the taps are a grid in C order, else None."""
    axes: list[list[int]] = [sorted({t[axis] for t in taps}) for axis in range(len(kernel_size))]
    if [len(a) for a in axes] != list(kernel_size) or list(itertools.product(*axes)) != list(taps):
        return None
    steps = [{q - p for p, q in itertools.pairwise(a)} or {1} for a in axes]
    return None if any(len(s) > 1 for s in steps) else tuple(s.pop() for s in steps)


def _runs(taps: Taps, channels: int) -> tuple[tuple[Run, ...], int]:
    """Split the channels into runs of equal taps, and find how often the sequence of runs repeats."""
    row = [c * len(taps) // channels for c in range(channels)]
    names: dict[tuple[tuple[int, ...], ...], int] = {}
    sequence = [names.setdefault(taps[r], len(names)) for r in row]
    period = next(p for p in range(1, channels + 1) if channels % p == 0 and sequence == sequence[:p] * (channels // p))
    runs: list[Run] = []
    for c in range(period):
        if runs and runs[-1].shifts == taps[row[c]]:
            runs[-1] = runs[-1]._replace(stop=c + 1)
        else:
            runs.append(Run(c, c + 1, taps[row[c]]))
    return tuple(runs), channels // period


def _split(runs: tuple[Run, ...], kernel_size: Sequence[int]) -> list[tuple[Run, ...]]:
    """Part wide grids, which PyTorch's own convolution computes, from the rest."""
    pieces: list[tuple[Run, ...]] = []
    mixed = False  # whether the last piece is one for columns
    for run in runs:
        width = run.stop - run.start
        native = width >= NATIVE_CHANNELS and _grid(run.shifts, kernel_size) is not None
        last = pieces.pop() if mixed and not native else ()
        start = last[-1].stop if last else 0
        pieces.append((*last, Run(start, start + width, run.shifts)))
        mixed = not native
    return pieces


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


def make_layout(
    taps: Taps,
    channels: int,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Layout:
    """Lay out one layer; ``padding`` is (before, after) per axis, as of the plain convolution."""
    origin = [d * ((k - 1) // 2) - low for k, (low, _), d in zip(kernel_size, padding, dilation, strict=True)]

    def shift(tap: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a + d * o for a, d, o in zip(origin, dilation, tap, strict=True))

    def plan(runs: tuple[Run, ...], native: bool = False) -> Plan:
        extra = reach([tap for run in runs for tap in run.shifts], kernel_size, padding, dilation)
        placed = tuple(run._replace(shifts=tuple(map(shift, run.shifts))) for run in runs)
        return Plan(placed, repeats, stride, *extra, groups, _grid(placed[0].shifts, kernel_size) if native else None)

    runs, repeats = _runs(taps, channels)
    if len(runs) == 1 or groups > 1 or repeats > 1:
        return Layout(plan(runs), (plan(runs, len(runs) == 1),))
    pieces = _split(runs, kernel_size)
    return Layout(plan(runs), tuple(plan(p, len(p) == 1 and p[0].stop >= NATIVE_CHANNELS) for p in pieces))


def slices(plan: Plan, size: Sequence[int], tap: Sequence[int], wider: Sequence[int] | None = None) -> Any:
    """Return the index of what ``tap`` of all output units reads in the extended image, on its last axes.

    Args:
        plan: of the layer.
        size: spatial output size.
        tap: a shift of the plan.
        wider: pixels to take beside that at the end of each axis, for a grid that starts at ``tap``.
    """
    starts = [b + o for b, o in zip(plan.before, tap, strict=True)]
    if wider is None:
        return (..., *(slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, plan.stride, size, strict=True)))
    ends = [a + s * (n - 1) + w + 1 for a, s, n, w in zip(starts, plan.stride, size, wider, strict=True)]
    return (..., *(slice(a, e) for a, e in zip(starts, ends, strict=True)))
