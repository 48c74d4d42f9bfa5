"""The profiles that widen a whole network by a wanted gain at the least total change."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from widerf._checks import require
from widerf.profile.programme import Array, Programme, solve
from widerf.profile.single import check_kernel_size, corner_variance, soft_corners, uniform_variance


def largest_gain(
    kernel_sizes: Sequence[Sequence[int]],
    weights: Sequence[float],
    *,
    cap: float = 1.0,
    fixed: float = 0.0,
) -> float:
    """Return the largest ratio of network stds, after over before, that profiles alone can reach: docs/theory.md (5).

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

    That is docs/theory.md (10). One multiplier λ serves the whole network, docs/theory.md (11):
    ``v_l(m) ∝ exp(λ w_l |m|²/D)`` where no cap binds. Layers far down, with a large jump, take most of the change.

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
        >>> from widerf.profile import strength_of
        >>> stem, last = allocate([(3, 3), (3, 3)], [1.0, 16.0], 1.10)
        >>> round(strength_of(stem), 3), round(strength_of(last), 3)
        (0.033, 0.444)
    """
    sizes = [check_kernel_size(size, "kernel_sizes") for size in kernel_sizes]
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
    at_corners = np.array([counts[k, w] * w * corner_variance(k) for k, w in axes])
    block = np.repeat(np.arange(len(axes)), [k for k, _ in axes])
    scale = at_corners.sum()  # the shared constraint is scaled so that all corners together give 1
    shared = np.concatenate(squares) * (at_corners / scale)[block]
    columns, bounds = [shared], [wanted / scale]
    if cap < 1.0:
        for index, (k, _) in enumerate(axes):
            if k > 2:
                columns.append(np.where(block == index, -np.concatenate(squares), 0.0))
                bounds.append(-((1 - cap) * uniform_variance(k) + cap * corner_variance(k)) / corner_variance(k))
    programme = Programme(np.stack(columns, 1), block, np.array([counts[a] for a in axes]), np.array(bounds))
    energies = solve(programme)
    return [energies[block == index] for index in range(len(axes))]
