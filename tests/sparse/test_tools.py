"""SparseConv drops in: layouts, compilers, exporters and all else that people do to a Conv2d can be done to it."""

from __future__ import annotations

import copy
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.sparse.layers import image, make, right, twin_of
from widerf import SparseConv1d, SparseConv2d, SparseConv3d, densify

# ── numbers, layouts, compilers
# ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision_agree_with_the_plain_layer(dtype: torch.dtype) -> None:
    layer = make(extent=9)
    x = image().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    exact = torch.autograd.grad(layer(image()).square().sum(), layer.weight)[0]
    assert (layer.weight.grad - exact).norm() < 0.02 * exact.norm()
    whole = copy.deepcopy(layer).to(dtype)
    assert (whole(image().to(dtype)).float() - layer(image())).norm() < 0.02 * layer(image()).norm()


def test_double_precision_stays_double_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make().double()(image().double()).dtype == torch.float64


@pytest.mark.parametrize("rank", [2, 3])
def test_channels_last_in_channels_last_out(rank: int) -> None:
    form = torch.channels_last if rank == 2 else torch.channels_last_3d
    layer: Any = {2: SparseConv2d, 3: SparseConv3d}[rank](8, 6, 3, padding=1, extent=5)
    x = image(2, 8, *[6] * rank)
    y = layer(x.contiguous(memory_format=form))
    assert y.is_contiguous(memory_format=form)
    torch.testing.assert_close(y, layer(x))
    assert layer(x).is_contiguous()
    right(layer.to(memory_format=form), x)


def test_strided_and_expanded_inputs() -> None:
    layer = make()
    right(layer, image(2, 16, 20, 9)[:, ::2, ::2])
    right(layer, image(1, 8, 10, 9).expand(3, -1, -1, -1))
    right(layer, image(2, 8, 9, 10).transpose(2, 3))


def test_inference_mode_then_training() -> None:
    layer = make()
    with torch.inference_mode():
        y = layer(image())
    assert torch.equal(layer(image()), y)
    layer(image().requires_grad_()).sum().backward()
    with torch.inference_mode():
        born_there = SparseConv2d(8, 6, 3, padding=1)
        right(born_there)


