"""Slow, obvious twins of what the library does, used as oracles."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> list[Any]:
    """All that a model and the world's random states hold, as plain values that compare bit by bit."""

    def bits(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        raw = tensor.detach().contiguous().cpu()
        return (id(tensor), str(raw.dtype), tuple(raw.shape), raw.reshape(-1).view(torch.uint8).numpy().tobytes())

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
