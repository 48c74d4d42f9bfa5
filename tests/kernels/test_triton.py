"""The CUDA path without a GPU: its numbers as interpreted, its kernels as compiled for two architectures."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.kernels import offline
from tests.kernels.interpreted import ROUNDING, Case, errors, interpreting, wrong
from widerf.kernels import cuda, device

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SHARED_90 = 227 * 1024  # bytes per block on sm_90
SMALLEST_SHARED = 99 * 1024  # bytes per block on the 8.x GPUs that have least; 163 KiB on sm_80

CASES = {
    "one pattern, blocks of channels share a tap": Case(rows=(0,) * 32, outs=5),
    "one pattern, channels_last": Case(rows=(0,) * 64, outs=33, size=(4, 3), layout="channels_last"),
    "each channel its own pattern": Case(rows=(0, 1, 2, 3, 4), outs=3),
    "wide and narrow runs": Case(rows=(0,) * 17 + (1, 2, 2), outs=7, layout="channels_last"),
    "groups, stride, odd numbers": Case(
        rows=(0, 0, 1, 1, 1, 2), outs=9, groups=3, kernel=(1, 3), stride=(2, 1), dilation=(1, 2), padding=(0, 3)
    ),
    "runs end where groups end": Case(rows=(0,) * 40, outs=4, groups=2, size=(5, 4), stride=(1, 3)),
    "depthwise": Case(rows=(0, 1, 2, 3, 4), outs=5, groups=5, stride=(2, 1)),
    "depthwise, channels_last": Case(
        rows=(0, 1, 2, 0, 1, 2), outs=6, groups=6, kernel=(2, 3), stride=(1, 2), layout="channels_last"
    ),
    "two outputs per channel": Case(rows=(0, 1, 2), outs=6, groups=3),
    "image smaller than the extent": Case(rows=(0, 1, 2), outs=4, size=(2, 3), reach=9),
    "no images": Case(rows=(0, 1, 2), outs=4, batch=0),
    "a signal": Case(rows=(0, 1, 1), outs=4, kernel=(1, 5), size=(1, 19), padding=(0, 2), stride=(1, 2)),
    "slice of a larger tensor": Case(rows=(0, 1, 1), outs=4, layout="sliced"),
    "transposed memory": Case(rows=(0, 1, 1), outs=4, layout="transposed"),
    "many chunks": Case(rows=(0, 1, 1), outs=4, batch=3, size=(12, 12), settings=(("COLUMNS", 9000), ("PIXELS", 16))),
    "64-bit addresses": Case(rows=(0,) * 16 + (1,), outs=3, settings=(("ADDRESSES", 0),)),
    "64-bit addresses, depthwise": Case(rows=(0, 1, 1), outs=3, groups=3, settings=(("ADDRESSES", 0),)),
    "bfloat16": Case(rows=(0,) * 16 + (1, 2), outs=3, dtype="bfloat16"),
    "bfloat16, depthwise": Case(rows=(0, 1, 2), outs=3, groups=3, dtype="bfloat16", layout="channels_last"),
    "float16": Case(rows=(0,) * 16 + (1, 2), outs=3, dtype="float16", layout="channels_last"),
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreting() as pool:
        yield pool


def check(interpreter: ProcessPoolExecutor, case: Case) -> None:
    found = interpreter.submit(errors, case).result(timeout=600)
    assert sorted(found) == ["forward", "grad_input", "grad_weight"]
    assert not wrong(found, case), (case, found)


def drawn(seed: int) -> Case:
    """A small layer drawn at random."""
    draw = random.Random(seed)
    groups = draw.choice((1, 1, 2, 3))
    per_group = draw.choice((1, 2, 3, 5, 16, 19, 32, 34))
    channels, patterns = groups * per_group, draw.choice((1, 2, 3, 40))
    return Case(
        rows=tuple(c * min(patterns, channels) // channels for c in range(channels)),
        outs=groups * draw.choice((1, 2, 7, 17, 33)),
        groups=groups,
        kernel=draw.choice(((3, 3), (2, 3), (1, 1), (3, 1))),
        batch=draw.choice((1, 2, 3)),
        size=(draw.randint(2, 9), draw.randint(2, 9)),
        stride=(draw.randint(1, 3), draw.randint(1, 3)),
        padding=(draw.randint(1, 4), draw.randint(1, 4)),
        dilation=(draw.randint(1, 2), draw.randint(1, 2)),
        reach=draw.choice((1, 3, 7)),
        dtype=draw.choice(("float32", "float32", "bfloat16", "float16")),
        layout=draw.choice(("contiguous", "channels_last", "sliced", "transposed")),
        settings=draw.choice(((), (), (("COLUMNS", 500),), (("ADDRESSES", 0),), (("PIXELS", 16),))),
        seed=seed,
    )


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_agree_with_the_scattered_kernel(name: str, interpreter: ProcessPoolExecutor) -> None:
    check(interpreter, CASES[name])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_interpreted_kernels_agree_on_layers_drawn_at_random(seed: int, interpreter: ProcessPoolExecutor) -> None:
    check(interpreter, drawn(seed))


def test_a_tap_in_the_wrong_place_would_be_seen() -> None:
    """The bounds above tell kernels apart that differ by one row: they are not met by any numbers of that size."""
    from tests.kernels.interpreted import problem
    from tests.reference import scattered_convolution

    x, weight, offsets, _ = problem(CASES["wide and narrow runs"])
    moved = offsets.clone()
    moved[0, 0, 0] += 7
    right, wrong = (scattered_convolution(x.double(), weight.double(), None, o, padding=1) for o in (offsets, moved))
    assert (right - wrong).abs().max() / right.abs().max() > 10 * max(ROUNDING.values())


def check_compiled(
    kind: str, channels_last: bool, architecture: int, layers: tuple[str, ...] = (), kernels: tuple[str, ...] = ()
) -> None:
    chosen = offline.variants(kind, channels_last, architecture).items()
    for launch, layer in chosen:
        kernel = launch.name.split()[0]
        if (layers and layer not in layers) or (kernels and kernel not in kernels):
            continue
        needs = offline.compiled(launch, architecture)
        # Up to 16 bytes are ptxas's own with 64-bit addresses: it takes them with half of the registers unused.
        own = 16 if " BIG " in launch.name and needs.registers <= 128 else 0
        assert needs.stack <= own, (layer, launch.name, needs.registers, needs.stack)
        assert 0 < needs.registers <= 255
        most = SHARED_90 if launch.by_descriptors else SMALLEST_SHARED
        assert needs.shared <= most, (layer, launch.name, needs.shared)
        if "gemm" in launch.name or launch.by_descriptors:
            tensor_core = "mma" in needs.assembly
            assert tensor_core == (kind != "float32"), (layer, launch.name)
        if launch.by_descriptors:
            check_pipelined(launch, needs, kind)


def check_pipelined(launch: offline.Launch, needs: offline.Needs, kind: str) -> None:
    """Boxes are copied by the hardware while a warp group multiplies: of n stages n − 1 wait in shared memory."""
    assert needs.bulk_copies >= 2, launch.name
    assert launch.stages >= 3, launch.name
    assert needs.shared >= (launch.stages - 1) * launch.bytes_of_step, (launch.name, needs.shared)
    assert (needs.wgmma > 0) == (kind != "float32"), launch.name


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile anew: a cached kernel would hide a compiler that fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@needs_triton
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
def test_kernels_of_a_shared_pattern_compile_without_spills(architecture: int) -> None:
    check_compiled("bfloat16", True, architecture, ("shared",), ("implicit_gemm", "tap_sum", "weight_gemm"))


@needs_triton
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", ["bfloat16", "tf32"])
def test_products_of_boxes_are_pipelined_by_the_hardware(kind: str) -> None:
    check_compiled(kind, True, 90, ("128 at 28², blocks of 64", "512 at 7², blocks of 32"))


@needs_triton
@pytest.mark.slow
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", offline.KINDS)
@pytest.mark.parametrize("architecture", offline.ARCHITECTURES)
def test_all_kernels_compile_without_spills(architecture: int, kind: str, channels_last: bool) -> None:
    check_compiled(kind, channels_last, architecture)


@pytest.mark.parametrize(("x", "weight", "reason"), [
    (torch.empty(1, 2, 3, 3), torch.empty(2, 2, 3, 3), "on cpu"),
    (torch.empty(1, 2, 3, 3, device="meta"), torch.empty(2, 2, 3, 3, device="meta"), "on meta"),
])  # fmt: skip
@needs_triton
def test_tensors_elsewhere_are_refused_with_the_reason(x: torch.Tensor, weight: torch.Tensor, reason: str) -> None:
    assert reason in (cuda.unsupported(x, weight) or "")


def test_without_triton_the_reason_is_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x = torch.empty(1, 2, 3, 3)
    assert cuda.unsupported(x, x) == "triton is not installed"


def test_importing_the_library_does_not_import_triton_nor_need_it() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import widerf, widerf.kernels.cuda, widerf.kernels.triton_kernels"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(cuda.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    program = "import sys, widerf, widerf.kernels.cuda; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_precision_follows_the_convolutions_of_pytorch() -> None:
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert device.precision(torch.float32) == "tf32"
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert device.precision(torch.float32) == "ieee"
