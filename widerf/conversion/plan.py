"""What is to become of each convolution, and the layers that take their places; the model stays as it is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from widerf.conversion.report import LayerConversion
from widerf.conversion.windows import SPARSE, early_layers, why_not, widest_extent, window_for
from widerf.convolutions.branches import rebuilt
from widerf.convolutions.convolution import Convolution
from widerf.convolutions.places import Place
from widerf.patterns.named import Mixture
from widerf.sparse.layer import SparseConv

Extent = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One convolution, what is known of it, and the layer that takes its place (None: it stays).

    Attributes:
        kernel: the convolution.
        row: its line of the report.
        place: where it runs, if that is known.
        depth: 0 for the first layer on the way to the map, 1 for the last one.
        layer: the sparse layer with its parameters.
    """

    kernel: Convolution
    row: LayerConversion
    place: Place | None = None
    depth: float = 1.0
    layer: SparseConv | None = None

    @property
    def free(self) -> bool:
        """Whether the layer may become sparse."""
        return self.row.converted


@dataclass(frozen=True)
class Taps:
    """How the taps of all layers are drawn: the arguments of `convert`."""

    pattern: str | Mixture | None
    block: int | None
    seed: int

    def layer(self, kernel: Convolution, extent: Extent) -> SparseConv:
        """Return the sparse layer of that extent for a convolution, with its parameters and a seed of its own."""
        kind = next(sparse for dense, sparse in SPARSE.items() if isinstance(kernel.module, dense))
        # by the name: the same in every process
        digest = hashlib.blake2b(f"{self.seed}:{kernel.name}".encode(), digest_size=7).digest()
        seed = int.from_bytes(digest, "big")
        return kind.from_dense(kernel.module, extent, self.pattern, seed, self.block)  # type: ignore[no-any-return]


def decide(
    model: nn.Module,
    kernels: Sequence[Convolution],
    left: Mapping[str, str],
    places: Mapping[str, Place] | None,
    early: bool,
) -> list[Step]:
    """Decide which convolutions become sparse.

    Args:
        model: that holds them.
        kernels: all its convolutions.
        left: name → reason for those that the user wants left alone.
        places: where they run, if that is known.
        early: whether stem and first stage stay dense.
    """
    lost = rebuilt(model, kernels)
    kept = {**(early_layers(model, kernels, places or {}) if early else {}), **left}
    running = [name for name, place in (places or {}).items() if place.jump is not None]
    order = {name: i / max(1, len(running) - 1) for i, name in enumerate(running)}
    steps = []
    for kernel in kernels:
        place = None if places is None else places.get(kernel.name)
        row = LayerConversion(kernel.name, kernel.kind, kernel.kernel_size)
        if place is not None:
            row = replace(row, jump=place.jump, map_size=place.before)
        problem = why_not(kernel, lost) or kept.get(kernel.name)
        if problem is None and places is not None and place is None:
            problem = "not run on the way to the last map"
        steps.append(Step(kernel, replace(row, verdict=problem or "sparse"), place, order.get(kernel.name, 1.0)))
    return steps


def windows(steps: Sequence[Step], wanted: int | None) -> dict[str, Extent | None]:
    """Return the window of each layer that may become sparse; None where there is none wider than its kernel."""
    jumps = {min(step.place.jump) for step in steps if step.place is not None and step.place.jump is not None}
    # At one resolution the windows grow with depth: what the pilots found to help (docs/sparse.md).
    level = len(jumps) == 1
    return {
        step.kernel.name: window_for(step.kernel, wanted, step.place, step.depth if level else 1.0)
        for step in steps
        if step.free
    }


def build(steps: Sequence[Step], extents: Mapping[str, Extent | None], taps: Taps) -> list[Step]:
    """Return the steps with their sparse layers."""
    built = []
    for step in steps:
        window = extents.get(step.kernel.name)
        if not step.free:
            built.append(step)
        elif window is None or window == step.kernel.kernel_size:
            tight = step.place is not None and widest_extent(step.kernel, step.place.before) == step.kernel.kernel_size
            why = "no wider window fits its map" if tight else "its kernel is as wide as the window"
            built.append(replace(step, row=replace(step.row, verdict=why)))
        else:
            layer = taps.layer(step.kernel, window)
            row = replace(step.row, extent=window, pattern=layer.pattern, channels_per_cell=layer.readers())
            built.append(replace(step, row=replace(row, pattern_groups=len(layer.offsets)), layer=layer))
    return built


def multiplications(steps: Sequence[Step], sparse: bool) -> int:
    """Count the multiplications of all convolutions that run, one input."""
    total = 0
    for step in steps:
        module: Any = step.layer if sparse and step.layer is not None else step.kernel.module
        if step.place is None or step.kernel.transposed or not hasattr(module, "groups"):
            continue
        taps = module.offsets.shape[1] if isinstance(module, SparseConv) else math.prod(module.kernel_size)
        total += math.prod(step.place.after) * module.out_channels * (module.in_channels // module.groups) * taps
    return total
