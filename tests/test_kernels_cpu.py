"""The compiled CPU kernels against float64 convolutions with the scattered dense kernel."""

from __future__ import annotations

import random
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from widerf.kernels import cpu
from widerf.layout import Plan, make_layout

SOURCES = Path(cpu.__file__).parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-pthread", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma"]
BUILDS = {"plain": ("plain", []), "avx2": ("avx2", AVX2), "wide": ("avx512", AVX2)}  # name: source, flags
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")


class Case(NamedTuple):
    """One layer and its tensors."""

    x: Tensor
    weight: Tensor
    offsets: list[list[tuple[int, int]]]  # [pattern group][tap]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def plan(self) -> Plan:
        taps = tuple(tuple(group) for group in self.offsets)
        pads = tuple((p, p) for p in self.padding)
        return make_layout(taps, self.x.shape[1], self.kernel, self.stride, pads, self.dilation, self.groups).whole

    def exact(self, x: Tensor, weight: Tensor) -> Tensor:
        """Scatter the weights into a dense kernel and convolve in float64."""
        channels = x.shape[1]
        reach = max(abs(o) for group in self.offsets for tap in group for o in tap)
        reach = max(reach, *self.kernel)
        dense = torch.zeros(*weight.shape[:2], 2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
        flat = weight.flatten(2)
        outs = weight.shape[0] // self.groups
        rows = []
        for o in range(weight.shape[0]):
            first = o // max(1, outs) * weight.shape[1]
            planes = []
            for c in range(weight.shape[1]):
                taps = self.offsets[(first + c) * len(self.offsets) // channels]
                index = torch.tensor([(reach + dy) * (2 * reach + 1) + reach + dx for dy, dx in taps])
                planes.append(dense[o, c].flatten().index_put((index,), flat[o, c]).view_as(dense[o, c]))
            rows.append(torch.stack(planes))
        pads = [
            p + d * (reach - (k - 1) // 2) for p, d, k in zip(self.padding, self.dilation, self.kernel, strict=True)
        ]
        y = F.conv2d(x, torch.stack(rows), None, self.stride, pads, self.dilation, self.groups)
        height, width = self.size()
        return y[..., :height, :width]

    def size(self) -> tuple[int, int]:
        sizes = zip(self.x.shape[2:], self.padding, self.dilation, self.kernel, self.stride, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)
        return height, width


def random_case(seed: int) -> Case:
    """Draw a layer: every argument may take any value that a user may give, small enough for the oracle."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    kernel = draw.choice([(3, 3), (3, 3), (1, 3), (2, 2), (5, 5), (1, 1)])
    dilation = (draw.choice([1, 1, 2]), draw.choice([1, 1, 3]))
    padding = (draw.randint(0, 3), draw.randint(0, 3))
    stride = draw.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1)])
    same = draw.random() < 0.4
    if same:
        stride, padding = (1, 1), tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    image = [n + draw.choice([0, 1, 5, 16, 23, 40]) for n in least]
    groups, per_in, per_out = draw.choice([(1, 0, 0)] * 3 + [(2, 0, 0), (5, 0, 0), (11, 1, 1), (16, 1, 1)])
    per_in, per_out = per_in or draw.choice([1, 2, 3, 7, 16]), per_out or draw.choice([1, 2, 5, 6, 17, 24, 33])
    channels = groups * per_in
    extent = draw.choice([3, 7, 15, 31])
    window = [(y, x) for y in range(-(extent // 2), extent // 2 + 1) for x in range(-(extent // 2), extent // 2 + 1)]
    taps = kernel[0] * kernel[1]
    if len(window) < taps:
        window = [(y, x) for y in range(-4, 5) for x in range(-4, 5)]
    patterns = draw.choice([1, channels, draw.randint(1, channels)])
    offsets = [draw.sample(window, taps) for _ in range(patterns)]
    batch = draw.choice([0, 1, 1, 2, 3])
    x = torch.randn(batch, channels, *image, generator=generator)
    weight = torch.randn(groups * per_out, per_in, *kernel, generator=generator)
    if draw.random() < 0.3:
        x = x.contiguous(memory_format=torch.channels_last)
    return Case(x, weight, offsets, kernel, stride, padding, dilation, groups)  # type: ignore[arg-type]


def largest_error(case: Case) -> float:
    """Return the largest error of the three functions, each relative to the largest magnitude of its result."""
    plan = case.plan()
    x, weight = case.x.double().requires_grad_(), case.weight.double().requires_grad_()
    y = case.exact(x, weight)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    if not case.x.is_contiguous():
        up = up.contiguous(memory_format=torch.channels_last)
    exact = (y.detach(), *torch.autograd.grad(y, (x, weight), up.double()))
    found = (
        cpu.forward(case.x, case.weight, plan, case.size()),
        cpu.grad_input(up, case.weight, plan, case.x.shape),
        cpu.grad_weight(case.x, up, plan, case.weight.shape),
    )
    errors = [0.0]
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        if a.numel():
            scale = float(b.abs().max())
            errors.append(float((a.double() - b).abs().max()) / (scale or 1.0))
    return max(errors)


@cache
def built(name: str, directory: Path) -> Any:
    source, flags = BUILDS[name]
    path = directory / f"{name}.so"
    subprocess.run([COMPILER, *FLAGS, *flags, str(SOURCES / f"{source}.cpp"), "-o", str(path)], check=True)
    return cpu.load(path)


@pytest.fixture(params=list(BUILDS))
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> str:
    name: str = request.param
    if name != "plain" and "avx2" not in cpu.runnable():
        pytest.skip(f"this processor has {cpu.runnable()} only")
    library = built(name, tmp_path_factory.getbasetemp())
    monkeypatch.setattr(cpu, "library", lambda: library)
    return name


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_compiler
def test_kernels_compute_the_scattered_convolution_and_its_gradients(kernels: str, threads: int) -> None:
    worst = max((largest_error(random_case(seed)), seed) for seed in range(60))
    assert worst[0] <= 1e-5, worst
