"""Which convolutions of a model can become sparse, which should, and how wide their windows are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from widerf.convolutions.convolution import Convolution
from widerf.convolutions.places import Place
from widerf.sparse.layer import SparseConv, why_not_plain
from widerf.sparse.ranks import SparseConv1d, SparseConv2d, SparseConv3d

SPARSE: dict[type[nn.Module], type[SparseConv]] = {
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.Conv3d: SparseConv3d,
}


def _odd(n: float) -> int:
    """Return the largest odd integer up to ``n``."""
    return int(n) - (int(n) + 1) % 2


def automatic_extent(
    kernel_size: Sequence[int], map_size: Sequence[int], depth: float = 1.0, dilation: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the extent of a layer from its map: two thirds of the map at most, and 4k + 3 (15 for a 3×3) at most.

    A window that hangs far over the border spends its taps on zeros; one that is as wide as the map leaves nothing to
    the layers above. Axes on which the kernel has one tap keep one cell. ``depth`` < 1 scales the reach of the window
    between 2k + 1 and that. The cells of a dilated layer are ``dilation`` pixels of the map apart.

    Example:
        >>> [automatic_extent((3, 3), (n, n)) for n in (56, 28, 14, 7)]
        [(15, 15), (15, 15), (9, 9), (5, 5)]
        >>> automatic_extent((1, 7), (28, 28))
        (1, 19)
        >>> automatic_extent((3, 3), (28, 28), dilation=(2, 4))
        (9, 5)
    """
    widths = []
    for k, n, d in zip(kernel_size, map_size, dilation or [1] * len(kernel_size), strict=True):
        most = min(4 * k + 3, 2 * n / 3 / d + 1)
        least = min(2 * k + 1, most)
        wanted = least * (most / least) ** depth
        widths.append(1 if k == 1 else max(k, _odd(wanted) + (k + 1) % 2))
    return tuple(widths)


def widest_extent(kernel: Convolution, map_size: Sequence[int]) -> tuple[int, ...]:
    """Return the widest window that is no wider than the map, (S − 1)·dilation + 1 ≤ map, with the kernel's parity.

    Never narrower than the kernel; axes on which it has one tap keep one cell.
    """
    widths = []
    for k, n, d in zip(kernel.kernel_size, map_size, kernel.dilation, strict=True):
        most = (n - 1) // d + 1
        widths.append(1 if k == 1 else max(k, most - (most - k) % 2))
    return tuple(widths)


def why_not(kernel: Convolution, rebuilt: Mapping[str, str]) -> str | None:
    """Return why a convolution cannot be made sparse, whatever the user wants, or None.

    Args:
        kernel: the convolution.
        rebuilt: what `widerf.convolutions.branches.rebuilt` says of the model.
    """
    module: Any = kernel.module
    if isinstance(module, SparseConv):
        return "sparse already"
    if kernel.transposed:
        return "transposed"
    dense = next((kind for kind in SPARSE if isinstance(module, kind)), None)
    if dense is None:
        return f"{type(module).__name__} is no plain convolution"
    problem = why_not_plain(module, dense)  # type: ignore[arg-type]
    if problem is not None:
        return problem
    if all(k == 1 for k in kernel.kernel_size):
        return "1×1 kernel: no taps to move"
    if kernel.patchify:
        return "patchify (stride ≥ kernel)"
    axes = zip(kernel.kernel_size, kernel.stride, kernel.dilation, strict=True)
    if any(k > 1 and math.gcd(s, d) > 1 for k, s, d in axes):
        return "its dilation shares a factor with its stride: all windows would read the same part of the map"
    if not kernel.name:
        return f"the model itself: Sparse{dense.__name__}.from_{dense.__name__.lower()} makes a sparse layer of it"
    if kernel.name in rebuilt:
        return f"{rebuilt[kernel.name]} would rebuild it as a plain convolution"
    return None


def early_layers(model: nn.Module, kernels: Sequence[Convolution], places: Mapping[str, Place]) -> dict[str, str]:
    """Return the stem and the layers of the first stage, with the reason to leave them dense.

    By jump, where that is known: the first stage is that of the second spatial layer, and all below an eighth of the
    last jump. If no layer has a larger jump than the first stage, it is the first half of the layers. Without jumps:
    the first convolution, and what timm's ``feature_info`` counts to the first quarter of the resolution.
    """
    spatial = [k for k in kernels if max(k.kernel_size) > 1]
    early = {k.name: "the stem stays dense" for k in spatial[:1]}
    running = [(name, min(p.jump)) for name, p in places.items() if p.jump and name in {k.name for k in spatial}]
    if running:
        early = {running[0][0]: "the stem stays dense"}
        last = max(jump for _, jump in running)
        first = max(running[min(1, len(running) - 1)][1], last / 8)
        stage = [name for name, jump in running if jump <= first]
        if first >= last:
            stage = [name for name, _ in running[: len(running) // 2]]
        return {**dict.fromkeys(stage, "the first stage stays dense"), **early}
    info = getattr(model, "feature_info", None) or []
    info = [i for i in info if isinstance(i, dict) and i.get("reduction", 99) <= 4]
    fronts = [str(i.get("module", "")) for i in info]
    stage = [k.name for k in spatial if any(f and (k.name == f or k.name.startswith(f + ".")) for f in fronts)]
    return {**dict.fromkeys(stage, "the first stage stays dense"), **early}


def window_for(kernel: Convolution, wanted: int | None, place: Place | None, depth: float) -> tuple[int, ...] | None:
    """Return the window of a layer, never wider than its map; None if that is no wider than the kernel."""
    if wanted is None:
        assert place is not None
        extent = automatic_extent(kernel.kernel_size, place.before, depth, kernel.dilation)
    else:
        extent = tuple(1 if k == 1 else max(k, wanted) for k in kernel.kernel_size)
    if place is not None:
        most = widest_extent(kernel, place.before)
        fits = [
            s if (s - 1) * d < n else m for s, m, n, d in zip(extent, most, place.before, kernel.dilation, strict=True)
        ]
        extent = tuple(max(k, s) for k, s in zip(kernel.kernel_size, fits, strict=True))
    return None if extent == kernel.kernel_size else extent
