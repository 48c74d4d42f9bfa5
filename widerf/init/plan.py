"""Planning: what each convolution is to get, or why it is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from widerf.convolutions.convolution import Convolution
from widerf.init.draws import Base
from widerf.init.lasting import profile_of
from widerf.init.verdict import FROZEN, NOT_SELECTED, WIDENED, not_lasting, tied, unknown_weight
from widerf.init.weights import Held, hold, is_frozen, storage_of, unchangeable
from widerf.profile.single import solve_axes
from widerf.report import Verdict


@dataclass
class Change:
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

    kernel: Convolution
    held: Held | None
    verdict: Verdict
    shape: Tensor | None = None
    strength: float | None = None
    drawn: bool = False
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def refusal(self) -> str | None:
        """Why the change cannot be made now, though it should."""
        due = self.held is not None and (self.shape is not None or self.drawn)
        return unchangeable(self.held) if due and self.held is not None else None


def solve_ahead(kernels: Sequence[Convolution], strength: float) -> None:
    """Solve the profiles of all kernel sizes in one programme: each later look finds its profile solved."""
    able = [kernel for kernel in kernels if kernel.offsets is None and kernel.nothing_to_gain() is None]
    solve_axes({k for kernel in able for cell in kernel.cells for k in cell.size}, strength)


def plan(
    kernels: Sequence[Convolution],
    chosen: set[str],
    named: bool,
    shapes: Callable[[Convolution], tuple[Tensor, float] | Verdict],
    base: Base,
) -> list[Change]:
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
        step = Change(kernel, None if isinstance(held, str) else held, NOT_SELECTED)
        steps.append(step)
        if kernel.name not in chosen:
            continue
        if isinstance(held, str):
            step.verdict = unknown_weight(held)
            continue
        owner = owners.setdefault(held.storage(), kernel.name)
        reason = kernel.nothing_to_gain()
        if owner != kernel.name:
            step.verdict = tied(owner)
        elif is_frozen(held) and not named:
            step.verdict = FROZEN
        elif reason is not None:
            step.verdict, step.drawn = reason, base is not None
        else:
            step.drawn, wanted = base is not None, shapes(kernel)
            if isinstance(wanted, Verdict):
                step.verdict = wanted
            else:
                (step.shape, step.strength), step.verdict = wanted, WIDENED
    return steps


def leave_what_cannot_last(model: nn.Module, steps: Sequence[Change]) -> None:
    """Take the profile off the plan where it cannot last: the weight is computed already, or others read it, too."""
    readers = Counter(storage_of(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for step in steps:
        if step.held is None or step.shape is None:
            continue
        if type(step.held) is not Held and profile_of(step.held.module) is None:
            step.shape, step.verdict = None, not_lasting("this one is computed, or holds several kernels")
        elif readers[step.held.storage()] > 1:
            step.shape, step.verdict = None, not_lasting("another module has this one, too")
