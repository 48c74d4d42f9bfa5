from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from tests.reference import fingerprint
from widerf.trace.sandbox import untouched


class Whimsical(nn.Module):
    """Holds state in every way that a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.tied = self.conv
        self.rnn = nn.LSTM(2, 2)
        self.cache: dict[str, int] = {}
        self.list = [1, 2]
        self.plain = torch.arange(3.0)
        self.register_buffer("mask", torch.full((2,), float("nan")))
        self.register_buffer("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


def model_with_history() -> Whimsical:
    torch.manual_seed(1)
    model = Whimsical()
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    model.conv.bias.requires_grad_(False)
    model.bn.eval()
    model.conv.register_forward_hook(lambda *_: None)
    return model


def ruin(model: Whimsical) -> None:
    model.train()
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
            parameter.requires_grad_(not parameter.requires_grad)
        model.conv.weight.data = torch.zeros(1)
        model.mask.zero_()
        model.plain.add_(1)
    model.bn.weight = nn.Parameter(torch.ones(2))
    model.conv.weight.grad = None
    model.bn.running_mean = torch.ones(2)
    model.register_buffer("new", torch.ones(1))
    model.extra = nn.Linear(1, 1)
    model.cache["seen"] = 1
    model.list.append(3)
    model.note = "here"
    del model.none
    model.conv.register_forward_hook(lambda *_: None)
    model.register_full_backward_hook(lambda *_: None)
    random.random()
    np.random.rand()  # noqa: NPY002


@pytest.mark.parametrize("leave", [None, ValueError, KeyboardInterrupt])
def test_whatever_the_block_does_the_model_comes_back_bit_identical(leave: type[BaseException] | None) -> None:
    model = model_with_history()
    before = fingerprint(model)
    if leave is None:
        with untouched(model):
            ruin(model)
    else:
        with pytest.raises(leave), untouched(model):
            ruin(model)
            raise leave
    assert fingerprint(model) == before


def test_the_fingerprint_sees_each_ruin() -> None:
    model = model_with_history()
    before = fingerprint(model)
    ruin(model)
    assert fingerprint(model) != before


def test_a_graph_in_flight_can_still_be_differentiated() -> None:
    model = model_with_history()
    loss = model(torch.randn(2, 1, 8, 8)).square().sum()
    with untouched(model):
        model.train()
        with torch.no_grad():
            model(torch.randn(2, 1, 8, 8))
    model.zero_grad()
    loss.backward()
    assert model.conv.weight.grad.abs().sum() > 0


def test_blocks_nest() -> None:
    model = model_with_history()
    before = fingerprint(model)
    with untouched(model):
        inner = fingerprint(model)
        with untouched(model):
            ruin(model)
        assert fingerprint(model) == inner
        ruin(model)
    assert fingerprint(model) == before
