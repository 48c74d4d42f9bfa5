"""Branches of a model that are silent at initialisation, and blocks that fuse their branches into one kernel."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widerf.convolutions.convolution import Convolution
from widerf.trace.certain import held
from widerf.trace.sandbox import untouched

_SILENT = 1e-3  # a branch scaled by less moves nothing at initialisation
_SCALE = re.compile(r"gamma|layer_?scale|res_?scale|skip_?init|^ls\d?$|scale_?\d?$", re.IGNORECASE)
_TELLS = "get_equivalent_kernel_bias"  # it tells the fused kernel and leaves the block as it is
# Methods that make one plain convolution of a block's branches and norms, from the weights alone.
FUSING = (
    "fuse",
    "fuse_model",
    "reparameterize",
    "reparametrize",
    "switch_to_deploy",
    "convert_to_deploy",
    _TELLS,
)
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


def fusing_methods(block: nn.Module) -> list[str]:
    """Return which methods of `FUSING` the class of ``block`` has; a submodule of that name is none.

    Example:
        >>> class Block(nn.Module):
        ...     def fuse(self): ...
        >>> fusing_methods(Block()), fusing_methods(nn.Conv2d(1, 1, 1))
        (['fuse'], [])
    """
    return [method for method in FUSING if callable(getattr(type(block), method, None))]


def rebuilt(model: nn.Module, kernels: Sequence[Convolution]) -> dict[str, str]:
    """Return the kernels that a block around them can still rebuild as plain convolutions, and by what.

    A method that exists need not have anything left to do: it is called on a copy of its block, and a kernel counts
    as rebuilt if it is not there afterwards. If the method fails there, all in the block count. Blocks are sought in
    ``model`` and among the modules that hold it.

    Returns:
        kernel name → "Class.method()" of the nearest such block, with a word on where it is if it lies above ``model``.
    """
    wanted = {id(kernel.module): kernel.name for kernel in kernels}
    found: dict[str, str] = {}
    for block, where in [
        *((b, ", above what is converted,") for b in _above(model)),
        *((b, "") for b in model.modules()),
    ]:
        methods = fusing_methods(block)
        for method in methods:
            if method == _TELLS and len(methods) > 1:
                continue  # the others can be tried
            paths = {path: wanted[id(m)] for path, m in block.named_modules() if id(m) in wanted and path}
            lost = paths.keys() - _survivors(block, method, list(paths)) if paths else ()
            found |= {paths[path]: f"{type(block).__name__}.{method}(){where}" for path in lost}
    return found


def _above(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold ``model``, outermost last found first: a module does not know its holders."""
    objects = gc.get_objects()  # millions: looked through without a loop of Python's
    kinds = list(map(type, objects))
    types = dict(zip(map(id, kinds), kinds, strict=True))
    found = itertools.compress(types, map(issubclass, types.values(), itertools.repeat(nn.Module)))
    every = itertools.compress(objects, map(set(found).__contains__, map(id, kinds)))
    everything = [module for module in every if vars(module).get("_modules")]
    above: list[nn.Module] = []
    inner = {id(model)}
    while inner:
        known = {id(m) for m in above} | {id(model)}
        layer = [m for m in everything if id(m) not in known and any(id(c) in inner for c in m._modules.values())]
        above, inner = [*layer, *above], {id(m) for m in layer}
    return above


def _survivors(block: nn.Module, method: str, paths: Sequence[str]) -> set[str]:
    """Return which submodules are still there after ``method`` was called on a copy of ``block``; none if it fails."""
    if method == _TELLS:
        return set(paths) if len(paths) == 1 else set()
    try:
        with held(untouched(block), torch.no_grad(), _quiet()):
            twin = copy.deepcopy(block)
            places = {path: twin.get_submodule(path) for path in paths}
            result: Any = getattr(twin, method)()
    except Exception:  # whatever another author's method may raise
        return set()
    left = {id(m) for m in (result if isinstance(result, nn.Module) else twin).modules()}
    return {path for path, module in places.items() if id(module) in left}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with held(warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO())):
        warnings.simplefilter("ignore")
        yield


def undone(model: nn.Module, kernels: Sequence[Convolution]) -> dict[str, str]:
    """Return the kernels that share a re-parametrised block with narrower branches, and what undoes the widening.

    RepVGG, MobileOne and their kin add a k×k, a 1×1 and an identity branch and fuse them afterwards: the narrow ones
    put their energy on the centre tap. Such a block is known by its method that fuses, and by a sibling of equal
    channels.
    """
    convolutions = {kernel.name: kernel for kernel in kernels}
    notes: dict[str, str] = {}
    for name, block in model.named_modules():
        if not name or not fusing_methods(block):
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


def _narrower(other: Convolution, kernel: Convolution) -> bool:
    same = all(
        getattr(other.module, key, None) == getattr(kernel.module, key, None) for key in ("in_channels", "out_channels")
    )
    if other.rank != kernel.rank or not same:
        return False
    smaller = all(a <= b for a, b in zip(other.kernel_size, kernel.kernel_size, strict=True))
    return smaller and other.kernel_size != kernel.kernel_size and other.stride == kernel.stride
