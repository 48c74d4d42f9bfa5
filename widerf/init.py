"""Initialisation that widens the effective receptive field: what to put on each tap, and nothing else.

:func:`apply` re-weights the taps of every convolution of a model towards *soft corners*
(:func:`widerf.profile.soft_corners`): w ← w·√(n·v(m)) for the n taps m of a kernel, then one scalar per tensor that restores
Σ w². A base initialisation such as He's keeps its gain; only the share of the taps changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from widerf._checks import require
from widerf.advice import undone, warnings_of
from widerf.draws import Base, check_base
from widerf.geometry import ntuple
from widerf.kernels import Kernel, Selector, find_kernels, select
from widerf.profile import check_strength
from widerf.report import Report
from widerf.rescale import LayerChange, Step, execute, factors_for, plan
from widerf.weights import Backup


@dataclass(frozen=True)
class InitReport(Report[LayerChange]):
    """What :func:`apply` did, layer by layer; a sequence of :class:`LayerChange` that prints as a table.

    Attributes:
        gain: predicted std of the network's ERF, after over before (with ``input_size``).
        signal_kept: what zero padding leaves of the signal energy at the end of the widened layers if they follow each
            other in one chain, after over before (with ``input_size``).
        dry_run: whether the model was left as it was.
    """

    gain: float | None = None
    signal_kept: float | None = None
    dry_run: bool = False
    columns: ClassVar[Mapping[str, str | Callable[[Any], object]]] = {
        "layer": "name",
        "kind": "kind",
        "kernel": "kernel_size",
        "jump": "jump",
        "strength": "strength",
        "std before": "std_before",
        "after": "std_after",
        "border loss": "border_after",
        "verdict": "verdict",
    }

    def lines(self) -> list[str]:
        """Return how many layers were widened, and what that does to the network."""
        changed = sum(row.widened for row in self.rows)
        would = "would be widened (dry run)" if self.dry_run else "widened"
        said = [f"{changed} of {len(self.rows)} convolutions {would}"]
        if self.gain is not None:
            said.append(f"predicted ERF std of the network: ×{self.gain:.3f}")
        if self.signal_kept is not None:
            said.append(f"signal energy after zero padding, if the layers follow each other: ×{self.signal_kept:.2f}")
        return said


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
    strength = check_strength(strength)
    check_base(base, generator)
    kernels = find_kernels(model)
    require(bool(kernels), "model", "hold at least one convolution", type(model).__name__)
    chosen = {kernel.name for kernel in kernels} if only is None else select(kernels, model, only, "only")
    chosen -= set() if skip is None else select(kernels, model, skip, "skip")
    shapes = _equal(strength)
    if target is not None:
        shapes = _allocated(model, kernels, chosen, target, input_size)
    steps = plan(kernels, chosen, only is not None, shapes, base)
    for step in steps:
        holds = "hold values in every layer that is to change"
        require(step.refusal is None or dry_run, "model", holds, f"{step.kernel.name} ({step.refusal})")
    rows = _change(steps, base, generator, dry_run)
    notes = undone(model, kernels)
    rows = [
        dataclasses.replace(row, verdict=f"{row.verdict}, {notes[row.name]}")
        if row.widened and row.name in notes
        else row
        for row in rows
    ]
    return InitReport(tuple(rows), tuple(warnings_of(model, steps, rows)), dry_run=dry_run)


def _equal(strength: float) -> Callable[[Kernel], tuple[Tensor, float]]:
    return lambda kernel: (kernel.shape(strength), strength)


def _allocated(
    model: nn.Module, kernels: Sequence[Kernel], chosen: set[str], target: float, input_size: Sequence[int] | None
) -> Callable[[Kernel], tuple[Tensor, float]]:
    raise NotImplementedError("target")


def _change(steps: Sequence[Step], base: Base, generator: Generator | None, dry_run: bool) -> list[LayerChange]:
    """Make all changes; if the user's own ``base`` fails on the way, undo those made."""
    if not callable(base) or dry_run:
        return [execute(step, base, generator, dry_run) for step in steps]
    backups = [Backup(step.held) for step in steps if step.held is not None and step.drawn]
    try:
        return [execute(step, base, generator, dry_run) for step in steps]
    except BaseException:
        for backup in backups:
            backup.undo()
        raise


@torch.no_grad()
def periphery_(
    tensor: Tensor, strength: float = 0.5, *, transposed: bool = False, stride: int | Sequence[int] = 1
) -> Tensor:
    """Widen one weight tensor in place, as ``torch.nn.init`` functions fill one.

    Args:
        tensor: weight of a convolution, shape (out, in/groups, *kernel_size), or of a transposed one, shape (in, out/groups,
            *kernel_size).
        strength: 0 … 1, see :func:`apply`.
        transposed: whether it belongs to a transposed convolution.
        stride: of that transposed convolution: each of its output phases sees only every ``stride``-th tap and keeps its
            own energy. A plain convolution is widened alike at any stride.

    Returns:
        ``tensor``.

    Raises:
        TypeError: if ``tensor`` is not a floating-point tensor.
        ValueError: if ``tensor`` has no 1 to 3 spatial axes or ``strength`` is outside [0, 1].

    Example:
        >>> weight = periphery_(torch.ones(1, 1, 3, 3), 0.5)
        >>> [round(float(weight[0, 0, i, j]), 4) for i, j in [(0, 0), (0, 1), (1, 1)]]
        [1.25, 0.7906, 0.5]
    """
    require(isinstance(tensor, Tensor), "tensor", "be a tensor", type(tensor).__name__, TypeError)
    floating = tensor.is_floating_point() or tensor.is_complex()
    require(floating, "tensor", "hold floating-point numbers", tensor.dtype, TypeError)
    require(3 <= tensor.ndim <= 5, "tensor", "have 3 to 5 axes (out, in, *kernel_size)", tuple(tensor.shape))
    strength = check_strength(strength)
    size = tuple(tensor.shape[2:])
    steps = ntuple(stride, len(size), "stride") if transposed else (1,) * len(size)
    kernel = Kernel("", nn.Identity(), kernel_size=size, stride=steps, dilation=(1,) * len(size), transposed=transposed)
    if strength > 0.0 and kernel.nothing_to_gain() is None:
        kernel.scale_(tensor, factors_for(kernel, kernel.energies(tensor), kernel.shape(strength)))
    return tensor


__all__ = ["InitReport", "LayerChange", "apply", "periphery_"]
