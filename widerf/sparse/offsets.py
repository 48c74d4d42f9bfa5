"""The offsets of a layer: drawing them for its channels, and checking those that come from elsewhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from widerf import patterns
from widerf._checks import require
from widerf.functional import check_offsets


def fresh_seed() -> int:
    """Return a seed that follows from the state of torch's global generator, which it leaves as it is.

    So ``torch.manual_seed`` makes the offsets reproducible, layers drawn one after the other differ, and the weights
    of a network with sparse layers come out equal to those of its dense twin.
    """
    state = torch.get_rng_state().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "big")


UNIT = 16  # channels: a block is a multiple of that many, for a GPU reads them at once


def check_block(block: int | None) -> None:
    """Raise unless ``block`` is None or a positive multiple of 16: TypeError for no integer, ValueError else."""
    if block is not None:
        require(isinstance(block, int), "block", "be an integer", block, TypeError)
        require(block >= UNIT and block % UNIT == 0, "block", f"be a positive multiple of {UNIT}", block)


def block_width(channels: int, parts: int = 1, block: int | None = None) -> int | None:
    """Return how many neighbouring channels share their taps, or None if there is no use in blocks.

    Args:
        channels: input channels that the blocks cut up.
        parts: kinds of block that the pattern needs.
        block: the widest that is wanted; None: 64, or 32 or 16 where those alone divide the channels (32 with a rest
            where none does and there are 64 or more), and at least two blocks, for one pattern is poor.

    Returns:
        64, 32, 16, or ``block``, narrowed until there is a block for each part; None for fewer channels than that takes
        (or, by default, for some 40 that are no multiple of 16): there each pattern has as few channels as it likes.

    Example:
        >>> [block_width(channels) for channels in (512, 96, 64, 72, 40, 32, 16)]
        [64, 32, 32, 32, None, 16, None]
    """
    if block is not None:
        most = min(block, math.ceil(channels / parts) // UNIT * UNIT)  # narrower than asked for: of about equal width
        fits = [w for w in range(most, 0, -UNIT) if math.ceil(channels / w) >= parts]
        return fits[0] if fits else None
    fits = [w for w in (64, 32, UNIT) if w * max(2, parts) <= channels]
    exact = [w for w in fits if channels % w == 0]
    rest = [w for w in fits if w <= 32 and channels >= 64]
    widest = exact or rest
    return widest[0] if widest else None


def draw_offsets(
    pattern: str | patterns.Mixture,
    kernel_size: Sequence[int],
    extent: Sequence[int],
    in_channels: int,
    groups: int,
    seed: int,
    block: int | None = None,
    stride: Sequence[int] | int = 1,
) -> Tensor:
    """Draw a named pattern or a mixture for a layer, (pattern groups, taps, D).

    Runs of `block_width` neighbouring input channels share their taps. In a grouped convolution each group of channels
    is cut up alike if it holds two blocks; narrower groups lie within blocks that are cut from all channels.
    """
    per_group = in_channels // groups
    channels = per_group if per_group >= 2 * UNIT else in_channels
    width = block_width(channels, patterns.kinds(pattern), block)
    if width is None:
        return _finest(pattern, kernel_size, extent, in_channels, groups, seed, stride)
    generator = torch.Generator().manual_seed(seed)
    rows = patterns.draw(pattern, kernel_size, extent, math.ceil(channels / width), generator, stride)
    unit = math.gcd(width, channels)  # equal runs of channels is what a row of the buffer means
    rows = rows[torch.arange(0, channels, unit) // width]
    return rows.repeat(in_channels // channels, 1, 1)


def _finest(
    pattern: str | patterns.Mixture,
    kernel_size: Sequence[int],
    extent: Sequence[int],
    in_channels: int,
    groups: int,
    seed: int,
    stride: Sequence[int] | int,
) -> Tensor:
    """Draw as many patterns as it takes to read the whole window (`patterns.natural_groups`), if there are channels.

    In a grouped convolution each group of channels gets all of them if it has as many channels; else neighbouring
    channels take turns, so that the patterns of one group of channels differ and all groups together read the window.
    """
    wanted = patterns.natural_groups(pattern, kernel_size, extent)
    per_group = in_channels // groups
    generator = torch.Generator().manual_seed(seed)
    if groups == 1 or per_group >= wanted:
        rows = patterns.draw(pattern, kernel_size, extent, min(wanted, per_group), generator, stride)
        return rows.repeat(groups, 1, 1)
    rows = patterns.draw(pattern, kernel_size, extent, min(wanted, in_channels), generator, stride)
    if per_group == 1:
        return rows
    if pattern in patterns.HALVES:  # near and far patterns in turn, so that every group of channels holds both
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
