"""The kinds of aten operators: what the readings of a recording, by coordinates and by energies, need to know of each.

An operator that is in no list here has no kind, and both readings refuse it by name: nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal[
    "pointwise", "moves", "convolution", "matmul", "pooling", "resampling", "reduction", "normalisation", "softmax",
    "dropout",
]  # fmt: skip

_LISTS: dict[Kind, str] = {
    # Outputs are copies of inputs: each output element reads one input element, or a constant.
    "moves": (
        "view _unsafe_view reshape _reshape_alias permute transpose t unsqueeze squeeze expand slice select "
        "split split_with_sizes unsafe_split unsafe_split_with_sizes unbind cat stack constant_pad_nd clone "
        "alias detach _to_copy as_strided take index index_select gather roll flip repeat pixel_shuffle "
        "pixel_unshuffle channel_shuffle native_channel_shuffle unfold reflection_pad1d reflection_pad2d "
        "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d contiguous lift_fresh "
        "diagonal movedim copy topk sort im2col slice_scatter select_scatter index_put unflatten "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d _upsample_nearest_exact3d tril triu rot90 repeat_interleave narrow chunk"
    ),
    # Element by element, with broadcasting. Operators that torch itself marks as such need not be listed.
    "pointwise": (
        "hardswish _prelu_kernel masked_fill where clamp clamp_min clamp_max hardtanh elu mish log_sigmoid_forward"
    ),
    "convolution": "convolution",
    "matmul": "mm bmm addmm baddbmm mv dot",
    "pooling": (
        "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
        "max_pool2d avg_pool1d avg_pool2d avg_pool3d"
    ),
    "resampling": (
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d "
        "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa"
    ),
    # Each input element has a part in one output element.
    "reduction": "col2im mean sum amax amin max min var std var_mean std_mean logsumexp linalg_vector_norm norm prod",
    "normalisation": (
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
        "_batch_norm_with_update miopen_batch_norm native_layer_norm native_group_norm _fused_rms_norm"
    ),
    "softmax": "_softmax _safe_softmax",
    "dropout": "native_dropout",
}
_KINDS: dict[str, Kind] = {name: kind for kind, names in _LISTS.items() for name in names.split()}


def kind_of(op: Any) -> Kind | None:
    """Kind of an aten operator, ``None`` for one that has no rule.

    Example:
        >>> aten = torch.ops.aten
        >>> kind_of(aten.gelu.default), kind_of(aten.mm.default), kind_of(aten.fft_fft.default)
        ('pointwise', 'matmul', None)
    """
    kind = _KINDS.get(str(op._schema.name).split("::")[1])
    if kind is None and torch.Tag.pointwise in op.tags:
        return "pointwise"
    return kind


def axis_matrices(op: Callable[[Tensor], Tensor], image: Tensor, rank: int) -> list[Tensor]:
    """Weights of a linear operator that acts on each spatial axis by itself, such as bilinear interpolation.

    The operator is probed with indicator images of each index along one axis.

    Args:
        op: maps ``(batch, channels, *spatial)`` to ``(batch, channels, *spatial')``, linear, the same for all channels.
        image: any image of the shape, type and device that ``op`` is used on.
        rank: number of spatial axes.

    Returns:
        Per axis a matrix ``(out, in)``; element (o, i) is the weight of input index i in output index o.

    Example:
        >>> op = lambda x: torch.nn.functional.avg_pool2d(x, 2)
        >>> [m.tolist() for m in axis_matrices(op, torch.zeros(1, 1, 4, 2), 2)]
        [[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]], [[0.5, 0.5]]]
    """
    spatial = image.shape[-rank:]
    flat = op(image.new_ones((1, 1, *spatial)))[0, 0]
    centre = tuple(n // 2 for n in flat.shape)
    matrices = []
    for axis, n in enumerate(spatial):
        shape = [n, 1, *(1 for _ in spatial)]
        shape[2 + axis] = n
        probes = torch.eye(n, dtype=image.dtype, device=image.device).reshape(shape).expand(n, 1, *spatial)
        index: list[Any] = [slice(None), 0, *centre]
        index[2 + axis] = slice(None)
        matrices.append(op(probes.contiguous())[tuple(index)].T)
    # Each probe bears the other axes' sums at the centre; together they bear rank − 1 of these too many.
    excess = flat[centre]
    return [matrices[0], *(m / excess for m in matrices[1:])]


def reduced_dims(arguments: dict[str, Any], ndim: int) -> tuple[int, ...]:
    """The axes that a reduction runs over, from its arguments; all of them where none is given."""
    dims = arguments.get("dim")
    if dims is None or (isinstance(dims, Sequence) and len(dims) == 0):
        return tuple(range(ndim))
    return tuple(d % ndim for d in ([dims] if isinstance(dims, int) else dims))
