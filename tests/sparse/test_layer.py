"""SparseConv as a module: its arguments, and offsets that no checkpoint, copy or move loses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.sparse.layers import image, make, right
from widerf import SparseConv2d, patterns
from widerf.functional import sparse_conv2d

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
