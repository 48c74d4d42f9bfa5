"""Which convolutions of a model: all of them, and those that a user names."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from widerf._checks import require
from widerf.convolutions.convolution import Convolution
from widerf.geometry import ntuple

Selector: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]] | None


@functools.lru_cache(maxsize=1024)
def _is_convolution(kind: type[nn.Module]) -> bool:
    """Return whether a class is a convolution: torch's, its subclasses, or timm's mixture of experts."""
    return issubclass(kind, _ConvNd) or any(cls.__name__ == "CondConv2d" for cls in kind.__mro__)


def _convolution(name: str, module: Any) -> Convolution:
    rank = len(module.kernel_size)
    offsets = getattr(module, "offsets", None)
    return Convolution(
        name,
        module,
        kernel_size=tuple(module.kernel_size),
        stride=ntuple(module.stride, rank, "stride"),
        dilation=ntuple(module.dilation, rank, "dilation"),
        transposed=isinstance(module, _ConvTransposeNd),
        offsets=offsets if isinstance(offsets, Tensor) and not offsets.is_floating_point() else None,
    )


def find_convolutions(model: nn.Module) -> list[Convolution]:
    """Return every convolution of ``model`` in the order of its modules, each module once."""
    require(isinstance(model, nn.Module), "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    kernels = []
    for name, module in model.named_modules():
        kind: Any = type(module)
        if _is_convolution(kind):
            kernels.append(_convolution(name, module))
    return kernels


def select(kernels: Sequence[Convolution], model: nn.Module, selector: Selector, argument: str) -> set[str]:
    """Return the names of the kernels that ``selector`` picks.

    A string is a shell-style pattern for the layer's name or for that of a module around it (``"layer4"`` picks all
    in it); a class picks its instances and what is inside them.

    Raises:
        TypeError: if an entry is neither a string nor a module class.
        ValueError: if an entry picks no convolution: a misspelt name would else pass in silence.
    """
    entries: list[Any] = list(selector) if isinstance(selector, (list, tuple, set, frozenset)) else [selector]
    modules = dict(model.named_modules())
    picked: set[str] = set()
    for entry in entries:
        right = isinstance(entry, str) or (isinstance(entry, type) and issubclass(entry, nn.Module))
        require(right, argument, "hold name patterns or module classes", entry, TypeError)
        found = {kernel.name for kernel in kernels if _matches(kernel.name, entry, modules)}
        require(bool(found), argument, "match a convolution of the model in every entry", entry)
        picked |= found
    return picked


def _matches(name: str, entry: str | type[nn.Module], modules: dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)] if name else [""]
    if isinstance(entry, str):
        return any(fnmatch.fnmatchcase(path, entry) for path in around)
    return any(isinstance(modules[path], entry) for path in around)
