"""Arms of the race: sparse layers, what people would use instead, and cuDNN's dense layer that all are divided by."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.gpu.layers import random_taps
from experiments.harness.runs import Record
from widerf import SparseConv2d, convert, kernels

Build = Callable[[], nn.Module]
Network = tuple[str, int, int, str]  # timm model, batch, side, way


@dataclass(frozen=True)
class Heat:
    """Modules that get one input, timed one after the other; the first is what the others are divided by."""

    part: str
    shape: tuple[int, int, int]  # batch, channels, side
    dtype: torch.dtype
    channels_last: bool
    arms: tuple[tuple[str, Build], ...]
    stride: int = 1

    @property
    def name(self) -> str:
        """For people and for the rows."""
        b, c, n = self.shape
        form = "channels_last" if self.channels_last else "NCHW"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{b}×{c}@{n}², {str(self.dtype).removeprefix('torch.')}, {form}{stride}"


def blocks(channels: int, block: int, kernel: int, extent: int, stride: int = 1, depthwise: bool = False) -> Build:
    """A sparse layer whose neighbouring channels share their taps by ``block``; 0: each has its own."""

    def build() -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        patterns = channels // min(block, channels) if block else channels
        offsets = random_taps(patterns, kernel**2, extent, generator)
        groups = channels if depthwise else 1
        return SparseConv2d(channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False, pattern=offsets)

    return build


def plain(channels: int, kernel: int, dilation: int = 1, stride: int = 1, depthwise: bool = False) -> Build:
    """The dense layer."""
    groups = channels if depthwise else 1
    return lambda: nn.Conv2d(
        channels, channels, kernel, stride, dilation * (kernel // 2), dilation, groups=groups, bias=False
    )


class Deformable(nn.Module):
    """torchvision's deformable 3×3, its offsets a parameter."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) / channels)
        self.offsets = nn.Parameter(3 * torch.randn(1, 18, side, side))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        from torchvision.ops import deform_conv2d

        result: Tensor = deform_conv2d(x, self.offsets.expand(len(x), -1, -1, -1), self.weight, padding=1)
        return result


def _dense(shape: tuple[int, int, int], dtype: torch.dtype, last: bool, wide: bool, stride: int = 1) -> Heat:
    c = shape[1]

    def default() -> nn.Module:
        return SparseConv2d(c, c, 3, stride, 1, bias=False, seed=0)

    arms: list[tuple[str, Build]] = [("dense 3×3", plain(c, 3, stride=stride)), ("default pattern", default)]
    arms += [(f"blocks of {b}, extent 7", blocks(c, b, 3, 7, stride)) for b in (64, 32) if b <= c and c % b == 0]
    if wide:
        arms += [
            ("blocks of 64, extent 15", blocks(c, 64, 3, 15, stride)),
            ("dilated 3×3", plain(c, 3, 3, stride)),
            ("a pattern for every channel", blocks(c, 0, 3, 7, stride)),
        ]
    return Heat("convolution", shape, dtype, last, tuple(arms), stride)


def _depthwise(shape: tuple[int, int, int], last: bool) -> Heat:
    c = shape[1]
    arms: list[tuple[str, Build]] = [("dense 3×3", plain(c, 3, depthwise=True))]
    for k, extent in ((3, 15), (5, 15), (7, 23)):
        if k > 3:
            arms.append((f"dense {k}×{k}", plain(c, k, depthwise=True)))
        arms.append((f"dilated {k}×{k}", plain(c, k, 2, depthwise=True)))
        arms.append((f"{k * k} taps, blocks of 32", blocks(c, 32, k, extent, depthwise=True)))
    return Heat("depthwise", shape, torch.bfloat16, last, tuple(arms))


def _launches(shape: tuple[int, int, int], dtype: torch.dtype, count: int) -> Heat:
    """A chain of layers on images so small that its time is that of launching: what Python takes for a layer."""

    def chain(build: Build) -> Build:
        return lambda: nn.Sequential(*(build() for _ in range(count)))

    arms = _dense(shape, dtype, True, False).arms[:2]
    return Heat("launch", shape, dtype, True, tuple((f"{count} times {name}", chain(build)) for name, build in arms))


def heats(small: bool) -> list[Heat]:
    """Return all heats, what matters most first: those whose figures were asked for end with that of the launches."""
    half, full = torch.bfloat16, torch.float32
    if small:
        deformable = (("deform_conv2d", lambda: Deformable(32, 8)),)
        first = _dense((2, 32, 8), full, True, True)
        return [
            Heat(first.part, first.shape, full, True, (*first.arms, *deformable)),
            _dense((2, 32, 8), full, False, False, 2),
            _depthwise((2, 32, 8), True),
            _launches((1, 32, 8), full, 3),
        ]
    four = [(128, 64, 56), (128, 128, 28), (128, 256, 14), (128, 512, 7)]
    rivals: tuple[tuple[str, Build], ...] = (
        ("dense 3×3", plain(64, 3)),
        ("deform_conv2d", lambda: Deformable(64, 56)),
        ("blocks of 64, extent 15", blocks(64, 64, 3, 15)),
        ("dense 15×15", plain(64, 15)),
    )
    return [
        *(_dense(shape, half, True, True) for shape in four),
        _depthwise((64, 96, 56), True),
        *(_dense(shape, full, True, False) for shape in four),
        _launches((2, 64, 8), half, 12),
        *(_dense(shape, half, False, False) for shape in four),
        _dense((128, 128, 56), half, True, False, 2),
        _depthwise((64, 384, 14), True),
        _depthwise((64, 96, 56), False),
        Heat("rivals", (32, 64, 56), full, False, rivals),
    ]


