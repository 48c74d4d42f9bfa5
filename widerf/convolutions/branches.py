"""Branches of a model that are silent at initialisation, and blocks that fuse their branches into one kernel."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from widerf.convolutions.convolution import Kernel

_SILENT = 1e-3  # a branch scaled by less moves nothing at initialisation
_SCALE = re.compile(r"gamma|layer_?scale|res_?scale|skip_?init|^ls\d?$|scale_?\d?$", re.IGNORECASE)
_FUSES = ("reparameterize", "fuse", "switch_to_deploy", "reparametrize")
_BRANCHES = ("identity", "rbr_identity", "skip")


def silent_branches(model: nn.Module) -> dict[str, float]:
    """Return the scales that silence a branch: name of norm or layer scale → its largest entry.

    In docs/theory.md (6) such a branch has a = 0, and nothing done to its kernels shows. A normalisation whose scale is
    0 ends a residual branch that ``zero_init_last`` silences; layer scales of 1e-6 are found by the name of their
    parameter.
    """
    found = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            norm = key == "weight" and "norm" in type(module).__name__.lower()
            if parameter is None or not (norm or _SCALE.search(key)) or not _readable(parameter):
                continue
            largest = float(parameter.detach().abs().max())
            if largest <= _SILENT:
                found[f"{name}.{key}".lstrip(".")] = largest
    return found


def _readable(parameter: Tensor) -> bool:
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    return not lazy and not parameter.is_meta and parameter.numel() > 0 and parameter.is_floating_point()


def undone(model: nn.Module, kernels: Sequence[Kernel]) -> dict[str, str]:
    """Return the kernels that share a re-parametrised block with narrower branches, and what undoes the widening.

    RepVGG, MobileOne and their kin add a k×k, a 1×1 and an identity branch and fuse them afterwards: the narrow ones
    put their energy on the centre tap. Such a block is known by its method that fuses, and by a sibling of equal
    channels.
    """
    convolutions = {kernel.name: kernel for kernel in kernels}
    notes: dict[str, str] = {}
    for name, block in model.named_modules():
        if not name or not any(hasattr(type(block), method) for method in _FUSES):
            continue
        inside = [kernel for path, kernel in convolutions.items() if path.startswith(f"{name}.")]
        identity = [key for key in _BRANCHES if isinstance(getattr(block, key, None), nn.Module)]
        for kernel in inside if len(inside) <= 12 else []:
            narrow = [other for other in inside if _narrower(other, kernel)]
            if kernel.nothing_to_gain() is None and (narrow or (identity and len(inside) == 1)):
                parts = sorted({"×".join(map(str, other.kernel_size)) for other in narrow}) + identity[:1]
                branches = " and ".join(parts) + (" branches" if len(parts) > 1 else " branch")
                notes.setdefault(kernel.name, f"undone in part: the {branches} of its block add to its centre")
    return notes


def _narrower(other: Kernel, kernel: Kernel) -> bool:
    same = all(
        getattr(other.module, key, None) == getattr(kernel.module, key, None) for key in ("in_channels", "out_channels")
    )
    if other.rank != kernel.rank or not same:
        return False
    smaller = all(a <= b for a, b in zip(other.kernel_size, kernel.kernel_size, strict=True))
    return smaller and other.kernel_size != kernel.kernel_size and other.stride == kernel.stride
