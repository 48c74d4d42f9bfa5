"""Small calls of every operator that the library's table names, overload by overload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from widerf.operators import TABLE
from widerf.trace.tape import Call

Arguments = tuple[Any, ...]
Case = Callable[[int], Arguments]

# Overloads whose only tensors are masks or counts.
NO_IMAGE = {"where", "where.Scalar", "repeat_interleave.Tensor"}


def values(*shape: int, seed: int = 0) -> Tensor:
    """Distinct float64 values, none of them at a kink of any listed operator."""
    generator = torch.Generator().manual_seed(17 * len(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def image(n: int, rank: int = 2, channels: int = 4, seed: int = 0) -> Tensor:
    return values(1, channels, *(n,) * rank, seed=seed)


def mask(n: int) -> Tensor:
    return values(1, 1, n, n, seed=5) > 0


def index(*entries: int) -> Tensor:
    return torch.tensor(entries)


def _everywhere(n: int, entries: Tensor) -> Tensor:
    return entries.view(1, -1, 1, 1).expand(1, len(entries), n, n)


MOVES: dict[str, list[Case]] = {
    "permute": [lambda n: (image(n), [0, 2, 3, 1])],
    "transpose.int": [lambda n: (image(n), 2, 3)],
    "t": [lambda n: (values(3, n),)],
    "unsqueeze": [lambda n: (image(n), 2)],
    "squeeze": [lambda n: (image(n),)],
    "squeeze.dim": [lambda n: (image(n), 0)],
    "squeeze.dims": [lambda n: (image(n), [0])],
    "expand": [lambda n: (image(n, channels=1), [2, 3, n, n])],
    "slice.Tensor": [lambda n: (image(n), 2, 1, n, 1), lambda n: (image(n), 3, 0, n, 2)],
    "select.int": [lambda n: (image(n), 1, 2)],
    "split.Tensor": [lambda n: (image(n), 2, 1)],
    "split.sizes": [lambda n: (image(n), [1, 3], 1)],
    "split_with_sizes": [lambda n: (image(n), [1, 3], 1)],
    "unsafe_split.Tensor": [lambda n: (image(n), 3, 1)],
    "unsafe_split_with_sizes": [lambda n: (image(n), [1, 3], 1)],
    "unbind.int": [lambda n: (image(n), 1)],
    "take": [lambda n: (image(n), index(0, n, 2 * n + 1))],
    "index.Tensor": [lambda n: (image(n), [None, index(2, 0)]), lambda n: (image(n), [None, None, index(1, 1)])],
    "index_select": [lambda n: (image(n), 1, index(3, 1))],
    "gather": [lambda n: (image(n), 1, _everywhere(n, index(3, 1)))],
    "roll": [lambda n: (image(n), [1], [3])],
    "flip": [lambda n: (image(n), [1])],
    "repeat": [lambda n: (image(n), [1, 2, 1, 1])],
    "pixel_shuffle": [lambda n: (image(n), 2)],
    "pixel_unshuffle": [lambda n: (image(n), 2)],
    "channel_shuffle": [lambda n: (image(n), 2)],
    "native_channel_shuffle": [lambda n: (image(n), 2)],
    "unfold": [lambda n: (image(n), 3, 2, 2)],
    "diagonal": [lambda n: (image(n), 0, 2, 3)],
    "movedim.int": [lambda n: (image(n), 1, 3)],
    "movedim.intlist": [lambda n: (image(n), [1, 2], [3, 1])],
    "unflatten.int": [lambda n: (image(n), 1, [2, 2])],
    "tril": [lambda n: (image(n),)],
    "triu": [lambda n: (image(n), 1)],
    "rot90": [lambda n: (image(n), 1, [2, 3])],
    "repeat_interleave.self_int": [lambda n: (image(n), 2, 1)],
    "repeat_interleave.self_Tensor": [lambda n: (image(n), index(1, 2, 1, 3), 1)],
    "narrow": [lambda n: (image(n), 3, 1, n - 1)],
    "narrow.Tensor": [lambda n: (image(n), 3, torch.tensor(1), n - 1)],
    "chunk": [lambda n: (image(n), 2, 1)],
    "cat": [lambda n: ([image(n), image(n, seed=1)], 1)],
    "stack": [lambda n: ([image(n), image(n, seed=1)], 1)],
    "copy": [lambda n: (image(n), image(n, seed=1)), lambda n: (image(n), image(n, channels=1))],
    "slice_scatter": [lambda n: (image(n), image(n, channels=2), 1, 0, 4, 2)],
    "select_scatter": [lambda n: (image(n), image(n)[:, 0], 1, 2)],
    "index_put": [
        lambda n: (image(n), [None, index(2, 0)], image(n, channels=2)),
        lambda n: (image(n), [None, index(2, 2)], image(n, channels=2), True),
    ],
    "scatter.src": [lambda n: (image(n), 1, _everywhere(n, index(2, 0)), image(n, channels=2, seed=1))],
    "scatter.value": [lambda n: (image(n), 1, _everywhere(n, index(2, 0)), 0.5)],
    "index_copy": [lambda n: (image(n), 1, index(2, 0), image(n, channels=2, seed=1))],
    "index_fill.int_Scalar": [lambda n: (image(n), 1, index(2, 0), 0.5)],
    "index_fill.int_Tensor": [lambda n: (image(n), 1, index(2, 0), values())],
    "view": [lambda n: (image(n), [4, n * n])],
    "view.dtype": [lambda n: (image(n), torch.float64)],
    "_unsafe_view": [lambda n: (image(n), [4, n * n])],
    "reshape": [lambda n: (image(n), [4, n * n])],
    "_reshape_alias": [lambda n: (image(n), [4, n * n], [n * n, 1])],
    "clone": [lambda n: (image(n),)],
    "alias": [lambda n: (image(n),)],
    "detach": [lambda n: (image(n),)],
    "_to_copy": [lambda n: (image(n),)],
    "contiguous": [lambda n: (image(n).mT,)],
    "lift_fresh": [lambda n: (image(n),)],
    "as_strided": [
        lambda n: (image(n), [1, 4, n // 2, n // 2], [4 * n * n, n * n, n, 1]),
        lambda n: (image(n), [1, 4, n // 2, n // 2], [4 * n * n, n * n, n, 1], n + 1),
        lambda n: (image(n)[..., 1:], [1, 4, n // 2, n // 2], [4 * n * n, n * n, n, 1], n + 2),
    ],
    "topk": [lambda n: (image(n), 2, 1)],
    "sort": [lambda n: (image(n), 1)],
    "sort.stable": [lambda n: (image(n), {"stable": True, "dim": 1})],
    "constant_pad_nd": [lambda n: (image(n), [1, 2, 0, 1], 0.5), lambda n: (image(n), [-1, 2], 0.0)],
    "reflection_pad1d": [lambda n: (image(n, 1), [1, 2])],
    "reflection_pad2d": [lambda n: (image(n), [1, 2, 0, 1])],
    "reflection_pad3d": [lambda n: (image(n, 3, 1), [1, 0, 0, 1, 1, 1])],
    "replication_pad1d": [lambda n: (image(n, 1), [1, 2])],
    "replication_pad2d": [lambda n: (image(n), [1, 2, 0, 1])],
    "replication_pad3d": [lambda n: (image(n, 3, 1), [1, 0, 0, 1, 1, 1])],
    "im2col": [lambda n: (image(n), [3, 3], [1, 1], [1, 1], [2, 2])],
    **{
        f"{name}{form}": [case]
        for name in ("upsample_nearest", "_upsample_nearest_exact")
        for form, case in {
            "1d": lambda n: (image(n, 1), [2 * n]),
            "1d.vec": lambda n: (image(n, 1), None, [2.0]),
            "2d": lambda n: (image(n), [2 * n, 3 * n]),
            "2d.vec": lambda n: (image(n), [2 * n, n], None),
            "3d": lambda n: (image(n, 3, 1), [n, n, 2 * n]),
            "3d.vec": lambda n: (image(n, 3, 1), [n, n, 2 * n], None),
        }.items()
    },
}  # fmt: skip

POINTWISE: dict[str, list[Case]] = {
    "hardswish": [lambda n: (3 * image(n),)],
    "_prelu_kernel": [lambda n: (image(n), values(1, 4, 1, 1))],
    "masked_fill.Scalar": [lambda n: (image(n), mask(n), 0.5)],
    "masked_fill.Tensor": [lambda n: (image(n), mask(n), values())],
    "clamp": [lambda n: (image(n), -0.5, 0.5)],
    "clamp.Tensor": [lambda n: (image(n), values(4, 1, 1) - 1, values(4, 1, 1) + 1)],
    "clamp_min": [lambda n: (image(n), 0.1)],
    "clamp_min.Tensor": [lambda n: (image(n), values(4, 1, 1))],
    "clamp_max": [lambda n: (image(n), 0.1)],
    "clamp_max.Tensor": [lambda n: (image(n), values(4, 1, 1))],
    "hardtanh": [lambda n: (image(n),)],
    "elu": [lambda n: (image(n), 0.7)],
    "leaky_relu": [lambda n: (image(n), 0.2)],
    "celu": [lambda n: (image(n), 0.7)],
    "selu": [lambda n: (image(n),)],
    "hardsigmoid": [lambda n: (image(n),)],
    "mish": [lambda n: (image(n),)],
    "log_sigmoid_forward": [lambda n: (image(n),)],
    "where.self": [lambda n: (mask(n), image(n), image(n, seed=1)), lambda n: (mask(n), image(n), values())],
    "where.ScalarOther": [lambda n: (mask(n), image(n), 0.5)],
    "where.ScalarSelf": [lambda n: (mask(n), 0.5, image(n))],
    "max.other": [lambda n: (image(n), image(n, seed=1))],
    "min.other": [lambda n: (image(n), image(n, seed=1))],
}

CONVOLUTION: dict[str, list[Case]] = {
    "convolution": [
        lambda n: (image(n), values(6, 4, 3, 3), values(6), [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
        lambda n: (image(n), values(8, 2, 3, 2), None, [1], [1], [2], False, [0], 2),
        lambda n: (image(n), values(4, 6, 3, 3), values(6), [2, 2], [1, 1], [1, 1], True, [1, 1], 1),
        lambda n: (image(n, 1), values(4, 3, 4), None, [3], [0], [1], True, [0], 1),
    ]
}


def _with(case: Case, *more: Any) -> Case:
    return lambda n: (*case(n), *more)


# What TorchScript calls: with the switches of the libraries behind it, benchmark, deterministic, cuDNN, TF32.
CONVOLUTION |= {
    "_convolution": [_with(case, False, False, True, True) for case in CONVOLUTION["convolution"]],
    "_convolution.deprecated": [_with(case, False, False, True) for case in CONVOLUTION["convolution"]],
}

MATMUL: dict[str, list[Case]] = {
    "mm": [lambda n: (values(3, n), values(n, 2))],
    "bmm": [lambda n: (values(2, 3, n), values(2, n, 2))],
    "mv": [lambda n: (values(3, n), values(n))],
    "dot": [lambda n: (values(n), values(n, seed=1))],
    "addmm": [lambda n: (values(2), values(3, n), values(n, 2)), lambda n: (values(3, 2), values(3, n), values(n, 2))],
    "baddbmm": [lambda n: (values(2, 3, 2), values(2, 3, n), values(2, n, 2))],
}

RESAMPLING: dict[str, list[Case]] = {
    "max_pool1d_with_indices": [lambda n: (image(n, 1), [3], [2], [1], [1])],
    "max_pool2d_with_indices": [lambda n: (image(n), [3, 2], [2, 1], [1, 1], [1, 1])],
    "max_pool3d_with_indices": [lambda n: (image(n, 3, 1), [2, 2, 2], [2, 1, 2])],
    "max_pool2d": [lambda n: (image(n), [3, 3], [2, 2], [1, 1])],
    "avg_pool1d": [lambda n: (image(n, 1), [3], [2], [1])],
    "avg_pool2d": [lambda n: (image(n), [3, 3], [2, 2]), lambda n: (image(n), [3], [1], [1], False, False)],
    "avg_pool3d": [lambda n: (image(n, 3, 1), [2, 2, 2], [2, 1, 2])],
    "_adaptive_avg_pool2d": [lambda n: (image(n), [n // 2, 3 * n // 4])],
    "_adaptive_avg_pool3d": [lambda n: (image(n, 3, 1), [n // 2, 3 * n // 4, n])],
    "adaptive_avg_pool1d": [lambda n: (image(n, 1), [3 * n // 4])],
    "adaptive_avg_pool2d": [lambda n: (image(n), [n // 2, 3 * n // 4])],
    "adaptive_max_pool2d": [lambda n: (image(n), [n // 2, 3 * n // 4])],
    "adaptive_max_pool3d": [lambda n: (image(n, 3, 1), [n // 2, 3 * n // 4, n])],
    "upsample_linear1d": [lambda n: (image(n, 1), [2 * n], False)],
    "upsample_linear1d.vec": [lambda n: (image(n, 1), [2 * n], False, None)],
    "upsample_bilinear2d": [lambda n: (image(n), [2 * n, n], False), lambda n: (image(n), [2 * n, n // 2], True)],
    "upsample_bilinear2d.vec": [lambda n: (image(n), None, False, [2.0, 1.5])],
    "upsample_trilinear3d": [lambda n: (image(n, 3, 1), [2 * n, n, n // 2], False)],
    "upsample_trilinear3d.vec": [lambda n: (image(n, 3, 1), [2 * n, n, n // 2], False, None)],
    **{
        name: [lambda n: (image(n), [2 * n, n // 2], False)]
        for name in ("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
    },
    **{
        f"{name}.vec": [lambda n: (image(n), [2 * n, n // 2], False, None)]
        for name in ("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
    },
}


def _over(*more: Any) -> list[Case]:
    return [lambda n: (image(n), [1], *more), lambda n: (image(n), [2, 3], *more)]


def _over_one(*more: Any) -> list[Case]:
    return [lambda n: (image(n), 1, *more), lambda n: (image(n), -1, *more)]


def _whole(*more: Any) -> list[Case]:
    return [lambda n: (image(n), *more)]


REDUCTION: dict[str, list[Case]] = {
    "mean": _whole(),
    "mean.dim": [*_over(), *_over(True)],
    "sum": _whole(),
    "sum.dim_IntList": [*_over(), *_over(True), lambda n: (image(n), [])],
    "amax": [*_over(), *_over(True), *_whole()],
    "amin": [*_over(), *_over(True), *_whole()],
    "max": _whole(),
    "max.dim": _over_one(),
    "min": _whole(),
    "min.dim": _over_one(True),
    **{name: _whole() for name in ("var", "std", "var_mean", "std_mean")},
    **{f"{name}.dim": _over() for name in ("var", "std", "var_mean", "std_mean")},
    **{f"{name}.correction": _over() for name in ("var", "std", "var_mean", "std_mean")},
    "logsumexp": [*_over(), *_over(True)],
    "linalg_vector_norm": [lambda n: (image(n), 2, [1]), lambda n: (image(n), 3, [2, 3], True), *_whole()],
    "norm.Scalar": _whole(),
    "norm.ScalarOpt_dim": [lambda n: (image(n), 2, [1]), lambda n: (image(n), 3, [2, 3], True)],
    "norm.ScalarOpt_dtype": [lambda n: (image(n), 2, {"dtype": torch.float64})],
    "norm.ScalarOpt_dim_dtype": [lambda n: (image(n), 2, [1], True, {"dtype": torch.float64})],
    "prod": _whole(),
    "prod.dim_int": _over_one(),
    "col2im": [lambda n: (values(1, 9, (n // 2) ** 2), [n, n], [3, 3], [1, 1], [1, 1], [2, 2])],
}

STATISTICS = (lambda: values(4), lambda: values(4).exp())


def _batch_norm(training: bool, *more: Any) -> list[Case]:
    return [lambda n: (image(n), values(4), values(4), values(4), values(4).exp(), training, *more)]


NORMALISATION: dict[str, list[Case]] = {
    "native_batch_norm": [
        *_batch_norm(True, 0.1, 1e-5), *_batch_norm(False, 0.1, 1e-5),
        lambda n: (image(n), None, None, None, None, True, 0.1, 1e-5),
    ],
    "_native_batch_norm_legit": [*_batch_norm(True, 0.1, 1e-5), *_batch_norm(False, 0.1, 1e-5)],
    "_native_batch_norm_legit.no_stats": [lambda n: (image(n), values(4), values(4), True, 0.1, 1e-5)],
    "_native_batch_norm_legit_no_training": [
        lambda n: (image(n), values(4), values(4), values(4), values(4).exp(), 0.1, 1e-5)
    ],
    "_batch_norm_with_update": [lambda n: (image(n), values(4), values(4), values(4), values(4).exp(), 0.1, 1e-5)],
    "cudnn_batch_norm": [*_batch_norm(True, 0.1, 1e-5), *_batch_norm(False, 0.1, 1e-5)],
    "miopen_batch_norm": [*_batch_norm(True, 0.1, 1e-5), *_batch_norm(False, 0.1, 1e-5)],
    "native_group_norm": [lambda n: (image(n), values(4), values(4), 1, 4, n * n, 2, 1e-5)],
    "native_layer_norm": [
        lambda n: (values(2, 3, 5), [5], values(5), values(5), 1e-5),
        lambda n: (values(2, 3, 5), [3, 5], None, None, 1e-5),
    ],
    "_fused_rms_norm": [
        lambda n: (values(2, 3, 5), [5], values(5), 1e-5),
        lambda n: (values(2, 3, 5), [5], None, None),
    ],
    "_softmax": [lambda n: (image(n), 1, False), lambda n: (image(n), -1, False)],
    "_safe_softmax": [lambda n: (image(n), 1)],
    "native_dropout": [lambda n: (image(n), 0.3, False)],
}  # fmt: skip

CASES = {**MOVES, **POINTWISE, **CONVOLUTION, **MATMUL, **RESAMPLING, **REDUCTION, **NORMALISATION}

# What runs on another device only: its Jacobian is taken from the operator of the same meaning.
STAND_INS: dict[str, Callable[..., Any]] = {
    "cudnn_batch_norm": torch.ops.aten.native_batch_norm,
    "miopen_batch_norm": torch.ops.aten.native_batch_norm,
}
# Products in one type that are given out in another exist on CUDA only.
CUDA_ONLY = {"mm.dtype", "bmm.dtype", "addmm.dtype", "baddbmm.dtype"}


def overloads() -> list[str]:
    """Every overload of every listed operator that can take a tensor which depends on an image."""
    found = []
    for name in TABLE:
        packet = getattr(torch.ops.aten, name.split(".")[0], None)
        for overload in packet.overloads() if packet is not None else []:
            op = getattr(packet, overload)
            writes = any(a.alias_info is not None and a.alias_info.is_write and a.is_out for a in op._schema.arguments)
            full = name if "." in name else f"{name}.{overload}"
            if "." in name and overload != name.split(".")[1]:
                continue
            # TorchScript's overloads for plain numbers, strings and dictionaries have no kernel.
            script = not torch._C._dispatch_has_kernel(f"aten::{full}".removesuffix(".default"))
            # Named axes: torch 2.11 has these overloads still, later versions have none.
            dimnames = "names" in overload or "dimname" in overload.lower()
            if not writes and not script and not dimnames and full not in found:
                found.append(full)
    return [short for name in found if (short := name.removesuffix(".default")) not in NO_IMAGE]


def call_of(name: str, arguments: Arguments, position: int) -> tuple[Call, Tensor]:
    """The recorded call in which the leaf at one position depends on the input, and that leaf."""
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    leaves, spec = _flattened(arguments)
    tensor = leaves[position]
    leaves[position] = None
    count = len(op._schema.returns)
    return Call(op, tuple(leaves), spec, {position: 0}, tuple(range(1, count + 1)), "module"), tensor


def _flattened(arguments: Arguments) -> tuple[list[Any], Any]:
    keywords = arguments[-1] if arguments and isinstance(arguments[-1], dict) else {}
    positional = arguments[:-1] if keywords else arguments
    return pytree.tree_flatten((positional, keywords))


def tracked(name: str, arguments: Arguments) -> Iterator[int]:
    """Positions of the leaves that may depend on an image: not running statistics."""
    leaves, _ = _flattened(arguments)
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not ("batch_norm" in name and position > 0):
            yield position
