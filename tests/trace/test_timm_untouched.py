"""Every model of the list comes back bit-identical from measure, predict and receptive_field, also when interrupted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn

import widerf
from experiments.timm.models import SmallModel, read
from tests.reference import fingerprint

_QUICK = 400_000  # parameters
_BUILDABLE = 40_000_000


def listed() -> list[Any]:
    small = sorted((m for m in read() if m.parameters <= _BUILDABLE), key=lambda m: m.parameters)
    marks = [[] if m.parameters <= _QUICK else [pytest.mark.slow] for m in small]
    return [pytest.param(m, id=m.module, marks=mark) for m, mark in zip(small, marks, strict=True)]


def outcome(action: Callable[[], object]) -> None:
    """What the three say about the model is the sweep's matter; here only what they leave behind counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
        except (ValueError, NotImplementedError):
            return


class Stop:
    """Raises in the forward pass of a model, in the call after ``after`` further ones."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left, self.error = after, error

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


def first_leaf(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))


@pytest.mark.parametrize("small", listed())
def test_the_model_comes_back_bit_identical(small: SmallModel) -> None:
    torch.manual_seed(0)
    model = timm.create_model(small.name).train()  # training mode: batch statistics and dropout would move
    for parameter in list(model.parameters())[::3]:
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).requires_grad_(False)
    size = small.input_size
    before = fingerprint(model)
    outcome(lambda: widerf.measure(model, size, samples=2))
    assert fingerprint(model) == before
    outcome(lambda: widerf.predict(model, size))
    assert fingerprint(model) == before
    outcome(lambda: widerf.receptive_field(model, size))
    assert fingerprint(model) == before


@pytest.mark.parametrize("small", listed())
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_also_when_it_is_interrupted(small: SmallModel, error: type[BaseException]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(small.name).train()
    # The probe calls the first layer once; the trace and the measurement come after it.
    stop = Stop(after=1, error=error)
    first_leaf(model).register_forward_hook(stop)
    before = fingerprint(model)
    for look in (widerf.measure, widerf.predict, widerf.receptive_field):
        stop.left = 1
        with pytest.raises((error, ValueError)):
            look(model, small.input_size)
        assert fingerprint(model) == before
