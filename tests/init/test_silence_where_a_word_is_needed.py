"""Silence where a person needs a word: each situation that spoils what apply is for is told, and no other is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from widerf.init import apply


def net(norm: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm or nn.Identity(), nn.Conv2d(4, 4, 3, padding=1))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "batch without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance with statistics": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "layer over channels": lambda: LayerNorm2d(4),
    "layer over all": lambda: nn.LayerNorm((4, 8, 8)),
}


@pytest.mark.parametrize(("name", "steps"), list(itertools.product(NORMS, [0, 1, 3])))
def test_a_trained_network_is_told_from_a_fresh_one_whatever_normalises_it(name: str, steps: int) -> None:
    model = net(NORMS[name]())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(4, 2, 8, 8)) * torch.randn(1, 4, 8, 8)).sum().backward()
        optimizer.step()
    told = [warning for warning in apply(model, 0.5).warnings if "has been trained" in warning]
    assert len(told) == (steps > 0)
    assert all("(1: " in warning for warning in told)


def half() -> nn.Module:
    model = net().half()
    model[0].weight.data.fill_(6e4)
    return model


def filled(value: float) -> nn.Module:
    model = net()
    model[2].weight.data.fill_(value)
    return model


def dirac() -> nn.Module:
    model = net()
    nn.init.dirac_(model[2].weight)
    return model


def frozen() -> nn.Module:
    model = net()
    model[2].requires_grad_(False)
    return model


def again(change: float) -> nn.Module:
    model = net()
    apply(model, 0.5)
    model[2].weight.data.add_(change)
    return model


def silent() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.norm(self.conv(x))

    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Block())


class Own(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight * 2, self.bias)


SITUATIONS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "half precision overflows": (half, {}, "half precision"),
    "weights of zero": (lambda: filled(0.0), {}, "hold only zeros"),
    "not a number": (lambda: filled(float("nan")), {}, "NaN or infinity"),
    "infinite": (lambda: filled(float("inf")), {}, "NaN or infinity"),
    "an empty periphery": (dirac, {}, "empty periphery"),
    "frozen": (frozen, {}, "frozen"),
    "changed since": (lambda: again(0.1), {}, "changed since"),
    "silent branches": (silent, {}, "silent at initialisation"),
    "a forward of its own": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), Own(4, 4, 3)), {}, "forward of its own",
    ),
    "a strong strength": (net, {"strength": 0.9}, "nearly empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_spoils_the_widening_is_told(name: str) -> None:
    build, arguments, word = SITUATIONS[name]
    told = [w for w in apply(build(), **{"strength": 0.5, **arguments}).warnings if word in w]
    assert len(told) == 1


@pytest.mark.parametrize("build", [net, lambda: again(0.0), lambda: net(nn.BatchNorm2d(4)), lambda: net().double()])
def test_where_nothing_is_spoilt_nothing_is_said(build: Callable[[], nn.Module]) -> None:
    assert apply(build(), 0.5).warnings == ()
