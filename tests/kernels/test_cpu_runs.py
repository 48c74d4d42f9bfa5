"""The CPU kernels for channels_last where runs of neighbouring channels share their taps."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.layers import COMPILER, FLAGS, SOURCES, Case, largest_error, needs_compiler
from widerf.kernels import cpu, op


def runs_case(
    widths: int,
    count: int,
    outs: int,
    image: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    extent: int = 7,
    batch: int = 2,
    kernel: tuple[int, int] = (3, 3),
) -> Case:
    """``count`` runs of ``widths`` channels; depthwise if ``outs`` is 0."""
    channels, draw, generator = widths * count, random.Random(0), torch.Generator().manual_seed(0)
    line = range(-(extent // 2), extent // 2 + 1)
    offsets = [draw.sample([(y, x) for y in line for x in line], kernel[0] * kernel[1]) for _ in range(count)]
    x = torch.randn(batch, channels, *image, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outs or channels, channels if outs else 1, *kernel, generator=generator)
    return Case(x, weight, offsets, kernel, stride, (1, 1), (1, 1), 1 if outs else channels)


def drawn_case(seed: int) -> Case:
    """Draw a layer of runs: widths, outputs and images that leave remainders everywhere, windows wider than the map."""
    draw = random.Random(seed)
    return runs_case(
        draw.choice([16, 17, 23, 32, 40, 64, 80]),
        draw.choice([1, 2, 3]),
        draw.choice([0, 0, 1, 5, 17, 33, 64, 70, 130]),
        (draw.choice([3, 7, 14, 20]), draw.choice([3, 7, 17, 29])),
        draw.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1)]),
        draw.choice([5, 7, 15]),
        draw.choice([1, 2, 3]),
        draw.choice([(3, 3), (3, 3), (1, 3), (2, 2)]),
    )


@needs_compiler
def test_runs_compute_the_scattered_convolution_and_its_gradients(kernels: str, threads: int) -> None:
    worst = max((largest_error(drawn_case(seed)), seed) for seed in range(12))
    assert worst[0] <= 1e-5, worst


@needs_compiler
@pytest.mark.slow
def test_five_hundred_layers_of_runs_are_exact(kernels: str, threads: int) -> None:
    worst = max((largest_error(drawn_case(seed)), seed) for seed in range(500))
    assert worst[0] <= 1e-5, worst


@needs_compiler
@pytest.mark.parametrize(
    "case",
    [
        runs_case(300, 1, 20, (9, 8), extent=5),  # a run that is cut
        runs_case(40, 2, 290, (21, 20), extent=5),  # more outputs than are summed at a time, several chunks of pixels
        runs_case(64, 1, 0, (92, 92), extent=5),  # a result that goes past the caches
        runs_case(52, 1, 0, (102, 101), extent=5),  # and one whose pixels are not aligned
    ],
    ids=["wide run", "many outputs", "large depthwise", "large depthwise, odd"],
)
def test_layers_of_many_tiles_are_exact(kernels: str, case: Case) -> None:
    assert largest_error(case) <= 1e-5


@needs_compiler
@pytest.mark.parametrize("outs", [24, 0])
def test_results_are_channels_last_and_the_same_bits_for_any_number_of_threads(kernels: str, outs: int) -> None:
    case, before, results = runs_case(40, 2, outs, (25, 24)), torch.get_num_threads(), []
    up = torch.randn(case.exact(case.x, case.weight).shape, generator=torch.Generator().manual_seed(1))
    up = up.contiguous(memory_format=torch.channels_last)
    try:
        for count in (1, 1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (
                    cpu.forward(case.x, case.weight, case.plan(), case.size()),
                    cpu.grad_input(up, case.weight, case.plan(), case.x.shape),
                    cpu.grad_weight(case.x, up, case.plan(), case.weight.shape),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in results[0][:2])


@needs_compiler
@pytest.mark.parametrize("outs", [8, 0])
def test_what_no_tap_of_a_run_reads_does_not_matter_even_if_it_is_nan(kernels: str, outs: int) -> None:
    case = runs_case(24, 2, outs, (11, 11))
    spoilt = case.x.clone()
    spoilt[1] = torch.nan
    whole = cpu.forward(case.x, case.weight, case.plan(), case.size())
    part = cpu.forward(spoilt, case.weight, case.plan(), case.size())
    assert torch.equal(part[0], whole[0])
    assert part[1].isnan().any()


def second_order(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Differentiate a function of both gradients by input, weight and what comes from above."""
    x, weight = (t.to(dtype).requires_grad_() for t in (case.x, case.weight))
    exact = dtype == torch.float64
    y = case.exact(x, weight) if exact else op._forward(x, weight, case.plan().text, list(case.size()))
    draws = torch.Generator().manual_seed(2)
    up, a, b = (torch.randn(t.shape, generator=draws).to(dtype) for t in (y, x, weight))
    up = up.contiguous(memory_format=torch.channels_last).requires_grad_()
    first = torch.autograd.grad(y, (x, weight), up, create_graph=True)
    assert all(exact or t.dim() != 4 or t.is_contiguous(memory_format=torch.channels_last) for t in (y, first[0]))
    return torch.autograd.grad((first[0] * a).sum() + (first[1] * b).sum(), (x, weight, up))


