"""Errors not degraded: where only a figure needs a rule, an operator without one costs the figure, not the call."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import widerf
from widerf.errors import UntreatedOperatorError
from widerf.sparse.layer import SparseConv

pytestmark = pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")


def _grid(x: Tensor) -> Tensor:
    return nn.functional.affine_grid(torch.eye(2, 3)[None].expand(len(x), -1, -1), list(x.shape), align_corners=False)


# Functions of a map whose operator has no rule, and the operator's name.
UNTREATED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cumsum": (lambda x: x.cumsum(-1), "cumsum"),
    "cumprod": (lambda x: x.tanh().cumprod(-1), "cumprod"),
    "fft": (lambda x: torch.fft.fft(x, norm="ortho").real, "fft|view_as_real"),
    "logcumsumexp": (lambda x: x.logcumsumexp(-1), "logcumsumexp"),
    "median": (lambda x: x - x.median(-1, keepdim=True).values, "median"),
    "solve": (lambda x: torch.linalg.solve(torch.eye(x.shape[-2]) * 2 + 0 * x[:1, :1, :, :1], x), "linalg"),
    "grid sample": (lambda x: nn.functional.grid_sample(x, _grid(x), align_corners=False), "grid_sampler"),
}
PLACES = range(1, 4)
CASES = list(itertools.product(UNTREATED, PLACES))


class Function(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return UNTREATED[self.name][0](x)


def net(name: str, place: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))]
    layers.insert(place, Function(name))
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_the_figure_alone_is_lost_and_the_operator_named(name: str, place: int) -> None:
    size, operator = (3, 8, 8), UNTREATED[name][1]
    for road in (widerf.predict, widerf.receptive_field):
        with pytest.raises(UntreatedOperatorError, match=rf"({operator}).* in module '{place}'"):
            road(net(name, place), size, layer="")
    widened, plain = net(name, place), net(name, place)
    report = widerf.init.apply(widened, 0.5, input_size=size)
    widerf.init.apply(plain, 0.5)
    assert all(row.widened for row in report) and report.gain is None
    assert any(re.search(operator, warning) for warning in report.warnings)
    assert all(torch.equal(a, b) for a, b in zip(widened.parameters(), plain.parameters(), strict=True))
    model = net(name, place)
    changed = widerf.convert(model, extent=5, input_size=size)
    assert sum(isinstance(module, SparseConv) for module in model) == 2 and changed.gain is None
    assert re.search(operator, str(changed))
    erf = widerf.measure(model, size, layer="", samples=2)
    assert erf.untraced is not None and re.search(operator, erf.untraced)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_what_lies_before_the_operator_is_seen_as_ever(name: str, place: int) -> None:
    layer = str(place - 1)
    found, without = (
        widerf.receptive_field(model, (3, 8, 8), layer=layer) for model in (net(name, place), net(name, 3))
    )
    assert found.interval((4, 4)) == without.interval((4, 4)) and not found.global_paths
    views = widerf.summary(net(name, place), (3, 8, 8))
    assert re.search(UNTREATED[name][1], str(views))
