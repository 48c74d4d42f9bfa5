"""The arms of the main job: how the same network is initialised or built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import widerf
from experiments.harness.inputs import InputError

KINDS = ("xavier", "he", "widened", "sparse")


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        name: in tables and files, e.g. ``widened-0.5``.
        xavier: base draw by Xavier instead of He; both use the same normal numbers.
        strength: strength of ``widerf.init.apply`` after the draw; None leaves the draw alone.
        sparse: build the 3×3 layers after the first as ``SparseConv2d`` with its default pattern.
    """

    name: str
    xavier: bool = False
    strength: float | None = None
    sparse: bool = False

    def build(self, network: Callable[[Callable[..., nn.Module]], nn.Sequential], seed: int) -> nn.Sequential:
        """Return the network of this arm; arms with the same seed share one base draw."""
        net = network(_sparse_after_first(seed) if self.sparse else nn.Conv2d)
        generator = torch.Generator().manual_seed(seed)
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, widerf.SparseConv2d, nn.Linear)):
                if self.xavier:
                    nn.init.xavier_normal_(module.weight, generator=generator)
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.strength is not None:
            widerf.init.apply(net, self.strength)
        return net


def _sparse_after_first(seed: int) -> Callable[..., nn.Module]:
    """Return a factory of layers: the first call gives a dense one (stems want local taps), the others SparseConv2d."""
    count = 0

    def conv(*args: int, **options: int) -> nn.Module:
        nonlocal count
        count += 1
        return (
            nn.Conv2d(*args, **options)
            if count == 1
            else widerf.SparseConv2d(*args, **options, seed=100 * seed + count)
        )  # type: ignore[arg-type]

    return conv


def choose(kinds: Sequence[str], strengths: Sequence[float]) -> list[Arm]:
    """Return the arms of these kinds; ``widened`` stands for one arm a strength.

    Raises:
        InputError: unknown kind, or a strength outside [0, 1].

    Example:
        >>> [arm.name for arm in choose(["he", "widened"], [0.25, 0.5])]
        ['he', 'widened-0.25', 'widened-0.5']
    """
    arms: list[Arm] = []
    for kind in dict.fromkeys(kinds):
        if kind not in KINDS:
            raise InputError(f"--arms must be among {', '.join(KINDS)}, got {kind!r}")
        if kind == "widened":
            for strength in dict.fromkeys(strengths):
                if not 0 <= strength <= 1:
                    raise InputError(f"--strengths must be in [0, 1], got {strength}")
                arms.append(Arm(f"widened-{strength:g}", strength=strength))
        else:
            arms.append(Arm(kind, xavier=kind == "xavier", sparse=kind == "sparse"))
    return arms
