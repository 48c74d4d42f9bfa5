"""The course of one training: what each look at the validation images said, and how it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from experiments.harness.runs import Record

ARRIVED, BUDGET, DIVERGED = "arrived", "budget", "diverged"
LOOKS = 2  # in a row at the target make a crossing: one look alone can be luck


@dataclass
class Curve:
    """Validation accuracy against steps.

    Attributes:
        target: accuracy that counts as learnt.
        steps, accuracy, loss: of each look. A run whose loss is no number any more ends at that look.

    Example:
        >>> curve = Curve(0.9)
        >>> for step, accuracy in [(10, 0.91), (20, 0.8), (30, 0.92), (40, 0.95)]:
        ...     curve.look(step, accuracy, loss=0.1)
        >>> curve.steps_to_target, curve.outcome
        (30, 'arrived')
    """

    target: float
    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def look(self, step: int, accuracy: float, loss: float) -> None:
        """Note one look."""
        self.steps.append(step)
        self.accuracy.append(accuracy)
        self.loss.append(loss)

    @property
    def steps_to_target(self) -> int | None:
        """The first of two looks in a row at the target; None: never."""
        there = [accuracy >= self.target for accuracy in self.accuracy]
        looks = range(len(there) - LOOKS + 1)
        return next((self.steps[look] for look in looks if all(there[look : look + LOOKS])), None)

    @property
    def diverged(self) -> bool:
        """Whether the loss is no number any more."""
        return bool(self.loss) and not math.isfinite(self.loss[-1])

    @property
    def outcome(self) -> str:
        """How the run ended: at the target, at the end of its budget, or with a loss that is no number."""
        return DIVERGED if self.diverged else ARRIVED if self.steps_to_target is not None else BUDGET

    def record(self) -> Record:
        """Return what a line of results holds. JSON knows no NaN: a loss that is none is None."""
        return {
            "outcome": self.outcome,
            "steps_to_target": self.steps_to_target,
            "accuracy": self.accuracy[-1],
            "curve": {
                "step": self.steps,
                "accuracy": self.accuracy,
                "loss": [loss if math.isfinite(loss) else None for loss in self.loss],
            },
        }
