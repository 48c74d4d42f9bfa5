"""Random graphs of every kind of operator, smooth and with positive derivatives, as models of one tensor."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
CHANNELS = 4


class Function(nn.Module):
    """A function of one tensor as a module, with its name for messages."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


class Gate(nn.Module):
    """Squeeze-excite: a path through the mean over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(CHANNELS, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        means = x.flatten(2).mean(2) @ self.mix
        return x * means.sigmoid().view(*x.shape[:2], *(1 for _ in x.shape[2:]))


class Branch(nn.Module):
    """A graph beside the identity, joined with it."""

    def __init__(self, inner: nn.Module, joined: str) -> None:
        super().__init__()
        self.inner, self.joined = inner, joined

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.joined == "add":
            return x + y
        if self.joined == "cat":
            return torch.cat([x[:, : CHANNELS // 2], y[:, CHANNELS // 2 :]], 1)
        return torch.where(x > x.mean(), x, y)  # depends on the image


class Subset(nn.Module):
    """What ``as_strided`` takes out of a map: every position from an offset on, one pixel smaller on each axis."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        size = (*x.shape[:2], *(n - 1 for n in x.shape[2:]))
        return x.as_strided(size, x.stride(), x.storage_offset() + sum(x.stride()[2:]))


class ZeroInsertion(nn.Module):
    """Every position is followed by a zero on each axis, as in StyleGAN's upsampling, and smoothed."""

    def forward(self, x: Tensor) -> Tensor:
        for axis in range(2, x.ndim):
            x = F.pad(x.unsqueeze(axis + 1).movedim(axis + 1, -1), (0, 1)).movedim(-1, axis + 1).flatten(axis, axis + 1)
        rank = x.ndim - 2
        weight = torch.ones(CHANNELS, 1, *(3,) * rank, dtype=x.dtype)
        return getattr(F, f"conv{rank}d")(x, weight, padding=1, groups=CHANNELS)


def _masked(x: Tensor) -> Tensor:
    even = torch.arange(x.shape[-1]) % 2 == 0
    return torch.where(even, x, torch.zeros((), dtype=x.dtype)) + torch.where(even, 0.5, x)


def _wrapped(x: Tensor) -> Tensor:
    return torch.cat([x[..., -1:], x, x[..., :1]], -1)


def _written(x: Tensor) -> Tensor:
    canvas = torch.zeros_like(x)
    canvas[..., 1:] = x[..., :-1]
    canvas[:, :1] += x[:, 1:2]
    return canvas + x


def _turned(x: Tensor) -> Tensor:
    y = x.clone()
    y.transpose_(1, -1)
    y.mul_(2.0)
    y.transpose_(1, -1)
    return y


