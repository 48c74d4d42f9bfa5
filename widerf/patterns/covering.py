"""What a stack of sparse layers reaches: the sum of its tap patterns, holes, width and sidelobes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from widerf._checks import require
from widerf.geometry import Moments, marginal, moments

if TYPE_CHECKING:
    from widerf.erf.map import ERF


@dataclass(frozen=True)
class Coverage:
    """Where the paths of a stack of layers end, and how evenly.

    Attributes:
        energy: float64, one axis per spatial axis, sums to 1: the share of the expected ERF energy at initialisation
            that each cell of the bounding box gets (equation 8 of Luo et al. 2016: the convolution of the layers' tap
            profiles).
        low: offset of the first cell of ``energy`` from the unit.
    """

    energy: Tensor
    low: tuple[int, ...]

    @property
    def holes(self) -> int:
        """Cells of the bounding box that no path reaches."""
        return int((self.energy == 0).sum())

    @property
    def reached(self) -> int:
        """Cells that some path reaches."""
        return int((self.energy > 0).sum())

    @property
    def side(self) -> int:
        """Side of the largest square (cube) without a hole."""
        solid, side = self.energy > 0, 0
        while solid.any():  # eroded by one cell each time
            side += 1
            for axis in range(solid.dim()):
                n = solid.shape[axis] - 1
                solid = solid.narrow(axis, 0, n) & solid.narrow(axis, 1, n)
        return side

    def _moments(self) -> list[Moments]:
        return [moments(marginal(self.energy, axis)) for axis in range(self.energy.dim())]

    @property
    def std(self) -> float:
        """Root of the mean of the axis variances, in pixels."""
        return float(torch.stack([axis.variance for axis in self._moments()]).mean().sqrt())

    @property
    def std_per_axis(self) -> tuple[float, ...]:
        """Standard deviation along each axis, in pixels."""
        return tuple(float(axis.variance.sqrt()) for axis in self._moments())

    @property
    def excess_kurtosis(self) -> float:
        """Mean over the axes of μ₄/σ⁴ − 3: 0 for a Gaussian, −1.2 for a flat square; NaN without any width."""
        figures = [axis.fourth / axis.variance**2 - 3 for axis in self._moments() if axis.variance > 0]
        return float(torch.stack(figures or [torch.tensor(torch.nan)]).mean())

    @property
    def sidelobe(self) -> float:
        """Largest gain of the energy map, as a filter, outside its main lobe.

        ``max |ĥ(f)|`` over ``Σ_i 12·(σ_i f_i)² > 1``, with ĥ(0) = 1. A flat square of side S has its first null on that
        ellipse, and a sidelobe of 0.22; a dilated grid answers 1.0 at f = 1/spacing: it cannot tell some patterns
        from a flat image. The frequencies are sampled at eight points per 1/side or finer.
        """
        size = [1 << (8 * n - 1).bit_length() if n > 1 else 1 for n in self.energy.shape]
        gain = torch.fft.fftn(self.energy, s=size).abs()
        away = torch.zeros(size, dtype=torch.float64)
        for axis, (n, figures) in enumerate(zip(size, self._moments(), strict=True)):
            f = torch.fft.fftfreq(n, dtype=torch.float64).square() * 12 * figures.variance
            away += f.view([-1 if a == axis else 1 for a in range(len(size))])
        return float(gain[away > 1].max()) if bool((away > 1).any()) else 0.0

    @property
    def roughness(self) -> float:
        """How unevenly the energy lies on the scale of a quarter of its width: 0 for a smooth map.

        ``‖A − Ã‖ / ‖Ã‖``, Ã the energy smoothed by a Gaussian of σ_i/4 along each axis. Holes, spikes and the
        lattice of a dilated grid are rough (two layers of spacing 4: 3.4); a bell is not (0.03), a flat square only at
        its edges (0.26).

        Example:
            >>> from widerf.patterns import dense_taps, grid
            >>> round(coverage([dense_taps(3)[None]] * 6).roughness, 2), round(coverage([grid(3, 9)] * 2).roughness, 1)
            (0.03, 3.4)
        """
        margins = [math.ceil(std) for std in self.std_per_axis]  # four deviations of the smoothing
        bare = F.pad(self.energy, [m for m in reversed(margins) for _ in range(2)])
        smooth = bare
        for axis, (margin, std) in enumerate(zip(margins, self.std_per_axis, strict=True)):
            if margin:
                x = torch.arange(-margin, margin + 1, dtype=torch.float64) / (std / 4)
                bell = (-x.square() / 2).exp()
                rows = smooth.movedim(axis, -1)
                flat = F.conv1d(rows.reshape(-1, 1, rows.shape[-1]), (bell / bell.sum()).view(1, 1, -1), padding=margin)
                smooth = flat.view(rows.shape).movedim(-1, axis)
        return float((bare - smooth).norm() / smooth.norm())

    @property
    def isotropy(self) -> float:
        """``3·E[x²y²] / E[x⁴]`` in units of the axes' σ, mean over axes: 1 if all directions are alike.

        Exactly 1 for any map that depends on the distance only; more where the diagonals reach further than the axes
        (a flat square 1.67, a 3×3 kernel 2), less where the axes do (a cross 0). NaN with one axis or without width.

        Example:
            >>> from widerf.patterns import dense_taps
            >>> [round(coverage([dense_taps(3)[None]] * n).isotropy, 2) for n in (1, 6)]
            [2.0, 1.09]
        """
        rank, stds = self.energy.dim(), self.std_per_axis
        if rank < 2 or not all(stds):
            return math.nan
        axes = []
        for axis, (n, std) in enumerate(zip(self.energy.shape, stds, strict=True)):
            x = torch.arange(n, dtype=torch.float64)
            share = self.energy.sum([a for a in range(rank) if a != axis])
            axes.append(((x - (share * x).sum()) / std).square())
        fourth = [float((self.energy.movedim(i, -1) * axes[i].square()).sum()) for i in range(rank)]
        pairs = itertools.combinations(range(rank), 2)
        mixed = [float((self.energy.movedim((i, j), (-2, -1)) * axes[i][:, None] * axes[j]).sum()) for i, j in pairs]
        return 3 * (sum(mixed) / len(mixed)) / (sum(fourth) / len(fourth))

    def erf(self) -> ERF:
        """Return the energy map as an `ERF`, about the unit, with all its figures and plots."""
        from widerf.erf.map import ERF

        return ERF.from_energy(self.energy, center=[float(-n) for n in self.low], clipped=0.0)

    def __str__(self) -> str:
        return (
            f"{'×'.join(map(str, self.energy.shape))} cells, {self.holes} holes, hole-free side {self.side}, "
            f"std {self.std:.2f}, excess kurtosis {self.excess_kurtosis:.2f}, sidelobe {self.sidelobe:.3f}"
        )


def _check(list_of_offsets: Sequence[Tensor], jumps: Sequence[int], branches: Sequence[float]) -> int:
    require(len(list_of_offsets) >= 1, "list_of_offsets", "hold at least one layer", [])
    rule = "hold integer tensors (groups, taps, D) of one D"
    ranks = set()
    for offsets in list_of_offsets:
        fine = isinstance(offsets, Tensor) and offsets.dim() == 3 and not offsets.is_floating_point()
        require(fine and offsets.numel() > 0, "list_of_offsets", rule, offsets, TypeError)
        ranks.add(offsets.shape[-1])
    require(len(ranks) == 1, "list_of_offsets", rule, sorted(ranks))
    require(len(jumps) == len(list_of_offsets), "jumps", f"hold {len(list_of_offsets)} integers", list(jumps))
    require(all(isinstance(j, int) and j >= 1 for j in jumps), "jumps", "hold positive integers", list(jumps))
    rule = f"hold {len(list_of_offsets)} numbers in (0, 1]"
    require(len(branches) == len(list_of_offsets) and all(0 < a <= 1 for a in branches), "shares", rule, branches)
    return int(ranks.pop())


def _profile(offsets: Tensor, jump: int, share: float) -> tuple[Tensor, Tensor]:
    """Return the distinct taps of a layer, in pixels, and the part of the energy on each; what passes by it at 0."""
    taps, counts = torch.unique((offsets.cpu() * jump).flatten(0, 1), dim=0, return_counts=True)
    profile = counts.double() / (offsets.shape[0] * offsets.shape[1])
    if share == 1:
        return taps, profile
    past = torch.zeros(1, taps.shape[1], dtype=taps.dtype)
    return torch.cat([taps, past]), torch.cat([profile * share, torch.tensor([1.0 - share], dtype=torch.float64)])


def coverage(
    list_of_offsets: Sequence[Tensor], jumps: Sequence[int] | None = None, shares: Sequence[float] | None = None
) -> Coverage:
    """Work out which pixels a unit on top of a stack of layers reaches, and with what share of the energy.

    Each layer spreads the energy evenly over its pattern groups and their taps, h_l = mean over groups of 1/taps at
    each tap, and A = h_1 ∗ … ∗ h_n (docs/theory.md (3)). Sums of positive numbers only: a cell is exactly zero if and
    only if no path ends there.

    Args:
        list_of_offsets: offsets (groups, taps, D) of each layer, from the input on; groups count as equally many
            channels.
        jumps: pixels between neighbouring offsets of each layer (jump × dilation); default 1 everywhere.
        shares: of each layer's energy in that after the addition, where it is the branch of a residual block: its
            profile is then (1 − a)·δ + a·h; default 1 everywhere, a plain chain.

    Returns:
        the `Coverage` of the stack.

    Raises:
        TypeError: if the offsets are not integer tensors.
        ValueError: if their ranks differ, or there is not one positive jump and one share in (0, 1] per layer.

    Example:
        >>> from widerf.patterns import grid, dense_taps
        >>> print(coverage([grid(3, 5), grid(3, 5)]))
        9×9 cells, 56 holes, hole-free side 1, std 2.31, excess kurtosis -0.75, sidelobe 1.000
        >>> print(coverage([dense_taps(3)[None], grid(3, 7)]))  # spacings 1 and 3 tile 9×9
        9×9 cells, 0 holes, hole-free side 9, std 2.58, excess kurtosis -1.23, sidelobe 0.22...
        >>> print(coverage([grid(3, 5), grid(3, 5)], shares=[0.25, 0.25]))  # the same, residual
        9×9 cells, 56 holes, hole-free side 1, std 1.15, excess kurtosis 1.50, sidelobe 1.000
    """
    jumps = [1] * len(list_of_offsets) if jumps is None else list(jumps)
    shares = [1.0] * len(list_of_offsets) if shares is None else list(shares)
    rank = _check(list_of_offsets, jumps, shares)
    energy, low = torch.ones([1] * rank, dtype=torch.float64), [0] * rank
    for offsets, jump, share in zip(list_of_offsets, jumps, shares, strict=True):
        taps, profile = _profile(offsets, jump, share)
        first = taps.amin(0)
        size = [n + int(s) for n, s in zip(energy.shape, taps.amax(0) - first, strict=True)]
        wider = torch.zeros(size, dtype=torch.float64)
        for tap, part in zip((taps - first).tolist(), profile.tolist(), strict=True):
            place = tuple(slice(a, a + n) for a, n in zip(tap, energy.shape, strict=True))
            wider[place] += energy * part
        energy, low = wider, [a + int(b) for a, b in zip(low, first, strict=True)]
    return Coverage(energy, tuple(low))
