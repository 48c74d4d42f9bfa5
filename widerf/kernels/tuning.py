"""Which path a layer takes, and measuring better sizes of tiles for it."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from widerf._checks import require
from widerf.kernels import configurations
from widerf.kernels.configurations import Configuration
from widerf.report import Report

Clock = Callable[[Callable[[], object]], float]
REPEATS = 20


@dataclass(frozen=True)
class Tuned:
    """What was measured of one map of a layer.

    Attributes:
        name: forward, grad_input, grad_weight, depthwise or depthwise_weight.
        before: microseconds of a training step of the layer with the configuration that was in use.
        after: with the best, which is in use from now on.
        tried: number of configurations that ran, and of those that did not fit the device.
        configuration: the best.
    """

    name: str
    before: float
    after: float
    tried: tuple[int, int]
    configuration: Configuration


@dataclass(frozen=True)
class Tuning(Report[Tuned]):
    """What `tune` measured; prints as a table.

    Attributes:
        note: the device; or why there was nothing to tune.
    """

    note: str = ""

    columns: ClassVar[Mapping[str, str | Callable[[Any], object]]] = {
        "map": "name",
        "before, µs": "before",
        "after, µs": "after",
        "tried, refused": lambda row: f"{row.tried[0]}, {row.tried[1]}",
        "pixels": lambda row: row.configuration.pixels,
        "outs": lambda row: row.configuration.outs,
        "ins": lambda row: row.configuration.ins,
        "warps": lambda row: row.configuration.warps,
        "stages": lambda row: row.configuration.stages,
        "programs": lambda row: row.configuration.programs,
    }

    def lines(self) -> list[str]:
        """Return the note."""
        return [self.note]


def search(step: Callable[[], object], clock: Clock) -> list[Tuned]:
    """Measure, for every shape that ``step`` asks a configuration for, all candidates; remember the best of each.

    Args:
        step: runs the layer.
        clock: returns the microseconds of a call; a RuntimeError of it means that the device refuses the candidate.
    """
    with configurations.asked() as shapes:
        step()
    rows = []
    for shape in dict.fromkeys(shapes):
        kept = configurations.choose(shape)
        times: dict[Configuration, float] = {kept: clock(step)}
        others = [c for c in configurations.candidates(shape) if c != kept]
        for candidate in others:
            configurations.remember(shape, candidate)
            try:
                times[candidate] = clock(step)
            except RuntimeError:  # Triton's OutOfResources is one: too much shared memory or too many registers
                continue
        best = min(times, key=times.__getitem__)
        configurations.remember(shape, best)
        counts = (len(times), len(others) + 1 - len(times))
        rows.append(Tuned(shape.map, times[kept], times[best], counts, best))
    return rows


def microseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call on the current CUDA device; compiled and warm before it is timed."""
    for _ in range(3):
        call()
    event: Any = torch.cuda.Event
    marks = [event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return float(statistics.median(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)))


def describe(layer: Any, input: Tensor) -> tuple[str, str]:
    """Return (path, why) of a layer on such an input: what `path_of` shows."""
    from widerf import kernels
    from widerf.kernels import cuda, op

    require(hasattr(layer, "_layout"), "layer", "be a sparse convolution", type(layer).__name__, TypeError)
    require(isinstance(input, Tensor), "input", "be a tensor", type(input).__name__, TypeError)
    layout = layer._layout()[0]
    dtype = layer.weight.dtype
    if torch.is_autocast_enabled(input.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
    if len(layout.pieces) == 1 and op.native(layout.pieces[0], input.device, dtype):
        return "PyTorch's convolution", "all channels read one grid"
    kind, why = kernels.path(input.device, dtype, layer.RANK)
    if kind != "cuda":
        return kernels.shown(kind), why
    plan = layout.whole
    sample = torch.empty(0, dtype=dtype, device=input.device)
    steps = (1, *plan.stride)[-2:]
    reason = cuda.why_not_boxes(op.shifts_of(plan.text), sample, steps, layer.out_channels, layer.groups)
    return (kernels.BY_BOXES, "") if reason is None else (kernels.GATHERED, reason)


def tune(layer: Any, input: Tensor) -> Tuning:
    """Measure which sizes of tiles are fastest for a layer, and use them from now on, in this process.

    Without it sizes come from a table by shape class. A training step of the layer is timed (forward and backward, with
    the autocast in force) for every candidate, some minutes in all with compilation; parameters, their gradients and
    the input are as before.

    Args:
        layer: a `SparseConv1d` or `SparseConv2d`.
        input: as the layer will get it: shape, dtype, device and memory format count, values do not.

    Returns:
        A table, one row per map measured; without rows where there is nothing to tune, and a line that says why.

    Raises:
        TypeError: if ``layer`` is no sparse layer or ``input`` no tensor.

    Example:
        >>> from widerf import SparseConv2d
        >>> print(tune(SparseConv2d(8, 8, 3, padding=1, seed=0), torch.zeros(1, 8, 9, 9)).note)
        nothing to tune: ...
    """
    from widerf import kernels

    path, why = describe(layer, input)
    if path != kernels.BY_BOXES:
        return Tuning((), note=f"nothing to tune: {path} takes no sizes of tiles" + (f" ({why})" if why else ""))
    wanted = [p for p in layer.parameters() if p.requires_grad]
    x = input.detach().requires_grad_()
    up = torch.ones_like(layer(x))

    def step() -> None:
        torch.autograd.grad(layer(x), [x, *wanted], up)

    with torch.cuda.device(input.device):
        return Tuning(tuple(search(step, microseconds)), note=torch.cuda.get_device_name())
