"""Theoretical receptive fields against the brute-force support of a gradient with positive weights."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from widerf import receptive_field
from widerf.errors import UntreatedOperatorError

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Smooth(nn.Module):
    """Stands in for max pooling, whose gradient reaches one pixel of a window only."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding, self.dilation = (
            pool.kernel_size,
            pool.stride,
            pool.padding,
            pool.dilation,
        )

    def forward(self, x: Tensor) -> Tensor:
        rank = x.ndim - 2
        kernel = self.kernel if isinstance(self.kernel, tuple) else (self.kernel,) * rank
        weight = torch.ones(x.shape[1], 1, *kernel, dtype=x.dtype)
        conv = getattr(F, f"conv{rank}d")
        return conv(x, weight, None, self.stride, self.padding, self.dilation, x.shape[1])


def positive_twin(model: nn.Module) -> nn.Module:
    """The same network with all weights 1, eval mode, and no max pooling: every path then shows in the gradient."""
    twin = copy.deepcopy(model).double().eval()
    for parameter in twin.parameters():
        # Small enough that no bounded activation saturates.
        parameter.data.fill_(0.5 / parameter[0].numel() if parameter.ndim > 1 else 0.5)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d):
            parent = twin.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Smooth(module))
    return twin


def support(
    model: nn.Module, input_size: tuple[int, ...], unit: tuple[int, ...], layer: str = ""
) -> list[tuple[int, int]]:
    """First and last pixel with a gradient per axis, by brute force."""
    twin = positive_twin(model)
    kept: list[Tensor] = []
    twin.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.append(output))
    x = torch.ones(1, *input_size, dtype=torch.float64, requires_grad=True)
    twin(x)
    (kept[-1][(slice(None), slice(None), *unit)].sum().log()).backward()
    seen = x.grad[0].abs().sum(0) > 0
    boxes = []
    for axis in range(seen.ndim):
        line = seen.movedim(axis, 0).reshape(seen.shape[axis], -1).any(1).nonzero().flatten()
        boxes.append((int(line[0]), int(line[-1])))
    return boxes


def assert_equals_support(
    model: nn.Module, input_size: tuple[int, ...], unit: tuple[int, ...], layer: str = ""
) -> None:
    found = receptive_field(model, input_size, layer=layer)
    first, last = found.interval(unit)
    cut = [(max(a, 0), min(b, n - 1)) for a, b, n in zip(first, last, input_size[1:], strict=True)]
    assert cut == support(model, input_size, unit, layer)


# ── known figures ───────────────────────────────────────────────────────────────────────────────────────


def test_resnet18_sees_435_pixels() -> None:
    found = receptive_field(timm.create_model("resnet18"))
    assert (found.size, found.jump, found.global_paths, dict(found.misaligned)) == ((435, 435), (32.0, 32.0), (), {})


def test_resnet50_sees_427_pixels_and_unit_16_is_centred_on_pixel_512() -> None:
    model = timm.create_model("resnet50")
    found = receptive_field(model, (3, 64, 64), layer="layer4")
    assert (found.size, found.jump) == ((427, 427), (32.0, 32.0))
    assert found.center((16, 16)) == (512.0, 512.0)
    third = receptive_field(model, (3, 64, 64), layer="layer3")
    assert (third.size, third.jump) == ((267, 267), (16.0, 16.0))


@pytest.mark.parametrize(("depth", "size"), [(11, 150), (13, 156), (16, 212), (19, 268)])
def test_vgg_after_the_last_pooling(depth: int, size: int) -> None:
    with torch.device("meta"):  # without the memory of its fully connected layers
        features = timm.create_model(f"vgg{depth}").features
    model = features.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    found = receptive_field(model, (3, 64, 64), layer=model[-1])
    assert (found.size, found.jump) == ((size, size), (32.0, 32.0))


def test_stem_of_three_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 7, stride=2, padding=3), nn.MaxPool2d(3, stride=2, padding=1), nn.AvgPool2d(3, 2, 1)
    )
    figures = [receptive_field(model, (3, 64, 64), layer=str(i)) for i in range(3)]
    assert [f.size for f in figures] == [(7, 7), (11, 11), (19, 19)]
    assert [f.jump for f in figures] == [(2.0, 2.0), (4.0, 4.0), (8.0, 8.0)]
    assert all(f.center((0, 0)) == (0.0, 0.0) for f in figures)


def test_three_dimensions() -> None:
    model = nn.Sequential(nn.Conv3d(1, 1, 3, padding=1), nn.MaxPool3d(2, stride=2, padding=1))
    assert [receptive_field(model, (1, 12, 12, 12), layer=str(i)).size for i in range(2)] == [(3, 3, 3), (4, 4, 4)]


