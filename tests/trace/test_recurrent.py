"""Recurrent layers are seen step by step: forwards a unit sees what lies before it, both ways all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from widerf import measure, predict, receptive_field
from widerf.trace.scene import Scene

KINDS = (nn.LSTM, nn.GRU, nn.RNN)
STEPS = 9
CASES = list(itertools.product(KINDS, [False, True], [1, 2], [False, True], [False, True]))


class Sequence(nn.Module):
    """A recurrent layer over positions between two convolutions."""

    def __init__(self, kind: Any, both: bool, layers: int, first: bool, bias: bool) -> None:
        super().__init__()
        self.before = nn.Conv1d(2, 4, 3, padding=1)
        self.layer = kind(4, 4, layers, batch_first=first, bidirectional=both, bias=bias)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y, _ = self.layer(x.transpose(1, 2) if self.first else x.permute(2, 0, 1))
        return y.transpose(1, 2) if self.first else y.permute(1, 2, 0)


@pytest.mark.parametrize(("kind", "both", "layers", "first", "bias"), CASES)
def test_a_unit_sees_what_the_gradient_sees(kind: Any, both: bool, layers: int, first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = Sequence(kind, both, layers, first, bias).eval()
    field = receptive_field(model, (2, STEPS), layer="")
    assert bool(field.global_paths) == (both and layers > 1)  # of one layer the two ways meet in no operator
    for unit in range(STEPS):
        x = torch.randn(1, 2, STEPS, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x)[0, :, unit].sum(), x)
        seen = gradient[0].abs().sum(0).nonzero().flatten()
        last = field.interval(unit)[1][0]
        assert field.interval(unit)[0][0] <= int(seen[0]) == 0
        assert min(last, STEPS - 1) == int(seen[-1]) == (STEPS - 1 if both else min(unit + 1, STEPS - 1))


@pytest.mark.parametrize(("kind", "both", "layers", "first", "bias"), CASES)
def test_the_recording_computes_what_the_model_does(
    kind: Any, both: bool, layers: int, first: bool, bias: bool
) -> None:
    torch.manual_seed(0)
    model = Sequence(kind, both, layers, first, bias)
    tape = Scene.of(model, (2, STEPS), "").tape
    with torch.no_grad():
        wanted = model(tape.values[0])
    torch.testing.assert_close(tape.values[tape.target], wanted)


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_two_roads_agree_behind_a_recurrent_layer(kind: Any) -> None:
    variances = []
    for seed in range(10):
        torch.manual_seed(seed)
        model = Sequence(kind, True, 1, True, True)
        roads = predict(model, (2, 11), layer=""), measure(model, (2, 11), layer="", samples=16)
        variances.append([erf.std**2 for erf in roads])
    predicted, measured = torch.tensor(variances).T
    gap = measured - predicted
    assert abs(float(gap.mean())) < 0.15 * float(measured.mean()) + 3 * float(gap.std() / len(gap) ** 0.5)
