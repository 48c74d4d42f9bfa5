"""What people do with a layer beside calling it, held against the plain call: graphs, compilers, autocast."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from experiments.harness.runs import Record
from widerf import SparseConv2d, convert


def _layer(device: torch.device, channels: int = 64, **options: Any) -> tuple[SparseConv2d, Tensor]:
    torch.manual_seed(0)
    layer = SparseConv2d(channels, channels, 3, padding=1, seed=0, **options).to(device)
    x = torch.randn(2, channels, 14, 14).to(device, memory_format=torch.channels_last)
    return layer, x.requires_grad_()


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).abs().max() / wanted.detach().abs().max())


def graph_replay(device: torch.device) -> float:
    """A training step captured and replayed on other numbers."""
    layer, x = _layer(device)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    return max(_error(a, b) for a, b in zip(captured, step(), strict=True))


def compiled(device: torch.device) -> float:
    """A compiled layer, without a break of the graph."""
    layer, x = _layer(device)
    called: Any = torch.compile(layer, fullgraph=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
    found = torch.autograd.grad(called(x).square().sum(), (x, layer.weight))
    return max(_error(a, b) for a, b in zip(found, wanted, strict=True))


def autocast(device: torch.device) -> float:
    """Under autocast the layer computes in bf16, its gradients are float32."""
    layer, x = _layer(device)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    grads = torch.autograd.grad(y.float().square().sum(), (x, layer.weight))
    assert y.dtype == torch.bfloat16 and {g.dtype for g in grads} == {torch.float32}
    return _error(y, layer(x))


def second_derivatives(device: torch.device) -> float:
    """The gradient of a gradient's norm, against float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        layer, x = _layer(device)
        layer, x = layer.to(dtype), x.detach().to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), layer.weight)[0])
    return _error(*found)


def memory_format(device: torch.device) -> float:
    """What comes in channels_last leaves so, and the other way round."""
    layer, x = _layer(device)
    last = layer(x)
    plain = layer(x.detach().contiguous())
    assert last.is_contiguous(memory_format=torch.channels_last) and plain.is_contiguous()
    return _error(last, plain)


def depthwise(device: torch.device) -> float:
    """A depthwise layer against float64."""
    layer, x = _layer(device, groups=64)
    with torch.no_grad():
        return _error(layer(x), layer.double()(x.double()))


def _network(device: torch.device) -> tuple[nn.Sequential, Tensor]:
    """A converted network in channels_last, and its input."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(64, 64, 3, padding=1, groups=64),
    )  # fmt: skip
    convert(net, extent=7, seed=0)
    last = {"memory_format": torch.channels_last}
    return net.to(device, **last).train(), torch.randn(2, 64, 14, 14).to(device, **last)  # type: ignore[call-overload]


def _gradients(called: nn.Module, x: Tensor) -> list[Tensor]:
    called.zero_grad(set_to_none=True)
    called(x).square().sum().backward()
    return [p.grad.clone() for p in called.parameters() if p.grad is not None]


def compiled_network(device: torch.device) -> float:
    """A training step of a converted network, compiled, against the plain call."""
    net, x = _network(device)
    wanted = _gradients(net, x)
    called: Any = torch.compile(net, backend="inductor" if device.type == "cuda" else "aot_eager")
    return max(_error(a, b) for a, b in zip(_gradients(called, x), wanted, strict=True))


def data_parallel(device: torch.device) -> float:
    """A training step of a converted network within `DistributedDataParallel`, of one process."""
    net, x = _network(device)
    wanted = _gradients(net, x)
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(net, static_graph=True)
            found = [_gradients(model, x) for _ in range(2)]  # the first step lays out its buckets anew
        finally:
            distributed.destroy_process_group()
    return max(_error(a, b) for grads in found for a, b in zip(grads, wanted, strict=True))


USES: dict[str, tuple[Callable[[torch.device], float], float]] = {
    "CUDA graph": (graph_replay, 0.0),
    "autocast": (autocast, 2**-6),
    "second derivatives": (second_derivatives, 1e-5),
    "memory format": (memory_format, 1e-6),
    "depthwise": (depthwise, 1e-6),
    "DDP, one process": (data_parallel, 1e-5),
    "compiled network": (compiled_network, 1e-4),
    "torch.compile, one graph": (compiled, 1e-5),
}


def check(device: torch.device) -> Iterator[Record]:
    """Yield a row for each use: its error and what is allowed."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, (use, bound) in USES.items():
        row: Record = {"part": "use", "heat": name}
        if use is graph_replay and device.type != "cuda":
            yield row | {"left out": "it needs a CUDA device"}
            continue
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                error = use(device)
        except Exception as problem:  # every use gets its row
            yield row | {"right": False, "why": f"{type(problem).__name__}: {problem}"[:300]}
            continue
        yield row | {"right": error <= bound, "error": error, "bound": bound}
