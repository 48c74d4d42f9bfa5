"""Fault kind: geometry guessed from numbers. What a tensor is follows from what made it, not from its length."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from widerf import predict, receptive_field
from widerf.trace.site import spatial_layer

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# ── maps without an axis for channels ───────────────────────────────────────────────────────────────────


class Dense(nn.Module):
    """One figure per pixel: depth, saliency, a binary mask."""

    def __init__(self, rank: int, how: str, stride: int = 1) -> None:
        super().__init__()
        self.a = CONVS[rank](2, 8, 3, padding=1, stride=stride)
        self.b = CONVS[rank](8, 1 if how == "squeeze" else 5, 3, padding=1)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        if self.how == "squeeze":
            return y.squeeze(1)
        return y.sigmoid().amax(1) if self.how == "largest" else y.mean(1)


@settings(max_examples=40, deadline=None)
@given(
    side=st.integers(5, 300), other=st.integers(5, 300), how=st.sampled_from(["squeeze", "largest", "mean"]),
    stride=st.sampled_from([1, 2]),
)  # fmt: skip
def test_a_map_without_channels_is_a_map_at_every_size(side: int, other: int, how: str, stride: int) -> None:
    site = spatial_layer(Dense(2, how, stride), (2, side, other))
    assert (site.name, site.layout) == ("", "no_channels")
    assert site.spatial_shape == (-(-side // stride), -(-other // stride))


@pytest.mark.parametrize("side", [16, 17, 64, 65, 72])
@pytest.mark.parametrize(("rank", "how"), [(1, "squeeze"), (2, "squeeze"), (2, "mean"), (3, "squeeze"), (3, "mean")])
def test_a_map_without_channels_sees_what_its_last_layer_sees(rank: int, how: str, side: int) -> None:
    side = min(side, 17) if rank == 3 else side
    torch.manual_seed(0)
    model, size = Dense(rank, how), (2, *(side,) * rank)
    field = receptive_field(model, size)
    assert (field.layer, field.size, field.jump) == ("", (5,) * rank, (1.0,) * rank)
    if how == "squeeze":
        assert torch.equal(predict(model, size).map, predict(model, size, layer="b").map)


def test_features_are_no_map_even_where_their_number_is_the_width() -> None:
    pooled = nn.Sequential(nn.Conv1d(2, 32, 3, padding=1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 32))
    assert spatial_layer(pooled, (2, 32)).name == "0"


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────


class Tokens(nn.Module):
    """Patches, attention or none, and tokens that are dropped or merged on the way."""

    def __init__(self, attend: bool, prefix: int, keep: str, patch: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, patch, stride=patch)
        self.start = nn.Parameter(torch.zeros(1, prefix, 16))
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True) if attend else None
        self.mix = nn.Linear(16, 16)
        self.keep = keep
        self.merge = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        if self.keep == "some":
            x = x[:, torch.arange(0, x.shape[1], 4)]
        if self.keep == "merged":
            x = x.view(len(x), side // 2, 2, side // 2, 2, 16).transpose(2, 3).reshape(len(x), -1, 64)
            return self.merge(x)
        x = self.norm(torch.cat([self.start.expand(len(x), -1, -1), x], 1))
        if self.attention is not None:
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mix(x)


@pytest.mark.parametrize(("attend", "prefix", "side"), list(itertools.product([True, False], [0, 1, 5], [16, 32, 48])))
def test_tokens_lie_on_the_grid_that_they_were_cut_from(attend: bool, prefix: int, side: int) -> None:
    site = spatial_layer(Tokens(attend, prefix, "all"), (3, side, side))
    assert (site.name, site.layout, site.prefix) == ("", "tokens", prefix)
    assert site.spatial_shape == (side // 4, side // 4)


@pytest.mark.parametrize(("attend", "prefix", "side"), list(itertools.product([True, False], [0, 1, 5], [16, 32, 64])))
def test_tokens_that_were_picked_lie_on_no_grid(attend: bool, prefix: int, side: int) -> None:
    """As in a masked autoencoder: what is left is not laid on a smaller grid because its number fits one."""
    model = Tokens(attend, prefix, "some")
    assert spatial_layer(model, (3, side, side)).name == "embed"
    with pytest.raises(ValueError, match="spatial axes"):
        spatial_layer(model, (3, side, side), "mix")


@pytest.mark.parametrize("side", [16, 32, 64])
def test_tokens_that_were_merged_lie_on_the_smaller_grid(side: int) -> None:
    site = spatial_layer(Tokens(True, 0, "merged"), (3, side, side))
    assert (site.layout, site.spatial_shape) == ("tokens", (side // 8, side // 8))


# ── several outputs ─────────────────────────────────────────────────────────────────────────────────────


class Heads(nn.Module):
    """A backbone with a main and an auxiliary head, whose order in the output varies."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.main, self.aux = nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 1)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        y = self.stem(x)
        main, aux = (F.interpolate(head(y), x.shape[2:], mode="bilinear") for head in (self.main, self.aux))
        named = {"out": main, "aux": aux}
        if self.form.startswith("dict"):
            return OrderedDict((key, named[key]) for key in self.form.split()[1:])
        if self.form == "auxiliary losses":
            return {"logits": main, "aux_logits": aux}
        return (main, aux) if self.form == "tuple" else [main, aux]


