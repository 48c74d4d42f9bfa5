"""The mildest call that makes a network see objects of a given size, or the one that comes nearest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from widerf.conversion.swap import convert
from widerf.init import apply
from widerf.survey.findings import Finding, Look, Remedy, after, call_of, waking

_ASKED = 1.5  # ratio up to which init.apply is asked for it: 7×7 kernels can have no more
_STRENGTHS = (0.5, 1.0)


@dataclass(frozen=True)
class Levers:
    """What can be pulled on a network for a wider ERF.

    Attributes:
        model: the network.
        input_size: ``(channels, *spatial)``.
        silent: names of scales that silence a branch.
        trained: whether the weights are: then they are neither re-weighted nor woken.
        whole: whether the last map is looked at, to which ``target=`` refers.
        groups: arguments of convert that choose layers, the mildest choice first.
        look: 2-sigma size of a model's ERF.
    """

    model: nn.Module
    input_size: tuple[int, ...]
    silent: Sequence[str]
    trained: bool
    whole: bool
    groups: Sequence[Mapping[str, Any]]
    look: Look

    def pull(self, finding: Finding, wanted: float) -> Finding:
        """Return the finding with the mildest call that suffices; else with the one that gives most, which it says."""
        best = finding
        for remedy, found in self._tried(finding, wanted):
            if found is not None and found > (best.after or finding.before or 0.0):
                best = replace(finding, call=remedy.text, after=found)
            if found is not None and found >= wanted:
                return best
        most = "none widens it" if best.after is None else f"the largest that one call gives is {best.after:.3g}"
        return replace(best, what=f"{best.what}; no lever reaches that: {most}")

    def _tried(self, finding: Finding, wanted: float) -> Iterator[tuple[Remedy, float | None]]:
        reweighted = [] if self.trained else list(self._reweighted(wanted / (finding.before or wanted)))
        first, last = (reweighted, []) if finding.name == "erf_too_small" else ([], reweighted)  # within the field
        if self.silent and not self.trained:
            first = [waking(self.model, list(self.silent)), *first]
        for remedy in first:
            yield remedy, after(self.model, remedy, self.look)
        for group in self.groups:
            yield from self._converted(group, wanted)
        for remedy in last:
            yield remedy, after(self.model, remedy, self.look)

    def _reweighted(self, ratio: float) -> Iterator[Remedy]:
        if self.whole and ratio <= _ASKED:
            yield call_of("init.apply", apply, target=math.ceil(100 * ratio) / 100, input_size=self.input_size)
        for strength in _STRENGTHS:
            yield call_of("init.apply", apply, strength=strength)

    def _converted(self, group: Mapping[str, Any], wanted: float) -> Iterator[tuple[Remedy, float | None]]:
        """Try the windows that convert chooses, the widest, and if they suffice, by halving, the narrowest that do."""
        pattern = {"pattern": "stratified"} if self.trained else {}

        def tried(**extent: int) -> tuple[Remedy, float | None]:
            remedy = call_of("convert", convert, **extent, **group, **pattern, input_size=self.input_size)
            return remedy, after(self.model, remedy, self.look)

        yield tried()
        low, high = 1, max(self.input_size[1:]) // 2
        enough = tried(extent=2 * high + 1)
        while high - low > 1 and enough[1] is not None and enough[1] >= wanted:
            middle = (low + high) // 2
            found = tried(extent=2 * middle + 1)
            if found[1] is not None and found[1] >= wanted:
                high, enough = middle, found
            else:
                low = middle
        yield enough
