"""What the initialiser did, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from widerf.report import Report, Verdict


@dataclass(frozen=True)
class LayerChange:
    """What :func:`widerf.init.apply` did to one convolution.

    Attributes:
        name: module name.
        kind: class of the layer.
        kernel_size: taps per axis.
        jump: input pixels of the network between two neighbouring input units of the layer (with ``input_size``).
        strength: strength that the layer now has; ``None`` where it was left alone.
        std_before: std of the kernel's energy over its taps, in input pixels of the layer: root of the mean of the axis
            variances, as the weights are, not as they are expected to be.
        std_after: the same afterwards.
        border_before: share of the layer's output energy that zero padding costs on an even map (with ``input_size``).
        border_after: the same afterwards.
        verdict: ``"widened"``, or why not; what should be known about a widened layer follows a comma. A string for
            people with a ``code`` for programs.
    """

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    jump: tuple[float, ...] | None
    strength: float | None
    std_before: float | None
    std_after: float | None
    verdict: Verdict
    border_before: float | None = None
    border_after: float | None = None

    @property
    def widened(self) -> bool:
        """Whether the kernel's profile was set."""
        return self.verdict.code == "widened"


@dataclass(frozen=True)
class InitReport(Report[LayerChange]):
    """What :func:`apply` did, layer by layer; a sequence of :class:`LayerChange` that prints as a table.

    Attributes:
        gain: predicted std of the network's ERF, after over before (with ``input_size``).
        erf_std: those two, in input pixels.
        signal_kept: what zero padding leaves of the signal energy at the end of the widened layers if they follow each
            other in one chain, after over before (with ``input_size``).
        dry_run: whether the model was left as it was.
    """

    gain: float | None = None
    erf_std: tuple[float, float] | None = None
    signal_kept: float | None = None
    dry_run: bool = False
    columns: ClassVar[Mapping[str, str | Callable[[Any], object]]] = {
        "layer": "name",
        "kind": "kind",
        "kernel": "kernel_size",
        "jump": "jump",
        "strength": "strength",
        "std before": "std_before",
        "after": "std_after",
        "border loss": "border_after",
        "verdict": "verdict",
    }

    def lines(self) -> list[str]:
        """Return how many layers were widened, and what that does to the network."""
        changed = sum(row.widened for row in self.rows)
        would = "would be widened (dry run)" if self.dry_run else "widened"
        said = [f"{changed} of {len(self.rows)} convolutions {would}"]
        if self.gain is not None:
            pixels = " to ".join(f"{std:.2f}" for std in self.erf_std or ())
            said.append(f"predicted ERF std of the network: ×{self.gain:.3f} ({pixels} pixels)")
        if self.signal_kept is not None:
            said.append(f"signal energy after zero padding, if the layers follow each other: ×{self.signal_kept:.2f}")
        return said
