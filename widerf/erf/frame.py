"""Where the units of an ERF see: the geometry that both roads put round an energy map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from widerf.erf.receptive import ReceptiveField


@dataclass(frozen=True)
class Frame:
    """Centre, theoretical size and jump of one unit, or of several that are looked at together.

    Attributes:
        center: middle of what the units see, per axis, in input pixels.
        trf_size: pixels per axis from the first to the last that any of them sees; ``None`` if they see the whole image
            besides (global paths), or if nobody knows.
        jump: input pixels between neighbouring units, per axis.
        untraced: why the theoretical field is not known, or ``None``.
    """

    center: tuple[float, ...]
    trf_size: tuple[int, ...] | None
    jump: tuple[float, ...]
    untraced: str | None = None

    @classmethod
    def of(cls, field: ReceptiveField, units: Sequence[tuple[int, ...]]) -> Frame:
        """Return the box that the units see together."""
        spans = [field.interval(unit) for unit in units]
        first = [min(ends) for ends in zip(*(low for low, _ in spans), strict=True)]
        last = [max(ends) for ends in zip(*(high for _, high in spans), strict=True)]
        return cls(
            center=tuple((a + b) / 2 for a, b in zip(first, last, strict=True)),
            trf_size=None if field.global_paths else tuple(b - a + 1 for a, b in zip(first, last, strict=True)),
            jump=field.jump,
        )

    @classmethod
    def of_cells(cls, image: Sequence[int], shape: Sequence[int], units: Sequence[tuple[int, ...]], why: str) -> Frame:
        """Return what stands in where the model cannot be traced: the units' cells, which tile the image."""
        jump = tuple(n / m for n, m in zip(image, shape, strict=True))
        middle = [sum(places) / len(units) for places in zip(*units, strict=True)]
        return cls(tuple((m + 0.5) * j - 0.5 for m, j in zip(middle, jump, strict=True)), None, jump, why)
