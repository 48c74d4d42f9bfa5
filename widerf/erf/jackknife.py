"""Standard errors from groups of draws that are left out one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def jackknife_error(full: Any, partial: Any, sizes: Sequence[int]) -> Any:
    """Standard error of an estimate by the delete-a-group jackknife with groups of unequal size.

    With h_j = n / m_j for group size m_j and n draws in all, the pseudo-values are h_j θ − (h_j − 1) θ_(j); their
    weighted spread is Busing, Meijer and van der Leeden (1999), "Delete-m jackknife for unequal m", eq. 10.

    Args:
        full: the estimate θ from all draws, an array of any shape.
        partial: the estimates θ_(j) without group j, shape ``(groups, *full.shape)``.
        sizes: draws m_j in each group.

    Returns:
        Array of the shape of ``full``.

    Example:
        >>> draws = np.array([1.0, 2.0, 4.0, 5.0])
        >>> without = (draws.sum() - draws) / 3
        >>> textbook = draws.std(ddof=1) / 2
        >>> abs(float(jackknife_error(draws.mean(), without, [1, 1, 1, 1])) - float(textbook)) < 1e-12
        True
    """
    full, partial = np.asarray(full), np.asarray(partial)
    h = (sum(sizes) / np.asarray(sizes, dtype=float)).reshape((-1,) + (1,) * (partial.ndim - 1))
    pseudo = h * full - (h - 1) * partial
    center = len(h) * full - ((h - 1) / h * partial).sum(0)
    return np.sqrt(((pseudo - center) ** 2 / (h - 1)).mean(0))
