"""Where the computer has more than a CPU: `pytest tests/test_device.py --device cuda --dtype bfloat16`.

Layers compute there what float64 computes on the CPU, and the ruler reads the same figures off a model wherever it is.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widerf
from tests.reference import scattered_convolution

# Relative error of a result, in the norm: one rounding of its numbers, and of the sums behind them.
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}
TENSOR_CORES = 2e-3  # float32 on CUDA may be multiplied in TF32
LAYERS: dict[str, dict[str, Any]] = {
    "dense": {},
    "wide": {"extent": 7, "in_channels": 16, "out_channels": 24},
    "grouped": {"groups": 2, "extent": 5},
    "depthwise": {"groups": 8, "out_channels": 8, "extent": 7},
    "strided": {"stride": 2, "extent": 7},
    "dilated": {"dilation": 2, "padding": (2, 0), "extent": 5},
}


def make(rank: int, options: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    arguments = {"in_channels": 8, "out_channels": 6, "padding": 1, "seed": 0, **options}
    torch.manual_seed(0)
    kind = getattr(widerf, f"SparseConv{rank}d")
    return kind(kernel_size=3, **arguments).to(device, dtype)


def exact(layer: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The layer and its three gradients by the scattered kernel, in float64 on the CPU."""
    x, weight, bias = (t.detach().cpu().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    told = (layer.stride, layer.padding, layer.dilation, layer.groups)
    y = scattered_convolution(x, weight, bias, layer.offsets.cpu(), *told)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad.detach().cpu().double())]


def check(layer: Any, x: Tensor) -> None:
    """Where the layer is, and in its precision: the output and the gradients of input, weight and bias."""
    y = layer(x)
    grad = torch.randn_like(y)
    found = [y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)]
    error = TENSOR_CORES if x.dtype == torch.float32 and x.is_cuda else ERRORS[x.dtype]
    for mine, wanted in zip(found, exact(layer, x, grad), strict=True):
        assert (mine.device, mine.dtype) == (x.device, x.dtype)
        assert float((mine.cpu().double() - wanted).norm() / wanted.norm()) <= error


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_gradients_are_those_of_the_scattered_kernel(
    name: str, form: torch.memory_format, device: torch.device, dtype: torch.dtype
) -> None:
    layer = make(2, LAYERS[name], device, dtype)
    x = torch.randn(3, layer.in_channels, 35, 38, device=device, dtype=dtype)  # several tiles, none of them whole
    check(layer, x.contiguous(memory_format=form).requires_grad_())


@pytest.mark.parametrize("rank", [1, 3])
def test_signals_and_volumes_too(rank: int, device: torch.device, dtype: torch.dtype) -> None:
    layer = make(rank, {"extent": 5}, device, dtype)
    check(layer, torch.randn(2, 8, *[11] * rank, device=device, dtype=dtype, requires_grad=True))


@pytest.fixture
def model() -> nn.Module:
    """Three layers on the CPU in float32."""
    torch.manual_seed(0)
    widths = [(3, 16), (16, 16), (16, 16)]
    return nn.Sequential(*[m for a, b in widths for m in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())])


def test_the_ruler_reads_the_same_wherever_the_model_is(model: nn.Module, device: torch.device) -> None:
    here, there = model.eval(), copy.deepcopy(model).eval().to(device)
    assert widerf.receptive_field(there, (3, 21, 21)) == widerf.receptive_field(here, (3, 21, 21))
    wanted = widerf.predict(here, (3, 21, 21)).std
    assert widerf.predict(there, (3, 21, 21)).std == pytest.approx(wanted, rel=1e-4)
    images = torch.randn(8, 3, 21, 21)
    figures = [
        widerf.measure(which, (3, 21, 21), inputs=images, samples=8, generator=torch.Generator().manual_seed(0)).std
        for which in (there, here)
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    assert {p.device for p in there.parameters()} == {device}


def test_a_model_is_widened_and_converted_where_it_is(model: nn.Module, device: torch.device) -> None:
    there = copy.deepcopy(model).to(device)
    for which in (there, model):
        widerf.init.apply(which, 0.5)
        widerf.convert(which, extent=5)
    for mine, wanted in zip(there.state_dict().values(), model.state_dict().values(), strict=True):
        assert mine.device == device
        torch.testing.assert_close(mine.cpu(), wanted, rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 3, 21, 21)
    torch.testing.assert_close(there.eval()(x.to(device)).cpu(), model.eval()(x), rtol=1e-3, atol=1e-3)