class Graphs:
    """Draws models. All weights are positive, so that no two paths cancel."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def model(self) -> tuple[nn.Module, tuple[int, ...]]:
        """A model in float64 and the size of its image."""
        rank = self.random.choice([1, 1, 2, 2, 2, 3])
        side = self.random.choice({1: [31, 32, 37], 2: [15, 16, 18], 3: [9, 10]}[rank])
        self.strides = 2
        depth = self.random.randint(2, 5 if rank < 3 else 3)
        first = CONVS[rank](2, CHANNELS, 3, padding=1)
        layers = [first, *(self.layer(rank) for _ in range(depth))]
        if self.random.random() < 0.2:
            layers.append(nn.Sequential(CONVS[rank](CHANNELS, 1, 1), Function("squeeze", lambda x: x.squeeze(1))))
        model = nn.Sequential(*layers).double()
        for parameter in model.parameters():
            parameter.data = torch.rand_like(parameter) * 0.8 / max(1, parameter[0].numel()) + 0.05
        return model.eval(), (2, *(side,) * rank)

    def layer(self, rank: int, deep: bool = True) -> nn.Module:
        names = ["conv", "padded", "grouped", "pool", "smooth", "shift", "norm", "gate", "move", "write", "strided"]
        names += ["branch"] * 3 if deep else []
        names += ["up", "down"] if deep and self.strides else []
        return getattr(self, f"_{self.random.choice(names)}")(rank)

    def _conv(self, rank: int) -> nn.Module:
        return CONVS[rank](CHANNELS, CHANNELS, 3, padding=1, dilation=1)

    def _padded(self, rank: int) -> nn.Module:
        mode = self.random.choice(["circular", "reflect", "replicate"])
        if rank == 3 and mode == "reflect":
            mode = "circular"
        return CONVS[rank](CHANNELS, CHANNELS, 3, padding=self.random.choice([1, 2]), padding_mode=mode)

    def _grouped(self, rank: int) -> nn.Module:
        return CONVS[rank](CHANNELS, CHANNELS, self.random.choice([1, 3]), padding=1, groups=2)

    def _pool(self, rank: int) -> nn.Module:
        return AVG_POOLS[rank](3, 1, 1)

    def _smooth(self, rank: int) -> nn.Module:
        return self.random.choice([nn.Softplus, nn.Sigmoid, nn.Identity])()

    def _shift(self, rank: int) -> nn.Module:
        by = self.random.choice([1, -2])
        return self.random.choice([
            Function("roll", lambda x: x.roll(by, -1)), Function("wrap", _wrapped), Function("mask", _masked),
            Function("flip", lambda x: x.flip(-1)),
        ])  # fmt: skip

    def _norm(self, rank: int) -> nn.Module:
        return self.random.choice([
            nn.GroupNorm(2, CHANNELS), INSTANCE_NORMS[rank](CHANNELS, affine=True),
            Function("layer norm", lambda x: F.layer_norm(x.movedim(1, -1), (CHANNELS,)).movedim(-1, 1)),
        ])  # fmt: skip

    def _gate(self, rank: int) -> nn.Module:
        return Gate()

    def _move(self, rank: int) -> nn.Module:
        return self.random.choice([
            Function("shuffle", lambda x: x.reshape(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)),
            Function("swap", lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)),
            Function("repeat", lambda x: x[:, :2].repeat(1, 2, *(1 for _ in x.shape[2:]))),
            Function("crop", lambda x: x[..., 1:]),
        ])  # fmt: skip

    def _write(self, rank: int) -> nn.Module:
        return Function("write", self.random.choice([_written, _turned]))

    def _strided(self, rank: int) -> nn.Module:
        return Subset()

    def _branch(self, rank: int) -> nn.Module:
        inner = nn.Sequential(self._same(rank), self._same(rank))
        return Branch(inner, self.random.choice(["add", "cat", "where"]))

    def _same(self, rank: int) -> nn.Module:
        """A layer that keeps the size."""
        kinds = [self._conv, self._pool, self._smooth, self._norm, self._gate, self._write]
        roll = Function("roll", lambda x: x.roll(1, -1))
        padded = CONVS[rank](
            CHANNELS, CHANNELS, 3, padding=1, padding_mode=self.random.choice(["circular", "replicate"])
        )
        return self.random.choice([*(kind(rank) for kind in kinds), roll, padded])

    def _down(self, rank: int) -> nn.Module:
        self.strides -= 1
        pad = self.random.choice([0, 1])
        return self.random.choice([CONVS[rank](CHANNELS, CHANNELS, 3, stride=2, padding=pad), AVG_POOLS[rank](2)])

    def _up(self, rank: int) -> nn.Module:
        self.strides -= 1
        if rank == 3:
            return nn.Upsample(scale_factor=2)
        return self.random.choice([
            nn.Upsample(scale_factor=2), ZeroInsertion(), TRANSPOSED[rank](CHANNELS, CHANNELS, 4, stride=2, padding=1),
            nn.Upsample(scale_factor=2, mode="linear" if rank == 1 else "bilinear"),
        ])  # fmt: skip