def test_threads_do_not_share_work_space() -> None:
    from concurrent.futures import ThreadPoolExecutor

    layer = make(extent=9)
    xs = [image(2, 8, 10, 9) * i for i in range(16)]
    wanted = [layer(x) for x in xs]
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        for a, b in zip(pool.map(layer, xs), wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_batches_larger_than_the_work_space() -> None:
    layer = SparseConv2d(16, 4, 3, padding=1, extent=9, dtype=torch.float64)
    x = torch.randn(25, 16, 40, 40, dtype=torch.float64)
    right(layer, x)
    big = torch.randn(1, 16, 200, 200, dtype=torch.float64)
    right(layer, big)


class Net(nn.Module):
    """Two sparse layers and what is usually around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = SparseConv2d(3, 8, 3, 2, 1, extent=7, seed=0)
        self.norm = nn.BatchNorm2d(8)
        self.b = SparseConv2d(8, 8, 3, 1, 1, groups=8, extent=9, seed=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x)))).mean((2, 3))  # type: ignore[no-any-return]


def test_compiles_whole_and_does_not_recompile_for_new_sizes() -> None:
    from torch._dynamo.testing import CompileCounter

    net, counter = Net().eval(), CompileCounter()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    for h, w in ((32, 40), (48, 24), (64, 56)):
        x = image(2, 3, h, w)
        torch.testing.assert_close(compiled(x), net(x))
    assert counter.frame_count == 1


@pytest.mark.slow  # the compiler takes a minute
@pytest.mark.filterwarnings("ignore")
def test_compiled_gradients_are_right_through_inductor() -> None:
    net = Net().eval()
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for size in (32, 48, 64):
        x = image(2, 3, size, size + 8).requires_grad_()
        found = torch.autograd.grad(compiled(x).square().sum(), [x, *net.parameters()])
        wanted = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_change_of_offsets_just_before_compilation_is_an_error_not_a_wrong_number() -> None:
    net = make(seed=1)
    with torch.no_grad():
        net.offsets.copy_(make(seed=2).offsets)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(net, fullgraph=True, backend="eager")(image())
    torch._dynamo.reset()
    net(image())
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image()), twin_of(net, image()), rtol=1e-4, atol=1e-5)


def dynamic_export(net: nn.Module) -> Any:
    side = torch.export.Dim("height", min=20, max=400), torch.export.Dim("width", min=20, max=400)
    shapes = ({2: 2 * side[0], 3: 2 * side[1]},)
    return torch.export.export(net, (image(2, 3, 64, 48),), dynamic_shapes=shapes)


def test_exports_with_dynamic_height_and_width() -> None:
    net = Net().eval()
    program = dynamic_export(net).module()
    for h, w in ((64, 48), (40, 100)):
        x = image(2, 3, h, w)
        torch.testing.assert_close(program(x), net(x))


@pytest.mark.filterwarnings("ignore")
def test_onnx_has_stock_operators_only_and_runs_in_onnxruntime(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    net, path = Net().eval(), tmp_path / "net.onnx"
    torch.onnx.export(dynamic_export(net), (image(2, 3, 64, 48),), str(path), dynamo=True, verbose=False)
    nodes = onnx.load(str(path)).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for h, w in ((64, 48), (40, 100)):
        x = image(2, 3, h, w)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_jit_traces() -> None:
    net = Net().eval()
    traced = torch.jit.trace(net, image(2, 3, 64, 48))
    torch.testing.assert_close(traced(image(2, 3, 40, 52)), net(image(2, 3, 40, 52)))


# ── the tools around
# ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_batch_norm_folds_into_it() -> None:
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    layer, norm = make(), nn.BatchNorm2d(6)
    with torch.no_grad():
        for p in (*norm.parameters(), norm.running_mean, norm.running_var):
            p.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    fused = fuse_conv_bn_eval(layer.eval(), norm.eval())
    assert isinstance(fused, SparseConv2d)
    assert torch.equal(fused.offsets, layer.offsets)
    torch.testing.assert_close(fused(image()), norm(layer(image())), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_densified_twin_quantises() -> None:
    from torchao.quantization.pt2e import quantize_pt2e as quantise
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as quantizer

    net = densify(Net().eval())
    tool = quantizer.X86InductorQuantizer().set_global(quantizer.get_default_x86_inductor_quantization_config())
    prepared = quantise.prepare_pt2e(torch.export.export(net, (image(2, 3, 32, 32),)).module(), tool)
    prepared(image(2, 3, 32, 32))
    quantised = quantise.convert_pt2e(prepared)
    x = image(2, 3, 32, 32)
    assert (quantised(x) - net(x)).norm() < 0.1 * net(x).norm()


def test_weight_norm_and_pruning_keep_the_offsets() -> None:
    from torch.nn.utils import parametrizations, prune

    layer = make()
    offsets = layer.offsets.clone()
    wanted = layer(image())
    torch.testing.assert_close(parametrizations.weight_norm(layer)(image()), wanted, rtol=1e-4, atol=1e-5)
    pruned = make()
    prune.l1_unstructured(pruned, "weight", 0.5)
    assert torch.equal(pruned.offsets, offsets)
    right(pruned)


def test_no_code_that_looks_for_plain_convolutions_takes_it_for_one() -> None:
    """Such code may rebuild a plain layer from the weight alone (timm's RepGhost fusing, LoRA merging)."""
    layers: list[tuple[Any, Any]] = [
        (SparseConv1d(4, 4, 3), nn.Conv1d),
        (SparseConv2d(4, 4, 3), nn.Conv2d),
        (SparseConv3d(4, 4, 3), nn.Conv3d),
    ]
    for layer, plain in layers:
        assert not isinstance(layer, plain)
        assert isinstance(layer, nn.modules.conv._ConvNd)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def ddp_rank(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(rank)
    layer = SparseConv2d(8, 6, 3, padding=1)
    before = layer.offsets.clone()
    model = nn.parallel.DistributedDataParallel(layer)
    losses = []
    for _ in range(2):
        y = model(image())
        losses.append(y.detach())
        y.square().sum().backward()
    torch.save({"before": before, "after": layer.offsets, "y": losses, "grad": layer.weight.grad}, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_with_different_seeds_train_with_the_same_offsets(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ddp_rank, (free_port(), str(tmp_path / "rank")), nprocs=2)  # type: ignore[no-untyped-call]
    a, b = (torch.load(tmp_path / f"rank.{rank}", weights_only=True) for rank in range(2))
    assert not torch.equal(a["before"], b["before"])
    assert torch.equal(a["after"], b["after"])
    for u, v in zip([*a["y"], a["grad"]], [*b["y"], b["grad"]], strict=True):
        assert torch.equal(u, v)
