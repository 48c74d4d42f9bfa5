"""Programme (P) of :mod:`widerf.profile`, solved.

How (P) is solved: cvxpy (Clarabel) finds the multipliers λ; the primal is recovered from them by the Gibbs law, and a
few Newton steps on the smooth dual take the constraint residual from the solver's 1e-6 down to rounding. Nothing is
returned unless the Karush-Kuhn-Tucker conditions hold to 1e-9.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from widerf.trace.certain import held

Array = NDArray[np.float64]

RESIDUAL = 1e-9  # largest violation of a constraint of (P) that is accepted; moments are scaled to be at most 1
_NEWTON_STEPS = 60


@dataclass(frozen=True)
class Programme:
    """Programme (P) with its blocks laid end to end.

    Attributes:
        features: (taps, constraints); row r holds what one unit of energy on tap r adds to each constraint.
        block: (taps,); the block that each tap belongs to.
        counts: (blocks,); ω_b, how many equal kernels the block stands for.
        bounds: (constraints,); t.
    """

    features: Array
    block: NDArray[np.int64]
    counts: Array
    bounds: Array

    def gibbs(self, multipliers: Array) -> Array:
        """Return the energies v that minimise the Lagrangian: v_b ∝ exp(A_bᵀ λ / ω_b)."""
        exponent = self.features @ multipliers / self.counts[self.block]
        top = np.full(len(self.counts), -np.inf)
        np.maximum.at(top, self.block, exponent)
        weight = np.exp(exponent - top[self.block])
        return np.asarray(weight / np.bincount(self.block, weight)[self.block])

    def slack(self, energies: Array) -> Array:
        """Return A v − t, which is ≥ 0 where v is feasible."""
        return np.asarray(self.features.T @ energies - self.bounds)

    def curvature(self, energies: Array) -> Array:
        """Return the Hessian of the dual: Σ_b Cov_{v_b}(features) / ω_b."""
        blocks = len(self.counts)
        mean = np.stack([np.bincount(self.block, energies * column, blocks) for column in self.features.T], axis=1)
        centred = self.features - mean[self.block]
        return np.asarray((centred * (energies / self.counts[self.block])[:, None]).T @ centred)


def _multipliers(programme: Programme) -> Array:
    """Return λ of (P) as Clarabel finds it.

    Raises:
        RuntimeError: with the solver's status, if it does not end at an optimum.
    """
    import cvxpy as cp

    energies = cp.Variable(len(programme.block))
    blocks = np.arange(len(programme.counts))[:, None] == programme.block[None, :]
    moments = programme.features.T @ energies >= programme.bounds
    entropy = cp.sum(cp.multiply(programme.counts[programme.block], cp.entr(energies)))
    problem = cp.Problem(cp.Maximize(entropy), [blocks.astype(float) @ energies == 1, moments])
    with held(warnings.catch_warnings()):
        # "Solution may be inaccurate" is settled afterwards, by the residual of the polished solution.
        warnings.simplefilter("ignore", UserWarning)
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise RuntimeError(f"the solver ended with status {problem.status!r} on a programme of {len(blocks)} kernels")
    return np.maximum(np.atleast_1d(np.asarray(moments.dual_value, dtype=np.float64)), 0.0)


def solve(programme: Programme) -> Array:
    """Return the energies v that solve (P), all blocks end to end.

    Raises:
        RuntimeError: if the solver fails or the optimality conditions are not met to 1e-9.
    """
    multipliers = _multipliers(programme)
    active = multipliers > 1e-6 * max(1.0, float(multipliers.max(initial=0.0)))
    multipliers[~active] = 0.0
    for _ in range(_NEWTON_STEPS):
        energies = programme.gibbs(multipliers)
        slack = programme.slack(energies)
        active |= slack < -RESIDUAL  # a multiplier that Clarabel could not tell from 0
        if np.abs(slack[active]).max(initial=0.0) < 1e-3 * RESIDUAL:
            break
        hessian = programme.curvature(energies)[np.ix_(active, active)]
        step = np.linalg.lstsq(hessian, -slack[active], rcond=1e-14)[0]
        # Half of |λ| at most: far from the optimum of a nearly flat dual a full step may run off.
        limit = np.max(np.abs(step) / (0.5 * np.abs(multipliers[active]) + 1e-3), initial=1.0)
        multipliers[active] = np.maximum(multipliers[active] + step / limit, 0.0)
    residual = max(float(np.abs(slack[active]).max(initial=0.0)), float((-slack).max(initial=0.0)))
    if residual > RESIDUAL or multipliers.min(initial=0.0) < 0:
        raise RuntimeError(f"the optimality conditions hold to {residual:.1e} only, wanted {RESIDUAL:.0e}")
    return energies
