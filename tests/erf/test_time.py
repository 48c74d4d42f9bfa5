"""Time, as a count that no load disturbs: how many numbers a reading writes, beside those of a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from widerf import receptive_field

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PASSES, CHANNELS = 6, 24


class Written(TorchDispatchMode):
    """Counts the numbers that operators write into memory of their own; views write none."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                inplace = func._schema.is_mutable
                if inplace or tensor.untyped_storage()._cdata not in given:
                    self.numbers += tensor.numel()
                    self.largest = max(self.largest, tensor.numel())
        return result


def written(call: Callable[[], Any]) -> Written:
    with Written() as counter:
        call()
    return counter


class Windows(nn.Module):
    """Attention within windows, shifted or not, as in Swin: tokens last, padded to whole windows, biased, masked."""

    def __init__(self, rank: int, channels: int, window: int, shift: int, heads: int = 2) -> None:
        super().__init__()
        self.rank, self.window, self.shift, self.heads = rank, window, shift, heads
        self.norm = nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.bias = nn.Parameter(torch.zeros(heads, window**rank, window**rank))

    def forward(self, x: Tensor) -> Tensor:  # (batch, channels, *spatial)
        rank, w, size = self.rank, self.window, x.shape[2:]
        axes = tuple(range(1, rank + 1))
        y = self.norm(x.movedim(1, -1))
        y = F.pad(y, [0, 0, *(end for n in reversed(size) for end in (0, -n % w))])
        padded = y.shape[1:-1]
        y = y.roll((-self.shift,) * rank, axes)
        y = y.view(len(x), *(side for n in padded for side in (n // w, w)), -1)
        order = [*range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)]
        y = y.permute(0, *order, 2 * rank + 1).reshape(-1, w**rank, y.shape[-1])
        y = self.attend(y)
        y = y.view(len(x), *(n // w for n in padded), *(w for _ in padded), -1)
        back = [1 + side * rank + axis for axis in range(rank) for side in (0, 1)]
        y = y.permute(0, *back, 2 * rank + 1).reshape(len(x), *padded, -1).roll((self.shift,) * rank, axes)
        y = x.movedim(1, -1) + y[(slice(None), *(slice(n) for n in size))]
        return (y + self.mlp(y)).movedim(-1, 1)

    def attend(self, y: Tensor) -> Tensor:
        q, k, v = self.qkv(y).view(*y.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2) + self.bias
        if self.shift:
            scores = scores.view(1, -1, *scores.shape[1:]) + scores.new_zeros(scores.shape[0], 1, *scores.shape[2:])
            scores = scores.flatten(0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(y.shape))


def transformer(rank: int, window: int, channels: int = CHANNELS) -> nn.Module:
    """Patches, two blocks of windows, a layer that joins them with the image's own features, as in SwinUNETR."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = CONVS[rank](1, channels, 2, stride=2)
            self.blocks = nn.Sequential(
                Windows(rank, channels, window, 0), Windows(rank, channels, window, window // 2)
            )
            self.skip = CONVS[rank](1, channels, 3, padding=1)
            self.head = CONVS[rank](2 * channels, channels, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.blocks(self.stem(x))
            return self.head(torch.cat([self.skip(x), F.interpolate(y, scale_factor=2)], 1))

    return Net().eval()


# sides of images for which the maps have about 500 tokens and no whole number of windows
SIDES = {1: 1000, 2: 46, 3: 18}
WINDOWS = {1: (8, 64, 256), 2: (3, 7, 11), 3: (2, 4, 7)}


@pytest.mark.parametrize(("rank", "window"), [(rank, window) for rank in WINDOWS for window in WINDOWS[rank][1:]])
def test_a_windowed_transformer_takes_few_passes(rank: int, window: int) -> None:
    model, size = transformer(rank, window), (1, *(SIDES[rank],) * rank)
    with torch.no_grad():
        one = written(lambda: model(torch.randn(1, *size)))
    all_in_all = written(lambda: receptive_field(model, size))
    assert all_in_all.numbers < PASSES * one.numbers


@pytest.mark.parametrize("rank", WINDOWS)
def test_boxes_grow_with_the_tokens_and_not_with_the_pairs_of_tokens(rank: int) -> None:
    size = (1, *(SIDES[rank],) * rank)
    readings, pairs = [], []
    for window in WINDOWS[rank]:
        model = transformer(rank, window)
        with torch.no_grad():
            one = written(lambda model=model: model(torch.randn(1, *size)))
        reading = written(lambda model=model: receptive_field(model, size))
        # The recording is one pass: what is left is the reading.
        readings.append(reading.numbers - one.numbers)
        pairs.append(window**rank)
        boxes = 2 * rank * math.prod(size)  # of the pixels, once for each of the channels that are joined
        assert reading.largest <= max(one.largest, 2 * CHANNELS * boxes), window
    assert max(pairs) > 10 * min(pairs)
    assert max(readings) < 2 * min(readings), list(zip(pairs, readings, strict=True))
