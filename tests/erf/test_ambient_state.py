"""Fault kind: ambient state. The ruler gives the same answer whatever surrounds the call or wraps the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.reference import fingerprint
from widerf import measure, predict, receptive_field

SIZE = (2, 15, 15)


class Swish(torch.autograd.Function):
    """A custom function, inside which torch switches gradients off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * (s + x * s * (1 - s))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.gate = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        x = self.last(x) * 0.5
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(kept)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "meta device by default": lambda: torch.device("meta"),
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
}
ROADS: dict[str, Callable[[nn.Module], Any]] = {
    "receptive_field": lambda model: receptive_field(model, SIZE),
    "predict": lambda model: predict(model, SIZE),
    "measure": lambda model: measure(model, SIZE, samples=4),
}


def same(a: Any, b: Any) -> None:
    if hasattr(a, "map"):
        torch.testing.assert_close(a.map, b.map, rtol=1e-9, atol=1e-15)
        assert (a.center, a.trf_size, a.jump, a.untraced) == (b.center, b.trf_size, b.jump, b.untraced)
    else:
        paths = [[name.removeprefix("inner").removeprefix(".") for name in field.global_paths] for field in (a, b)]
        assert (a.size, a.jump, a.center()) == (b.size, b.jump, b.center()) and paths[0] == paths[1]


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning", "ignore:Anomaly Detection")
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
def test_what_surrounds_the_call_does_not_matter(surrounding: str, road: str) -> None:
    model = net()
    expected = ROADS[road](model)
    before = fingerprint(model)
    with SURROUNDINGS[surrounding]():
        found = ROADS[road](model)
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    same(found, expected)
    assert fingerprint(model) == before
    with SURROUNDINGS[surrounding]():
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (grad, inference)


class Wrapped(nn.Module):
    """The network with part of it in a wrapper of the caller's."""

    def __init__(self, inner: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.inner, x)


def scripted_part(model: nn.Module) -> nn.Module:
    model.first = torch.jit.script(model.first)
    return model


def compiled_part(model: nn.Module) -> nn.Module:
    model.last = torch.compile(model.last, backend="eager")
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "scripted": torch.jit.script,
    "traced": lambda model: torch.jit.trace(model, torch.zeros(1, *SIZE, dtype=torch.float64)),
    "compiled part": compiled_part,
    "scripted part": scripted_part,
    "reentrant checkpoint": lambda model: Wrapped(model, lambda m, x: checkpoint(m, x, use_reentrant=True)),
    "checkpoint": lambda model: Wrapped(model, lambda m, x: checkpoint(m, x, use_reentrant=False)),
    "two checkpoints": lambda model: Wrapped(
        model, lambda m, x: checkpoint(lambda y: checkpoint(m, y, use_reentrant=True), x, use_reentrant=True)
    ),
    "weights that want no gradient": lambda model: model.requires_grad_(False),
}


@pytest.mark.filterwarnings(
    "ignore::widerf.errors.ClippedWarning", "ignore::DeprecationWarning", "ignore:None of the inputs",
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit",
)  # fmt: skip
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_wraps_the_model_does_not_matter(wrapper: str, road: str) -> None:
    expected = ROADS[road](net())
    same(ROADS[road](WRAPPERS[wrapper](net())), expected)


def test_a_model_made_in_inference_mode_is_refused_in_one_sentence() -> None:
    with torch.inference_mode():
        model = copy.deepcopy(net())
    for road in ROADS.values():
        with pytest.raises(ValueError, match=r"ordinary tensors.*inference_mode.*'first.weight'"):
            road(model)
        road(copy.deepcopy(net()))


def test_layers_of_a_compiled_model_bear_the_names_they_have_without() -> None:
    model = torch.compile(net(), backend="eager")
    assert receptive_field(model, SIZE, layer="first").layer == "first"
    assert receptive_field(model, SIZE, layer="_orig_mod.first").size == (3, 3)


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 4, 13])
def test_the_prediction_of_a_half_precision_model_does_not_underflow(dtype: torch.dtype, depth: int) -> None:
    torch.manual_seed(0)
    layers = [m for i in range(depth) for m in (nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(32, 8, 3, padding=1))
    size = (3, 2 * depth + 7, 2 * depth + 7)
    expected = predict(model, size).std
    assert predict(copy.deepcopy(model).to(dtype), size).std == pytest.approx(expected, rel=0.02)


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
def test_a_custom_function_is_differentiated() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1)]
    plain = nn.Sequential(*layers).double()
    custom = nn.Sequential(layers[0], Wrapped(nn.Identity(), lambda _, x: Swish.apply(x)), layers[2]).double()
    for road in ROADS.values():
        same(road(custom), road(plain))


def test_a_model_that_fails_for_its_own_reasons_says_so() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask

    class Typo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.no_such_layer(x)

    for model, error, match in ((Two(), TypeError, "mask"), (Typo(), AttributeError, "no_such_layer")):
        for road in ROADS.values():
            with pytest.raises(error, match=match):
                road(model)
    with pytest.raises(ValueError, match=r"input_size must be one that the model accepts.*RuntimeError.*channels"):
        receptive_field(net(), (5, 15, 15))
