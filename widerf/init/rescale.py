"""Planning and making the change to each layer: w ← w·√(wanted energy of the tap / present one), and Σ w² as it was."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from widerf.convolutions.convolution import Convolution
from widerf.init.backup import Backup
from widerf.init.draws import Base, draw_
from widerf.init.plan import Change
from widerf.init.report import LayerChange
from widerf.init.verdict import (
    AS_IT_WAS,
    AT_STRENGTH_ONE,
    BY_AN_EARLIER_CALL,
    EMPTY_PERIPHERY,
    NOT_FINITE,
    OVERFLOW,
    ZERO,
    parametrised,
)
from widerf.init.weights import MARK, Experts, Held, unchangeable
from widerf.report import Verdict

_UNCHANGED = 1e-3  # relative change of a tap's energy up to which a weight counts as left as it was
_ALREADY_WIDE = 0.15  # strength that fresh weights show by chance at most (and 5 standard errors)


@torch.no_grad()
def execute(step: Change, base: Base, generator: Generator | None, dry_run: bool) -> LayerChange:
    """Make one planned change, or in a dry run only tell what it would give."""
    kernel, held = step.kernel, step.held
    row = LayerChange(kernel.name, kernel.kind, kernel.kernel_size, None, None, None, None, step.verdict)
    if held is None or unchangeable(held) is not None:
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


def factors_for(kernel: Convolution, energies: Tensor, ratio: Tensor) -> Tensor:
    """Return what multiplies each tap: √ratio, and one scalar per output phase that keeps Σ w²."""
    factors = ratio.sqrt()
    # Taps off a grid have no phases: one part, the whole.
    parts: list[Any] = [...] if kernel.offsets is not None else [cell.where for cell in kernel.cells]
    for where in parts:
        before, after = energies[where].sum(), (energies[where] * ratio[where]).sum()
        if float(after) > 0:
            factors[where] *= (before / after).sqrt()
    return factors


def _remembered(step: Change, energies: Tensor) -> Tensor | None:
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


def _rescale(step: Change, held: Held, energies: Tensor, shape: Tensor, dry_run: bool) -> tuple[Tensor | None, Verdict]:
    """Give the weight the wanted relative energies.

    Returns:
        The energies afterwards, ``None`` if the layer was left alone; and the verdict.
    """
    kernel = step.kernel
    if not bool(energies.isfinite().all()):
        return None, NOT_FINITE
    if float(energies.sum()) == 0.0:
        return None, ZERO
    earlier = None if step.drawn and dry_run else _remembered(step, energies)
    if earlier is not None and bool(((earlier == 0) & (shape > 0)).any()):
        return None, AT_STRENGTH_ONE
    ratio = shape if earlier is None else torch.where(earlier > 0, shape / earlier.clamp_min(1e-300), earlier)
    if bool(((ratio - 1).abs() <= 1e-9).logical_or_(shape == 0).all()):
        return energies, AS_IT_WAS if step.strength == 0.0 else BY_AN_EARLIER_CALL
    factors = factors_for(kernel, energies, ratio)
    wanted = energies * factors**2
    if bool(((energies - wanted).abs() <= 1e-6 * wanted).all()):
        return None, EMPTY_PERIPHERY
    if earlier is None and not step.drawn:
        _note_wide(step, energies, held.read().numel())
    if dry_run:
        return wanted, step.verdict
    return _write(step, held, factors, wanted)


def _note_wide(step: Change, energies: Tensor, weights: int) -> None:
    """Remark if the weights are wider than uniform ones are by chance: another call or a load may have widened them."""
    low, high = step.kernel.variance_range()
    if high - low < 1e-9 * high:
        return
    place = (step.kernel.std(energies) ** 2 - low) / (high - low)
    if place > max(_ALREADY_WIDE, 5 * (2 * energies.numel() / weights) ** 0.5):
        step.remarks["wide"] = f"{place:.2g}"


def _overflows(kernel: Convolution, weight: Tensor, factors: Tensor) -> bool:
    """Return whether a half-precision weight would leave its range."""
    return float(kernel.scale_(weight.float().clone(), factors).abs().max()) > torch.finfo(weight.dtype).max


def _write(step: Change, held: Held, factors: Tensor, wanted: Tensor) -> tuple[Tensor | None, Verdict]:
    """Scale the taps; where the weight is computed from others, see whether that held and undo it if not."""
    kernel, verdict = step.kernel, step.verdict
    coarse = held.read().dtype in (torch.float16, torch.bfloat16)
    if coarse and _overflows(kernel, held.read(), factors):
        return None, OVERFLOW
    if type(held) in (Held, Experts):
        held.scale_(factors)
        got = kernel.energies(held.read()) if coarse else wanted
    else:
        backup = Backup(held)
        try:
            held.scale_(factors)
        except NotImplementedError as error:
            backup.undo()
            return None, parametrised(str(error))
        got = kernel.energies(held.read())
        error_ = float((got / got.sum() - wanted / wanted.sum()).abs().max())
        if not error_ < (1e-2 if coarse else 1e-4):
            backup.undo()
            why = f"{held.note or 'its computation'} does not keep the profile (off by {error_:.2g})"
            return None, parametrised(why)
        if held.note:
            verdict = verdict.noting("computed", held.note)
    assert step.shape is not None
    mark = {"shape": step.shape.flatten().tolist(), "energies": got.flatten().tolist(), "strength": step.strength}
    setattr(kernel.module, MARK, mark)
    return got, verdict
