"""Errors that name the argument, the rule and the value received."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def require(holds: bool, argument: str, rule: str, value: object, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` unless ``holds``.

    Args:
        holds: whether the rule holds.
        argument: name of the argument, as the caller wrote it.
        rule: what the argument must do, e.g. ``"be in [0, 1]"``.
        value: what was received instead.
        error: class of the error, ``ValueError`` or ``TypeError``.

    Example:
        >>> require(False, "strength", "be in [0, 1]", 1.5)
        Traceback (most recent call last):
        ...
        ValueError: strength must be in [0, 1], got 1.5
    """
    if not holds:
        raise error(f"{argument} must {rule}, got {value!r}")


def require_known(name: str, known: Iterable[str], argument: str) -> None:
    """Raise ``ValueError`` unless ``name`` is among ``known``; the message gives the nearest name that is.

    Example:
        >>> require_known("mixt", ["mixed", "grid"], "pattern")
        Traceback (most recent call last):
        ...
        ValueError: pattern must be one of 'mixed', 'grid', got 'mixt'; did you mean 'mixed'?
    """
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(map(repr, names[:20])) + (f", … ({len(names)} in all)" if len(names) > 20 else "")
    raise ValueError(f"{argument} must be one of {listed}, got {name!r}{hint}")
