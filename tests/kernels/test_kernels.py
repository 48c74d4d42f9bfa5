"""One operator, whatever computes it: the same numbers on every path, known to compilers, hidden from exporters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import widerf
from tests.reference import scattered_convolution
from widerf import SparseConv1d, SparseConv2d, SparseConv3d, kernels
from widerf.kernels import columns, cpu
from widerf.kernels.plan import read_plan

OPERATORS = torch.ops.widerf


def paths() -> list[str]:
    """The paths that this machine can take."""
    return ["torch", *(name for name in cpu.runnable() if cpu._find(name) is not None)]


def case(rank: int = 2, groups: int = 1, dtype: torch.dtype = torch.float32, last: bool = False) -> Any:
    """(input, weight, gradient of the output, text of the plan) of a layer, and the layer."""
    torch.manual_seed(0)
    kind: Any = {1: SparseConv1d, 2: SparseConv2d, 3: SparseConv3d}[rank]
    layer = kind(4, 6 if groups == 1 else 4, 3, 2, 1, groups=groups, extent=5, dtype=dtype, bias=False)
    x = torch.randn(2, 4, *[6, 7, 5][:rank], dtype=dtype)
    grad = torch.randn(layer(x).shape, dtype=dtype)
    if last:
        x, grad = x.to(memory_format=torch.channels_last), grad.to(memory_format=torch.channels_last)
    return x, layer.weight.detach(), grad, layer._layout()[0].whole.text, layer


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("which", ["sparse_conv", "sparse_conv_grad_input", "sparse_conv_grad_weight"])
def test_the_operators_are_what_pytorch_expects_of_operators(which: str, last: bool) -> None:
    x, weight, grad, plan, _ = case(last=last)
    arguments = {
        "sparse_conv": (x, weight, plan, list(grad.shape[2:])),
        "sparse_conv_grad_input": (grad, weight, plan, list(x.shape)),
        "sparse_conv_grad_weight": (x, grad, plan, list(weight.shape)),
    }[which]
    for needs in ((False, False), (True, True), (False, True)):
        first, second = (t.clone().requires_grad_(n) for t, n in zip(arguments[:2], needs, strict=True))
        torch.library.opcheck(getattr(OPERATORS, which).default, (first, second, *arguments[2:]))


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_of_weights_lie_in_memory_as_the_weights_do(
    path: str, form: torch.memory_format, groups: int
) -> None:
    """They are taken as they are, and DDP copies them into its buckets as they lie."""
    layer = SparseConv2d(4, 4, 3, padding=1, groups=groups, extent=5, seed=0).to(memory_format=form)  # type: ignore[call-overload]
    with kernels.use(path):
        layer(torch.randn(2, 4, 6, 7).contiguous(memory_format=form)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.stride() == layer.weight.stride()


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "groups", "last"), [(1, 1, False), (2, 1, False), (2, 4, True), (3, 2, False)])
def test_every_path_gives_the_numbers_of_the_scattered_kernel(
    path: str, dtype: torch.dtype, rank: int, groups: int, last: bool
) -> None:
    x, weight, grad, _, layer = case(rank, groups, dtype, last)
    x = x.requires_grad_()
    with kernels.use(path):
        y = layer(x)
        found = y, *torch.autograd.grad(y, (x, layer.weight), grad)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, weight))
    twin = scattered_convolution(
        exact_x, exact_w, None, layer.offsets, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    wanted = twin, *torch.autograd.grad(twin, (exact_x, exact_w), grad.double())
    error = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= error * b.norm()
    if last:
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_tensors_that_do_not_match_are_refused() -> None:
    x, _, _, _, layer = case()
    with pytest.raises(RuntimeError, match="one dtype and device, but got torch.float32 on cpu and torch.float64"):
        layer.double()(x)


def test_a_plan_is_its_text() -> None:
    plan = case(groups=4)[4]._layout()[0].whole
    assert read_plan(plan.text) == plan
    assert read_plan(plan.text).text == plan.text


def test_compilers_see_one_closed_operator_with_its_gradients() -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    seen: list[set[str]] = []

    def keep(module: Any, _: Any) -> Any:
        seen.append({str(node.target) for node in module.graph.nodes if "widerf" in str(node.target)})
        return make_boxed_func(module.forward)

    backend: Any = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    x, _, grad, _, layer = case()
    y = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)(x.requires_grad_())
    found = torch.autograd.grad(y, (x, layer.weight), grad)
    assert seen == [
        {"widerf.sparse_conv.default"},
        {"widerf.sparse_conv_grad_input.default", "widerf.sparse_conv_grad_weight.default"},
    ]
    for a, b in zip(found, torch.autograd.grad(layer(x), (x, layer.weight), grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [False, True])
def test_exporters_see_stock_operators_only(strict: bool) -> None:
    x, _, _, _, layer = case()
    program = torch.export.export(layer, (x,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert not [target for target in targets if "widerf" in target]


@pytest.mark.parametrize("pattern", ["mixed", "partition", "random"])
@pytest.mark.parametrize(("rank", "groups"), [(1, 1), (2, 1), (2, 2), (2, 4), (3, 1), (3, 4)])
def test_what_exporters_get_is_the_same_convolution(rank: int, groups: int, pattern: str) -> None:
    kind: Any = {1: SparseConv1d, 2: SparseConv2d, 3: SparseConv3d}[rank]
    layer = kind(
        4, 8, (2, 3, 2)[:rank], (1, 2, 3)[:rank], 1, (2, 1, 1)[:rank], groups, extent=5, pattern=pattern, seed=0
    )
    layer = layer.double()
    plan, x = layer._layout()[0].whole, torch.randn(2, 4, *[7, 6, 5][:rank], dtype=torch.float64, requires_grad=True)
    size = layer(x).shape[2:]
    results = []
    for function in (columns.exportable, columns.plain):
        y = function(x, layer.weight, plan, size)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_counters_of_operations_count_the_multiplications() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, grad, _, layer = case()
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * weight.numel() * grad[0, 0].numel() * len(x)


@pytest.mark.parametrize("path", paths())
def test_many_gradients_at_once(path: str) -> None:
    x, _, grad, _, layer = case()
    inputs = (x.requires_grad_(), layer.weight)
    ups = torch.randn(3, *grad.shape)
    with kernels.use(path):
        y = layer(x)
        found = torch.autograd.grad(y, inputs, ups, is_grads_batched=True, retain_graph=True)
        for i, up in enumerate(ups):
            for a, b in zip(found, torch.autograd.grad(y, inputs, up, retain_graph=True), strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", paths())
def test_second_derivatives_stay_on_the_fast_path(path: str) -> None:
    x, _, grad, _, layer = case()
    results = []
    with kernels.use(path):
        for model in (layer, layer.to_conv2d()):
            x = x.detach().requires_grad_()
            g = grad.clone().requires_grad_()
            (first,) = torch.autograd.grad(model(x), x, g, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), g)[0])
            if model is layer:
                assert "sparse_conv_grad_input" in str(first.grad_fn)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_per_sample_gradients_compile() -> None:
    x, _, _, _, layer = case()

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (sample[None],)).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))
    wanted = per_sample(layer.weight.detach(), x)
    found = torch.compile(per_sample, backend="aot_eager")(layer.weight.detach(), x)
    torch.testing.assert_close(found, wanted)


# ── the choice
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_info_says_which_path_is_in_use() -> None:
    table = widerf.kernels.info()
    best = next(iter(paths()[1:]), None)
    with kernels.use(""):
        assert kernels.info()["cpu float32"].path == (f"C++ for {best}" if best else kernels.STOCK)
    for name in paths():
        with kernels.use(name):
            row = kernels.info()["cpu float32"]
            assert row.path == (kernels.STOCK if name == "torch" else f"C++ for {name}")
            assert f"WIDERF_KERNELS={name}" in row.why
    assert kernels.info() == table


def test_a_path_that_is_not_there_is_an_error_and_changes_nothing() -> None:
    before = kernels.info()
    with pytest.raises(ValueError, match="WIDERF_KERNELS must be 'torch' or one of .*got 'neon'"), kernels.use("neon"):
        pass
    assert kernels.info() == before


def said_by(code: str, **environment: str) -> str:
    """What a process of its own prints."""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


def test_the_environment_decides_at_the_start() -> None:
    code = "import widerf; print(widerf.kernels.info()['cpu float32'].path)"
    assert said_by(code, WIDERF_KERNELS="torch") == kernels.STOCK


INTERPRETED = """
import torch
from tests.kernels.test_kernels import case
from widerf.kernels import op
from widerf.kernels.plan import read_plan
from widerf.kernels import columns

