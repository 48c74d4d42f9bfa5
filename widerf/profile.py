"""The profiles that widen a kernel, or a whole network, at the least change: two convex programmes.

A *profile* v is the share of a kernel's energy (its second moment) that each tap gets: v ≥ 0, Σ v = 1. The energies of
stacked layers add up by convolution, so the variance of the effective receptive field is a *linear* function of the
profiles (Luo et al. 2016, eq. 8, generalised), and "as much variance at the least change" is a convex programme:

    minimise   Σ_b ω_b KL(v_b ‖ uniform)   over distributions v_b   subject to   Σ_b A_b v_b ≥ t.        (P)

Its Lagrange conditions give v_b ∝ exp(A_bᵀ λ / ω_b) with λ ≥ 0: a Gibbs law. :func:`soft_corners` is (P) for one
kernel, :func:`allocate` is (P) for all kernels of a network under one common constraint. It is solved in
:mod:`widerf.programme`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widerf._checks import require
from widerf.geometry import tap_coordinates
from widerf.programme import RESIDUAL, Array, Programme, solve


def check_strength(strength: float) -> float:
    """Return ``strength`` as a float, or raise what says that it must be in [0, 1]."""
    given: Any = strength  # NumPy's and torch's scalars too, whatever the annotation says
    real = isinstance(given, numbers.Real) and not isinstance(given, bool)
    require(real, "strength", "be a number", strength, TypeError)
    require(0.0 <= strength <= 1.0, "strength", "be in [0, 1]", strength)
    return float(strength)


def _check_kernel_size(kernel_size: Sequence[int], argument: str = "kernel_size") -> tuple[int, ...]:
    size = tuple(kernel_size)
    whole = all(isinstance(k, int) and not isinstance(k, bool) and k >= 1 for k in size)
    require(1 <= len(size) <= 3 and whole, argument, "hold 1 to 3 integers of at least 1", kernel_size)
    return size


def uniform_variance(taps: int) -> float:
    """Return (k² − 1)/12, the variance of k equal taps on an axis (Luo et al. 2016, eq. 11), in taps²."""
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

    which is the least KL(v ‖ uniform) with that much variance. The constraints see only the axis marginals of v, and
    H(v) ≤ Σ_i H(v_i) with equality for the product of the marginals alone. So the optimum is the product of D
    one-dimensional optima, and those are what is solved: v(m) = Π_i exp(β_i m_i²)/Z_i. At k = 3 in two dimensions it is
    exact: corner (2+s)²/36, edge (2+s)(1−s)/18, centre (1−s)²/9.

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
    size, strength = _check_kernel_size(kernel_size), check_strength(strength)
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
    reach = np.abs(coordinates).max(axis=(0, 1))
    features = (coordinates[..., reach > 0] / reach[reach > 0]) ** 2
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


def largest_gain(
    kernel_sizes: Sequence[Sequence[int]],
    weights: Sequence[float],
    *,
    cap: float = 1.0,
    fixed: float = 0.0,
) -> float:
    """Return the largest ratio of network stds, after over before, that profiles alone can reach.

    Example:
        >>> round(largest_gain([(3, 3)] * 20, [1.0] * 20), 3)
        1.225
    """
    lowest = fixed + _variance(kernel_sizes, weights, 0.0)
    highest = fixed + _variance(kernel_sizes, weights, cap)
    return math.sqrt(highest / lowest) if lowest > 0 else 1.0


def _variance(kernel_sizes: Sequence[Sequence[int]], weights: Sequence[float], strength: float) -> float:
    """Return Σ_l w_l σ²_l for one strength everywhere; σ² is the mean over axes."""
    total = 0.0
    for size, weight in zip(kernel_sizes, weights, strict=True):
        per_axis = [(1 - strength) * uniform_variance(k) + strength * corner_variance(k) for k in size]
        total += weight * sum(per_axis) / len(per_axis)
    return total


def allocate(
    kernel_sizes: Sequence[Sequence[int]],
    weights: Sequence[float],
    gain: float,
    *,
    cap: float = 1.0,
    fixed: float = 0.0,
) -> list[Tensor]:
    """Return the profiles of all kernels of a network that widen it by ``gain`` at the least total change.

    With σ²(v) the variance of a profile (mean over axes), the profiles solve

        minimise  Σ_l KL(v_l ‖ uniform)   subject to   f + Σ_l w_l σ²(v_l) ≥ gain² · (f + Σ_l w_l σ²(uniform_l)),
        and on each axis of each layer at most the variance of strength ``cap``.

    One multiplier λ serves the whole network: ``v_l(m) ∝ exp(λ w_l |m|²/D)`` where no cap binds. Layers far down, with
    a large jump, take nearly all of the change.

    Args:
        kernel_sizes: taps per axis of each kernel.
        weights: w_l ≥ 0, what one tap² of variance in layer l adds to the network's: (jump·dilation)² × path share.
        gain: wanted ratio of the network's std, after over before; at least 1.
        cap: largest strength that any axis of any layer may get, in (0, 1].
        fixed: f, variance of the network that no profile changes (pooling, say), in the same unit.

    Returns:
        one float64 profile per kernel, shaped like the kernel.

    Raises:
        ValueError: if ``gain`` is below 1 or beyond what the network can have; the message names that limit.
        RuntimeError: with the solver's status, if it fails.

    Example:
        >>> stem, last = allocate([(3, 3), (3, 3)], [1.0, 16.0], 1.10)
        >>> round(strength_of(stem), 3), round(strength_of(last), 3)
        (0.033, 0.444)
    """
    sizes = [_check_kernel_size(size, "kernel_sizes") for size in kernel_sizes]
    require(len(sizes) == len(weights), "weights", f"have one entry per kernel ({len(sizes)})", len(weights))
    require(all(math.isfinite(w) and w >= 0 for w in weights), "weights", "be finite and at least 0", list(weights))
    require(0.0 < cap <= 1.0, "cap", "be in (0, 1]", cap)
    require(fixed >= 0, "fixed", "be at least 0", fixed)
    limit = largest_gain(sizes, weights, cap=cap, fixed=fixed)
    require(gain >= 1.0, "gain", "be at least 1", gain)
    rule = f"be at most {limit:.4f}, the largest gain that these kernels can have at strength {cap:g}"
    require(gain <= limit * (1 + 1e-9), "gain", rule, gain)
    if gain == 1.0 or gain >= limit * (1 - 1e-9):
        return [soft_corners(size, 0.0 if gain == 1.0 else cap) for size in sizes]
    wanted = gain**2 * (fixed + _variance(sizes, weights, 0.0)) - fixed
    axes = sorted({(k, w / len(size)) for size, w in zip(sizes, weights, strict=True) for k in size})
    solved = dict(zip(axes, _axes_of_network(axes, sizes, weights, wanted, cap), strict=True))
    profiles = []
    for size, weight in zip(sizes, weights, strict=True):
        profile = torch.ones((), dtype=torch.float64)
        for k in size:
            profile = profile.unsqueeze(-1) * torch.from_numpy(solved[k, weight / len(size)])
        profiles.append(profile)
    return profiles


def _axes_of_network(
    axes: list[tuple[int, float]],
    sizes: list[tuple[int, ...]],
    weights: Sequence[float],
    wanted: float,
    cap: float,
) -> list[Array]:
    """Solve :func:`allocate` on the marginals: like kernels of like weight share a block.

    As in :func:`soft_corners`, the constraint sees only axis marginals, so each kernel is the product of its axes.
    """
    counts = dict.fromkeys(axes, 0.0)
    for size, weight in zip(sizes, weights, strict=True):
        for k in size:
            counts[k, weight / len(size)] += 1.0
    squares = [np.linspace(-1.0, 1.0, k) ** 2 if k > 1 else np.zeros(1) for k, _ in axes]
    reach = np.array([counts[k, w] * w * corner_variance(k) for k, w in axes])
    block = np.repeat(np.arange(len(axes)), [k for k, _ in axes])
    scale = reach.sum()  # the shared constraint is scaled so that all corners together give 1
    shared = np.concatenate(squares) * (reach / scale)[block]
    columns, bounds = [shared], [wanted / scale]
    if cap < 1.0:
        for index, (k, _) in enumerate(axes):
            if k > 2:
                columns.append(np.where(block == index, -np.concatenate(squares), 0.0))
                bounds.append(-((1 - cap) * uniform_variance(k) + cap * corner_variance(k)) / corner_variance(k))
    programme = Programme(np.stack(columns, 1), block, np.array([counts[a] for a in axes]), np.array(bounds))
    energies = solve(programme)
    return [energies[block == index] for index in range(len(axes))]