@needs_compiler
@pytest.mark.parametrize("outs", [18, 0])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_second_derivatives_of_runs_are_exact(kernels: str, outs: int, stride: tuple[int, int]) -> None:
    case = runs_case(20, 2, outs, (9, 10), stride)
    for found, expected in zip(second_order(case, torch.float32), second_order(case, torch.float64), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


class Mutant(NamedTuple):
    """In a source, ``old`` becomes ``new``: a fault, which stays within the memory of its arrays."""

    source: str
    fault: str
    old: str
    new: str


MUTANTS = (
    Mutant("blocks.h", "shift negated", "return {-1, 1, 1, s.sy", "return {1, 1, 1, s.sy"),
    Mutant("blocks.h", "first image again", "y = 0, sample++", "y = 0"),
    Mutant("blocks.h", "stride left out", "i * way.down_x * step", "i * step"),
    Mutant("blocks_dense.h", "first tap again", "(t * outputs + o0)", "(0 * outputs + o0)"),
    Mutant("blocks_dense.h", "first channels again", "first, c, panel", "first, 0, panel"),
    Mutant("blocks_dense.h", "first outputs again", "first, o - begin)", "first, 0)"),
    Mutant("blocks_weight.h", "first outputs again", "size, o, wide", "size, 0, wide"),
    Mutant("blocks_weight.h", "first channels again", "pairs.from.data, first,", "pairs.from.data, 0,"),
    Mutant("blocks_depthwise.h", "mask dropped", "step : zeros", "step : image + r.at + r.low * step"),
    Mutant("blocks_depthwise.h", "first lanes again", "lane[2] = {0, second}", "lane[2] = {0, 0 * second}"),
    Mutant("blocks_depthwise.h", "stride left out", "phase + i * way.down_x", "phase + i"),
    Mutant("blocks_depthwise.h", "lanes of the last vector", "VW + lane - piece.second", "lane"),
)


@cache
def shown() -> tuple[Case, ...]:
    """Return the layers that have to show every fault."""
    return tuple(
        runs_case(90 if outs else 23, 2, outs, (8, 9), stride) for outs in (37, 0) for stride in ((1, 1), (2, 2))
    )


def library_of(mutant: Mutant | None, directory: Path) -> ctypes.CDLL:
    """Compile the sources with a fault in them."""
    sources = directory / "csrc"
    shutil.copytree(SOURCES, sources)
    if mutant is not None:
        text = (sources / mutant.source).read_text(encoding="utf-8")
        assert mutant.old in text
        (sources / mutant.source).write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [str(COMPILER), *FLAGS, "-O0", str(sources / "plain.cpp"), "-o", str(directory / "faulty.so")]
    subprocess.run(command, check=True)
    return cpu.load(directory / "faulty.so")


@needs_compiler
@pytest.mark.parametrize("mutant", [None, *MUTANTS], ids=lambda m: f"{m.source}: {m.fault}" if m else "none")
def test_every_fault_is_seen(mutant: Mutant | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_of(mutant, tmp_path)
    monkeypatch.setattr(cpu, "library", lambda: library)
    worst = max(largest_error(case) for case in shown())
    assert worst <= 1e-5 if mutant is None else worst > 1e-2