def microseconds(call: Callable[[], object], device: torch.device, seconds: float, graph: bool = False) -> float:
    """Return the median time of a call: warm, on the device's own clock where it is a GPU.

    With ``graph`` a GPU replays calls that were captured: what the kernels take, without the launches.
    """
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        if graph:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                # It replays ten times what takes so many milliseconds.
                return float(do_bench_cudagraph(call, rep=max(1, int(100 * seconds)), return_mode="median")) * 1e3
        return float(do_bench(call, warmup=10, rep=int(1e3 * seconds), return_mode="median")) * 1e3
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[1] * 1e6


def steps_of(module: nn.Module, x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return what computes a forward pass, and forward and backward."""
    x = x.detach().requires_grad_()
    wanted = [x, *module.parameters()]
    with torch.no_grad():
        up = torch.randn_like(module(x))

    def both() -> object:
        return torch.autograd.grad(module(x), wanted, up, allow_unused=True)

    def forward() -> object:
        with torch.no_grad():
            return module(x)

    return forward, both


def time_module(module: nn.Module, x: Tensor, seconds: float) -> Record:
    """Return microseconds of a forward pass and of both passes, replayed and launched one by one, and added bytes."""
    forward, both = steps_of(module, x)
    row: Record = {}
    if x.is_cuda:
        both()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        row["bytes"] = torch.cuda.max_memory_allocated() - before
    for name, call in (("forward", forward), ("both", both)):
        row[name] = round(microseconds(call, x.device, seconds, graph=True), 1)
        row[f"eager {name}"] = round(microseconds(call, x.device, seconds), 1)
    return row


def _input(heat: Heat, device: torch.device) -> tuple[Tensor, torch.memory_format]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # the rivals choose their fastest kernel, too
    b, c, n = heat.shape
    form = torch.channels_last if heat.channels_last else torch.contiguous_format
    return torch.randn(b, c, n, n).to(device, heat.dtype, memory_format=form), form


def warm(index: int, arm: str, device: str, small: bool) -> None:
    """Compile what an arm of a heat needs, where another process finds it: one training step."""
    heat = heats(small)[index]
    x, form = _input(heat, torch.device(device))
    module: Any = dict(heat.arms)[arm]().to(x.device, heat.dtype, memory_format=form)
    steps_of(module, x)[1]()


def run(heat: Heat, device: torch.device, seconds: float) -> Iterator[Record]:
    """Yield a row for each arm; an arm that cannot run says why instead of times."""
    x, form = _input(heat, device)
    first: Record = {}
    for name, build in heat.arms:
        row: Record = {"part": heat.part, "heat": heat.name, "arm": name}
        if name == "deform_conv2d" and importlib.util.find_spec("torchvision") is None:
            yield row | {"failed": "torchvision is not installed"}
            continue
        try:
            module: Any = build().to(device, heat.dtype, memory_format=form)
            row |= time_module(module, x, seconds)
            if isinstance(module, SparseConv2d):
                path = kernels.path_of(module, x)
                row |= {"path": path.path, "why": path.why}
        except RuntimeError as error:
            yield row | {"failed": f"{type(error).__name__}: {error}"[:200]}
            continue
        first = first or row
        timed = [key for key in ("forward", "both", "eager forward", "eager both", "bytes") if key in row]
        yield row | {f"{key} ratio": round(row[key] / first[key], 3) for key in timed}


def networks(small: bool) -> list[Network]:
    """Return (timm model, batch, side, way) of the training steps: replayed as a graph, launched singly, compiled.

    The first model is the one whose figures were asked for.
    """
    if small:
        return [("test_resnet", 2, 64, "eager")]
    models = ("resnet50", "convnext_tiny")
    return [(model, 64, 224, way) for model in models for way in ("graph", "eager", "compiled")]


def _paths(model: nn.Module, step: Callable[[], None]) -> Record:
    """Return how many sparse layers took which path in one step."""
    found: dict[str, int] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        path = kernels.path_of(module, inputs[0]).path
        found[path] = found.get(path, 0) + 1

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, SparseConv2d)]
    step()
    for hook in hooks:
        hook.remove()
    return found


def _step(model: nn.Module, called: Any, x: Tensor) -> None:
    """Take a training step, but for the optimiser; ``called`` is the model, or it compiled."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        loss = called(x).float().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)


def _peak(step: Callable[[], None], device: torch.device) -> int | None:
    """Return the most bytes that a step holds at once, parameters included."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def run_network(name: str, batch: int, side: int, way: str, device: torch.device, seconds: float) -> Record:
    """Return milliseconds and bytes of a training step, plain and converted, channels_last; bf16 autocast on a GPU."""
    import timm

    x = torch.randn(batch, 3, side, side).to(device, memory_format=torch.channels_last)
    row: Record = {"part": "network", "heat": f"{name}, {batch}×3@{side}²", "arm": way}
    for kind in ("plain", "converted"):
        model = timm.create_model(name, pretrained=False)
        if kind == "converted":
            convert(model, input_size=(3, side, side), seed=0)
        model = model.to(device, memory_format=torch.channels_last).train()
        row["layers by path"] = _paths(model, partial(_step, model, model, x))
        called: Any = torch.compile(model) if way == "compiled" else model
        step = partial(_step, model, called, x)
        step()
        row[f"{kind} bytes"] = _peak(step, device)
        row[kind] = round(microseconds(step, device, seconds, graph=way == "graph") / 1e3, 3)
        del model, called, step
    row["ratio"] = round(row["converted"] / row["plain"], 3)
    if row["plain bytes"]:
        row["bytes ratio"] = round(row["converted bytes"] / row["plain bytes"], 3)
    return row