@pytest.mark.parametrize("form", ["dict out", "dict out aux", "dict aux out", "auxiliary losses", "tuple", "list"])
def test_the_main_output_is_looked_at(form: str) -> None:
    field = receptive_field(Heads(form), (3, 32, 32))
    only_main = receptive_field(Heads("dict out"), (3, 32, 32))
    assert (field.layer, field.size) == ("", only_main.size)


def test_of_a_pyramid_the_deepest_map_is_looked_at() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            a = self.a(x)
            return [a, self.b(a).relu()]

    assert spatial_layer(Pyramid(), (3, 32, 32)).spatial_shape == (8, 8)


# ── what is global, what is a border, what is joined ────────────────────────────────────────────────────


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean(tuple(range(2, x.ndim)), keepdim=True).sigmoid()


@settings(max_examples=30, deadline=None)
@given(
    side=st.integers(24, 40), kernel=st.integers(1, 5), stride=st.integers(1, 4), padding=st.integers(0, 2),
    rank=st.sampled_from([1, 2]),
)  # fmt: skip
def test_a_gate_is_global_whatever_the_layer_before_leaves_out(
    side: int, kernel: int, stride: int, padding: int, rank: int
) -> None:
    conv = CONVS[rank]
    first = conv(3, 4, kernel, stride=stride, padding=min(padding, kernel // 2))
    model = nn.Sequential(first, Gate(), conv(4, 4, 3, padding=1))
    field = receptive_field(model, (3, *(side,) * rank))
    assert field.global_paths == ("1",) and field.size == (kernel + 2 * stride,) * rank


@pytest.mark.parametrize("crop", [0, 1, 5])
def test_a_gate_over_a_crop_is_global_too(crop: int) -> None:
    class Crop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., crop : x.shape[-1] - 2 * crop, crop:]

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Crop(), Gate())
    assert receptive_field(model, (3, 32, 32)).global_paths == ("2",)


@pytest.mark.parametrize(("rank", "axis", "zeros", "front"), list(itertools.product([1, 2], [0, 1], [1, 2, 3], [0, 1])))
def test_zeros_on_an_inserted_axis_see_nothing(rank: int, axis: int, zeros: int, front: int) -> None:
    class Insert(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            dim = 2 + min(axis, rank - 1)
            moved = F.pad(x.unsqueeze(dim + 1).movedim(dim + 1, -1), (front, zeros - front))
            return moved.movedim(-1, dim + 1).flatten(dim, dim + 1)

    conv = CONVS[rank]
    model = nn.Sequential(conv(1, 2, 3, padding=1), Insert(), conv(2, 2, 3, padding=1)).double()
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    size = (1, *(19,) * rank)
    x = torch.ones(1, *size, dtype=torch.float64, requires_grad=True)
    y = model(x)
    along = [n // 2 for n in y.shape[2:]]
    along[min(axis, rank - 1)] = 9 * (zeros + 1) + front  # where an element of the image lies, not a zero
    unit = tuple(along)
    y[(0, slice(None), *unit)].sum().backward()
    seen = (x.grad[0, 0] > 0).nonzero()
    first, last = receptive_field(model, size).interval(unit)
    assert (list(first), list(last)) == (seen.amin(0).tolist(), seen.amax(0).tolist())


def _wrapped(x: Tensor) -> Tensor:
    return torch.cat([x[..., -2:], x, x[..., :1]], -1)


def _shifted_in_time(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[..., :-1, :][:, :1] = x[..., 1:, :][:, :1]
    out[..., 1:, :][:, 1:2] = x[..., :-1, :][:, 1:2]
    out[:, 2:] = x[:, 2:]
    return out


def _shuffled_up(x: Tensor) -> Tensor:
    return torch.stack([x, x.roll(1, -1)], -1).flatten(-2)


PARTS = {
    "wrap": _wrapped, "temporal shift": _shifted_in_time, "interleaved": _shuffled_up,
    "halves swapped": lambda x: torch.cat([x[..., 8:], x[..., :8]], -1),
    "rows from elsewhere": lambda x: torch.cat([x[:, :, :3], x[:, :, -3:], x[:, :, 3:]], 2),
    "where, by place": lambda x: torch.where(torch.arange(x.shape[-1]) < 3, x.roll(2, -1), x),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_put_side_by_side_do_not_join(name: str) -> None:
    class Apply(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return PARTS[name](x)

    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Apply(), nn.Conv2d(4, 4, 3, padding=1))
    assert dict(receptive_field(model, (1, 16, 16)).misaligned) == {}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate", "zeros"])
def test_no_padding_is_a_joint(mode: str, rank: int) -> None:
    model = nn.Sequential(CONVS[rank](1, 2, 3, padding=1, padding_mode=mode), CONVS[rank](2, 2, 3))
    assert dict(receptive_field(model, (1, *(16,) * rank)).misaligned) == {}


@pytest.mark.parametrize("joined", ["add", "cat", "maximum"])
def test_paths_that_are_shifted_and_meet_are_still_reported(joined: str) -> None:
    class Meet(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x[..., 1:], x[..., :-1]
            return torch.cat([a, b], 1) if joined == "cat" else getattr(torch, joined)(a, b)

    found = receptive_field(nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), Meet()), (1, 16)).misaligned
    assert dict(found) == {"1": (-1.0,)}
