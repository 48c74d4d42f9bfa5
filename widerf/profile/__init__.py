"""The profiles that widen a kernel (:func:`soft_corners`) or a whole network (:func:`allocate`) at the least change."""

from widerf.profile.network import allocate, largest_gain
from widerf.profile.single import (
    check_strength,
    corner_variance,
    soft_corners,
    solve_axes,
    strength_of,
    tap_profile,
    uniform_variance,
)

__all__ = [
    "allocate",
    "check_strength",
    "corner_variance",
    "largest_gain",
    "soft_corners",
    "solve_axes",
    "strength_of",
    "tap_profile",
    "uniform_variance",
]
