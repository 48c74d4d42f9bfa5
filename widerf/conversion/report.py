"""What a conversion did to each convolution, and to the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from widerf.report import Report


@dataclass(frozen=True)
class LayerConversion:
    """What `convert` did to one convolution.

    Attributes:
        name: module name.
        kind: class of the layer before.
        kernel_size: taps per axis.
        extent: side of the window per axis; None if left dense.
        jump: input pixels of the network between neighbouring units of the layer's input (with ``input_size``).
        map_size: spatial shape of the layer's input (with ``input_size``).
        pattern: what its taps are drawn by; None if left dense.
        pattern_groups: groups of input channels with taps of their own.
        channels_per_cell: fewest and most input channels that read a cell of the window.
        verdict: "sparse", or why it was left dense.
    """

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    extent: tuple[int, ...] | None = None
    jump: tuple[float, ...] | None = None
    map_size: tuple[int, ...] | None = None
    pattern: str | None = None
    pattern_groups: int | None = None
    channels_per_cell: tuple[int, int] | None = None
    verdict: str = "sparse"

    @property
    def converted(self) -> bool:
        """Whether the layer is sparse now (with ``dry_run``: would be)."""
        return self.verdict == "sparse"


@dataclass(frozen=True)
class ConversionReport(Report[LayerConversion]):
    """What `convert` did, layer by layer; prints as a table.

    Attributes:
        gain: predicted std of the network's ERF, after over before (with ``input_size``).
        erf_std: those two, before and after, in input pixels.
        erf_kurtosis: its excess kurtosis, before and after: 0 for a Gaussian, above for heavy tails.
        target: the gain that was asked for.
        target_kurtosis: the excess kurtosis that was asked for.
        weights: number of parameters, before and after.
        multiplications: of all convolutions for one input, before and after (with ``input_size``).
        dry_run: whether the model was left as it was.
    """

    gain: float | None = None
    erf_std: tuple[float, float] | None = None
    erf_kurtosis: tuple[float, float] | None = None
    target: float | None = None
    target_kurtosis: float | None = None
    weights: tuple[int, int] | None = None
    multiplications: tuple[int, int] | None = None
    dry_run: bool = False
    columns: ClassVar[Mapping[str, str | Callable[[Any], object]]] = {
        "layer": "name",
        "kind": "kind",
        "kernel": "kernel_size",
        "extent": "extent",
        "jump": "jump",
        "map": "map_size",
        "pattern": "pattern",
        "pattern groups": "pattern_groups",
        "verdict": "verdict",
    }

    def lines(self) -> list[str]:
        """Return how many layers were converted, and what that does to the network."""
        changed = sum(row.converted for row in self.rows)
        would = "would become sparse (dry run)" if self.dry_run else "became sparse"
        said = [f"{changed} of {len(self.rows)} convolutions {would}"]
        if self.weights is not None:
            said.append(f"weights: {self.weights[0]:,} before, {self.weights[1]:,} after")
        if self.multiplications is not None:
            said.append("multiplications: {:,} before, {:,} after".format(*self.multiplications))
        if self.erf_std is not None and self.gain is not None:
            wanted = "" if self.target is None else f" (target ×{self.target:g})"
            said.append(
                "predicted ERF std: {:.2f} to {:.2f} pixels".format(*self.erf_std) + f", ×{self.gain:.3f}{wanted}"
            )
        if self.erf_kurtosis is not None:
            wanted = "" if self.target_kurtosis is None else f" (wanted {self.target_kurtosis:g})"
            said.append("predicted excess kurtosis: {:.2f} to {:.2f}".format(*self.erf_kurtosis) + wanted)
        return said
