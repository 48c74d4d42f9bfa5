r"""Soft corners that last: the profile as a parametrisation of the weight.

The layer convolves with w = s·v, where s_m = √(n·v_m) of soft corners is a buffer, one factor for each tap m, of mean
square 1, and v is what is trained. With learning rate η, :math:`v_m \leftarrow v_m - \eta\,\partial L/\partial v_m`
and :math:`\partial L/\partial v_m = s_m\,\partial L/\partial w_m` give

.. math:: w_m \leftarrow w_m - \eta\, s_m^2\, \frac{\partial L}{\partial w_m},

the effective learning rate of tap m is η s_m² (docs/theory.md (9a)): outer taps learn faster, inner ones more slowly.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from widerf.convolutions.convolution import Convolution


class LastingProfile(nn.Module):
    """The parametrisation w = s·v of :func:`torch.nn.utils.parametrize.register_parametrization`.

    Attributes:
        scale: s, in a shape that goes with the weight's; saved in the state dict.

    Example:
        >>> profile = LastingProfile(torch.tensor([1.25, 0.5, 1.25]))
        >>> profile(profile.right_inverse(torch.ones(2, 1, 3)))[0].tolist()
        [[1.0, 1.0, 1.0]]
    """

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, v: Tensor) -> Tensor:
        """Return the weight w that the layer convolves with."""
        return v * self.scale

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return v, so that ``layer.weight = w`` does what it says."""
        return w / self.scale


def profile_of(module: nn.Module) -> LastingProfile | None:
    """Return the lasting profile of a layer's weight, None if there is none or something else computes it, too."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    chain: Any = module.parametrizations["weight"]  # type: ignore[index]
    return chain[0] if len(chain) == 1 and isinstance(chain[0], LastingProfile) else None


def _scale_of(kernel: Convolution, weight: Tensor, shape: Tensor) -> Tensor:
    """Return s for relative energies ``shape``, laid out as :meth:`Convolution.target_energies`, as small as it goes.

    Taps off a grid differ between input channels, and their rows between groups of connections.
    """
    if kernel.offsets is None:
        return shape.sqrt().to(weight).reshape((1, 1, *kernel.kernel_size))
    module: Any = kernel.module
    whole = kernel.scale_(torch.ones_like(weight, memory_format=torch.contiguous_format), shape.sqrt())
    return whole[:1].clone() if module.groups == 1 else whole


@torch.no_grad()
def make_last(kernel: Convolution, shape: Tensor) -> None:
    """Make the profile ``shape`` (relative energies, mean 1) of a plain or lasting weight last; the weight stays."""
    module: Any = kernel.module
    weight = module.weight.detach()
    profile, scale = profile_of(module), _scale_of(kernel, weight, shape)
    if profile is None:
        parametrize.register_parametrization(module, "weight", LastingProfile(scale))
        if "__deepcopy__" in vars(type(module)):
            type(module).__deepcopy__ = _copy_with_class
    elif not torch.equal(profile.scale, scale):
        original = module.parametrizations.weight.original
        profile.scale = scale
        original.copy_(weight / scale)


def settle(module: nn.Module) -> None:
    """Make the weight of a layer with a lasting profile a plain parameter again, the same object, of the same value."""
    if profile_of(module) is not None:
        parametrize.remove_parametrizations(module, "weight")


def _copy_with_class(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Deep copy of a parametrised layer, with a class of its own.

    torch lets a copy share the class that it made for the layer; to remove the parametrisation of either then takes
    the weight from both.
    """
    if id(module) in memo:
        return memo[id(module)]  # type: ignore[no-any-return]
    shared = type(module)
    (base,) = shared.__bases__
    namespace = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    replica: Any = type(shared.__name__, (base,), namespace)
    replica = memo[id(module)] = replica.__new__(replica)
    state = base.__getstate__(module) if hasattr(base, "__getstate__") else vars(module)
    replica.__setstate__(copy.deepcopy(state, memo))
    return replica  # type: ignore[no-any-return]
