"""Slow, obvious twins of what the library does, used as oracles."""

from __future__ import annotations

import hashlib
import itertools
import random
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor, nn

from widerf.trace.tape import Tape


def fingerprint(model: nn.Module) -> list[Any]:
    """All that a model and the world's random states hold, as plain values that compare bit by bit."""

    def bits(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        raw = tensor.detach().contiguous().cpu()
        return (
            id(tensor),
            str(raw.dtype),
            tuple(raw.shape),
            hashlib.blake2b(raw.reshape(-1).view(torch.uint8).numpy()).hexdigest(),
        )

    state: list[Any] = []
    for name, module in model.named_modules():
        for key, value in sorted(vars(module).items()):
            if isinstance(value, dict) and key.startswith("_"):
                plain = {str(k): bits(v) if isinstance(v, Tensor | None) else id(v) for k, v in value.items()}
                state.append((name, key, plain))
            elif isinstance(value, Tensor):
                state.append((name, key, bits(value)))
            else:
                state.append((name, key, repr(value)))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state.append((name, parameter.requires_grad, bits(parameter), bits(parameter.grad)))
    numpy_state = np.random.get_state()  # noqa: NPY002
    state += [bits(torch.get_rng_state())[1:], repr(random.getstate()), repr(numpy_state), numpy_state[1].tobytes()]
    return state


def energy(model: nn.Module, images: Tensor, unit: tuple[int, ...]) -> Tensor:
    """Σ over images, input channels and output channels of (∂y/∂x)², one backward pass for each of them."""
    total = torch.zeros(images.shape[2:], dtype=torch.float64)
    for image in images:
        x = image[None].clone().requires_grad_()
        for y in model(x)[(0, slice(None), *unit)]:
            total += torch.autograd.grad(y, x, retain_graph=True)[0][0].double().square().sum(0)
    return total


def uniform_stack(layers: int, rank: int = 2) -> Tensor:
    """Energy map of a stack of 3-tap layers with equal shares: repeated convolution with the box, axis by axis."""
    line = np.ones(1)
    for _ in range(layers):
        line = np.convolve(line, np.ones(3) / 3)
    grid = line
    for _ in range(rank - 1):
        grid = np.multiply.outer(grid, line)
    return torch.from_numpy(grid)


def gibbs_axis(taps: int, strength: float) -> np.ndarray:
    """Soft corners of one axis by their closed form v ∝ exp(β m²), with β found by bisection on the variance."""
    squares = (np.arange(taps) - (taps - 1) / 2) ** 2
    wanted = (1 - strength) * squares.mean() + strength * squares.max()

    def law(beta: float) -> np.ndarray:
        weight = np.exp(beta * (squares - squares.max()))
        return weight / weight.sum()

    return law(optimize.brentq(lambda beta: law(beta) @ squares - wanted, -1e-6, 60.0, xtol=1e-14, rtol=1e-15))


def gibbs_corners(kernel_size: tuple[int, ...], strength: float) -> np.ndarray:
    """Soft corners in any rank: the outer product of its axes."""
    profile = np.ones(())
    for taps in kernel_size:
        profile = np.multiply.outer(profile, gibbs_axis(taps, strength))
    return profile


def gibbs_network(sizes: list[tuple[int, ...]], weights: list[float], gain: float) -> list[np.ndarray]:
    """The network's profiles by their closed form, one multiplier λ for all: v_l ∝ exp(λ w_l |m|²/D)."""

    def squares(size: tuple[int, ...]) -> np.ndarray:
        axes = np.meshgrid(*[(np.arange(k) - (k - 1) / 2) ** 2 for k in size], indexing="ij")
        return sum(axes) / len(size)

    def laws(multiplier: float) -> list[np.ndarray]:
        exponents = [multiplier * w * squares(size) for size, w in zip(sizes, weights, strict=True)]
        powers = [np.exp(e - e.max()) for e in exponents]
        return [p / p.sum() for p in powers]

    def variance(profiles: list[np.ndarray]) -> float:
        return sum(w * float((p * squares(s)).sum()) for p, s, w in zip(profiles, sizes, weights, strict=True))

    wanted = gain**2 * variance(laws(0.0))
    top = 60.0 / min(w for w in weights if w > 0)
    return laws(optimize.brentq(lambda m: variance(laws(m)) - wanted, 0.0, top, xtol=1e-15, rtol=1e-15, maxiter=500))


def divergence(profile: Tensor) -> float:
    """KL(profile ‖ uniform) in nats."""
    v = profile.double().flatten()
    return float(torch.special.xlogy(v, v * v.numel()).sum())


def continued(x: Tensor, margin: int, mode: str) -> Tensor:
    """Spatial axes of (batch, channels, *spatial) continued by ``margin`` on each side, index by index."""

    def index(i: int, n: int) -> int | None:
        if mode == "zeros":
            return i if 0 <= i < n else None
        if mode == "replicate":
            return min(max(i, 0), n - 1)
        if mode == "circular":
            return i % n
        while not 0 <= i < n:  # reflect at the border pixels as often as it takes
            i = -i if i < 0 else 2 * (n - 1) - i
            if n == 1:
                i = 0
        return i

    for axis in range(2, x.dim()):
        n = x.shape[axis]
        rows = [index(i, n) for i in range(-margin, n + margin)]
        parts = [x.narrow(axis, r, 1) if r is not None else torch.zeros_like(x.narrow(axis, 0, 1)) for r in rows]
        x = torch.cat(parts, axis)
    return x


def scattered_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """The framework's dense convolution with the kernel in which each weight lies in the cell of its tap."""
    rank = weight.dim() - 2
    batched = x if x.dim() == rank + 2 else x[None]
    k = weight.shape[2:]

    def axes(value: Any) -> tuple[int, ...]:
        return (value,) * rank if isinstance(value, int) else tuple(value)

    s, d = axes(stride), axes(dilation)
    low = [0] * rank
    high = [0] * rank
    if padding == "same":
        low = [d[i] * (k[i] - 1) // 2 for i in range(rank)]
        high = [d[i] * (k[i] - 1) - low[i] for i in range(rank)]
    elif padding != "valid":
        low = high = list(axes(padding))
    r = int(offsets.abs().max()) + max(k)
    dense = weight.new_zeros(*weight.shape[:2], *[2 * r + 1] * rank)
    per_group = weight.shape[1]
    for o in range(weight.shape[0]):
        for c in range(per_group):
            channel = o // (weight.shape[0] // groups) * per_group + c
            row = offsets[channel * len(offsets) // (per_group * groups)]
            for t, tap in enumerate(row.tolist()):
                dense[(o, c, *[r + a for a in tap])] = weight[o, c].flatten()[t]
    margin = (r + max(k)) * max(d) + max(low)
    wide = continued(batched, margin, padding_mode)
    for i in range(rank):
        start = margin - low[i] + d[i] * ((k[i] - 1) // 2 - r)
        wide = wide.narrow(2 + i, start, wide.shape[2 + i] - start)
    convolution = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[rank - 1]
    y = convolution(wide, dense, bias, s, 0, d, groups)
    for i in range(rank):
        n = (batched.shape[2 + i] + low[i] + high[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1
        y = y.narrow(2 + i, 0, n)
    return y if x.dim() == rank + 2 else y[0]


def minkowski_sum(list_of_offsets: list[Tensor]) -> set[tuple[int, ...]]:
    """The cells that a stack of tap patterns reaches, by adding up all choices of taps."""
    cells: set[tuple[int, ...]] = {(0,) * list_of_offsets[0].shape[-1]}
    for offsets in list_of_offsets:
        taps = {tuple(tap) for tap in offsets.flatten(0, 1).tolist()}
        cells = {tuple(a + b for a, b in zip(c, t, strict=True)) for c in cells for t in taps}
    return cells


def shares(weight: Tensor, rank: int = 2) -> Tensor:
    """Share of a weight's energy that each tap has."""
    energy = weight.detach().double().square().sum(dim=tuple(range(weight.ndim - rank)))
    return energy / energy.sum()


def stack(layers: int, width: int = 8, kernel_size: int = 3, rank: int = 2) -> nn.Sequential:
    """Convolutions with ReLU, on images of three channels."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    convs = [kind(width if i else 3, width, kernel_size, padding=kernel_size // 2, bias=False) for i in range(layers)]
    return nn.Sequential(*itertools.chain.from_iterable((conv, nn.ReLU()) for conv in convs))


def replayed(tape: Tape, image: Tensor) -> Tensor:
    """The map, made by running the recorded operators one after another."""
    values = {0: image}
    for step in tape.needed():
        outputs = step.run({position: values[value] for position, value in step.inputs.items()})
        values.update({value: out for value, out in zip(step.outputs, outputs, strict=True) if value is not None})
    return values[tape.target]
