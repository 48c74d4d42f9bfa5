"""SparseConv drops in: everything that people do to a Conv2d can be done to it, and the offsets are never lost."""

from __future__ import annotations

import copy
import io
import os
import pickle
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import scattered_convolution
from widerf import SparseConv1d, SparseConv2d, SparseConv3d, densify, patterns
from widerf.functional import sparse_conv2d


def make(seed: int | None = 0, **arguments: Any) -> SparseConv2d:
    torch.manual_seed(0)
    return SparseConv2d(8, 6, 3, padding=1, seed=seed, **arguments)


def image(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8, 10, 9)), generator=torch.Generator().manual_seed(1))


def twin_of(layer: Any, x: Tensor) -> Tensor:
    return scattered_convolution(
        x, layer.weight, layer.bias, layer.offsets, layer.stride, layer.padding, layer.dilation, layer.groups
    )


def right(layer: Any, x: Tensor | None = None) -> None:
    """The layer computes what its own buffers say."""
    x = image() if x is None else x
    torch.testing.assert_close(layer(x), twin_of(layer, x), rtol=1e-4, atol=1e-5)


# ── arguments and attributes
# ────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_and_bias_are_those_of_the_plain_layer_after_the_same_seed() -> None:
    torch.manual_seed(3)
    sparse = nn.Sequential(SparseConv2d(4, 8, 3), SparseConv2d(8, 8, (1, 3), groups=4, bias=False))
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, (1, 3), groups=4, bias=False))
    for a, b in zip(sparse.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_default_pattern_follows_the_global_seed_and_differs_between_layers() -> None:
    def offsets() -> list[Tensor]:
        torch.manual_seed(5)
        return [SparseConv2d(12, 12, 3).offsets for _ in range(2)]

    first, second = offsets(), offsets()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(*first)


def test_the_default_extent_is_7_for_3_taps() -> None:
    layer = make()
    assert layer.extent == (7, 7)
    assert layer.offsets.dtype == torch.int64
    assert layer.offsets.shape == (8, 9, 2)
    assert layer.weight.shape == (6, 8, 3, 3)
    assert (layer.stride, layer.padding, layer.dilation, layer.groups) == ((1, 1), (1, 1), (1, 1), 1)


def test_offsets_of_your_own() -> None:
    rays = torch.tensor([[[a * d, b * d] for a in (-1, 0, 1) for b in (-1, 0, 1)] for d in (1, 4)])
    layer = make(pattern=rays)
    assert layer.extent == (9, 9)
    right(layer)
    right(make(pattern=rays, extent=11))


def test_channels_that_do_not_divide_are_spread_as_evenly_as_can_be_and_the_layer_says_so() -> None:
    layer = SparseConv2d(20, 4, 3, extent=9, pattern="partition")
    sizes = torch.bincount(torch.arange(20) * len(layer.offsets) // 20)
    assert sizes.max() - sizes.min() == 1
    assert layer.readers() == (2, 3)
    assert "channels_per_cell=2-3 of 20" in repr(layer)


@pytest.mark.parametrize(("channels", "groups"), [(24, 24), (24, 8), (24, 2), (36, 1)])
@pytest.mark.parametrize("pattern", ["mixed", "partition"])
def test_all_channels_together_read_the_whole_window_in_grouped_layers_too(
    channels: int, groups: int, pattern: str
) -> None:
    layer = SparseConv2d(channels, channels, 3, padding=1, groups=groups, extent=9, pattern=pattern, seed=0)
    assert len({tuple(t) for t in layer.offsets.flatten(0, 1).tolist()}) == 81
    right(layer, image(1, channels, 6, 7))
    if pattern == "mixed" and channels // groups > 1:  # every group of channels has near and far taps
        row = torch.arange(channels) * len(layer.offsets) // channels
        near = (layer.offsets == patterns.dense_taps(3)).all(-1).all(-1)[row].view(groups, -1)
        assert bool(near.any(1).all())
        assert not bool(near.all(1).any())


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"extent must be at least kernel_size \(3, 3\) on each axis, got \(2, 2\)", {"extent": 2}),
        (ValueError, r"offsets must lie in the window .*\(5, 5\).*\[\[4, 4\]\]", {"extent": 5, "pattern": "far"}),
        (ValueError, "hold no tap twice", {"pattern": "twice"}),
        (TypeError, "offsets must be an integer tensor.*float32", {"pattern": "float"}),
        (ValueError, "offsets must have no more groups than the 8 input channels, got 9", {"pattern": "many"}),
        (ValueError, "groups must divide in_channels=8, got 3", {"groups": 3}),
        (ValueError, "groups must divide out_channels=6, got 4", {"groups": 4}),
        (ValueError, "pattern must be one of 'mixed', .*did you mean 'mixed'", {"pattern": "mixt"}),
        (ValueError, "padding_mode must be one of", {"padding_mode": "mirror"}),
        (ValueError, "stride must be positive", {"stride": 0}),
        (TypeError, "dilation must hold integers only", {"dilation": (1.5, 1)}),
    ],
)  # fmt: skip
def test_bad_arguments_name_argument_rule_and_value(error: Any, message: str, arguments: dict[str, Any]) -> None:
    dense = patterns.dense_taps(3)[None]
    far = dense.clone()
    far[0, 0] = 4
    own = {"far": far, "twice": dense * 0, "float": dense.float(), "many": dense.repeat(9, 1, 1)}
    if arguments.get("pattern") in own:
        arguments = {**arguments, "pattern": own[arguments["pattern"]]}
    with pytest.raises(error, match=message):
        SparseConv2d(8, 6, 3, **arguments)


