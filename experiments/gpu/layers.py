"""Layers drawn at random, computed on the device by its kernels and in float64 by PyTorch's operators."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from experiments.harness.runs import Record
from widerf import SparseConv2d, kernels

# Greatest error over greatest number: a few roundings of the numbers, and of the factors in TF32.
BOUNDS = {"bfloat16": 2**-6, "float16": 2**-9, "float32": 1e-5, "tf32": 2e-3}
MAPS = ((7, 7), (14, 14), (28, 28), (56, 56), (33, 17), (15, 20))
SMALL = ((5, 7), (9, 6))


def draw(seed: int, small: bool) -> Record:
    """Return the description of a layer and its input; ``small`` for a device that is no GPU."""
    of = random.Random(seed)
    block = of.choice((16, 32, 64, 64, 0))
    blocks = of.choice((1, 2)) if small else of.choice((1, 2, 3, 4))
    ins = block * blocks or of.choice((3, 17, 40))
    depthwise = of.random() < 0.3
    return {
        "seed": seed,
        "ins": ins,
        "outs": ins if depthwise else of.choice((8, 24) if small else (16, 64, 72, 128, 200)),
        "groups": ins if depthwise else 1,
        "block": block,
        "kernel": of.choice(((3, 3), (3, 3), (2, 2), (1, 3), *([(5, 5), (7, 7)] if depthwise else []))),
        "extent": of.choice((7, 15)),
        "stride": of.choice(((1, 1), (1, 1), (2, 2), (2, 1))),
        "size": of.choice(SMALL if small else MAPS),
        "batch": of.choice((1, 3) if small else (1, 5, 32)),
        "numbers": of.choice(("bfloat16", "bfloat16", "float16", "float32", "tf32")),
        "channels_last": of.random() < 0.6,
    }


def random_taps(patterns: int, taps: int, extent: int, generator: torch.Generator) -> Tensor:
    """Draw distinct taps of a window for each pattern: offsets (patterns, taps, 2) from its centre."""
    cells = [torch.randperm(extent**2, generator=generator)[:taps] for _ in range(patterns)]
    return torch.stack([torch.stack([c // extent, c % extent], -1) - extent // 2 for c in cells])


def build(case: Record, device: torch.device) -> tuple[SparseConv2d, Tensor]:
    """Return the layer and its input on the device."""
    generator = torch.Generator().manual_seed(case["seed"])
    patterns = case["ins"] // (case["block"] or 1)
    layer = SparseConv2d(
        case["ins"],
        case["outs"],
        case["kernel"],
        case["stride"],
        padding=1,
        groups=case["groups"],
        bias=False,
        pattern=random_taps(patterns, case["kernel"][0] * case["kernel"][1], case["extent"], generator),
    )
    nn.init.normal_(layer.weight, generator=generator)
    dtype = getattr(torch, "float32" if case["numbers"] == "tf32" else case["numbers"])
    x = torch.randn(case["batch"], case["ins"], *case["size"], generator=generator)
    form = torch.channels_last if case["channels_last"] else torch.contiguous_format
    return layer.to(device, dtype), x.to(device, dtype, memory_format=form)


def maps(layer: SparseConv2d, x: Tensor, up: Tensor) -> dict[str, Tensor]:
    """Return the output and both gradients for ``up``."""
    x = x.detach().requires_grad_()
    y = layer(x)
    grad_x, grad_w = torch.autograd.grad(y, (x, layer.weight), up)
    return {"forward": y.detach(), "grad_input": grad_x, "grad_weight": grad_w}


def check(case: Record, device_name: str) -> Record:
    """Compare the device's kernels with float64; the same numbers twice; the path that the layer took."""
    device = torch.device(device_name)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case["numbers"] == "tf32"
    layer, x = build(case, device)
    exact_layer: Any = SparseConv2d(
        case["ins"], case["outs"], case["kernel"], case["stride"], padding=1, groups=case["groups"], bias=False,
        pattern=layer.offsets.cpu(), device=device, dtype=torch.float64,
    )  # fmt: skip
    exact_layer.weight.data.copy_(layer.weight)
    with torch.no_grad():
        up = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(1)).to(x)
    exact = maps(exact_layer, x.double(), up.double())  # float64 has no kernels: PyTorch's operators
    found, again = maps(layer, x, up), maps(layer, x, up)
    errors = {
        name: float((found[name].double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
        for name, wanted in exact.items()
    }
    bound = BOUNDS[case["numbers"]]
    return {
        "path": kernels.path_of(layer, x).path,
        "errors": errors,
        "bound": bound,
        "right": all(error <= bound for error in errors.values()),
        "same_bits": all(torch.equal(found[name], again[name]) for name in found),
    }
