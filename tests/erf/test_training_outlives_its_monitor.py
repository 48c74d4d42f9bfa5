"""The training must not die of its monitor: whatever fails, in the model or in the log, it goes on bit by bit."""

from __future__ import annotations

import itertools
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from widerf.erf.tracker import ERFTracker

SIZE, STEPS = (2, 9, 9), 5


class Net(nn.Module):
    """Fails in whatever way it is told, when it is looked at in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.fault: BaseException | str | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.drop(self.norm(self.first(x)).relu()))
        if self.training or self.fault is None:
            return y
        if isinstance(self.fault, BaseException):
            raise self.fault
        return {"detached": y.detach(), "nan": y * math.nan, "infinite": y * math.inf, "zero": y * 0}[self.fault]


ERRORS = [
    RuntimeError("out of memory"),
    ValueError("two\nlines"),
    KeyError("x"),
    OSError(28, "no space left on device"),
]
ERRORS += [MemoryError(), NotImplementedError(), AssertionError(), ZeroDivisionError(), StopIteration()]
FAULTS = [*ERRORS, "detached", "nan", "infinite", "zero"]


def train(model: Net, step: Callable[[int], None]) -> list[Tensor]:
    """Train with dropout and batch statistics; return all weights, buffers and a further draw."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(1)
    for index in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(2, *SIZE)).square().mean().backward()
        optimizer.step()
        step(index)
    return [*(tensor.clone() for tensor in model.state_dict().values()), torch.rand(3)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("fault", "when"), list(itertools.product(FAULTS, [1, STEPS - 1])), ids=str)
def test_a_model_that_cannot_be_measured_trains_on(fault: Any, when: int) -> None:
    model, plain = Net(), train(Net(), lambda _: None)
    tracker = ERFTracker(model, every=1, input_size=SIZE, samples=2)

    def step(index: int) -> None:
        model.fault = fault if index >= when else None
        tracker.step()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(train(model, step), plain)
    broken = [row for row in tracker.history if row["error"]]
    assert [row["step"] for row in tracker.history] == list(range(STEPS))
    assert [row["step"] for row in broken] == list(range(when, STEPS))
    assert all(math.isnan(row["std"]) and "\n" not in row["error"] for row in broken)
    assert sum("cannot be measured" in str(warning.message) for warning in caught) == len(broken)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_at_the_first_look_do_not_end_the_training(value: float) -> None:
    model = Net()
    tracker = ERFTracker(model, every=1, input_size=SIZE, samples=2)
    kept = model.first.weight.detach().clone()
    model.first.weight.data[0] = value
    with pytest.warns(UserWarning, match="cannot be measured"):
        tracker.step()
    model.first.weight.data = kept
    tracker.step()
    assert [math.isnan(row["std"]) for row in tracker.history] == [True, False]


class Failing:
    """A log of any kind that fails at some call of one of its methods."""

    def __init__(self, error: Exception, method: str) -> None:
        self.error, self.method, self.calls = error, method, 0

    def _maybe(self, method: str) -> None:
        if method == self.method:
            self.calls += 1
            raise self.error

    def add_scalar(self, *_: Any) -> None:
        self._maybe("add_scalar")

    def add_figure(self, *_: Any) -> None:
        self._maybe("add_figure")

    def flush(self) -> None:
        self._maybe("flush")


@pytest.mark.parametrize(
    ("error", "method"), list(itertools.product(ERRORS, ["call", "add_scalar", "add_figure", "flush"])), ids=str
)
def test_a_log_that_fails_does_not_end_the_training(error: Exception, method: str) -> None:
    def refuse(_: dict[str, Any]) -> None:
        raise error

    model, plain = Net(), train(Net(), lambda _: None)
    log = refuse if method == "call" else Failing(error, method)
    tracker = ERFTracker(model, every=2, input_size=SIZE, samples=2, log=log)
    with pytest.warns(UserWarning, match="cannot be logged") as told:
        assert same(train(model, lambda _: tracker.step()), plain)
    assert len(told) == len(tracker.history) == 3 and not any(row["error"] for row in tracker.history)


@pytest.mark.parametrize("how", ["folder gone", "folder a file", "path a folder"])
def test_a_file_that_cannot_be_written_does_not_end_the_training(how: str, tmp_path: Path) -> None:
    model, plain, path = Net(), train(Net(), lambda _: None), tmp_path / "logs" / "erf.jsonl"
    tracker = ERFTracker(model, every=2, input_size=SIZE, samples=2, log=path)
    tracker.step()
    shutil.rmtree(path.parent)
    if how == "folder a file":
        path.parent.write_text("")
    elif how == "path a folder":
        path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be logged"):
        assert same(train(model, lambda _: tracker.step()), plain)
