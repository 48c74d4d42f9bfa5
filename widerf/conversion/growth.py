"""Windows that grow with depth until the predicted ERF is as wide as wanted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from widerf._checks import require
from widerf.conversion.plan import Extent, Step
from widerf.conversion.windows import widest_extent

TOLERANCE = 0.03  # of the wanted gain
_CLOSE = 0.01  # where the bisection ends
_ROUNDS = 7
_POLISH = 24  # trials of single layers
_SCAN = (0.25, 0.5, 0.75, 1.0)

Windows = dict[str, Extent]


def grown(steps: Sequence[Step], growth: float) -> Windows:
    """Return the windows at a growth between 0 (kernels) and 1 (as wide as the maps), the deeper the wider.

    S = k·(map/k)^g with g = growth^(1/(depth + ½)), rounded to the kernel's parity: geometric in the growth and, at
    equal maps, in the depth.
    """
    windows = {}
    for step in steps:
        if step.free and step.place is not None:
            share = growth ** (1 / (step.depth + 0.5))
            most = widest_extent(step.kernel, step.place.before)
            pairs = zip(step.kernel.kernel_size, most, strict=True)
            windows[step.kernel.name] = tuple(k + 2 * round((k * (m / k) ** share - k) / 2) for k, m in pairs)
    return windows


class _Trials:
    """Windows that were tried, and the gain of each; every one is predicted once."""

    def __init__(self, gain_of: Callable[[Windows], float | None], target: float) -> None:
        self._gain_of, self._target = gain_of, target
        self.seen: list[tuple[float, Windows]] = []

    def gain(self, windows: Windows) -> float:
        for gain, tried in self.seen:
            if tried == windows:
                return gain
        value = self._gain_of(windows)
        require(value is not None, "target", "be left out where the ERF cannot be predicted", self._target)
        assert value is not None
        self.seen.append((value, windows))
        return value

    def nearest(self) -> tuple[float, Windows]:
        """Return how far the best trial is off, relative to the target, and its windows."""
        gain, windows = min(self.seen, key=lambda trial: abs(trial[0] / self._target - 1))
        return abs(gain / self._target - 1), windows


def windows_for_gain(
    steps: Sequence[Step], gain_of: Callable[[Windows], float | None], target: float, remark: str = ""
) -> Windows:
    """Return the least growth of the windows (`grown`) at which the predicted gain is the target.

    A coarse scan from below brackets it, bisection closes in; where whole cells make too coarse a step, single layers
    are tried one cell wider and narrower.

    Args:
        steps: the layers; their places are known.
        gain_of: predicted std with those windows over today's; None if it cannot be predicted.
        target: wanted gain, more than 1.
        remark: what else to say if it is out of reach.

    Raises:
        ValueError: if no windows reach the target within 3 per cent: the message names the largest possible gain.
    """
    trials = _Trials(gain_of, target)
    high = next((g for g in _SCAN if trials.gain(grown(steps, g)) >= target * (1 - _CLOSE)), None)
    if high is None:
        most = max(gain for gain, _ in trials.seen)
        rule = f"be at most {most:.3f}, the largest predicted gain of windows no wider than their maps{remark}"
        require(most >= target * (1 - TOLERANCE), "target", rule, target)
        return trials.nearest()[1]
    low = max((g for g in _SCAN if g < high), default=0.0)
    for _ in range(_ROUNDS):
        if trials.nearest()[0] <= _CLOSE:
            return trials.nearest()[1]
        middle = (low + high) / 2
        low, high = (low, middle) if trials.gain(grown(steps, middle)) > target else (middle, high)
    return _polished(trials, steps)


def _polished(trials: _Trials, steps: Sequence[Step]) -> Windows:
    """Return the nearest windows after single layers were tried one cell wider and narrower, the deepest first.

    Taps that are drawn anew at each width make the gain jump: a bisection may end beside the target.
    """
    deepest = sorted((step for step in steps if step.free and step.place), key=lambda step: step.depth, reverse=True)
    left = _POLISH
    while left > 0:
        best = trials.nearest()[1]
        for step, wider in itertools.product(deepest, (2, -2)):
            if trials.nearest()[0] <= TOLERANCE or left <= 0:
                return trials.nearest()[1]
            assert step.place is not None
            most = widest_extent(step.kernel, step.place.before)
            sides = zip(step.kernel.kernel_size, best[step.kernel.name], most, strict=True)
            side = tuple(min(max(n + wider, k), m) for k, n, m in sides)
            trials.gain({**best, step.kernel.name: side})
            left -= 1
    return trials.nearest()[1]
