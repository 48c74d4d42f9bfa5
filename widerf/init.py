"""Initialisation that widens the effective receptive field: what to put on each tap, and nothing else.

:func:`apply` re-weights the taps of every convolution of a model towards *soft corners*
(:func:`widerf.profile.soft_corners`): w ← w·√(n·v(m)) for the n taps m of a kernel, then one scalar per tensor that restores
Σ w². A base initialisation such as He's keeps its gain; only the share of the taps changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn.parameter import UninitializedParameter

from widerf._checks import require
from widerf.draws import Base, check_base, draw_
from widerf.kernels import Kernel, Selector, find_kernels, select
from widerf.profile import _check_strength
from widerf.report import Report


@dataclass(frozen=True)
class LayerChange:
    """What :func:`apply` did to one convolution.

    Attributes:
        name: module name.
        kind: class of the layer.
        kernel_size: taps per axis.
        jump: input pixels of the network between two neighbouring input units of the layer, per axis (with ``input_size``).
        strength: strength that the layer now has; ``None`` where it was left alone.
        std_before: std of the kernel's energy over its taps, in input pixels of the layer: root of the mean axis variance.
        std_after: the same afterwards.
        verdict: ``"widened"``, or why not.
    """

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    jump: tuple[float, ...] | None
    strength: float | None
    std_before: float | None
    std_after: float | None
    verdict: str

    @property
    def widened(self) -> bool:
        """Whether the kernel's profile was set."""
        return self.verdict.startswith("widened")


@dataclass(frozen=True)
class InitReport(Report[LayerChange]):
    """What :func:`apply` did, layer by layer; a sequence of :class:`LayerChange` that prints as a table.

    Attributes:
        gain: predicted std of the network's ERF, after over before (with ``input_size``).
        dry_run: whether the model was left as it was.
    """

    gain: float | None = None
    dry_run: bool = False
    columns: ClassVar[Mapping[str, str | Callable[[Any], object]]] = {
        "layer": "name",
        "kind": "kind",
        "kernel": "kernel_size",
        "jump": "jump",
        "strength": "strength",
        "std before": "std_before",
        "after": "std_after",
        "verdict": "verdict",
    }

    def lines(self) -> list[str]:
        """Return how many layers were widened, and the gain."""
        changed = sum(row.widened for row in self.rows)
        would = "would be widened (dry run)" if self.dry_run else "widened"
        said = [f"{changed} of {len(self.rows)} convolutions {would}"]
        if self.gain is not None:
            said.append(f"predicted ERF std of the network: ×{self.gain:.3f}")
        return said


@dataclass
class _Step:
    """One planned change: the wanted energies relative to uniform, or why there are none."""

    kernel: Kernel
    shape: Tensor | None
    strength: float | None
    verdict: str
    drawn: bool = False


def _weight(kernel: Kernel) -> Tensor:
    weight = kernel.module.weight
    assert isinstance(weight, Tensor)
    return weight


def _refusal(kernel: Kernel) -> str | None:
    """Return why the layer's weight cannot be changed now, though it should, or ``None``."""
    weight = _weight(kernel)
    if isinstance(weight, UninitializedParameter):
        return "lazy, without a weight yet: run one forward pass first"
    if weight.is_meta:
        return "on the meta device, without values: materialise it first"
    return None


def _plan(kernels: list[Kernel], chosen: set[str], strength: float, base: Base) -> list[_Step]:
    steps = []
    for kernel in kernels:
        reason = kernel.nothing_to_gain()
        if kernel.name not in chosen:
            steps.append(_Step(kernel, None, None, "not selected"))
        elif reason is not None:
            steps.append(_Step(kernel, None, None, reason, drawn=base is not None))
        elif strength == 0.0:
            steps.append(_Step(kernel, None, 0.0, "strength 0", drawn=base is not None))
        else:
            steps.append(_Step(kernel, kernel.shape(strength), strength, "widened", drawn=base is not None))
    return steps


def _factors(kernel: Kernel, energies: Tensor, shape: Tensor) -> Tensor:
    """Return what multiplies each tap: √shape, and in each cell one scalar that keeps Σ w²."""
    factors = shape.sqrt()
    for cell in kernel.cells:
        before = energies[cell.where].sum()
        after = (energies[cell.where] * shape[cell.where]).sum()
        if float(after) > 0:
            factors[cell.where] *= (before / after).sqrt()
    return factors


