"""The verdicts of the initialiser: each code once, with the sentence that people read."""

from __future__ import annotations

from widerf.report import Verdict

WIDENED = Verdict("widened", "widened")
NOT_SELECTED = Verdict("not_selected", "not selected")
FROZEN = Verdict("frozen", "frozen (requires_grad is False): name it in only= to change it")
NOT_FINITE = Verdict("not_finite", "left alone: its weights are not finite")
OVERFLOW = Verdict("overflow", "left alone: its outer taps would leave the range of its half-precision type")
ZERO = Verdict("zero", "left alone: all its weights are zero")
AT_STRENGTH_ONE = Verdict("emptied", "left alone: at strength 1 already; only base= can fill its empty taps again")
EMPTY_PERIPHERY = Verdict(
    "empty_periphery", "left alone: empty periphery (all its energy lies where rescaling cannot move it)"
)
AS_IT_WAS = Verdict("as_it_was", "strength 0: as it was")
BY_AN_EARLIER_CALL = Verdict("widened", "widened by an earlier call")
NO_EFFECT = Verdict("no_effect", "widening it does not widen the network's ERF")


def not_lasting(why: str) -> Verdict:
    """Return the verdict on a layer whose weight cannot have a lasting profile."""
    return Verdict("not_lasting", f"left alone: a lasting profile needs a plain weight of its own, and {why}")


def unknown_weight(why: str) -> Verdict:
    """Return the verdict on a layer whose weight comes about in a way that widerf does not know."""
    return Verdict("unknown_weight", f"left alone: {why}")


def parametrised(why: str) -> Verdict:
    """Return the verdict on a layer whose parametrisation does not keep a profile."""
    return Verdict("parametrised", f"left alone: {why}")


def tied(owner: str) -> Verdict:
    """Return the verdict on a layer that shares its weight with an earlier one."""
    return Verdict("tied", f"tied to {owner}: changed there, once")