for rank, groups, last in ((1, 1, False), (2, 1, True), (2, 4, False)):
    x, weight, grad, text, _ = case(rank, groups, last=last)
    plan = read_plan(text)
    calls = (("forward", x, weight, grad.shape[2:]), ("grad_input", grad, weight, x.shape),
             ("grad_weight", x, grad, weight.shape))
    for name, a, b, shape in calls:
        found = op._on_cuda(name, a, b, plan, shape, op.memory_format(a) == torch.channels_last)
        torch.testing.assert_close(found, getattr(columns, name)(a, b, plan, shape), rtol=1e-4, atol=1e-4)
print("right")
"""


def test_the_triton_kernels_are_called_rightly() -> None:
    pytest.importorskip("triton")
    assert said_by(INTERPRETED, TRITON_INTERPRET="1") == "right"


def test_the_compiler_is_not_loaded_by_a_layer() -> None:
    code = (
        "import sys, torch; from widerf import SparseConv2d; "
        "SparseConv2d(4, 4, 3)(torch.randn(1, 4, 5, 5, requires_grad=True)).sum().backward(); "
        "print('torch._dynamo' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.slow  # exporting fifty layers takes minutes
@pytest.mark.filterwarnings("ignore")
def test_a_converted_resnet50_runs_in_onnxruntime(tmp_path: Path) -> None:
    import onnx
    import onnxruntime
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet50").eval()
    report = widerf.convert(model, extent=15)
    assert sum(row.converted for row in report) >= 10
    x, file = torch.randn(1, 3, 224, 224), str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    assert {node.domain for node in onnx.load(file).graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-3, atol=1e-4)
