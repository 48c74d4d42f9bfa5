"""Mixtures of dense and wide channels that give the predicted ERF a wanted tail at a wanted width.

At equal σ, the fewer channels are wide the wider their windows are, and the heavier the tail: a part of the channels
stays near, a part reaches far.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from widerf._checks import require
from widerf.conversion.growth import Windows
from widerf.patterns.named import Mixture

NEAR = 0.1  # how far from the wanted excess kurtosis is near enough
WIDE = "partition"  # the wide channels where no pattern is named: half of them with half dense ones is `mixed`
BLOCK = 16  # neighbouring channels that share their taps: the fewer, the finer the shares
_SHARES = (1.0, 0.5, 0.25, 0.125)
_ROUNDS = 3


@dataclass(frozen=True)
class Design:
    """Windows of the wanted gain, for one share of wide channels.

    Attributes:
        share: of the channels that are wide.
        windows: of the layers.
        kurtosis: excess kurtosis of the predicted ERF with them.
        met: whether their gain is the wanted one within the tolerance.
    """

    share: float
    windows: Windows
    kurtosis: float
    met: bool = True


def mixture(pattern: Any, share: float) -> str | Mixture:
    """Return the pattern of which ``share`` of the channels is ``pattern`` and the rest dense.

    Example:
        >>> mixture("stratified", 0.25), mixture("stratified", 1.0)
        ([('dense', 0.75), ('stratified', 0.25)], 'stratified')
    """
    return pattern if share == 1 else [("dense", 1 - share), (pattern, share)]


def design_for(search: Callable[[float], Design], wanted: float) -> Design:
    """Return the design whose excess kurtosis is nearest to the wanted one, from a coarse scan and a bisection.

    Args:
        search: from a share of wide channels to the windows of the wanted gain; raises ValueError where there are none.
        wanted: excess kurtosis.

    Raises:
        ValueError: if all channels wide do not give the gain, or if the wanted kurtosis is out of reach: the message
            names the least and the most.
    """
    found = [search(_SHARES[0])]
    for share in _SHARES[1:]:
        try:
            found.append(search(share))
        except ValueError:  # so few wide channels do not give the gain, and fewer will not
            break
    low, high = (pick(design.kurtosis for design in _met(found)) for pick in (min, max))
    rule = f"be between {low:.2f} and {high:.2f}, what dense and wide channels reach at that target"
    require(low - NEAR <= wanted <= high + NEAR, "kurtosis", rule, wanted)
    for _ in range(_ROUNDS):
        best = min(_met(found), key=lambda design: abs(design.kurtosis - wanted))
        between = _bracket(found, wanted)
        if abs(best.kurtosis - wanted) <= NEAR or between is None:
            return best
        try:
            found.append(search(between))
        except ValueError:  # taps are drawn anew for every share: one may fall short where its neighbours do not
            return best
    return min(_met(found), key=lambda design: abs(design.kurtosis - wanted))


def _met(found: Sequence[Design]) -> Sequence[Design]:
    """Return the designs that give the wanted gain; all, where whole cells are too coarse for any."""
    return [design for design in found if design.met] or found


def _bracket(found: Sequence[Design], wanted: float) -> float | None:
    """Return the share midway between neighbours with a lighter and a heavier tail than the wanted one."""
    for a, b in itertools.pairwise(sorted(found, key=lambda design: design.share)):
        if min(a.kurtosis, b.kurtosis) <= wanted <= max(a.kurtosis, b.kurtosis):
            return (a.share + b.share) / 2
    return None
