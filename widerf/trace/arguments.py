"""Checks of what callers give (sizes, units, weights), and the input of a probing pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widerf._checks import require

PROBES = 2  # images in the probing pass: more than one, so that the batch axis shows


def check_input_size(input_size: Sequence[int]) -> tuple[int, ...]:
    """Return ``input_size`` as a tuple after checking that it is (channels, *spatial) of rank 1 to 3."""
    require(isinstance(input_size, Sequence), "input_size", "be (channels, *spatial)", input_size, TypeError)
    sizes = tuple(input_size)
    rule = "be (channels, *spatial): 2 to 4 positive integers"
    require(all(isinstance(n, int) and not isinstance(n, bool) for n in sizes), "input_size", rule, sizes, TypeError)
    require(2 <= len(sizes) <= 4 and min(sizes) > 0, "input_size", rule, sizes)
    return sizes


def check_unit(unit: Sequence[int] | int | None, spatial_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index of a unit on a map after checking it; by default the centre unit, ``n // 2`` on each axis.

    Negative indices count from the end. On a map with one axis an integer will do.

    Raises:
        TypeError: if an entry is not an integer.
        ValueError: if the unit lies outside the map or has the wrong number of axes.

    Example:
        >>> check_unit(None, (7, 7)), check_unit((0, -1), (7, 7))
        ((3, 3), (0, 6))
    """
    if unit is None:
        return tuple(n // 2 for n in spatial_shape)
    index = (unit,) if isinstance(unit, int) else tuple(unit)
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in index)
    require(whole, "unit", "hold integers only", unit, TypeError)
    inside = len(index) == len(spatial_shape) and all(-n <= i < n for i, n in zip(index, spatial_shape, strict=True))
    require(inside, "unit", f"lie on the map of shape {tuple(spatial_shape)}", unit)
    return tuple(i % n for i, n in zip(index, spatial_shape, strict=True))


def is_finite(model: nn.Module) -> bool:
    """Whether :func:`check_finite` accepts a model."""
    try:
        check_finite(model)
    except ValueError:
        return False
    return True


def check_finite(model: nn.Module) -> None:
    """Raise ``ValueError`` that names the first parameter or buffer that is not finite, or cannot be differentiated."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        ordinary = "hold ordinary tensors, not such as were made under torch.inference_mode (a deep copy outside is)"
        require(not tensor.is_inference(), "model", ordinary, repr(name))
        require(not tensor.is_meta, "model", "hold values in every tensor", f"{name!r} on the meta device")
        if not tensor.is_floating_point() or bool(tensor.detach().sum().isfinite()):  # one look is enough
            continue
        # Masks of -inf are lawful buffers (Swin's shifted windows); NaN nowhere is.
        bad = bool(tensor.isnan().any() if not isinstance(tensor, nn.Parameter) else (~tensor.isfinite()).any())
        require(not bad, "model", "hold finite weights", f"NaN or infinity in {name!r}")


def probe_input(model: nn.Module, input_size: Sequence[int], batch: int = PROBES) -> Tensor:
    """Zeros of shape ``(batch, *input_size)`` on the device and in the floating type of the model's first parameter."""
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    options: dict[str, Any] = {"device": tensors[0].device, "dtype": tensors[0].dtype} if tensors else {}
    return torch.zeros((batch, *input_size), **options)
