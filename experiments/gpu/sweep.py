"""The candidates of the table of configurations, measured map by map: what the table is made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from experiments.gpu.layers import random_taps
from experiments.gpu.race import microseconds
from experiments.harness.runs import Record
from widerf.kernels import configurations, cuda
from widerf.kernels.configurations import Configuration, Shape
from widerf.kernels.cuda_tables import read_shifts


class Layer(NamedTuple):
    """A layer whose maps are measured; ``block`` neighbouring channels share their taps."""

    batch: int
    channels: int
    side: int
    block: int
    taps: int = 9
    extent: int = 7
    stride: int = 1
    depthwise: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """For people and for the rows."""
        kind = f"{self.taps} taps, depthwise" if self.depthwise else f"{self.taps} taps"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        numbers = str(self.dtype).removeprefix("torch.")
        return f"{self.batch}×{self.channels}@{self.side}²{stride}, {kind}, blocks of {self.block}, {numbers}"


def layers(small: bool) -> list[Layer]:
    """Return the layers, what matters most first."""
    if small:
        return [Layer(2, 32, 8, 16), Layer(2, 32, 8, 32, depthwise=True)]
    sides = ((64, 56), (128, 28), (256, 14), (512, 7))
    return [
        *(Layer(128, c, n, min(64, c // 2)) for c, n in sides),
        *(Layer(64, 96, 56, 32, k * k, 15, depthwise=True) for k in (3, 7)),
        *(Layer(128, c, n, 128) for c, n in sides[1:]),
        Layer(128, 128, 56, 64, stride=2),
        *(Layer(128, c, n, min(64, c // 2), dtype=torch.float32) for c, n in sides[:2]),
    ]


def maps(layer: Layer, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Return what computes the three maps of a layer in channels_last."""
    draw = torch.Generator().manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    c, out = layer.channels, (layer.side - 1) // layer.stride + 1
    taps = random_taps(c // layer.block, layer.taps, layer.extent, draw)
    shifts = read_shifts(taps.repeat_interleave(layer.block, 0))

    def image(side: int) -> Tensor:
        drawn = torch.randn(layer.batch, c, side, side, generator=draw)
        return drawn.to(device, layer.dtype, memory_format=torch.channels_last)

    x, grad = image(layer.side), image(out)
    weight = torch.randn(c, 1 if layer.depthwise else c, layer.taps, generator=draw).to(device, layer.dtype)
    common: Any = (shifts, (layer.stride, layer.stride), c if layer.depthwise else 1)
    return {
        "forward": lambda: cuda.forward(x, weight, *common, (out, out)),
        "grad_input": lambda: cuda.grad_input(grad, weight, *common, (layer.side, layer.side)),
        "grad_weight": lambda: cuda.grad_weight(x, grad, *common),
    }


def shape_of(call: Callable[[], Tensor]) -> Shape:
    """Return the shape that a map asks a configuration for."""
    with configurations.asked() as shapes:
        call()
    return shapes[0]


@contextmanager
def using(found: Configuration) -> Iterator[None]:
    """Compute with this configuration, whatever is asked."""
    with mock.patch.object(configurations, "choose", lambda shape: found):
        yield


def warm(index: int, name: str, device: str, small: bool, until: float) -> None:
    """Compile the candidates of a map of a layer, where another process finds them, until that time of the clock."""
    call = maps(layers(small)[index], torch.device(device))[name]
    for candidate in configurations.candidates(shape_of(call)):
        if time.time() > until:
            return
        with using(candidate):
            try:
                call()
            except RuntimeError:  # it does not fit the device: measuring it will say so
                continue


def run(layer: Layer, device: torch.device, seconds: float) -> Iterator[Record]:
    """Yield a row for each map of a layer: microseconds of each candidate, the table's first."""
    for name, call in maps(layer, device).items():
        shape = shape_of(call)
        found: dict[str, float | str] = {}
        for c in configurations.candidates(shape):
            key = " ".join(str(int(value)) for value in astuple(c))
            with using(c):
                try:
                    found[key] = round(microseconds(call, device, seconds, graph=True), 1)
                except RuntimeError as error:
                    found[key] = f"{type(error).__name__}: {error}"[:120]
        measured = {key: value for key, value in found.items() if not isinstance(value, str)}
        best = min(measured, key=measured.__getitem__, default="")
        yield {
            "part": "sweep",
            "heat": layer.name,
            "arm": name,
            "shape": list(shape),
            "times": found,
            "table": next(iter(found.values())),
            "best": best,
            "best time": measured.get(best),
        }
