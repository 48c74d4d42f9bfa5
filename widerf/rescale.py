"""Planning and making the change to each layer: w ← w·√(wanted energy of the tap / present one), and Σ w² as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import EllipsisType

import torch
from torch import Generator, Tensor

from widerf.convolutions import Kernel
from widerf.draws import Base, draw_
from widerf.weights import Backup, Experts, Held, hold, is_frozen, without_values

MARK = "_widerf_profile"  # attribute of a module: what an earlier call did to it
_UNCHANGED = 1e-3  # relative change of a tap's energy up to which a weight counts as left as it was
_ALREADY_WIDE = 0.15  # strength that fresh weights show by chance at most (and 5 standard errors)


@dataclass(frozen=True)
class LayerChange:
    """What :func:`widerf.init.apply` did to one convolution.

    Attributes:
        name: module name.
        kind: class of the layer.
        kernel_size: taps per axis.
        jump: input pixels of the network between two neighbouring input units of the layer (with ``input_size``).
        strength: strength that the layer now has; ``None`` where it was left alone.
        std_before: std of the kernel's energy over its taps, in input pixels of the layer: root of the mean of the axis
            variances, as the weights are, not as they are expected to be.
        std_after: the same afterwards.
        border_before: share of the layer's output energy that zero padding costs on an even map (with ``input_size``).
        border_after: the same afterwards.
        verdict: ``"widened"``, or why not; what should be known about a widened layer follows a comma.
    """

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    jump: tuple[float, ...] | None
    strength: float | None
    std_before: float | None
    std_after: float | None
    verdict: str
    border_before: float | None = None
    border_after: float | None = None

    @property
    def widened(self) -> bool:
        """Whether the kernel's profile was set."""
        return self.verdict.startswith("widened")


@dataclass
class Step:
    """One planned change.

    Attributes:
        kernel: the layer.
        held: how it keeps its weight; ``None`` if widerf does not know.
        shape: wanted energies relative to a uniform kernel; ``None`` to leave the taps as they are.
        strength: of ``shape``.
        verdict: what to say if all goes well.
        drawn: whether ``base`` draws the weight anew.
        remarks: what turned up on the way and concerns the whole report: subject → detail.
    """

    kernel: Kernel
    held: Held | None
    verdict: str
    shape: Tensor | None = None
    strength: float | None = None
    drawn: bool = False
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def refusal(self) -> str | None:
        """Why the change cannot be made now, though it should."""
        due = self.held is not None and (self.shape is not None or self.drawn)
        return without_values(self.held) if due and self.held is not None else None


def plan(
    kernels: list[Kernel],
    chosen: set[str],
    named: bool,
    shapes: Callable[[Kernel], tuple[Tensor, float] | str],
    base: Base,
) -> list[Step]:
    """Return what to do with each layer; nothing is changed yet.

    Args:
        kernels: all convolutions of the model.
        chosen: names of those that may be changed.
        named: whether the user named them: only then are frozen layers among them changed.
        shapes: gives the wanted relative energies and the strength of a kernel, or why it is left alone.
        base: ``None`` or what draws the weights.
    """
    steps, owners = [], dict[object, str]()
    for kernel in kernels:
        held = hold(kernel)
        step = Step(kernel, None if isinstance(held, str) else held, "not selected")
        steps.append(step)
        if kernel.name not in chosen:
            continue
        if isinstance(held, str):
            step.verdict = f"left alone: {held}"
            continue
        owner = owners.setdefault(held.storage(), kernel.name)
        reason = kernel.nothing_to_gain()
        if owner != kernel.name:
            step.verdict = f"tied to {owner}: changed there, once"
        elif is_frozen(held) and not named:
            step.verdict = "frozen (requires_grad is False): name it in only= to change it"
        elif reason is not None:
            step.verdict, step.drawn = reason, base is not None
        else:
            step.drawn, wanted = base is not None, shapes(kernel)
            if isinstance(wanted, str):
                step.verdict = wanted
            else:
                (step.shape, step.strength), step.verdict = wanted, "widened"
    return steps


@torch.no_grad()
def execute(step: Step, base: Base, generator: Generator | None, dry_run: bool) -> LayerChange:
    """Make one planned change, or in a dry run only tell what it would give."""
    kernel, held = step.kernel, step.held
    row = LayerChange(kernel.name, kernel.kind, kernel.kernel_size, None, None, None, None, step.verdict)
    if held is None or without_values(held) is not None:
        return row
    if math.prod(kernel.kernel_size) == 1 and not step.drawn:
        return replace(row, std_before=0.0, std_after=0.0)  # a 1×1 kernel need not be read to know that
    energies = kernel.energies(held.read())
    before = after = kernel.std(energies)
    if step.drawn and dry_run:
        # What is drawn is uniform in expectation: tell that, and draw nothing.
        energies = torch.ones_like(energies)
        after = kernel.std(energies)
    elif step.drawn:
        weight = held.blank()
        draw_(weight, kernel, base, generator)
        held.replace_(weight)
        energies = kernel.energies(held.read())
        after = kernel.std(energies)
    verdict, strength = step.verdict, None
    if step.shape is not None:
        new, verdict = _rescale(step, held, energies, step.shape, dry_run)
        if new is not None:
            after, strength = kernel.std(new), step.strength
    return replace(row, std_before=before, std_after=after, verdict=verdict, strength=strength)


