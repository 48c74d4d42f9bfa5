"""The profiles that widen a kernel, or a whole network, at the least change: two convex programmes.

A *profile* v is the share of a kernel's energy (its second moment) that each tap gets: v ≥ 0, Σ v = 1. The energies of
stacked layers add up by convolution, so the variance of the effective receptive field is a *linear* function of the
profiles (docs/theory.md (4)), and "as much variance at the least change" is a convex programme:

    minimise   Σ_b ω_b KL(v_b ‖ uniform)   over distributions v_b   subject to   Σ_b A_b v_b ≥ t.        (P)

Its Lagrange conditions give v_b ∝ exp(A_bᵀ λ / ω_b) with λ ≥ 0: a Gibbs law. :func:`soft_corners` is (P) for one
kernel, :func:`allocate` is (P) for all kernels of a network under one common constraint. It is solved in
:mod:`widerf.profile.programme`.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widerf._checks import require
from widerf.geometry import tap_coordinates
from widerf.profile.programme import RESIDUAL, Array, Programme, solve


def check_strength(strength: float) -> float:
    """Return ``strength`` as a float, or raise what says that it must be in [0, 1]."""
    given: Any = strength  # NumPy's and torch's scalars too, whatever the annotation says
    real = isinstance(given, numbers.Real) and not isinstance(given, bool)
    require(real, "strength", "be a number", strength, TypeError)
    require(0.0 <= strength <= 1.0, "strength", "be in [0, 1]", strength)
    return float(strength)


def check_kernel_size(kernel_size: Sequence[int], argument: str = "kernel_size") -> tuple[int, ...]:
    """Return ``kernel_size`` as a tuple, or raise what says that it must hold 1 to 3 positive integers."""
    size = tuple(kernel_size)
    whole = all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in size)
    require(1 <= len(size) <= 3 and whole, argument, "hold 1 to 3 integers of at least 1", kernel_size)
    return size


def uniform_variance(taps: int) -> float:
    """Return (k² − 1)/12, the variance of k equal taps on an axis (docs/theory.md (4)), in taps²."""
    return (taps**2 - 1) / 12


def corner_variance(taps: int) -> float:
    """Return ((k − 1)/2)², the largest variance that k taps on an axis can have, in taps²."""
    return ((taps - 1) / 2) ** 2


_axis_profiles: dict[tuple[int, float], Array] = {}  # solved ones; small, and few strengths are ever asked for


def solve_axes(lengths: Iterable[int], strength: float) -> None:
    """Solve the soft corners of several axis lengths in one programme, for later calls of :func:`soft_corners`.

    Most of the time of a small programme goes into setting it up, so a network's kernel sizes are solved together.
    """
    open_ = sorted({k for k in lengths if k > 2 and (k, strength) not in _axis_profiles})
    if not open_ or not RESIDUAL <= strength <= 1.0 - RESIDUAL:
        return
    block = np.repeat(np.arange(len(open_)), open_)
    squares = np.concatenate(
        [np.linspace(-1.0, 1.0, k) ** 2 for k in open_]
    )  # m² in [0, 1]: Clarabel needs the scaling
    features = np.where(block[:, None] == np.arange(len(open_)), squares[:, None], 0.0)
    bounds = np.array([(1.0 - strength) * uniform_variance(k) / corner_variance(k) + strength for k in open_])
    energies = solve(Programme(features, block, np.ones(len(open_)), bounds))
    _axis_profiles.update({(k, strength): energies[block == index] for index, k in enumerate(open_)})


def _axis_profile(taps: int, strength: float) -> Array:
    """Return the soft-corner profile of one axis of ``taps`` taps."""
    if taps <= 2 or strength < RESIDUAL:
        return np.full(taps, 1.0 / taps)
    if strength > 1.0 - RESIDUAL:
        return np.array([0.5 if tap in (0, taps - 1) else 0.0 for tap in range(taps)])
    solve_axes([taps], strength)
    return _axis_profiles[taps, strength]


def soft_corners(kernel_size: Sequence[int], strength: float) -> Tensor:
    """Return the profile nearest to uniform that has a wanted share of the possible variance on every axis.

    With m the centred tap coordinates, the profile solves

        maximise  H(v) = −Σ v log v   subject to   Σ v = 1   and, on each axis i,
        Σ v m_i² ≥ (1 − s)·(k_i² − 1)/12 + s·((k_i − 1)/2)²,

    which is the least KL(v ‖ uniform) with that much variance (docs/theory.md (7)). The constraints see only the axis
    marginals of v, and H(v) ≤ Σ_i H(v_i) with equality for the product of the marginals alone. So the optimum is the
    product of D one-dimensional optima, and those are what is solved: v(m) = Π_i exp(β_i m_i²)/Z_i. At k = 3 in two
    dimensions it is exact: corner (2+s)²/36, edge (2+s)(1−s)/18, centre (1−s)²/9 (docs/theory.md (8)).

    Args:
        kernel_size: taps per axis, one to three axes; axes of one or two taps have nothing to gain and stay uniform.
        strength: s in [0, 1]; 0 is the uniform profile, 1 the 2^D equal corners; the variance is linear in between.

    Returns:
        float64 tensor of shape ``kernel_size``; element m is the share of the kernel's energy on tap m; sums to 1.

    Raises:
        ValueError: if ``strength`` is outside [0, 1] or ``kernel_size`` is not 1 to 3 positive integers.
        RuntimeError: with the solver's status, if it fails.

    Example:
        >>> profile = soft_corners((3, 3), 0.5)
        >>> [round(36 * float(profile[tap]), 6) for tap in [(0, 0), (0, 1), (1, 1)]]
        [6.25, 2.5, 1.0]
    """
    size, strength = check_kernel_size(kernel_size), check_strength(strength)
    profile = torch.ones((), dtype=torch.float64)
    for taps in size:
        profile = profile.unsqueeze(-1) * torch.tensor(_axis_profile(taps, strength), dtype=torch.float64)
    return profile


def tap_profile(offsets: Tensor, strength: float) -> Tensor:
    """Return soft corners for taps that lie anywhere, as those of ``SparseConv2d`` do.

    The same programme as :func:`soft_corners`, with the second moments taken over the taps' own coordinates and
    averaged over the groups. A grid has a corner that is farthest on all axes at once; other patterns have none, so
    strength 1 stands for the taps of each group with the largest Σ_i (m_i/r_i)², r_i the largest |m_i| of the layer,
    in equal shares.

    Args:
        offsets: taps of each group relative to the kernel's centre, shape ``(groups, taps, D)``.
        strength: s in [0, 1].

    Returns:
        float64 tensor of shape ``(groups, taps)``; each row sums to 1.

    Example:
        >>> tap_profile(torch.tensor([[[-3], [0], [1]]]), 1.0).tolist()
        [[1.0, 0.0, 0.0]]
    """
    strength = check_strength(strength)
    require(offsets.ndim == 3, "offsets", "have shape (groups, taps, D)", tuple(offsets.shape))
    groups, taps, _ = offsets.shape
    coordinates = offsets.detach().to("cpu", torch.float64).numpy()
    radius = np.abs(coordinates).max(axis=(0, 1))
    features = (coordinates[..., radius > 0] / radius[radius > 0]) ** 2
    distance = features.sum(axis=-1)
    farthest = (distance >= distance.max(axis=1, keepdims=True) - 1e-9).astype(np.float64)
    extreme = farthest / farthest.sum(axis=1, keepdims=True)
    if strength > 1.0 - RESIDUAL:
        return torch.from_numpy(extreme)
    if strength < RESIDUAL or np.ptp(distance) == 0:
        return torch.full((groups, taps), 1.0 / taps, dtype=torch.float64)
    flat = features.reshape(groups * taps, -1) / groups
    uniform = flat.sum(axis=0) / taps
    bounds = (1 - strength) * uniform + strength * flat.T @ extreme.ravel()
    energies = solve(Programme(flat, np.repeat(np.arange(groups), taps), np.ones(groups), bounds))
    return torch.from_numpy(energies.reshape(groups, taps))


def strength_of(profile: Tensor) -> float:
    """Return the strength of a profile on a grid: its place between uniform (0) and corners (1) on the variance scale.

    Example:
        >>> round(strength_of(soft_corners((5, 3), 0.3)), 9)
        0.3
    """
    size = tuple(profile.shape)
    lowest, highest = sum(map(uniform_variance, size)), sum(map(corner_variance, size))
    if highest - lowest < 1e-12:
        return 0.0
    moment = float((profile.double().reshape(-1, 1) * tap_coordinates(size) ** 2).sum())
    return (moment - lowest) / (highest - lowest)
