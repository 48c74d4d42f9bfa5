"""Convolution layers whose taps are not a grid: drop-in replacements for torch.nn.Conv1d, Conv2d and Conv3d."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from widerf import patterns
from widerf._checks import require, require_known
from widerf.columns import Plan, make_plans, reach
from widerf.functional import apply_plans, check_offsets, extend, read_taps, resolve_padding
from widerf.geometry import ntuple

Size = int | Sequence[int]
Pairs = tuple[tuple[int, int], ...]


def fresh_seed() -> int:
    """Return a seed that follows from the state of torch's global generator, which it leaves as it is.

    So ``torch.manual_seed`` makes the offsets reproducible, layers drawn one after the other differ, and the weights of a network
    with sparse layers come out equal to those of its dense twin.
    """
    state = torch.get_rng_state().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "big")


def draw_offsets(
    pattern: str, kernel_size: Sequence[int], extent: Sequence[int], in_channels: int, groups: int, seed: int
) -> Tensor:
    """Draw a named pattern for a layer, (pattern groups, taps, D).

    The number of pattern groups is the least that reads the whole window (`patterns.natural_groups`), if there are as many
    input channels. In a grouped convolution each group of channels gets all of them if it has as many channels; else
    neighbouring channels take turns, so that the patterns of one group of channels differ and all groups together read the
    window.
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


class _SparseConv(_ConvNd):
    """What the three ranks share. The spatial rank is ``RANK``, the plain layer is ``DENSE``."""

    RANK: ClassVar[int]
    DENSE: ClassVar[type[_ConvNd]]
    offsets: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        extent: Size | None = None,
        pattern: str | Tensor = "mixed",
        seed: int | None = None,
    ) -> None:
        k = ntuple(kernel_size, self.RANK, "kernel_size")
        steps, spread = ntuple(stride, self.RANK, "stride"), ntuple(dilation, self.RANK, "dilation")
        pads = padding if isinstance(padding, str) else ntuple(padding, self.RANK, "padding")
        resolve_padding(pads, k, steps, spread)
        require(groups >= 1 and in_channels % groups == 0, "groups", f"divide in_channels={in_channels}", groups)
        require(out_channels % groups == 0, "groups", f"divide out_channels={out_channels}", groups)
        seed = fresh_seed() if seed is None else seed
        if isinstance(pattern, str):
            reach = tuple(2 * n + 1 for n in k) if extent is None else ntuple(extent, self.RANK, "extent")
            offsets = draw_offsets(pattern, k, reach, in_channels, groups, seed)
        else:
            offsets, reach = self._custom(pattern, k, extent, in_channels)
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            k,
            steps,
            pads,
            spread,
            False,
            (0,) * self.RANK,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.extent = reach
        self.pattern = pattern if isinstance(pattern, str) else "custom"
        self.register_buffer("offsets", offsets.to(device=self.weight.device))
        self._taps = read_taps(offsets)
        self._planned: tuple[Any, tuple[Plan, ...], Pairs, Pairs] | None = None

    @classmethod
    def _custom(
        cls, offsets: Tensor, k: tuple[int, ...], extent: Size | None, in_channels: int
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Check offsets of the user's own; the extent defaults to that of the smallest window that holds them."""
        offsets = check_offsets(offsets, math.prod(k), cls.RANK)
        rule = f"have no more groups than the {in_channels} input channels"
        require(len(offsets) <= in_channels, "pattern", rule, len(offsets))
        low = (-offsets).amax((0, 1)).tolist()
        high = offsets.amax((0, 1)).tolist()
        # The window of extent S = k + e begins e//2 cells before the dense taps and ends e − e//2 after them.
        needed = [
            n + max(2 * max(0, lo - (n - 1) // 2), 2 * max(0, hi - n // 2) - 1, 0)
            for n, lo, hi in zip(k, low, high, strict=True)
        ]
        needed = [s + (s - n) % 2 for s, n in zip(needed, k, strict=True)]
        if extent is None:
            return offsets, tuple(needed)
        reach = ntuple(extent, cls.RANK, "extent")
        cells = patterns.window(k, reach)
        inside = ((offsets >= cells[0]) & (offsets <= cells[-1])).all(-1)
        require(
            bool(inside.all()),
            "pattern",
            f"keep its offsets in the window of extent {reach}",
            offsets[~inside].tolist(),
        )
        return offsets, reach

    def _layout(self) -> tuple[tuple[Plan, ...], Pairs, Pairs]:
        """Return the plans, the padding they work with, and what to add to the image before: (before, after) per axis."""
        key = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        if self._planned is None or self._planned[0] != key:
            pads = resolve_padding(self.padding, self.kernel_size, self.stride, self.dilation)
            added: Pairs = ((0, 0),) * self.RANK
            if self.padding_mode != "zeros":
                offsets = [tap for group in self._taps for tap in group]
                added = tuple(zip(*reach(offsets, self.kernel_size, pads, self.dilation), strict=True))
                pads = tuple((low - a, high - b) for (low, high), (a, b) in zip(pads, added, strict=True))
            plans = make_plans(
                self._taps, self.in_channels, self.kernel_size, self.stride, pads, self.dilation, self.groups
            )
            self._planned = (key, plans, pads, added)
        return self._planned[1:]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input``, (batch, in, *spatial) or (in, *spatial)."""
        plans, pads, added = self._layout()
        wide = extend(input, added, self.padding_mode)
        return apply_plans(wide, self.weight, self.bias, plans, pads)


class SparseConv1d(_SparseConv):
    """`SparseConv2d` with one spatial axis."""

    RANK = 1
    DENSE = nn.Conv1d


class SparseConv2d(_SparseConv):
    """2-D."""

    RANK = 2
    DENSE = nn.Conv2d


class SparseConv3d(_SparseConv):
    """`SparseConv2d` with three spatial axes."""

    RANK = 3
    DENSE = nn.Conv3d
