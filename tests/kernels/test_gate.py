"""The gate: whatever the operators and layers are called with, an error or the right answer, on every path."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import widerf
from tests.kernels import malformed
from tests.reference import scattered_convolution
from widerf import SparseConv1d, SparseConv2d, kernels
from widerf.functional import sparse_conv2d
from widerf.kernels import cpu
from widerf.kernels.plan import read_plan

COMPILER = shutil.which("g++")
SOURCES = Path(cpu.__file__).parent / "csrc"


def paths() -> list[str]:
    return ["torch", *(name for name in cpu.runnable() if cpu._find(name) is not None)]


# ── memory safety at the C boundary
# ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", paths())
def test_raw_operators_answer_rightly_or_refuse(path: str) -> None:
    with kernels.use(path):
        counts = malformed.survey(range(200))
    assert min(counts.values()) > 40, counts


@pytest.mark.parametrize("name", malformed.OPERATORS)
def test_the_calls_reach_the_kernels_for_runs_of_channels(name: str) -> None:
    """In channels_last neighbours that share their taps have kernels of their own, dense and depthwise ones."""
    reached = {False: 0, True: 0}
    for seed in range(600):
        call = malformed.lawful(random.Random(seed))
        runs, repeats, *_, groups = json.loads(call.plan)
        outs = {"forward": call.second.shape[0], "grad_input": call.first.shape[1], "grad_weight": call.second.shape[1]}
        shared = repeats == 1 and min(end - start for start, end, _ in runs) >= 16 and call.first.dtype == torch.float32
        if call.name == name and shared and cpu._channels_last(call.first) and (groups == 1 or groups == outs[name]):
            reached[groups > 1] += 1
    assert min(reached.values()) >= 5, reached


@pytest.mark.slow  # ten thousand calls, under sanitizers
@pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
@pytest.mark.parametrize("name", ["plain", "avx2", "avx512"])
def test_ten_thousand_calls_of_raw_operators_under_sanitizers(name: str, tmp_path: Path) -> None:
    if name not in cpu.runnable():
        pytest.skip(f"this processor has {cpu.runnable()} only")
    assert COMPILER is not None
    flags = {"plain": [], "avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f", "-mavx2", "-mfma"]}[name]
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g", "-fPIC", "-shared", "-pthread"]
    library = tmp_path / "kernels.so"
    source = SOURCES / f"{name}.cpp"
    subprocess.run([COMPILER, *options, *flags, "-Wno-psabi", str(source), "-o", str(library)], check=True)
    find = [[COMPILER, f"-print-file-name={name}.so"] for name in ("libasan", "libstdc++")]
    preload = [subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in find]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0,allocator_may_return_null=1",
        "WIDERF_KERNELS": "",
    }
    command = [sys.executable, "-m", "tests.kernels.malformed", str(library), "10000", "0"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    counts = json.loads(ran.stdout.splitlines()[-1])
    assert sum(counts.values()) == 10_000
    assert min(counts.values()) > 2000, counts


def weights() -> st.SearchStrategy[Tensor]:
    """Weights of any shape, dtype and stride, some without memory."""

    def build(shape: list[int], dtype: torch.dtype, freed: bool, turned: bool) -> Tensor:
        t = torch.ones(shape).to(dtype)
        t = t.transpose(0, -1).contiguous().transpose(0, -1) if turned and t.dim() > 1 else t
        if freed:
            t.untyped_storage().resize_(0)
        return t

    near = st.tuples(*(st.sampled_from(n) for n in ([6, 1, 7, 0], [4, 8, 1, 0], [3, 1, 9], [3, 1, 9])))
    shape = st.one_of(near.map(list), st.just([6, 4, 3, 3]), st.lists(st.integers(0, 9), max_size=5))
    dtype = st.sampled_from([torch.float32] * 5 + [torch.float64, torch.int64, torch.complex64, torch.bfloat16])
    return st.builds(build, shape, dtype, st.sampled_from([False] * 4 + [True]), st.booleans())


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("bound", ["call", "data"])
def test_a_layer_given_any_weight_computes_with_it_or_refuses(path: str, bound: str) -> None:
    base = SparseConv2d(8, 6, 3, padding=1, groups=2, bias=False, seed=0)
    x = torch.randn(1, 8, 12, 12)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(weights())
    def run(weight: Tensor) -> None:
        layer = SparseConv2d(8, 6, 3, padding=1, groups=2, bias=False, pattern=base.offsets)
        try:
            if bound == "call":
                y = torch.func.functional_call(layer, {"weight": weight}, (x,))
            else:
                layer.weight.data = weight
                y = layer(x)
        except malformed.ERRORS:
            assert weight.shape != base.weight.shape or weight.dtype != x.dtype or not weight.untyped_storage().nbytes()
            return
        assert weight.shape[1:] == (4, 3, 3)
        assert weight.shape[0] % 2 == 0
        twin = scattered_convolution(x, weight, None, layer.offsets, 1, 1, 1, 2) if len(weight) else y
        torch.testing.assert_close(y.detach(), twin, rtol=1e-4, atol=1e-4)

    with kernels.use(path):
        run()


def test_what_a_layer_says_of_a_weight_that_does_not_fit() -> None:
    layer = SparseConv2d(8, 6, 3, padding=1, seed=0)
    x = torch.randn(1, 8, 12, 12)
    with pytest.raises(RuntimeError, match=r"weight must have shape \(out, in/groups, 3, 3\).*got \[6, 8, 1, 1\]"):
        torch.func.functional_call(layer, {"weight": torch.ones(6, 8, 1, 1)}, (x,))
    layer.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight must have memory for its 432 elements, got a storage of 0 bytes"):
        layer(x)
    layer.offsets.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="offsets must have memory"):
        layer(x)


@pytest.mark.parametrize("text", malformed.TEXTS)
def test_a_text_that_is_no_plan_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="plan must"):
        read_plan(text)


@pytest.mark.parametrize("path", paths())
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_integers_of_any_width_give_the_right_answer(path: str, data: st.DataObject) -> None:
    """Offsets, dilations and strides, alone and multiplied with one another, beyond 31, 32 and 63 bits."""
    width = st.sampled_from([0, 1, 2, 2**15 + 1, 2**30, 2**31 - 1, 2**31, 2**32, 2**33 + 1, 2**40, 2**62])
    sign = st.sampled_from([1, -1])
    tap = st.tuples(*(st.builds(lambda n, s: n * s, width, sign) for _ in range(2)))
    offsets = torch.tensor([[data.draw(tap)] for _ in range(2)])
    dilation, stride = (data.draw(st.sampled_from([1, 3, 2**16, 2**32])) for _ in range(2))
    groups = data.draw(st.sampled_from([1, 2]))
    x, weight = torch.randn(1, 2, 5, 6), torch.randn(2, 2 // groups, 1, 1)
    with kernels.use(path):
        y = sparse_conv2d(x, weight, None, offsets, stride, 0, dilation, groups)
    wanted = torch.zeros_like(y)
    for u in range(y.shape[2]):
        for v in range(y.shape[3]):
            for c, ((dy, dx),) in enumerate(offsets.tolist()):
                row, column = stride * u + dilation * dy, stride * v + dilation * dx
                if 0 <= row < 5 and 0 <= column < 6:
                    outs = slice(None) if groups == 1 else slice(c, c + 1)
                    wanted[0, outs, u, v] += weight[outs, c if groups == 1 else 0, 0, 0] * x[0, c, row, column]
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("channels", [1, 2])
def test_strides_whose_products_exceed_31_bits(channels: int) -> None:
    """An input offset of 2³⁵ within a tile; depthwise, 2³² phases of the stride."""
    x = torch.randn(1, 2, 4, 2**20)
    layer = SparseConv2d(
        2,
        channels,
        1,
        (4096, 2**20),
        (20480, 0),
        groups=channels,
        bias=False,
        pattern=torch.tensor([[[0, 0]], [[0, 1]]]),
    )
    y = layer(x.requires_grad_())
    assert y.shape == (1, channels, 11, 1)
    exact = (
        layer.weight[:, :, 0, 0] * x[0, :, 0, :2].diagonal()
        if channels == 1
        else layer.weight[:, 0, 0, 0] * x[0, :, 0, :2].diagonal()
    )
    wanted = torch.zeros_like(y)
    wanted[0, :, 5, 0] = exact.sum(-1) if channels == 1 else exact
    torch.testing.assert_close(y, wanted)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert int((grad != 0).sum()) == 2


@pytest.mark.parametrize("which", ["sparse_conv", "sparse_conv_grad_input", "sparse_conv_grad_weight"])
def test_the_gate_stands_before_compilers_and_vmap_too(which: str) -> None:
    layer = SparseConv1d(4, 6, 3, padding=1, seed=0)
    plan = layer._layout()[0].whole.text
    operator: Any = getattr(torch.ops.widerf, which)
    first = torch.randn(3, 2, 5 if which != "sparse_conv_grad_input" else 6, 9)
    second, shape = {
        "sparse_conv": (torch.randn(6, 4, 3), [9]),
        "sparse_conv_grad_input": (torch.randn(6, 4, 3), [2, 5, 9]),
        "sparse_conv_grad_weight": (torch.randn(2, 6, 9), [6, 4, 3]),
    }[which]
    with pytest.raises(ValueError, match="input must have the 4 channels of the plan"):
        torch.vmap(lambda a: operator(a, second, plan, shape))(first)
    with pytest.raises(ValueError, match="input must have the 4 channels of the plan"):
        operator(first[0].to("meta"), second.to("meta"), plan, shape)


def test_complex_layers_differentiate_as_pytorchs_do() -> None:
    layer = SparseConv2d(4, 2, 3, padding=1, extent=3, seed=0, bias=False, dtype=torch.complex64)
    dense, x = layer.to_conv2d(), torch.randn(1, 4, 5, 5, dtype=torch.complex64, requires_grad=True)
    grads = [torch.autograd.grad(model(x).abs().sum(), x)[0] for model in (layer, dense)]
    torch.testing.assert_close(*grads)
    assert widerf.SparseConv2d is SparseConv2d