@pytest.mark.parametrize("name", ["resnet26", "mobilenetv2_050"])
def test_a_dilated_variant_sees_what_the_gradient_sees(name: str) -> None:
    model = timm.create_model(name, output_stride=8)
    layer = "layer4" if name == "resnet26" else "blocks"
    found = receptive_field(model, (3, 640, 16), layer=layer)
    assert found.jump == (8.0, 8.0)
    assert support(model, (3, 640, 16), (40, 1), layer)[0] == (
        found.interval((40, 1))[0][0],
        found.interval((40, 1))[1][0],
    )


# ── random networks ─────────────────────────────────────────────────────────────────────────────────────


class Residual(nn.Module):
    def __init__(self, rank: int, kernels: tuple[int, ...], dilation: int, joined: str) -> None:
        super().__init__()
        pads = tuple(dilation * (k - 1) // 2 for k in kernels)
        self.branch = nn.Sequential(CONVS[rank](2, 2, kernels, padding=pads, dilation=dilation), nn.ReLU())
        self.joined = joined
        self.mix = CONVS[rank](4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.joined == "add":
            return x + self.branch(x)
        return self.mix(torch.cat([x, self.branch(x)], 1))


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, nn.Module]:
    rank = draw(st.sampled_from([1, 1, 2, 2, 3]))
    layers: list[nn.Module] = []
    stride_left = 4
    for _ in range(draw(st.integers(1, 4 if rank < 3 else 2))):
        kind = draw(st.sampled_from(["conv", "max", "avg", "residual", "upsample", "transposed", "grouped"]))
        kernel = draw(st.tuples(*[st.integers(1, 4)] * rank))
        stride = draw(st.sampled_from([1, 2] if stride_left > 1 else [1]))
        if kind in ("conv", "grouped"):
            dilation = draw(st.integers(1, 2))
            padding = draw(st.integers(0, 2))
            groups = 2 if kind == "grouped" else 1
            layers.append(CONVS[rank](2, 2, kernel, stride, padding, dilation, groups=groups, bias=draw(st.booleans())))
        elif kind == "max":
            layers.append(MAX_POOLS[rank](kernel, stride, min(kernel) // 2))
        elif kind == "avg":
            layers.append(AVG_POOLS[rank](kernel, stride, min(kernel) // 2))
        elif kind == "residual":
            odd = tuple(k | 1 for k in kernel)
            layers.append(Residual(rank, odd, draw(st.integers(1, 2)), draw(st.sampled_from(["add", "cat"]))))
        elif kind == "upsample":
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
        else:
            layers.append(TRANSPOSED[rank](2, 2, tuple(k + 1 for k in kernel), stride=2, padding=1))
        stride_left //= stride
    return rank, nn.Sequential(*layers)


_PERIOD = 16  # a multiple of all strides of a random network: by it the image may grow and all that is seen is shifted


def assert_sees_what_the_gradient_sees(model: nn.Module, input_size: tuple[int, ...], unit: tuple[int, ...]) -> None:
    """Compare where nothing is cut off: what a stride leaves out makes gaps, and the border may lie in one of them."""
    found = receptive_field(model, input_size, layer="")
    shape = model(torch.zeros(1, *input_size)).shape[2:]
    first, last = found.interval(unit)
    beyond = max(0, *(-a for a in first), *(b - n + 1 for b, n in zip(last, input_size[1:], strict=True)))
    margin = -(-beyond // _PERIOD) * _PERIOD
    wider = (input_size[0], *(n + 2 * margin for n in input_size[1:]))
    grown = model(torch.zeros(1, *wider)).shape[2:]
    shifted = tuple(u + (m - n) // 2 for u, n, m in zip(unit, shape, grown, strict=True))
    boxes = receptive_field(model, wider, layer="").interval(shifted)
    assert boxes == tuple(tuple(side + margin for side in sides) for sides in (first, last))
    assert all(a >= 0 and b < n for a, b, n in zip(*boxes, wider[1:], strict=True))
    assert_equals_support(model, wider, shifted)


@settings(max_examples=60, deadline=None)
@given(network=networks(), place=st.floats(0.3, 0.7))
def test_a_random_network_sees_what_the_gradient_sees(network: tuple[int, nn.Module], place: float) -> None:
    rank, model = network
    input_size = (2, *(48 if rank < 3 else 20,) * rank)
    shape = model(torch.zeros(1, *input_size)).shape[2:]
    unit = tuple(int(place * n) for n in shape)
    if math.prod(shape) > 1:
        assert_sees_what_the_gradient_sees(model, input_size, unit)


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kind", ["max", "avg", "conv"])
@pytest.mark.parametrize("unit", [0, 1, 5, 11])
def test_a_field_with_gaps_ends_where_its_last_pixel_is(unit: int, kind: str, dilation: int) -> None:
    first = {"max": nn.MaxPool1d(1, 2), "avg": nn.AvgPool1d(1, 2), "conv": nn.Conv1d(2, 2, 1, stride=2)}[kind]
    later = nn.Conv1d(2, 2, 3, padding=dilation, dilation=dilation)
    assert_sees_what_the_gradient_sees(nn.Sequential(nn.Conv1d(2, 2, 2, 1, 1), first, later), (2, 24), (unit,))


@pytest.mark.parametrize("unit", [(0, 0), (5, 11), (11, 3)])
def test_boxes_at_the_border_go_beyond_the_image_by_the_padding(unit: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, (3, 5), padding=(1, 2)), nn.Conv2d(2, 2, 3, padding=1))
    found = receptive_field(model, (2, 12, 12))
    assert found.interval(unit) == ((unit[0] - 2, unit[1] - 3), (unit[0] + 2, unit[1] + 3))
    assert_equals_support(model, (2, 12, 12), unit)


# ── paths ───────────────────────────────────────────────────────────────────────────────────────────────


class Misaligned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.avg_pool2d(x, 2)


def test_misaligned_paths_are_reported_with_their_offset() -> None:
    found = receptive_field(nn.Sequential(Misaligned()), (1, 16, 16), layer="0")
    assert dict(found.misaligned) == {"0": (0.5, 0.5)}
    assert found.size == (3, 3)


class Gated(nn.Module):
    """A convolution with squeeze-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.squeeze(x)


def test_squeeze_excite_is_named_and_the_local_size_is_given_beside_it() -> None:
    found = receptive_field(nn.Sequential(Gated(), Gated()), (2, 16, 16))
    assert found.size == (5, 5)
    assert found.global_paths == ("0.squeeze.0", "1.squeeze.0")


def test_squeeze_excite_over_channels_that_see_differently_is_global() -> None:
    class Ghost(nn.Module):
        """Half of the channels went through one more layer, as in GhostNet, before the squeeze-excite."""

        def __init__(self) -> None:
            super().__init__()
            self.primary = nn.Conv2d(2, 2, 3, padding=1)
            self.further = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.primary(x)
            x = torch.cat([x, self.further(x)], 1)
            return x * x.mean((2, 3), keepdim=True).sigmoid()

    found = receptive_field(nn.Sequential(Ghost(), nn.Conv2d(4, 4, 3, stride=2, padding=1)), (2, 16, 16))
    assert found.jump == (2.0, 2.0) and found.size == (7, 7) and found.global_paths == ("0",)


def test_units_that_all_see_the_same_lie_one_cell_apart() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4).clone()

    found = receptive_field(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), Mean()), (1, 16, 16))
    assert found.jump == (4.0, 4.0) and not found.regular and found.size == (16, 16)


def test_attention_is_global_and_the_patch_is_local() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    found = receptive_field(model)
    assert (found.size, found.jump) == ((16, 16), (16.0, 16.0))
    assert found.global_paths == ("blocks.0.attn", "blocks.1.attn")


def test_windowed_attention_sees_its_window() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), img_size=112, num_classes=0)
    found = receptive_field(model, (3, 112, 112), layer="layers.0")
    assert found.size == (28, 28)
    assert found.interval((8, 13)) == ((28, 28), (55, 55))
    assert found.global_paths == ()


def test_a_group_norm_sees_the_whole_map() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4))
    found = receptive_field(model, (2, 8, 8))
    assert (found.size, found.global_paths) == ((3, 3), ("1",))


class InPlace(nn.Module):
    """Writes half of the channels through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.last = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x], 1)
        x[:, :2] += self.conv(x[:, :2])
        F.relu_(x[:, 2:])
        return self.last(x)


def test_in_place_writes_through_views_are_followed() -> None:
    assert receptive_field(InPlace(), (2, 8, 8), layer="last").size == (3, 3)
    assert receptive_field(InPlace(), (2, 8, 8), layer="conv").size == (3, 3)


class Outlook(nn.Module):
    """Patches are mixed and put back where they came from, as in VOLO's outlook attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(18, 18, 1)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1, stride=2)
        return F.fold(self.mix(columns), (x.shape[2], x.shape[3]), 3, padding=1, stride=2)


@pytest.mark.parametrize("unit", [(0, 0), (5, 6), (11, 11)])
def test_patches_taken_out_and_put_back(unit: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), Outlook())
    assert_equals_support(model, (2, 12, 12), unit)


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x).real


def test_an_operator_without_a_rule_is_named_with_its_module() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), Fourier())
    with pytest.raises(UntreatedOperatorError, match=r"fft.*module '1'"):
        receptive_field(model, (1, 8, 8), layer="1")


def test_bad_units_are_refused() -> None:
    found = receptive_field(nn.Conv2d(1, 1, 3), (1, 8, 8))
    with pytest.raises(ValueError, match="unit must"):
        found.center((1, 2, 3))


def test_rectangular_kernels_do_not_pass_for_a_layout_with_the_channels_last() -> None:
    model = nn.Sequential(nn.MaxPool3d((3, 3, 1), 2), nn.MaxPool3d((4, 4, 1), 2))
    assert receptive_field(model, (2, 20, 20, 20)).size == (9, 9, 1)
    assert_equals_support(model, (2, 20, 20, 20), (1, 1, 3))
