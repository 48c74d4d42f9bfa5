"""The layer computes with the values that its offsets have, whoever put them there; nothing takes them by identity."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.sparse.layers import image, make, right, twin_of
from widerf import SparseConv1d, SparseConv2d, SparseConv3d, convert, kernels
from widerf.functional import sparse_conv2d

# ── identity as a cache key
# ────────────────────────────────────────────────────────────────────────────────────────────────


def replaced(layer: SparseConv2d, new: Tensor) -> None:
    layer.offsets = new.clone()


def written(layer: SparseConv2d, new: Tensor) -> None:
    layer.offsets.copy_(new)


def written_past_the_version(layer: SparseConv2d, new: Tensor) -> None:
    layer.offsets.data.copy_(new)


def repointed(layer: SparseConv2d, new: Tensor) -> None:
    layer.offsets.data = new.clone()


def written_one_by_one(layer: SparseConv2d, new: Tensor) -> None:
    for i, tap in enumerate(new.flatten().tolist()):
        layer.offsets.view(-1)[i] = tap


def written_as_numpy(layer: SparseConv2d, new: Tensor) -> None:
    layer.offsets.numpy()[...] = new.numpy()


def written_in_inference_mode(layer: SparseConv2d, new: Tensor) -> None:
    with torch.inference_mode():
        layer.offsets.copy_(new)


def written_through_an_old_state_dict(layer: SparseConv2d, new: Tensor) -> None:
    old = layer.state_dict()
    layer.state_dict()
    old["offsets"].copy_(new)


def loaded(layer: SparseConv2d, new: Tensor) -> None:
    layer.load_state_dict({**layer.state_dict(), "offsets": new})


def loaded_and_assigned(layer: SparseConv2d, new: Tensor) -> None:
    layer.load_state_dict({**layer.state_dict(), "offsets": new.clone()}, assign=True)


def stored_narrow(layer: SparseConv2d, new: Tensor) -> None:
    layer.offsets = new.to(torch.int16)


WAYS: list[Callable[[SparseConv2d, Tensor], None]] = [
    replaced, written, written_past_the_version, repointed, written_one_by_one, written_as_numpy,
    written_in_inference_mode, written_through_an_old_state_dict, loaded, loaded_and_assigned, stored_narrow,
]  # fmt: skip
COPIES: list[Callable[[Any], Any]] = [
    lambda m: m,
    copy.copy,
    copy.deepcopy,
    lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: m.to(torch.float32),
    lambda m: m.share_memory(),
]


def shorter(offsets: Tensor) -> Tensor:
    """What an average might make of the offsets: as many of them one nearer to zero as keep the taps apart."""
    new = offsets.clone()
    for group, tap, axis in itertools.product(*map(range, offsets.shape)):
        trial = new.clone()
        trial[group, tap, axis] -= trial[group, tap, axis].sign()
        new = trial if len({tuple(t) for t in trial[group].tolist()}) == offsets.shape[1] else new
    return new


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(WAYS), st.integers(0, 5), st.sampled_from(COPIES)), min_size=1, max_size=5))
def test_offsets_are_followed_whatever_way_they_come(steps: list[Any]) -> None:
    layer = make(extent=7, pattern="random")
    right(layer)
    for way, seed, copied in steps:
        layer = copied(layer)
        new = shorter(layer.offsets.long()) if seed == 0 else make(seed, extent=7, pattern="random").offsets
        way(layer, new)
        torch.testing.assert_close(
            layer(image()),
            sparse_conv2d(image(), layer.weight, layer.bias, new, padding=1),
            rtol=1e-4,
            atol=1e-5,
        )
        assert torch.equal(layer.offsets.long(), new)


def test_new_offsets_in_the_memory_of_old_ones_are_new_offsets() -> None:
    layer, x = make(), image()
    drawn = [make(seed).offsets for seed in range(40)]
    for offsets in drawn:  # each clone is freed before the next one is made
        y = torch.func.functional_call(layer, {"offsets": offsets.clone()}, (x,))
        torch.testing.assert_close(y, sparse_conv2d(x, layer.weight, layer.bias, offsets, padding=1))
    right(layer)
    assert torch.equal(layer.offsets, make().offsets)


@pytest.mark.parametrize("steps", range(4))
def test_a_write_that_looks_like_an_average_stands_and_an_average_does_not(steps: int) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    layer = make(extent=31, pattern="random", seed=steps)
    for decay in (0.3, 0.9, 0.999):
        ema = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        for _ in range(steps + 1):
            ema.update_parameters(layer)
        assert torch.equal(ema.module.state_dict()["offsets"], layer.offsets)
        right(ema.module)
        new = shorter(ema.module.offsets)
        ema.module.offsets.copy_(new)
        right(ema.module)
        assert torch.equal(ema.module.offsets, new)


def test_offsets_that_were_freed_are_an_error() -> None:
    layer = make()
    layer.offsets = layer.offsets.clone()
    layer.offsets.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="offsets must have memory for their 144 elements, got a freed storage"):
        layer(image())


# ── compiled layers
# ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("way", "pattern", "path"),
    [
        *((way, "mixed", "") for way in WAYS[:6]),
        *((written, p, k) for p in ("partition", "grid") for k in ("", "torch")),
    ],
)
def test_a_compiled_layer_follows_or_refuses_other_offsets(way: Any, pattern: str, path: str) -> None:
    def made(pattern: str, seed: int) -> SparseConv2d:
        return SparseConv2d(32, 6, 3, padding=1, extent=9, pattern=pattern, seed=seed)

    torch._dynamo.reset()
    layer, x = made(pattern, 1), image(1, 32, 9, 9)
    with kernels.use(path):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for seed in (2, 3):
            torch.testing.assert_close(compiled(x), twin_of(layer, x), rtol=1e-4, atol=1e-5)
            way(layer, made("random", seed).offsets[:1].repeat(len(layer.offsets), 1, 1))
            try:
                y = compiled(x)
            except torch._dynamo.exc.Unsupported:
                pass  # it is compiled anew, and sees the change
            except RuntimeError as error:
                assert "offsets must not be changed after compilation" in str(error)
            else:
                torch.testing.assert_close(y, twin_of(layer, x), rtol=1e-4, atol=1e-5)
            layer(x)  # as the message says
    torch._dynamo.reset()


# ── fake tensors, ensembles, torch.fx
# ────────────────────────────────────────────────────────────────────────────────────────────────

KINDS: list[tuple[Any, Any]] = [(SparseConv1d, nn.Conv1d), (SparseConv2d, nn.Conv2d), (SparseConv3d, nn.Conv3d)]


@pytest.mark.parametrize(("sparse", "plain"), KINDS)
@pytest.mark.parametrize("seed", [None, 0])
def test_layers_are_built_and_called_with_fake_tensors(sparse: Any, plain: Any, seed: int | None) -> None:
    state = torch.get_rng_state()
    with FakeTensorMode():
        layer, twin = sparse(8, 6, 3, 2, 1, seed=seed), plain(8, 6, 3, 2, 1)
        x = torch.randn(2, 8, *[9] * sparse.RANK)
        assert layer(x).shape == twin(x).shape
        layer(x).sum().backward()
        assert layer.weight.grad.shape == layer.weight.shape
        layer.load_state_dict(layer.state_dict())
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    st.sampled_from(["same", 0, 1]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_an_ensemble_computes_what_its_members_compute(
    groups: int, mode: str, padding: Any, dilation: int, equal: bool, rank: int, bias: bool
) -> None:
    kind: Any = KINDS[rank - 1][0]
    members = [
        kind(4, 8, 3, 1, padding, dilation, groups, bias, mode, extent=5, seed=0 if equal else i) for i in range(3)
    ]
    parameters, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    base = copy.deepcopy(members[0]).to("meta")
    x = torch.randn(2, 4, *[7] * rank)

    def call(p: Any, b: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(base, (p, b), (x,))  # type: ignore[no-any-return]

    y = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    torch.testing.assert_close(y, torch.stack([m(x) for m in members]), rtol=1e-4, atol=1e-5)
    grads = torch.vmap(torch.func.grad(lambda p, b, x: call(p, b, x).square().sum()), (0, 0, None))(
        parameters, buffers, x
    )
    for i, member in enumerate(members):
        wanted = torch.autograd.grad(member(x).square().sum(), member.weight)[0]
        torch.testing.assert_close(grads["weight"][i], wanted, rtol=1e-3, atol=1e-3)


class Model(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.b = nn.Sequential(SparseConv2d(8, 8, 3, padding=1, padding_mode=mode), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + 1  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_fx_sees_a_layer_as_it_sees_a_plain_one(mode: str) -> None:
    model = Model(mode)
    traced = torch.fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in traced.graph.nodes if n.op == "call_module"] == [
        ("call_module", "a"), ("call_module", "b.0"), ("call_module", "b.1"),
    ]  # fmt: skip
    x = image(1, 3, 12, 12)
    assert torch.equal(traced(x), model(x))
    layer: Any = model.b[0]
    with torch.no_grad():
        layer.offsets.copy_(SparseConv2d(8, 8, 3, seed=5).offsets)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("bias", [True, False])
def test_fx_traces_a_layer_by_itself(mode: str, bias: bool) -> None:
    layer = make(padding_mode=mode, bias=bias)
    traced = torch.fx.symbolic_trace(layer)
    assert torch.equal(traced(image()), layer(image()))
    traced.offsets.copy_(make(seed=3).offsets)
    torch.testing.assert_close(traced(image()), make(seed=3, padding_mode=mode, bias=bias)(image()))


def test_feature_extractors_take_converted_models() -> None:
    vision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    model = vision.models.resnet18(weights=None).eval()
    convert(model, extent=7)
    x = image(1, 3, 64, 64)
    (found,) = create_feature_extractor(model, ["layer2"])(x).values()
    wanted = model.layer2(model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x))))))
    torch.testing.assert_close(found, wanted)


def test_a_state_dict_shares_the_memory_of_the_offsets() -> None:
    layer = make()
    assert layer.state_dict()["offsets"].data_ptr() == layer.offsets.data_ptr()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert set(torch.load(file, weights_only=True)) == {"weight", "bias", "offsets"}