@torch.no_grad()
def _execute(step: _Step, base: Base, generator: Generator | None, dry_run: bool) -> LayerChange:
    kernel, weight = step.kernel, _weight(step.kernel)
    hollow = _refusal(kernel) is not None
    energies = None if hollow else kernel.energies(weight)
    before = None if energies is None else kernel.std(energies)
    after, verdict, strength = before, step.verdict, step.strength
    if step.drawn and not dry_run:
        draw_(weight, kernel, base, generator)
        energies = kernel.energies(weight)
        after = kernel.std(energies)
    if step.shape is not None and energies is not None:
        factors = _factors(kernel, energies, step.shape)
        after = kernel.std(energies * factors**2)
        if math.isclose(after, kernel.std(energies), rel_tol=1e-6):
            verdict, strength = "empty periphery: all energy lies on one tap", None
        elif math.isnan(after):
            verdict, strength = "all weights are zero", None
        elif not dry_run:
            weight.mul_(factors.to(weight))
    return LayerChange(kernel.name, kernel.kind, kernel.kernel_size, None, strength, before, after, verdict)


def apply(
    model: nn.Module,
    strength: float = 0.5,
    *,
    target: float | None = None,
    base: Base = None,
    only: Selector = None,
    skip: Selector = None,
    input_size: tuple[int, ...] | None = None,
    generator: Generator | None = None,
    dry_run: bool = False,
) -> InitReport:
    """Widen the effective receptive field of ``model`` in place by re-weighting the taps of its convolutions.

    Args:
        model: any module that holds convolutions.
        strength: 0 leaves every kernel as it is, 1 puts all energy on the corner taps; the variance is linear in between.
        target: wanted ratio of the network's ERF std to today's, instead of ``strength``; needs ``input_size``.
        base: ``None`` rescales the weights that are there; a name ("kaiming_normal", "kaiming_uniform", "xavier_normal",
            "xavier_uniform", "orthogonal") or a callable draws them anew first, in every selected convolution.
        only: name patterns or module classes; nothing else is touched.
        skip: name patterns or module classes that are left alone.
        input_size: (channels, *spatial) of one input; with it the report knows jumps and the network's gain.
        generator: source of the draws of ``base``; the global one is left alone then.
        dry_run: report only.

    Returns:
        what was done to each convolution, and why not.

    Raises:
        ValueError: if the model has no convolution, ``strength`` is outside [0, 1], a pattern matches nothing, or a layer
            that should change holds no values yet; then nothing has been changed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> [row.verdict for row in apply(net, 0.5)]
        ['widened', '1×1 kernel: no periphery']
    """
    strength = _check_strength(strength)
    check_base(base, generator)
    kernels = find_kernels(model)
    require(bool(kernels), "model", "hold at least one convolution", type(model).__name__)
    chosen = {kernel.name for kernel in kernels} if only is None else select(kernels, model, only, "only")
    chosen -= set() if skip is None else select(kernels, model, skip, "skip")
    if target is not None:
        raise NotImplementedError("target")
    steps = _plan(kernels, chosen, strength, base)
    refused = {s.kernel.name: _refusal(s.kernel) for s in steps if s.shape is not None or s.drawn}
    for name, reason in refused.items():
        require(
            reason is None or dry_run, "model", "hold values in every layer that is to change", f"{name} ({reason})"
        )
    rows = tuple(_execute(step, base, generator, dry_run) for step in steps)
    return InitReport(rows, dry_run=dry_run)


@torch.no_grad()
def periphery_(tensor: Tensor, strength: float = 0.5, *, transposed: bool = False) -> Tensor:
    """Widen one weight tensor in place, as ``torch.nn.init`` functions fill one.

    Args:
        tensor: weight of a convolution of stride 1, shape (out, in/groups, *kernel_size); transposed layers have (in,
            out/groups, *kernel_size).
        strength: 0 … 1, see :func:`apply`.
        transposed: whether it belongs to a transposed convolution.

    Returns:
        ``tensor``.

    Raises:
        ValueError: if ``tensor`` has no 1 to 3 spatial axes or ``strength`` is outside [0, 1].

    Example:
        >>> weight = periphery_(torch.ones(1, 1, 3, 3), 0.5)
        >>> [round(float(weight[0, 0, i, j]), 4) for i, j in [(0, 0), (0, 1), (1, 1)]]
        [1.25, 0.7906, 0.5]
    """
    require(isinstance(tensor, Tensor), "tensor", "be a tensor", type(tensor).__name__, TypeError)
    require(3 <= tensor.ndim <= 5, "tensor", "have 3 to 5 axes (out, in, *kernel_size)", tuple(tensor.shape))
    strength = _check_strength(strength)
    size = tuple(tensor.shape[2:])
    ones = (1,) * len(size)
    kernel = Kernel("", nn.Identity(), kernel_size=size, stride=ones, dilation=ones, transposed=transposed)
    if strength > 0.0 and kernel.nothing_to_gain() is None:
        tensor.mul_(_factors(kernel, kernel.energies(tensor), kernel.shape(strength)).to(tensor))
    return tensor


__all__ = ["InitReport", "LayerChange", "apply", "periphery_"]
