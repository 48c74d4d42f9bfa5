"""Compile the Triton kernels for GPUs that are not there; ``python -m tests.kernels.offline`` prints what they need.

``python -m tests.kernels.offline boxes`` prints the kernels by boxes alone, ``gathered`` the others.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from widerf.kernels import cuda, device

ARCHITECTURES = (80, 90)
KINDS = {
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bfloat16": (torch.bfloat16, "tf32"),
    "float16": (torch.float16, "tf32"),
}
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


@dataclass(frozen=True)
class Layer:
    """A layer of ``patterns`` equal blocks of input channels with equal taps."""

    channels: int
    outs: int
    groups: int
    patterns: int
    stride: int = 1
    batch: int = 8
    side: int = 28
    taps: int = 9
    boxes: bool = False  # computed by boxes, or gathered


LAYERS = {
    "shared": Layer(128, 128, 1, 1),
    "narrow": Layer(128, 128, 1, 32),
    "strided": Layer(128, 128, 1, 4, stride=2),
    "strided narrow": Layer(128, 128, 1, 32, stride=2),
    "odd": Layer(34, 50, 1, 2, stride=2, side=13),
    "grouped": Layer(96, 48, 6, 12),
    "depthwise": Layer(96, 96, 96, 96),
    "strided depthwise": Layer(96, 96, 96, 96, stride=2),
    "beyond 32 bits": Layer(128, 128, 1, 8, stride=2, batch=256, side=512),
    "depthwise beyond 32 bits": Layer(128, 128, 128, 128, stride=2, batch=256, side=512),
}


def _boxes(channels: int, side: int, block: int, **more: int) -> Layer:
    return Layer(channels, channels, 1, channels // block, batch=128, side=side, boxes=True, **more)


# One layer for every class of shapes that `widerf.kernels.configurations` tells apart.
BOX_LAYERS = {
    **{f"{c} at {n}², blocks of 64": _boxes(c, n, 64) for c, n in ((64, 56), (128, 28), (256, 14), (512, 7))},
    **{f"{c} at {n}², blocks of 32": _boxes(c, n, 32) for c, n in ((64, 56), (512, 7))},
    "128 at 28², blocks of 16": _boxes(128, 28, 16),
    "128 at 56², stride 2": _boxes(128, 56, 64, stride=2),
    "one image of 64 at 14²": Layer(64, 64, 1, 1, batch=1, side=14, boxes=True),
    **{
        f"depthwise 96 at 56², {taps} taps": Layer(96, 96, 96, 3, batch=64, side=56, taps=taps, boxes=True)
        for taps in (9, 25, 49)
    },
    "depthwise 384 at 14²": Layer(384, 384, 384, 12, batch=64, side=14, boxes=True),
    "depthwise 96 at 56², stride 2": Layer(96, 96, 96, 3, batch=64, side=56, stride=2, boxes=True),
}


@dataclass(frozen=True)
class Launch:
    """One kernel as a launch would compile it."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The kernel and the constants that are not sizes of tiles."""
        named = {self.kernel.arg_names[i]: v for i, v in self.constants}
        flags = [k for k in ("CHANNELS_LAST", "UNIFORM", "DIVIDE", "WEIGHTED", "BIG", "TURN") if named.get(k)]
        sizes = [f"{k}{named[k]}" for k in ("BB", "BH", "BW", "BM", "BN", "BC", "BK", "TAPS", "UNROLL") if k in named]
        return " ".join([self.kernel.__name__, *flags, *sizes])

    @property
    def by_descriptors(self) -> bool:
        """Whether boxes come through tensor descriptors."""
        return any(kind.startswith("tensordesc") for _, kind in self.signature)

    @property
    def bytes_of_step(self) -> int:
        """Bytes of the two factors of one step of a product by boxes: of `product` or `weight_product`."""
        named: dict[str, Any] = {self.kernel.arg_names[i]: v for i, v in self.constants}
        pixels = named["BB"] * named["BH"] * named["BW"]
        other = named["BC"] * named["BN"] if self.kernel.__name__ == "product" else pixels * named["BN"]
        width = 4 if "fp32[" in dict(self.signature)["x"] else 2
        return (pixels * named["BC"] + other) * width

    @property
    def stages(self) -> int:
        """Steps that are to be under way at once."""
        return dict(self.options)["num_stages"]


def _launch(kernel: Any, arguments: Sequence[Any], options: dict[str, Any]) -> Launch:
    """What the just-in-time compiler would make of these arguments: ones are constants, multiples of 16 are known."""
    tuning = {k: options[k] for k in ("num_warps", "num_stages") if k in options}
    named: dict[str, Any] = dict(zip(kernel.arg_names, arguments, strict=False))
    flags = {k: v for k, v in options.items() if k not in tuning} | {"WIDEN": False}
    named |= {k: v for k, v in flags.items() if k in kernel.arg_names}
    assert set(named) == set(kernel.arg_names), set(named) ^ set(kernel.arg_names)
    signature, constants, aligned = [], [], []
    for i, name in enumerate(kernel.arg_names):
        value = named[name]
        if isinstance(value, Tensor):
            signature.append((name, _POINTERS[value.dtype]))
            aligned.append(i)
        elif hasattr(value, "block_shape"):
            signature.append((name, f"tensordesc<{_POINTERS[value.base.dtype][1:]}{value.block_shape}>"))
        elif name in flags or value == 1:
            signature.append((name, "constexpr"))
            constants.append((i, value))
        else:
            signature.append((name, "i32" if value < 1 << 31 else "i64"))
            if value % 16 == 0:
                aligned.append(i)
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(tuning.items()))


