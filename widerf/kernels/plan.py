"""Where the connections of a sparse layer land: integers only, worked out once per layer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from widerf._checks import require

Taps = tuple[tuple[tuple[int, ...], ...], ...]  # [group][tap][axis]
SHOWN = 200  # characters of a text that is no plan
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
    lowest: tuple[int, ...] = field(init=False, compare=False, repr=False)  # of all shifts, per axis
    highest: tuple[int, ...] = field(init=False, compare=False, repr=False)
    blocks: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # work space, see `columns.Block`

    def __post_init__(self) -> None:
        parts = (self.runs, self.repeats, self.stride, self.before, self.after, self.groups)
        object.__setattr__(self, "text", json.dumps(parts))
        along = list(zip(*(shift for run in self.runs for shift in run.shifts), strict=True))
        object.__setattr__(self, "lowest", tuple(map(min, along)))
        object.__setattr__(self, "highest", tuple(map(max, along)))

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


def _integers(values: Any, length: int, least: int | None = None) -> bool:
    """Whether ``values`` is a list of so many integers, none less than ``least``."""
    if not isinstance(values, list) or len(values) != length:
        return False
    return all(type(v) is int and (least is None or v >= least) for v in values)


def _is_run(run: Any, start: int, taps: int, rank: int) -> bool:
    if not isinstance(run, list) or len(run) != 3 or not _integers(run[:2], 2, 0) or not isinstance(run[2], list):
        return False
    return run[0] == start < run[1] and len(run[2]) == taps and all(_integers(shift, rank) for shift in run[2])


def _why_no_plan(parts: Any) -> str | None:
    """Return the rule that ``parts``, read from the text of a plan, breaks; None if they are a plan."""
    if not isinstance(parts, list) or len(parts) != 6:
        return "be a list of runs, repeats, stride, before, after and groups"
    runs, repeats, stride, before, after, groups = parts
    rank = len(stride) if isinstance(stride, list) else 0
    if rank not in (1, 2, 3) or not _integers(stride, rank, 1):
        return f"have as stride one, two or three positive integers, not {stride!r}"
    if not (_integers(before, rank, 0) and _integers(after, rank, 0)):
        return f"have as before and after {rank} integers each, not negative, not {before!r} and {after!r}"
    if not _integers([repeats, groups], 2, 1):
        return f"have positive integers as repeats and groups, not {repeats!r} and {groups!r}"
    if not isinstance(runs, list) or not runs or not isinstance(runs[0], list) or len(runs[0]) != 3:
        return "have runs [start, stop, shifts]"
    taps, start = len(runs[0][2]) if isinstance(runs[0][2], list) else 0, 0
    for run in runs:
        if taps < 1 or not _is_run(run, start, taps, rank):
            return f"have runs that begin where the one before ends, of equally many shifts of {rank} integers"
        start = run[1]
    return (
        None
        if start * repeats % groups == 0
        else f"have groups that divide its {start * repeats} channels, not {groups}"
    )


@lru_cache(maxsize=1024)
def read_plan(text: str) -> Plan:
    """Return the plan that has this ``text``: the operators know a plan by what it says.

    So a compiled program that is kept in a cache means the same in another process.

    Raises:
        ValueError: if it is not the text of a plan.

    Example:
        >>> read_plan("[]")
        Traceback (most recent call last):
        ...
        ValueError: plan must be a list of runs, repeats, stride, before, after and groups, got '[]'
    """
    shown = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"plan must be JSON, got {shown!r}") from error
    why = _why_no_plan(parts)
    require(why is None, "plan", why or "", shown)
    runs, repeats, stride, before, after, groups = parts
    kept = tuple(Run(start, stop, tuple(map(tuple, shifts))) for start, stop, shifts in runs)
    return Plan(kept, repeats, tuple(stride), tuple(before), tuple(after), groups)


@lru_cache(maxsize=1024)
def trim(text: str, image: tuple[int, ...], size: tuple[int, ...]) -> Plan:
    """Return the plan for images and outputs of these sizes, with no wider border than they need.

    A tap that reads nothing but zeros there, however far away, reads those next to the image.
    """
    plan = read_plan(text)
    low = [-s * (m - 1) - 1 for s, m in zip(plan.stride, size, strict=True)]

    def near(shift: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(max(d, a), n) for d, a, n in zip(shift, low, image, strict=True))

    runs = tuple(run._replace(shifts=tuple(map(near, run.shifts))) for run in plan.runs)
    if runs == plan.runs:
        return plan
    along = list(zip(*(shift for run in runs for shift in run.shifts), strict=True))
    before = tuple(max(0, -min(d)) for d in along)
    after = tuple(max(0, max(d) - a - n) for d, a, n in zip(along, low, image, strict=True))
    return Plan(runs, plan.repeats, plan.stride, before, after, plan.groups)


class Layout(NamedTuple):
    """One layer, laid out in two ways."""

    whole: Plan  # all channels at once
    pieces: tuple[Plan, ...]  # grids for PyTorch's own convolution where that pays, and the rest; their results add up
    kernel_size: tuple[int, ...]  # of the weight


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


def overhang(
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


def origin(kernel_size: Sequence[int], padding: Sequence[tuple[int, int]], dilation: Sequence[int]) -> tuple[int, ...]:
    """Return which pixel the tap at offset 0 reads for output 0, per axis."""
    return tuple(d * ((k - 1) // 2) - low for k, (low, _), d in zip(kernel_size, padding, dilation, strict=True))


@lru_cache(maxsize=256)
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
    first = origin(kernel_size, padding, dilation)

    def shift(tap: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a + d * o for a, d, o in zip(first, dilation, tap, strict=True))

    def plan(runs: tuple[Run, ...], native: bool = False) -> Plan:
        extra = overhang([tap for run in runs for tap in run.shifts], kernel_size, padding, dilation)
        placed = tuple(run._replace(shifts=tuple(map(shift, run.shifts))) for run in runs)
        return Plan(placed, repeats, stride, *extra, groups, _grid(placed[0].shifts, kernel_size) if native else None)

    runs, repeats = _runs(taps, channels)
    if len(runs) == 1 or groups > 1 or repeats > 1:
        return Layout(plan(runs), (plan(runs, len(runs) == 1),), kernel_size)
    pieces = _split(runs, kernel_size)
    placed = tuple(plan(p, len(p) == 1 and p[0].stop >= NATIVE_CHANNELS) for p in pieces)
    return Layout(plan(runs), placed, kernel_size)


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
