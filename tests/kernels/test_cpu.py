"""The compiled CPU kernels against float64 convolutions with the scattered dense kernel."""

from __future__ import annotations

import platform
import random
import subprocess
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from tests.kernels.layers import (
    BUILDS,
    COMPILER,
    FLAGS,
    SOURCES,
    Case,
    largest_error,
    needs_compiler,
    skip_unless_runnable,
)
from widerf.kernels import cpu
from widerf.kernels.plan import make_layout


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


@needs_compiler
def test_kernels_compute_the_scattered_convolution_and_its_gradients(kernels: str, threads: int) -> None:
    worst = max((largest_error(random_case(seed)), seed) for seed in range(25))
    assert worst[0] <= 1e-5, worst


@needs_compiler
@pytest.mark.slow
def test_kernels_compute_a_thousand_layers(kernels: str, threads: int) -> None:
    worst = max((largest_error(random_case(seed)), seed) for seed in range(1000))
    assert worst[0] <= 1e-5, worst


def wide_case(channels: int, outs: int, groups: int, side: int, last: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    draw = random.Random(0)
    reach = 2 if groups > 1 else 7  # the oracle takes long over wide windows
    window = [(y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    offsets = [draw.sample(window, 9) for _ in range(channels)]
    x = torch.randn(2, channels, side, side, generator=generator)
    weight = torch.randn(outs, channels // groups, 3, 3, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return Case(x, weight, offsets, (3, 3), (1, 1), (1, 1), (1, 1), groups)


@needs_compiler
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("channels", "outs", "groups", "side"), [(40, 230, 1, 20), (32, 32, 32, 130)])
def test_layers_of_many_blocks_are_exact(
    kernels: str, channels: int, outs: int, groups: int, side: int, last: bool
) -> None:
    assert largest_error(wide_case(channels, outs, groups, side, last)) <= 1e-5


@needs_compiler
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("last", [False, True])
def test_what_no_tap_reads_does_not_matter_even_if_it_is_nan(kernels: str, groups: int, last: bool) -> None:
    case = wide_case(8, 8, groups, 11, last)
    plan = case.plan()
    spoilt = case.x.clone()
    spoilt[1] = torch.nan
    for name, shape in (("forward", case.size()), ("grad_input", case.x.shape)):
        whole = getattr(cpu, name)(case.x, case.weight, plan, shape)
        part = getattr(cpu, name)(spoilt, case.weight, plan, shape)
        torch.testing.assert_close(part[0], whole[0], rtol=0, atol=0)
        assert part[1].isnan().any()


@needs_compiler
def test_signals_are_images_of_one_row(kernels: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 4, 50, generator=generator), torch.randn(5, 4, 3, generator=generator)
    taps = tuple(tuple((o,) for o in line) for line in ((-9, 0, 2), (1, 5, 30)))
    plan = make_layout(taps, 4, (3,), (2,), ((1, 1),), (1,), 1).whole
    image = tuple(tuple((0, *tap) for tap in group) for group in taps)
    flat = make_layout(image, 4, (1, 3), (1, 2), ((0, 0), (1, 1)), (1, 1), 1).whole
    expected = cpu.forward(x[:, :, None], weight[:, :, None], flat, (1, 25))
    assert torch.equal(cpu.forward(x, weight, plan, (25,)), expected[:, :, 0])


@needs_compiler
def test_threads_do_not_change_a_bit(kernels: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append([])
            for groups in (1, 24):
                case = wide_case(24, 24, groups, 40, False)
                up = torch.ones(2, 24, 40, 40)
                results[-1] += [
                    cpu.forward(case.x, case.weight, case.plan(), case.size()),
                    cpu.grad_input(up, case.weight, case.plan(), case.x.shape),
                    cpu.grad_weight(case.x, up, case.plan(), case.weight.shape),
                ]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.chosen.cache_clear()
    try:
        monkeypatch.setenv(cpu.VARIABLE, "torch")
        assert cpu.chosen() is None
        assert not cpu.supported("cpu", torch.float32, 2)
        cpu.chosen.cache_clear()
        monkeypatch.setenv(cpu.VARIABLE, "sse9")
        with pytest.raises(ValueError, match="WIDERF_KERNELS must be 'torch' or one of .*'sse9'"):
            cpu.chosen()
    finally:
        cpu.chosen.cache_clear()


def test_without_libraries_nothing_is_supported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    cpu.chosen.cache_clear()
    try:
        assert cpu.library() is None
        assert not cpu.supported("cpu", torch.float32, 2)
        for name in cpu.SETS:  # a file that is no library is as good as none
            (tmp_path / f"_{name}{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
        cpu.chosen.cache_clear()
        assert cpu.library() is None
    finally:
        cpu.chosen.cache_clear()


@needs_compiler
def test_avx512_code_compiles(tmp_path: Path) -> None:
    # Its numbers are tested as "wide", the same source compiled for AVX2; this machine may not be able to run it.
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"{platform.machine()} has no AVX-512")
    command = [COMPILER, *FLAGS, "-O0", "-mavx512f", str(SOURCES / "avx512.cpp"), "-o", str(tmp_path / "avx512.so")]
    subprocess.run(command, check=True)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(name: str, sanitizers: str, tmp_path: Path) -> None:
    skip_unless_runnable(name)
    source, flags = BUILDS[name]
    program = tmp_path / "driver"
    options = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1", "-g", "-pthread", "-Wno-psabi"]
    include = [f"-I{SOURCES}", f'-DKERNELS="{source}.cpp"']
    driver = str(Path(__file__).parent / "sparse_conv_driver.cpp")
    subprocess.run([COMPILER, *options, *flags, *include, driver, "-o", str(program)], check=True)
    ran = subprocess.run([str(program), "400"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "400 layers\n", "")
