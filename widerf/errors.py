"""The errors and warnings that a caller may want to catch, each defined once."""

from __future__ import annotations


class UntreatedOperatorError(NotImplementedError):
    """An operator has no rule; the message names it and its module."""


class DeadUnitError(ValueError):
    """No gradient reaches the input from a unit: it is dead or silent, and has no effective receptive field."""


class ClippedWarning(UserWarning):
    """The image border cuts off, or could cut off, more than one per cent of an ERF's mass."""