def factors_for(kernel: Kernel, energies: Tensor, ratio: Tensor) -> Tensor:
    """Return what multiplies each tap: √ratio, and one scalar per output phase that keeps Σ w²."""
    factors = ratio.sqrt()
    parts: list[tuple[slice, ...] | EllipsisType] = [cell.where for cell in kernel.cells]
    for where in parts if kernel.offsets is None else [...]:
        before, after = energies[where].sum(), (energies[where] * ratio[where]).sum()
        if float(after) > 0:
            factors[where] *= (before / after).sqrt()
    return factors


def _remembered(step: Step, energies: Tensor) -> Tensor | None:
    """Return the relative energies that an earlier call gave this weight, if nobody has changed it since."""
    mark = getattr(step.kernel.module, MARK, None)
    if mark is None:
        return None
    then = torch.tensor(mark["energies"], dtype=torch.float64)
    if then.numel() != energies.numel() or not torch.allclose(then, energies.flatten(), rtol=_UNCHANGED, atol=0.0):
        if not step.drawn:
            step.remarks["stale"] = f"{mark['strength']:g}"
        return None
    return torch.tensor(mark["shape"], dtype=torch.float64).view_as(energies)


def _rescale(step: Step, held: Held, energies: Tensor, shape: Tensor, dry_run: bool) -> tuple[Tensor | None, str]:
    """Give the weight the wanted relative energies.

    Returns:
        The energies afterwards, ``None`` if the layer was left alone; and the verdict.
    """
    kernel = step.kernel
    if not bool(energies.isfinite().all()):
        return None, "left alone: its weights are not finite"
    if float(energies.sum()) == 0.0:
        return None, "left alone: all its weights are zero"
    earlier = None if step.drawn and dry_run else _remembered(step, energies)
    if earlier is not None and bool(((earlier == 0) & (shape > 0)).any()):
        return None, "left alone: at strength 1 already; only base= can fill its empty taps again"
    ratio = shape if earlier is None else torch.where(earlier > 0, shape / earlier.clamp_min(1e-300), earlier)
    if bool(((ratio - 1).abs() <= 1e-9).logical_or_(shape == 0).all()):
        same = "strength 0: as it was" if step.strength == 0.0 else f"{step.verdict} by an earlier call"
        return energies, same
    factors = factors_for(kernel, energies, ratio)
    wanted = energies * factors**2
    if bool(((energies - wanted).abs() <= 1e-6 * wanted).all()):
        return None, "left alone: empty periphery (all its energy lies where rescaling cannot move it)"
    if earlier is None and not step.drawn:
        _note_wide(step, energies, held.read().numel())
    if dry_run:
        return wanted, step.verdict
    return _write(step, held, factors, wanted)


def _note_wide(step: Step, energies: Tensor, weights: int) -> None:
    """Remark if the weights are wider than uniform ones are by chance: another call or a load may have widened them."""
    low, high = step.kernel.variance_range()
    if high - low < 1e-9 * high:
        return
    place = (step.kernel.std(energies) ** 2 - low) / (high - low)
    if place > max(_ALREADY_WIDE, 5 * (2 * energies.numel() / weights) ** 0.5):
        step.remarks["wide"] = f"{place:.2g}"


def _write(step: Step, held: Held, factors: Tensor, wanted: Tensor) -> tuple[Tensor | None, str]:
    """Scale the taps; where the weight is computed from others, see whether that held and undo it if not."""
    kernel, verdict = step.kernel, step.verdict
    coarse = held.read().dtype in (torch.float16, torch.bfloat16)
    if type(held) in (Held, Experts):
        held.scale_(factors)
        got = kernel.energies(held.read()) if coarse else wanted
    else:
        backup = Backup(held)
        try:
            held.scale_(factors)
        except NotImplementedError as error:
            backup.undo()
            return None, f"left alone: {error}"
        got = kernel.energies(held.read())
        error_ = float((got / got.sum() - wanted / wanted.sum()).abs().max())
        if not error_ < (1e-2 if coarse else 1e-4):
            backup.undo()
            return None, f"left alone: {held.note or 'its computation'} does not keep the profile (off by {error_:.2g})"
        if held.note:
            verdict += f", {held.note}"
    assert step.shape is not None
    mark = {"shape": step.shape.flatten().tolist(), "energies": got.flatten().tolist(), "strength": step.strength}
    setattr(kernel.module, MARK, mark)
    return got, verdict
