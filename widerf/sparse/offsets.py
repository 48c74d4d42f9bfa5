"""The offsets of a layer: drawing them for its channels, and checking those that come from elsewhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widerf import patterns
from widerf._checks import require, require_known
from widerf.functional import check_offsets


def fresh_seed() -> int:
    """Return a seed that follows from the state of torch's global generator, which it leaves as it is.

    So ``torch.manual_seed`` makes the offsets reproducible, layers drawn one after the other differ, and the weights
    of a network with sparse layers come out equal to those of its dense twin.
    """
    state = torch.get_rng_state().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "big")


def draw_offsets(
    pattern: str, kernel_size: Sequence[int], extent: Sequence[int], in_channels: int, groups: int, seed: int
) -> Tensor:
    """Draw a named pattern for a layer, (pattern groups, taps, D).

    The number of pattern groups is the least that reads the whole window (`patterns.natural_groups`), if there are as
    many input channels. In a grouped convolution each group of channels gets all of them if it has as many channels;
    else neighbouring channels take turns, so that the patterns of one group of channels differ and all groups
    together read the window.
    """
    require_known(pattern, patterns.NAMED, "pattern")
    wanted = patterns.natural_groups(pattern, kernel_size, extent)
    per_group = in_channels // groups
    generator = torch.Generator().manual_seed(seed)
    if groups == 1 or per_group >= wanted:
        rows = patterns.NAMED[pattern](kernel_size, extent, min(wanted, per_group), generator)
        return rows.repeat(groups, 1, 1)
    rows = patterns.NAMED[pattern](kernel_size, extent, min(wanted, in_channels), generator)
    if per_group == 1:
        return rows
    if pattern == "mixed":  # near and far patterns in turn, so that every group of channels holds both
        half = len(rows) // 2
        turn = [i // 2 if i % 2 == 0 and i // 2 < half else half + i // 2 for i in range(2 * half)]
        rows = rows[[*turn, *range(2 * half, len(rows))]]
    return rows[torch.arange(in_channels) % len(rows)]


def window_of(offsets: Tensor, kernel_size: Sequence[int]) -> tuple[int, ...]:
    """Return the extent of the smallest window that holds the offsets and has the kernel's centre."""
    low, high = (-offsets).amax((0, 1)).tolist(), offsets.amax((0, 1)).tolist()
    return tuple(
        k + 2 * max(0, before - (k - 1) // 2, after - k // 2)
        for k, before, after in zip(kernel_size, low, high, strict=True)
    )


def check_pattern(value: Any, kernel_size: Sequence[int], extent: Sequence[int], in_channels: int) -> Tensor:
    """Return ``value`` as int64 if they make a pattern of this layer.

    Raises:
        TypeError: if they are not a tensor of integers.
        ValueError: if the shape is wrong, a group holds a tap twice, a tap lies outside the window, or there are more
            groups than input channels.
    """
    offsets = check_offsets(value, math.prod(kernel_size), len(kernel_size))
    rule = f"have no more groups than the {in_channels} input channels"
    require(len(offsets) <= in_channels, "offsets", rule, len(offsets))
    cells = patterns.window(kernel_size, extent)
    inside = ((offsets.cpu() >= cells[0]) & (offsets.cpu() <= cells[-1])).all(-1)
    rule = f"lie in the window of extent {tuple(extent)}, {cells[0].tolist()} to {cells[-1].tolist()}"
    require(bool(inside.all()), "offsets", rule, offsets.cpu()[~inside].tolist())
    return offsets
