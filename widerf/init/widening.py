"""Initialisation that widens the effective receptive field: what to put on each tap, and nothing else.

:func:`apply` re-weights the taps of every convolution of a model towards *soft corners*
(:func:`widerf.profile.soft_corners`): w ← w·√(n·v(m)) for the n taps m of a kernel, then one scalar per tensor that
restores Σ w² (docs/theory.md (9)). A base initialisation such as He's keeps its gain; only the share of the taps
changes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from widerf._checks import require
from widerf.convolutions.branches import undone
from widerf.convolutions.convolution import Convolution
from widerf.convolutions.padding import border_loss, chain_energy
from widerf.convolutions.places import Place
from widerf.convolutions.selection import Selector, find_convolutions, select
from widerf.geometry import ntuple
from widerf.init.advice import warnings_of
from widerf.init.backup import Backup
from widerf.init.draws import Base, check_base
from widerf.init.lasting import make_last, settle
from widerf.init.outlook import Outlook
from widerf.init.plan import Change, leave_what_cannot_last, plan, solve_ahead
from widerf.init.report import InitReport, LayerChange
from widerf.init.rescale import execute, factors_for
from widerf.init.target import Shapes, shapes_for
from widerf.init.weights import unchangeable
from widerf.profile.single import check_strength
from widerf.trace.certain import certainly
from widerf.trace.sandbox import untouched


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
    cap: float = 1.0,
    lasting: bool = False,
) -> InitReport:
    """Widen the effective receptive field of ``model`` in place by re-weighting the taps of its convolutions.

    Each kernel gets the profile nearest to uniform with the wanted variance (:func:`widerf.profile.soft_corners`),
    and keeps its Σ w². 1×1 kernels, kernels of two taps and patchify layers (stride ≥ kernel) have nothing to gain.
    Transposed layers are widened per output phase, and each phase keeps its energy.

    *Calling it again* does not add up: strength is a state, not a step. If a weight is still what an earlier call
    made it, the new strength replaces the old one, and 0 takes it back. If it was changed since (trained, loaded,
    drawn anew), what is there is widened, and the report warns.

    *Lasting*: training of plain weights forgets the profile. With ``lasting`` it becomes a parametrisation,
    w = s·v with s_m = √(n·v_m) fixed: the network computes what it would without, and the learning rate of tap m is
    s_m² times the nominal one (docs/theory.md (9a), :class:`widerf.init.lasting.LastingProfile`).

    *Zero padding* takes more signal than before, since more energy lies on the outer taps; the report tells how much.

    Args:
        model: any module that holds convolutions.
        strength: 0 leaves every kernel as it is, 1 puts all energy on the corner taps; the variance is linear in
            between.
        target: wanted ratio of the network's predicted ERF std to today's, instead of ``strength``: strengths by
            least total KL (:func:`widerf.profile.allocate`). Needs ``input_size``.
        base: ``None`` rescales the weights that are there; a name ("kaiming_normal", "kaiming_uniform",
            "xavier_normal", "xavier_uniform", "orthogonal") or a callable draws them anew first, in every selected
            convolution, 1×1 included. Fans are those of the layer, also for grouped and transposed ones; a callable
            gets the weight tensor.
        only: name patterns or module classes; nothing else is touched. Frozen layers that it names are changed too.
        skip: name patterns or module classes that are left alone.
        input_size: ``(channels, *spatial)`` of one input; with it the report knows jumps, border losses and the
            network's gain.
        generator: source of the draws of ``base``; the global one is left alone then. Without ``base`` nothing is
            drawn.
        dry_run: report only; the model stays as it is, and may be lazy or on the meta device.
        cap: largest strength that ``target`` may give a layer.
        lasting: whether the profiles become parametrisations (``torch.nn.utils.parametrize``) of the weights. The
            parameters stay the same objects, and are called ``parametrizations.weight.original``. A weight that is
            computed already or tied is left alone, and the verdict says so. A later call sets the state anew: without
            ``lasting`` it takes the parametrisation off the layers that it sets.

    Returns:
        what was done to each convolution, and why not, with warnings.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the model has no convolution, ``strength`` is outside [0, 1], a pattern matches nothing,
            ``target`` is beyond what the network can have (the message names that), a tap that is to last would be
            empty and never learn (strength 1), or a layer that should change is lazy or on the meta device and has no
            values yet. Then nothing has been changed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> [row.verdict for row in apply(net, 0.5)]
        ['widened', '1×1 kernel: no periphery']
    """
    strength = check_strength(strength)
    require(isinstance(lasting, bool), "lasting", "be True or False", lasting, TypeError)
    check_base(base, generator)
    kernels = find_convolutions(model)
    require(bool(kernels), "model", "hold at least one convolution", type(model).__name__)
    chosen = {kernel.name for kernel in kernels} if only is None else select(kernels, model, only, "only")
    chosen -= set() if skip is None else select(kernels, model, skip, "skip")
    require(target is None or input_size is not None, "input_size", "be given together with target", input_size)
    outlook = None if input_size is None or target is None else Outlook.of(model, input_size)
    shapes: Shapes = lambda kernel: (kernel.target_energies(strength), strength)  # noqa: E731
    if outlook is not None and target is not None:
        shapes = shapes_for(outlook, kernels, chosen, target, cap)
    else:
        solve_ahead([kernel for kernel in kernels if kernel.name in chosen], strength)
    steps = plan(kernels, chosen, only is not None, shapes, base)
    if lasting:
        leave_what_cannot_last(model, steps)
        alive = all(step.shape is None or bool((step.shape > 0).all()) for step in steps)
        given = ("strength", strength) if target is None else ("cap", cap)
        require(alive, given[0], "be below 1 for a profile that lasts: empty taps would never learn", given[1])
    for step in steps:
        holds = "hold values in every layer that is to change"
        require(step.refusal is None or dry_run, "model", holds, f"{step.kernel.name} ({step.refusal})")
    if outlook is None and input_size is not None:
        outlook = Outlook.of(model, input_size)
    places = {} if outlook is None else outlook.places(kernels)
    before, after, problem = (None, None, "") if outlook is None else (outlook.std, None, outlook.problem)
    if dry_run and outlook is not None and before is not None:
        with untouched(model), _kept(generator):
            _change(steps, base, generator, dry_run=False, lasting=None)
            after, problem = outlook.after(steps)
    rows = _change(steps, base, generator, dry_run, lasting)
    if not dry_run and outlook is not None and before is not None:
        after, problem = outlook.after(steps)
    rows = _told(rows, steps, places, undone(model, kernels))
    notes = [*warnings_of(model, steps, rows), *([problem] if problem else [])]
    stds = (before, after) if before and after else None
    return InitReport(
        tuple(rows),
        tuple(notes),
        gain=stds[1] / stds[0] if stds else None,
        erf_std=stds,
        signal_kept=_signal_kept(steps, rows, places),
        dry_run=dry_run,
    )


@contextmanager
def _kept(generator: Generator | None) -> Iterator[None]:
    state = None if generator is None else generator.get_state()

    def restore() -> None:
        if generator is not None and state is not None:
            generator.set_state(state)

    with certainly(restore):
        yield


def _told(
    rows: Sequence[LayerChange], steps: Sequence[Change], places: Mapping[str, Place], notes: Mapping[str, str]
) -> list[LayerChange]:
    """Return the rows with what the network tells about each layer."""
    told = []
    for row, step in zip(rows, steps, strict=True):
        place, changes = places.get(row.name), dict[str, Any]()
        if place is not None:
            changes["jump"] = place.jump
        if row.widened and row.name in notes:
            changes["verdict"] = row.verdict.noting("undone", notes[row.name])
        if row.widened and place is not None and step.shape is not None:
            changes["border_before"] = border_loss(step.kernel, place, torch.ones_like(step.shape))
            changes["border_after"] = border_loss(step.kernel, place, step.shape)
        told.append(dataclasses.replace(row, **changes))
    return told


def _signal_kept(steps: Sequence[Change], rows: Sequence[LayerChange], places: Mapping[str, Place]) -> float | None:
    """Return what zero padding leaves after a chain of the widened layers, after over before."""
    shapes = {step.kernel.name: step for step, row in zip(steps, rows, strict=True) if row.border_after is not None}
    chain = [(shapes[name], place) for name, place in places.items() if name in shapes]
    chain = [(step, place) for step, place in chain if step.kernel.rank == chain[0][0].kernel.rank]
    if not chain:
        return None
    after = [(step.kernel, place, step.shape) for step, place in chain if step.shape is not None]
    return chain_energy(after) / chain_energy(
        [(kernel, place, torch.ones_like(shape)) for kernel, place, shape in after]
    )


def _change(
    steps: Sequence[Change], base: Base, generator: Generator | None, dry_run: bool, lasting: bool | None
) -> list[LayerChange]:
    """Make all changes, or none: what goes wrong on the way, an interrupt too, undoes those made.

    ``lasting`` None changes values only.
    """
    if dry_run:
        return [_lasting(step, execute(step, base, generator, dry_run), lasting, dry_run) for step in steps]
    due = [step.held for step in steps if step.held is not None and (step.drawn or step.shape is not None)]
    backups = [Backup(held) for held in due if unchangeable(held) is None]
    try:
        return [_lasting(step, execute(step, base, generator, dry_run), lasting, dry_run) for step in steps]
    except BaseException:
        for backup in backups:
            backup.undo()
        raise


def _lasting(step: Change, row: LayerChange, lasting: bool | None, dry_run: bool) -> LayerChange:
    """Make the profile last that a layer now has, or no longer last."""
    if row.strength is None or step.shape is None or lasting is None:
        return row
    if not lasting or row.strength == 0:
        if not dry_run:
            settle(step.kernel.module)
        return row
    if not dry_run:
        make_last(step.kernel, step.shape)
    return dataclasses.replace(row, verdict=row.verdict.noting("lasting", "lasting"))


@torch.no_grad()
def periphery_(
    tensor: Tensor, strength: float = 0.5, *, transposed: bool = False, stride: int | Sequence[int] = 1
) -> Tensor:
    """Widen one weight tensor in place, as ``torch.nn.init`` functions fill one.

    Args:
        tensor: weight of a convolution, shape ``(out, in/groups, *kernel_size)``, or of a transposed one, shape
            ``(in, out/groups, *kernel_size)``.
        strength: 0 … 1, see :func:`apply`.
        transposed: whether it belongs to a transposed convolution.
        stride: of that transposed convolution: each of its output phases sees only every ``stride``-th tap and keeps
            its own energy. A plain convolution is widened alike at any stride.

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
    kernel = Convolution(
        "", nn.Identity(), kernel_size=size, stride=steps, dilation=(1,) * len(size), transposed=transposed
    )
    if strength > 0.0 and kernel.nothing_to_gain() is None:
        kernel.scale_(tensor, factors_for(kernel, kernel.energies(tensor), kernel.target_energies(strength)))
    return tensor
