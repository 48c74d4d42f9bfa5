"""Layers for the compiled CPU kernels, their float64 twin, and the libraries to try them with."""

from __future__ import annotations

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
from widerf.kernels.plan import Plan, make_layout

SOURCES = Path(cpu.__file__).parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-pthread", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", *AVX2]
# name: source, flags
BUILDS = {"plain": ("plain", []), "avx2": ("avx2", AVX2), "wide": ("avx512", AVX2), "avx512": ("avx512", AVX512)}


def skip_unless_runnable(name: str) -> None:
    """Skip the test if this processor lacks what the build needs."""
    if {"plain": "plain", "avx512": "avx512"}.get(name, "avx2") not in cpu.runnable():
        pytest.skip(f"this processor has {cpu.runnable()} only")


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
        side = 2 * reach + 1
        place = torch.tensor([[(reach + dy) * side + reach + dx for dy, dx in group] for group in self.offsets])
        place = place[torch.arange(channels) * len(place) // channels].view(self.groups, 1, weight.shape[1], -1)
        index = place.expand(-1, weight.shape[0] // self.groups, -1, -1).reshape(*weight.shape[:2], -1)
        dense = weight.new_zeros(*weight.shape[:2], side * side).scatter(2, index, weight.flatten(2))
        pads = [
            p + d * (reach - (k - 1) // 2) for p, d, k in zip(self.padding, self.dilation, self.kernel, strict=True)
        ]
        y = F.conv2d(x, dense.unflatten(2, (side, side)), None, self.stride, pads, self.dilation, self.groups)
        height, width = self.size()
        return y[..., :height, :width]

    def size(self) -> tuple[int, int]:
        sizes = zip(self.x.shape[2:], self.padding, self.dilation, self.kernel, self.stride, strict=True)
        height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)
        return height, width


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
