"""The convolutions of a model, and what of each kernel may be widened."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from widerf.convolutions.taps import sum_of_squares, tap_places, variances
from widerf.profile.single import corner_variance, soft_corners, tap_profile, uniform_variance
from widerf.report import Verdict


@dataclass(frozen=True)
class Cell:
    """Taps that feed one and the same output unit.

    A plain kernel is one cell. A transposed convolution of stride s has one cell per output phase: a unit of its
    output sees only every s-th tap.

    Attributes:
        where: index of the cell's taps in a kernel-shaped tensor.
        size: taps per axis of the cell.
    """

    where: tuple[slice, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """One convolution of a model.

    Attributes:
        name: module name.
        module: the convolution.
        kernel_size: taps per axis; for non-grid taps the shape in which the weight stores them.
        stride: of the layer, per axis.
        dilation: of the layer, per axis.
        transposed: whether it is a transposed convolution.
        offsets: taps of each group of input channels for non-grid kernels, shape (groups, taps, D); else ``None``.
        cells: the taps that feed one output unit, see :class:`Cell`.
    """

    name: str
    module: nn.Module
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    offsets: Tensor | None = None
    cells: tuple[Cell, ...] = field(init=False)

    def __post_init__(self) -> None:
        period = tuple(
            s // math.gcd(s, d) if self.transposed else 1 for s, d in zip(self.stride, self.dilation, strict=True)
        )
        phases = itertools.product(*(range(min(p, k)) for p, k in zip(period, self.kernel_size, strict=True)))
        cells = []
        for phase in phases:
            where = tuple(slice(start, None, step) for start, step in zip(phase, period, strict=True))
            size = tuple(len(range(*w.indices(k))) for w, k in zip(where, self.kernel_size, strict=True))
            cells.append(Cell(where, size))
        object.__setattr__(self, "cells", tuple(cells))

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @property
    def kind(self) -> str:
        """Class name of the layer, without the ``Parametrized`` that torch puts before it."""
        return type(self.module).__name__.removeprefix("Parametrized")

    @property
    def spacing(self) -> tuple[float, ...]:
        """Input pixels of the layer between two neighbouring taps of a cell."""
        if self.transposed:
            return tuple(d / math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True))
        return tuple(float(d) for d in self.dilation)

    @property
    def patchify(self) -> bool:
        """Whether neighbouring outputs share no stretch of the input: stride ≥ dilation·(k − 1) + 1 on all axes."""
        axes = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        return not self.transposed and all(s >= d * (k - 1) + 1 for k, s, d in axes)

    def nothing_to_gain(self) -> Verdict | None:
        """Return why no profile can widen this kernel, or ``None`` if one can."""
        if self.offsets is not None:
            distances = self.offsets.double().square().sum(-1)
            if bool((distances != distances[:, :1]).any()):
                return None
            return Verdict("equally_far", "all taps of a group lie equally far out")
        if self.kernel_size == (1,) * self.rank:
            return Verdict("no_periphery", "×".join(["1"] * self.rank) + " kernel: no periphery")
        if max(max(cell.size) for cell in self.cells) <= 2:
            where = "taps per output phase" if self.transposed else "kernel"
            size = "×".join(map(str, self.cells[0].size))
            return Verdict("corners_only", f"{size} {where}: all taps are corners already")
        if self.patchify:
            return Verdict("patchify", "patchify (stride ≥ kernel): neighbouring outputs share no input")
        return None

    def target_energies(self, strength: float) -> Tensor:
        """Return the wanted energy of each tap relative to a uniform kernel (mean 1 in each cell).

        Shape ``kernel_size``, or ``(groups, taps)`` for non-grid taps.
        """
        if self.offsets is not None:
            return tap_profile(self.offsets, strength) * self.offsets.shape[1]
        return self.assemble([_soft_corners(cell.size, strength) for cell in self.cells])

    def assemble(self, profiles: Sequence[Tensor]) -> Tensor:
        """Return the relative energies of the whole kernel from one profile per cell."""
        whole = torch.ones(self.kernel_size, dtype=torch.float64)
        for cell, profile in zip(self.cells, profiles, strict=True):
            whole[cell.where] = profile * profile.numel()
        return whole

    def energies(self, weight: Tensor) -> Tensor:
        """Return Σ w² on each tap as float64 on the CPU, in the layout of :meth:`target_energies`.

        Args:
            weight: (out, in/groups, *kernel_size), or (in, out/groups, *kernel_size) if transposed, or more leading
                axes.
        """
        weight = weight.detach()
        if self.offsets is None:
            return sum_of_squares(weight, math.prod(self.kernel_size)).view(self.kernel_size)
        rows = self._pattern_rows()
        grouped = weight.view(rows.shape[0], -1, rows.shape[1], math.prod(self.kernel_size))
        per_channel = grouped.double().square().sum(1).cpu()
        total = torch.zeros(self.offsets.shape[:2], dtype=torch.float64)
        return total.index_add_(0, rows.flatten(), per_channel.flatten(0, 1))

    def scale_(self, weight: Tensor, factors: Tensor) -> Tensor:
        """Multiply each tap of ``weight`` by its factor, laid out as :meth:`target_energies`, in place; return it."""
        if self.offsets is None:
            if not weight.is_contiguous():
                return weight.mul_(factors.to(weight))
            # One factor for each column of the weight as a matrix: long rows multiply ten times faster than 3×3 ones.
            matrix = weight.view(weight.shape[0], -1)
            matrix.mul_(factors.flatten().to(weight).repeat(matrix.shape[1] // factors.numel()))
            return weight
        rows = self._pattern_rows()
        grouped = weight.view(rows.shape[0], -1, rows.shape[1], math.prod(self.kernel_size))
        grouped.mul_(factors[rows].unsqueeze(1).to(weight))
        return weight

    def _pattern_rows(self) -> Tensor:
        """Return which row of ``offsets`` each input channel has, (groups, in/groups): equal runs of channels."""
        assert self.offsets is not None
        channels, groups = int(self.module.in_channels), int(self.module.groups)  # type: ignore[arg-type]
        return (torch.arange(channels) * len(self.offsets) // channels).view(groups, channels // groups)

    def std(self, energies: Tensor) -> float:
        """Return the std of the taps' energy in input pixels of the layer: root of the mean of the axis variances.

        Transposed kernels: root of the mean over output phases. NaN if there is no energy.
        """
        if self.offsets is None:
            parts = [(tap_places(cell.size), energies[cell.where].numpy().ravel()) for cell in self.cells]
        else:
            parts = [(self.offsets.flatten(0, 1).double().cpu().numpy(), energies.numpy().ravel())]
        squares = [step**2 for step in self.spacing]
        return math.sqrt(sum(float(variances(*part) @ squares) for part in parts) / (len(parts) * self.rank))

    def variance_range(self) -> tuple[float, float]:
        """Return the variances (:meth:`std` squared) of strength 0 and 1."""
        if self.offsets is not None:
            return self.std(self.target_energies(0.0)) ** 2, self.std(self.target_energies(1.0)) ** 2
        return tuple(  # type: ignore[return-value]
            sum(variance(k) * step**2 for cell in self.cells for k, step in zip(cell.size, self.spacing, strict=True))
            / (self.rank * len(self.cells))
            for variance in (uniform_variance, corner_variance)
        )


@functools.lru_cache(maxsize=256)
def _soft_corners(size: tuple[int, ...], strength: float) -> Tensor:
    """Return the profile; the tensor is shared, and nobody here writes to it."""
    return soft_corners(size, strength)