def launches(layer: Layer, kind: str, channels_last: bool) -> list[Launch]:
    """Return what a training step of the layer launches, without computing anything."""
    dtype, precision = KINDS[kind]
    form = torch.channels_last if channels_last else torch.contiguous_format
    seen: list[Launch] = []

    def image(channels: int, side: int) -> Tensor:
        return torch.empty(layer.batch, channels, side, side, dtype=dtype, device="meta", memory_format=form)

    def record(kernel: Any, grid: tuple[int, ...], _: Tensor, *arguments: Any, **options: Any) -> None:
        assert all(0 < n < 1 << 31 for n in grid[:1]) and all(0 < n < 1 << 16 for n in grid[1:])
        seen.append(_launch(kernel, arguments, options))

    out = (layer.side - 1) // layer.stride + 1
    x, grad = image(layer.channels, layer.side), image(layer.outs, out)
    weight = torch.empty(layer.outs, layer.channels // layer.groups, layer.taps, dtype=dtype, device="meta")
    draw = torch.Generator().manual_seed(0)
    patterns = torch.randint(-7, 8, (layer.patterns, layer.taps, 2), generator=draw)
    shifts = patterns[torch.arange(layer.channels) * layer.patterns // layer.channels]
    common = (shifts, (layer.stride, layer.stride), layer.groups)
    with (
        mock.patch.object(device, "launch", record),
        mock.patch.object(device, "precision", lambda dtype: precision if dtype == torch.float32 else "ieee"),
        mock.patch.object(cuda, "BOXES", layer.boxes),
    ):
        assert (cuda.why_not_boxes(shifts, x, common[1], layer.outs, layer.groups) is None) == layer.boxes
        cuda.forward(x, weight, *common, (out, out))
        cuda.grad_input(grad, weight, *common, (layer.side, layer.side))
        cuda.grad_weight(x, grad, *common)
    return list(dict.fromkeys(seen))


def layers_for(architecture: int, channels_last: bool) -> dict[str, Layer]:
    """Return the layers whose kernels an architecture runs: boxes in channels_last, by descriptors from 9.0 on."""
    boxes = {name: layer for name, layer in BOX_LAYERS.items() if architecture >= 90 or layer.groups > 1}
    return LAYERS | boxes if channels_last else LAYERS


def variants(kind: str, channels_last: bool, architecture: int) -> dict[Launch, str]:
    """Return all launches of these layers, each with the first layer that needs it."""
    first: dict[Launch, str] = {}
    for name, layer in layers_for(architecture, channels_last).items():
        for launch in launches(layer, kind, channels_last):
            first.setdefault(launch, name)
    return first


@dataclass(frozen=True)
class Needs:
    """What a compiled kernel takes, per thread (registers, bytes of stack) and per block (bytes of shared memory)."""

    registers: int
    stack: int
    shared: int
    assembly: str

    @property
    def wgmma(self) -> int:
        """Matrix products of a whole warp group."""
        return self.assembly.count("wgmma.mma_async")

    @property
    def bulk_copies(self) -> int:
        """Boxes that the hardware copies."""
        return self.assembly.count("cp.async.bulk.tensor")


def compiled(launch: Launch, architecture: int) -> Needs:
    """Compile one kernel; registers that spill show up as stack."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    constants = {(i,): value for i, value in launch.constants}
    source = ASTSource(launch.kernel, dict(launch.signature), constants, attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    assert found, report
    registers, stack, static, local = map(int, found.groups())
    return Needs(registers, stack + local, kernel.metadata.shared + static, kernel.asm["ptx"])


TITLES = ("sm", "numbers", "layer", "kernel", "registers", "spilled bytes", "shared bytes")
PIPELINE = ("steps held", "wgmma", "copies")


def rows(boxes: bool) -> Iterator[str]:
    """The table of the kernels by boxes, or of the gathering ones, line by line."""
    titles = (*TITLES, *PIPELINE) if boxes else TITLES
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for architecture, kind, last in itertools.product(ARCHITECTURES, KINDS, (False, True)):
        for launch, layer in variants(kind, last, architecture).items():
            if (layer in BOX_LAYERS) != boxes:
                continue
            n = compiled(launch, architecture)
            row: tuple[object, ...] = (architecture, kind, layer, launch.name, n.registers, n.stack, n.shared)
            if launch.by_descriptors:
                row += (f"{n.shared / launch.bytes_of_step:.1f} of {launch.stages}", n.wgmma, n.bulk_copies)
            yield f"| {' | '.join(map(str, row + ('',) * (len(titles) - len(row))))} |"


if __name__ == "__main__":
    for kinds in sys.argv[1:] or ("boxes", "gathered"):
        for line in rows(kinds == "boxes"):
            print(line, flush=True)
        print()