# ── checkpoints, copies, devices
# ────────────────────────────────────────────────────────────────────────────────────────


def test_a_plain_checkpoint_loads_and_each_weight_serves_its_partner_tap() -> None:
    plain = nn.Conv2d(8, 6, 3)
    layer = make(extent=9, pattern="partition")
    offsets = layer.offsets.clone()
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.offsets, offsets)
    m = patterns.dense_taps(3)
    best = patterns.match_dense(offsets.flip(1), 3)  # from another order: as good, if not the same where there are ties
    assert torch.equal((m * offsets).sum((1, 2)), (m * best).sum((1, 2)))
    right(layer)


def test_offsets_travel_in_the_state_dict_weights_only() -> None:
    source, target = make(seed=1), make(seed=2)
    assert not torch.equal(source.offsets, target.offsets)
    target(image())
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(source.offsets, target.offsets)
    assert torch.equal(source(image()), target(image()))


def test_a_checkpoint_with_offsets_outside_the_window_is_refused() -> None:
    wide, layer = make(extent=9), make(extent=5)
    with pytest.raises(RuntimeError, match=r"offsets: offsets must lie in the window of extent \(5, 5\)"):
        layer.load_state_dict(wide.state_dict())
    right(layer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_compute_the_same(copied: Any) -> None:
    layer = make()
    y = layer(image())
    twin = copied(layer)
    assert torch.equal(twin(image()), y)
    assert len(pickle.dumps(layer)) < 50_000  # no work space inside
    twin.load_state_dict(make(seed=7).state_dict())
    right(twin)
    right(layer)


def test_meta_then_to_empty_then_load() -> None:
    source = make(seed=1)
    with torch.device("meta"):
        layer = SparseConv2d(8, 6, 3, padding=1, seed=2)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(layer(image()), source(image()))


def test_meta_then_to_empty_then_reset_brings_the_offsets_back() -> None:
    with torch.device("meta"):
        layer = SparseConv2d(8, 6, 3, padding=1, seed=2)
    layer.to_empty(device="cpu").reset_parameters()
    assert torch.equal(layer.offsets, make(seed=2).offsets)
    right(layer)


def test_moves_after_the_first_forward() -> None:
    layer = make()
    y = layer(image())
    layer.to("meta")
    assert layer(image().to("meta")).shape == y.shape
    layer.double()
    assert layer.offsets.dtype == torch.int64


def test_a_change_in_place_is_followed() -> None:
    layer, other = make(seed=1), make(seed=2)
    layer(image())
    with torch.no_grad():
        layer.offsets.copy_(other.offsets)
    right(layer)
    torch.testing.assert_close(layer(image()), F.conv2d(image(), *plain_arguments(layer)), rtol=1e-4, atol=1e-5)


def plain_arguments(layer: SparseConv2d) -> tuple[Any, ...]:
    dense = layer.to_conv2d()
    return dense.weight, dense.bias, dense.stride, dense.padding, dense.dilation, dense.groups


def test_nonsense_written_into_the_offsets_is_an_error_not_a_wrong_number() -> None:
    layer = make()
    with torch.no_grad():
        layer.offsets.add_(10)
    with pytest.raises(ValueError, match="offsets must lie in the window"):
        layer(image())


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9998, 0.99999])
def test_running_averages_of_the_model_keep_the_offsets(decay: float) -> None:
    from timm.utils import ModelEmaV2, ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    layer = make(extent=31, pattern="random")
    offsets = layer.offsets.clone()
    averages = [
        ModelEmaV2(layer, decay),
        ModelEmaV3(layer, decay),
        AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True),
    ]
    for step in range(3):
        with torch.no_grad():
            layer.weight.add_(0.1)
        for ema in averages:
            (ema.update_parameters if isinstance(ema, AveragedModel) else ema.update)(layer)
            if step == 1:
                ema.module(image())
    for ema in averages:
        assert torch.equal(ema.module.state_dict()["offsets"], offsets)
        right(ema.module)


def test_functional_call_uses_the_offsets_that_it_is_given() -> None:
    layer, other = make(seed=1), make(seed=2)
    state = {**dict(layer.named_parameters()), "offsets": other.offsets}
    y = torch.func.functional_call(layer, state, (image(),))
    torch.testing.assert_close(y, sparse_conv2d(image(), layer.weight, layer.bias, other.offsets, padding=1))
    right(layer)


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


# ── to and from plain layers
# ────────────────────────────────────────────────────────────────────────────────────────────


def test_from_plain_shares_the_parameters_and_to_plain_copies_them() -> None:
    plain = nn.Conv2d(8, 6, 3, padding=1)
    sparse = SparseConv2d.from_conv2d(plain, extent=9, pattern="centered", seed=0)
    assert sparse.weight is plain.weight
    assert sparse.bias is plain.bias
    right(sparse)
    dense = sparse.to_conv2d()
    assert dense.kernel_size == (9, 9)
    assert int((dense.weight != 0).sum()) == plain.weight.numel()
    torch.testing.assert_close(dense(image()), sparse(image()), rtol=1e-4, atol=1e-5)


def test_from_plain_refuses_what_would_not_carry_over() -> None:
    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(F.pad(input, (1, 0, 1, 0)))

    hooked = nn.Conv2d(4, 4, 3)
    hooked.register_forward_hook(lambda *_: None)
    for conv in (Own(4, 4, 3), hooked, nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.Linear(3, 3)):
        with pytest.raises(TypeError, match="conv must be a plain Conv2d"):
            SparseConv2d.from_conv2d(conv)  # type: ignore[arg-type]
