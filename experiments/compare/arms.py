"""The arms of the main job: how the same network is initialised or built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import widerf
from experiments.compare import draws
from experiments.compare.task import Task
from experiments.harness.inputs import InputError

#: Kinds that stand for one arm a strength.
BY_STRENGTH = ("widened", "inverse", "shuffled", "lasting", "lasting_only", "penalty")
KINDS = ("xavier", "he", "torch", "orthogonal", *BY_STRENGTH, "covariance", "sparse", "dilated")
DEFAULT = ("xavier", "he", "widened", "sparse")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: in tables and files, e.g. ``widened-0.5``.
        base: draw of the weights, one of ``draws.BASES``; all bases use the same normal numbers.
        profile: what is done to the taps after the draw: ``widened`` (``widerf.init.apply``) or one of its controls,
            ``inverse`` (centre-weighted) and ``shuffled`` (the same factors on random taps); ``lasting``: widened, and
            a parametrisation that keeps the learning rates of the profile; ``lasting_only``: these rates on the weights
            as drawn; ``covariance``: ``draws.covary``; None leaves them alone.
        strength: of the profile.
        penalty: factor of ``widerf.erf_penalty`` in the loss.
        taps: ``dense``; ``sparse``: the 3×3 layers after the first are ``SparseConv2d`` with its default pattern;
            ``dilated``: spacings that grow with depth from 1 to 2.
    """

    name: str
    base: str = "he"
    profile: str | None = None
    strength: float = 0.0
    taps: str = "dense"
    penalty: float = 0.0

    def of(self, task: Task) -> Task:
        """Return the task as this arm trains it."""
        return dataclasses.replace(task, penalty=self.penalty)

    def build(self, network: Callable[[Callable[..., nn.Module]], nn.Sequential], seed: int) -> nn.Sequential:
        """Return the network of this arm; arms with the same seed share one base draw."""
        net = network(_sparse_after_first(seed) if self.taps == "sparse" else nn.Conv2d)
        if self.taps == "dilated":
            _dilate(net)
        draws.draw(net, self.base, seed)
        if self.profile == "widened":
            widerf.init.apply(net, self.strength)
        elif self.profile == "inverse":
            draws.reweight(net, partial(draws.centre_weighted, strength=self.strength))
        elif self.profile == "shuffled":
            draws.reweight(net, draws.shuffled(self.strength, seed))
        elif self.profile == "lasting":
            widerf.init.apply(net, self.strength, lasting=True)
        elif self.profile == "lasting_only":
            draws.rates_alone(net, self.strength)
        elif self.profile == "covariance":
            draws.covary(net)
        return net


def _sparse_after_first(seed: int) -> Callable[..., nn.Module]:
    """Return a factory of layers: the first call gives a dense one (stems want local taps), the others SparseConv2d."""
    count = 0

    def conv(*args: int, **options: Any) -> nn.Module:
        nonlocal count
        count += 1
        if count == 1:
            return nn.Conv2d(*args, **options)
        return widerf.SparseConv2d(*args, **options, seed=100 * seed + count)

    return conv


def _dilate(net: nn.Module) -> None:
    """Space the taps of the second half of the stride-1 layers by 2; behind a stride a spacing would skip pixels."""
    convs = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1]
    for conv in convs[len(convs) // 2 :]:
        if conv.stride == (1, 1):
            conv.dilation, conv.padding = (2, 2), tuple(2 * int(p) for p in conv.padding)


def choose(kinds: Sequence[str], strengths: Sequence[float]) -> list[Arm]:
    """Return the arms of these kinds; ``widened`` stands for one arm a strength, its controls for strength 0.5.

    The number of ``penalty`` is the factor of the penalty, by default 0.1.

    A name with its strength, such as ``inverse-0.25``, stands for that arm alone.

    Raises:
        InputError: unknown kind, or a strength outside [0, 1], or of 1 where profiles last.

    Example:
        >>> [arm.name for arm in choose(["he", "widened", "inverse"], [0.25, 0.5])]
        ['he', 'widened-0.25', 'widened-0.5', 'inverse-0.5']
        >>> choose(["widened-1"], [])
        [Arm(name='widened-1', base='he', profile='widened', strength=1.0, taps='dense', penalty=0.0)]
    """
    arms: list[Arm] = []
    for name in dict.fromkeys(kinds):
        kind, _, number = name.partition("-")
        if kind not in KINDS or (number and kind not in BY_STRENGTH):
            raise InputError(f"--arms must be among {', '.join(KINDS)}, got {name!r}")
        if kind in BY_STRENGTH:
            usual = strengths if kind == "widened" else [0.1 if kind == "penalty" else 0.5]
            for strength in dict.fromkeys([_strength(number)] if number else usual):
                if not 0 <= strength <= 1:
                    raise InputError(f"--strengths must be in [0, 1], got {strength}")
                if kind.startswith("lasting") and strength == 1:
                    raise InputError(f"--arms must leave every tap a learning rate, got {kind}-1")
                profile = {"penalty": strength} if kind == "penalty" else {"profile": kind, "strength": strength}
                arms.append(Arm(f"{kind}-{strength:g}", **profile))  # type: ignore[arg-type]
        elif kind == "covariance":
            arms.append(Arm(kind, profile=kind))
        elif kind in ("sparse", "dilated"):
            arms.append(Arm(kind, taps=kind))
        else:
            arms.append(Arm(kind, base=kind))
    return arms


def _strength(number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise InputError(f"--arms must end in a strength such as widened-0.5, got {number!r}") from None
