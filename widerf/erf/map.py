"""The effective receptive field (ERF) of a unit: its map and the figures taken from it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from widerf._checks import require, require_known
from widerf.erf.archive import read_fields
from widerf.erf.border import clipped_message, clipped_share
from widerf.erf.gaussian import GaussianFit, fit_gaussian
from widerf.erf.jackknife import jackknife_error
from widerf.errors import ClippedWarning, DeadUnitError
from widerf.geometry import Moments, marginal, moments
from widerf.report import counted

CLIPPED_LIMIT = 0.01
_FIGURES = ("std", "std_per_axis", "centroid", "size", "radius", "area_ratio", "excess_kurtosis", "clipped")


@dataclass(frozen=True, eq=False)
class ERF:
    """Effective receptive field of a unit: how much each input pixel moves it, on the linear scale.

    Build one with :func:`widerf.measure`, :func:`widerf.predict` or :meth:`ERF.from_energy`.

    Attributes:
        map: float64, shape of the input's spatial axes, sums to 1; an element is the share of that pixel in
            ``A = Σ_channels E[(∂y/∂x)²]`` (docs/theory.md (1)).
        center: centre of the unit's theoretical receptive field (TRF) per axis; pixel i has its centre at i.
        trf_size: pixels per axis of the TRF; None where a global path lets the unit see the whole image, or the size is
            not known.
        jump: input pixels between neighbouring units of the layer, per axis; None where it is not known.
        untraced: why the model could not be traced, None if it could; ``center`` is then the centre of the unit's cell,
            as if the cells of the map tiled the image.
        samples: draws that were averaged; None for a prediction.
        clipped: share of the mass that the image border cuts off or could have, see :func:`clipped_share`.
        blocks: float32, shape ``(blocks, *spatial)``: sums of the energy over disjoint groups of draws, scaled so that
            all of them sum to 1; the intervals come from them. None for a prediction.
        block_samples: draws in each block.
    """

    map: Tensor = field(repr=False)
    center: tuple[float, ...]
    trf_size: tuple[int, ...] | None = None
    jump: tuple[float, ...] | None = None
    untraced: str | None = None
    samples: int | None = None
    clipped: float = 0.0
    blocks: Tensor | None = field(default=None, repr=False)
    block_samples: tuple[int, ...] | None = field(default=None, repr=False)

    @classmethod
    def from_energy(
        cls,
        energy: Tensor,
        *,
        center: Sequence[float],
        trf_size: Sequence[int] | None = None,
        jump: Sequence[float] | None = None,
        untraced: str | None = None,
        samples: int | None = None,
        clipped: float | None = None,
        blocks: Tensor | None = None,
        block_samples: Sequence[int] | None = None,
        warn: bool = True,
    ) -> ERF:
        """Build an ERF from an energy map on any scale.

        Args:
            energy: ``A`` up to a factor, shape of the input's spatial axes, non-negative.
            center: centre of the TRF per axis, input pixels.
            trf_size: pixels per axis of the TRF, None if it is the whole image or not known.
            jump: input pixels between neighbouring units, None if not known.
            untraced: why ``center`` is not that of the theoretical receptive field.
            samples: draws behind ``energy``.
            clipped: share of mass that the border cuts off; by default that of :func:`clipped_share`.
            blocks: energy summed over groups of draws, on any common scale.
            block_samples: draws in each block.
            warn: whether to give a :class:`ClippedWarning` where ``clipped`` exceeds 0.01.

        Raises:
            ValueError: if the map is empty, negative, not finite or zero everywhere, or does not have an axis for each
                entry of ``center``.

        Example:
            >>> erf = ERF.from_energy(torch.tensor([1.0, 2.0, 1.0]), center=(1,), trf_size=(3,))
            >>> erf.map.tolist(), erf.std
            ([0.25, 0.5, 0.25], 0.7071067811865476)
        """
        energy = energy.detach().to("cpu", torch.float64)
        require(energy.ndim == len(center), "energy", f"have {len(center)} axes, one per entry of center", energy.ndim)
        require(
            bool(energy.isfinite().all()) and bool((energy >= 0).all()), "energy", "be finite and ≥ 0", _range(energy)
        )
        total = float(energy.sum())
        if total == 0:
            raise DeadUnitError(
                "energy must be positive somewhere (no gradient reaches the input: dead or silent unit)"
            )
        share = energy / total
        size = None if trf_size is None else tuple(trf_size)
        step = None if jump is None else tuple(float(j) for j in jump)
        middle = tuple(float(c) for c in center)
        if clipped is None:
            clipped = clipped_share(share, middle, size, step)
        if clipped > CLIPPED_LIMIT and warn:
            warnings.warn(clipped_message(share, size, clipped), ClippedWarning, stacklevel=3)
        if blocks is not None:
            blocks = (blocks.to("cpu", torch.float64) / blocks.sum(dtype=torch.float64)).float()
        counts = None if block_samples is None else tuple(block_samples)
        return cls(share, middle, size, step, untraced, samples, clipped, blocks, counts)

    @property
    def amplitude(self) -> Tensor:
        """√map scaled to sum 1: the reading of the paper that fits its Fig. 2."""
        root = self.map.sqrt()
        return root / root.sum()

    @property
    def centroid(self) -> tuple[float, ...]:
        """Centre of mass of the energy map per axis, input pixels."""
        return tuple(float(axis.mean) for axis in self._moments())

    @property
    def std_per_axis(self) -> tuple[float, ...]:
        """Standard deviation of the energy map about its centroid, per axis, input pixels."""
        return tuple(math.sqrt(float(axis.variance)) for axis in self._moments())

    @property
    def std(self) -> float:
        """Root of the mean of the axis variances of the energy map, input pixels."""
        return math.sqrt(sum(s**2 for s in self.std_per_axis) / self.map.ndim)

    @property
    def excess_kurtosis(self) -> float:
        """Mean over the axes of the marginals' excess kurtosis: 0 for a Gaussian, −1.2 for a flat map."""
        figures = [(float(axis.variance), float(axis.fourth)) for axis in self._moments()]
        values = [fourth / variance**2 - 3 for variance, fourth in figures if variance > 0]
        return sum(values) / len(values) if values else math.nan

    def size(self, level: float = 0.0455, of: Literal["amplitude", "energy"] = "amplitude") -> float:
        """The paper's 2-sigma size: side of the square with as many pixels as exceed ``level`` × the centre pixel.

        The centre pixel is the one at :attr:`center`; where that falls between pixels, the mean of those next to it.

        In one and three dimensions: a length, the side of a cube.

        Args:
            level: threshold as a share of the centre pixel, by default 1 − 95.45 %.
            of: the map it is taken on.

        Returns:
            ``count ** (1 / D)``, input pixels; NaN if the centre pixel is zero, where no level is defined.
        """
        require(0 < level < 1, "level", "be in (0, 1)", level)
        require_known(of, ("amplitude", "energy"), "of")
        values = self.map.sqrt() if of == "amplitude" else self.map
        middle = self.at_center(values)
        return float((values > level * middle).sum()) ** (1 / values.ndim) if middle > 0 else math.nan

    def radius(self, mass: float) -> float:
        """Least distance from :attr:`center` within which at least ``mass`` of the energy lies, input pixels."""
        offsets = self._offsets()
        squares = sum(o**2 for o in torch.meshgrid(*offsets, indexing="ij"))
        assert isinstance(squares, Tensor)
        return self._reach(squares.sqrt(), mass)

    def area_ratio(self, mass: float) -> float:
        """Area of the smallest square about :attr:`center` that holds ``mass`` of the energy, over the image's area.

        The square is not cut at the image border, so that the ratio can exceed 1 for a unit off the middle. In one and
        three dimensions: length and volume.
        """
        grids = torch.meshgrid(*[o.abs() for o in self._offsets()], indexing="ij")
        side = 2 * self._reach(torch.stack(grids).amax(0), mass) + 1
        return float(side**self.map.ndim / self.map.numel())

    def gaussian_fit(self) -> GaussianFit:
        """Fit a Gaussian with axis-parallel axes to the energy map by least squares.

        Raises:
            ValueError: if the map has fewer pixels than the fit has parameters.
        """
        return fit_gaussian(self.map.numpy(), self.centroid, self.std_per_axis)

    def standard_error(self, figure: str | Callable[[ERF], float] = "std", **arguments: Any) -> Any:
        """Standard error of a figure over the draws, by the jackknife.

        See :func:`widerf.erf.jackknife.jackknife_error`.

        Args:
            figure: name of a figure, or a function of an ERF.
            **arguments: what the figure takes, e.g. ``mass=0.5``.

        Returns:
            A float, or a tuple for a figure per axis.

        Raises:
            ValueError: for a prediction, which has no sampling error, and for a measurement with a single draw.
        """
        require(
            self.blocks is not None, "figure", "belong to a measured ERF; a prediction has no sampling error", figure
        )
        assert self.blocks is not None and self.block_samples is not None
        require(len(self.blocks) > 1, "samples", "be at least 2 for a standard error", self.samples)
        full = np.asarray(_figure(self, figure, arguments))
        total = self.blocks.sum(0, dtype=torch.float64)
        left_out = [replace(self, map=_unit_sum(total - block), blocks=None) for block in self.blocks]
        partial = np.asarray([_figure(erf, figure, arguments) for erf in left_out])
        error = jackknife_error(full, partial, self.block_samples)
        return float(error) if error.ndim == 0 else tuple(map(float, error))

    def interval(self, figure: str | Callable[[ERF], float] = "std", confidence: float = 0.95, **arguments: Any) -> Any:
        """Confidence interval of a figure of a measured ERF, by the jackknife and Student's t.

        Args:
            figure: name of a figure, or a function of an ERF.
            confidence: probability that the interval covers the true figure.
            **arguments: what the figure takes, e.g. ``mass=0.5``.

        Returns:
            ``(low, high)``; for a figure per axis, a tuple of such pairs.

        Raises:
            ValueError: see :meth:`standard_error`; or if ``confidence`` is not in (0, 1).
        """
        from scipy.stats import t

        require(0 < confidence < 1, "confidence", "be in (0, 1)", confidence)
        error = np.asarray(self.standard_error(figure, **arguments))
        assert self.blocks is not None
        value = np.asarray(_figure(self, figure, arguments))
        half = error * t.ppf((1 + confidence) / 2, len(self.blocks) - 1)
        pairs = [(float(v - w), float(v + w)) for v, w in zip(np.atleast_1d(value), np.atleast_1d(half), strict=True)]
        return pairs[0] if value.ndim == 0 else tuple(pairs)

    def __repr__(self) -> str:
        figures = f"std {self.std:.3g}, 2σ size {self.size():.3g}"
        field = "whole image" if self.trf_size is None else "×".join(map(str, self.trf_size))
        field = "not known" if self.untraced is not None else field
        how = "predicted" if self.samples is None else f"measured, {counted(self.samples, 'draw')}"
        clipped = f", {self.clipped:.0%} clipped" if self.clipped > CLIPPED_LIMIT else ""
        image = "×".join(map(str, self.map.shape))
        return f"ERF({figures} of {image} pixels, theoretical field {field}{clipped}, {how})"

    def _repr_html_(self) -> str:
        from widerf.erf import plot

        return plot.html(self)

    def plot(self, ax: Any = None) -> Any:
        """Draw the map with its 2-sigma contour, the TRF and the fitted Gaussian; see :func:`widerf.erf.plot.draw`."""
        from widerf.erf import plot

        return plot.draw(self, ax)

    def save(self, path: str | Path) -> None:
        """Write the ERF: ``.npz`` keeps it for :meth:`load`, ``.png`` (or ``.svg``, ``.pdf``) draws it.

        Raises:
            ValueError: for any other ending.
        """
        path = Path(path)
        require(path.suffix in (".npz", ".png", ".svg", ".pdf"), "path", "end in .npz, .png, .svg or .pdf", str(path))
        if path.suffix != ".npz":
            from widerf.erf import plot

            plot.save(plot.figure(self), path)
            return
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        arrays: dict[str, Any] = {name: np.asarray(v) for name, v in values.items() if v is not None}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> ERF:
        """Read an ERF that :meth:`save` wrote as ``.npz``.

        Raises:
            ValueError: if the file is damaged, or if what it holds is no ERF; the message says what is wrong.
        """
        return cls(**read_fields(path, tuple(cls.__dataclass_fields__)))

    def _moments(self) -> list[Moments]:
        return [moments(marginal(self.map, axis)) for axis in range(self.map.ndim)]

    def _offsets(self) -> list[Tensor]:
        return [torch.arange(n, dtype=torch.float64) - c for n, c in zip(self.map.shape, self.center, strict=True)]

    def _reach(self, distance: Tensor, mass: float) -> float:
        require(0 < mass <= 1, "mass", "be in (0, 1]", mass)
        ordered, index = distance.flatten().sort()
        held = self.map.flatten()[index].cumsum(0)
        # The sum of all pixels may miss 1 by rounding.
        first = int(torch.searchsorted(held, mass * float(held[-1]) - 1e-12))
        return float(ordered[min(first, len(ordered) - 1)])

    def at_center(self, values: Tensor) -> float:
        """Return the value of a map at :attr:`center`; between pixels, the mean of those next to it."""
        for c, n in zip(self.center, self.map.shape, strict=True):
            low = min(max(math.floor(c + 1e-9), 0), n - 1)
            high = min(max(math.ceil(c - 1e-9), 0), n - 1)
            values = values[[low, high]].mean(0)
        return float(values)


def _figure(erf: ERF, figure: str | Callable[[ERF], float], arguments: dict[str, Any]) -> Any:
    if callable(figure):
        return figure(erf)
    require_known(figure, _FIGURES, "figure")
    if figure == "clipped":
        return clipped_share(erf.map, erf.center, erf.trf_size, erf.jump)
    value = getattr(erf, figure)
    return value(**arguments) if callable(value) else value


def _unit_sum(energy: Tensor) -> Tensor:
    energy = energy.clamp_min(0)
    return energy / energy.sum()


def _range(values: Tensor) -> str:
    return f"values from {float(values.min()):.3g} to {float(values.max()):.3g}"
