"""The convolutions of a model, and what of each kernel may be widened."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from widerf._checks import require
from widerf.geometry import ntuple, tap_coordinates
from widerf.profile import soft_corners, tap_profile

Selector: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]] | None


@dataclass(frozen=True)
class Cell:
    """Taps that feed one and the same output unit.

    A plain kernel is one cell. A transposed convolution of stride s has one cell per output phase: a unit of its
    output sees only every s-th tap.

    Attributes:
        where: index of the cell's taps in a kernel-shaped tensor.
        size: taps per axis of the cell.
    """

    where: tuple[slice, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """One convolution of a model.

    Attributes:
        name: module name.
        module: the convolution.
        kernel_size: taps per axis; for non-grid taps the shape in which the weight stores them.
        stride: of the layer, per axis.
        dilation: of the layer, per axis.
        transposed: whether it is a transposed convolution.
        offsets: taps of each group of input channels for non-grid kernels, shape (groups, taps, D); else ``None``.
        cells: the taps that feed one output unit, see :class:`Cell`.
    """

    name: str
    module: nn.Module
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False
    offsets: Tensor | None = None
    cells: tuple[Cell, ...] = field(init=False)

    def __post_init__(self) -> None:
        period = tuple(
            s // math.gcd(s, d) if self.transposed else 1 for s, d in zip(self.stride, self.dilation, strict=True)
        )
        phases = itertools.product(*(range(min(p, k)) for p, k in zip(period, self.kernel_size, strict=True)))
        cells = []
        for phase in phases:
            where = tuple(slice(start, None, step) for start, step in zip(phase, period, strict=True))
            size = tuple(len(range(*w.indices(k))) for w, k in zip(where, self.kernel_size, strict=True))
            cells.append(Cell(where, size))
        object.__setattr__(self, "cells", tuple(cells))

    @property
    def rank(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel_size)

    @property
    def kind(self) -> str:
        """Class name of the layer, without the ``Parametrized`` that torch puts before it."""
        return type(self.module).__name__.removeprefix("Parametrized")

    @property
    def spacing(self) -> tuple[float, ...]:
        """Input pixels of the layer between two neighbouring taps of a cell."""
        if self.transposed:
            return tuple(d / math.gcd(s, d) for s, d in zip(self.stride, self.dilation, strict=True))
        return tuple(float(d) for d in self.dilation)

    def nothing_to_gain(self) -> str | None:
        """Return why no profile can widen this kernel, or ``None`` if one can."""
        if self.offsets is not None:
            distances = self.offsets.double().square().sum(-1)
            return None if bool((distances != distances[:, :1]).any()) else "all taps of a group lie equally far out"
        if self.kernel_size == (1,) * self.rank:
            return "×".join(["1"] * self.rank) + " kernel: no periphery"
        if max(max(cell.size) for cell in self.cells) <= 2:
            where = "taps per output phase" if self.transposed else "kernel"
            return f"{'×'.join(map(str, self.cells[0].size))} {where}: all taps are corners already"
        pairs = zip(self.kernel_size, self.stride, self.dilation, strict=True)
        if not self.transposed and all(s >= d * (k - 1) + 1 for k, s, d in pairs):
            return "patchify (stride ≥ kernel): neighbouring outputs share no input"
        return None

    def shape(self, strength: float) -> Tensor:
        """Return the wanted energy of each tap relative to a uniform kernel (mean 1 in each cell).

        Shape ``kernel_size``, or ``(groups, taps)`` for non-grid taps.
        """
        if self.offsets is not None:
            return tap_profile(self.offsets, strength) * self.offsets.shape[1]
        return self.assemble([soft_corners(cell.size, strength) for cell in self.cells])

    def assemble(self, profiles: Sequence[Tensor]) -> Tensor:
        """Return the relative energies of the whole kernel from one profile per cell."""
        whole = torch.ones(self.kernel_size, dtype=torch.float64)
        for cell, profile in zip(self.cells, profiles, strict=True):
            whole[cell.where] = profile * profile.numel()
        return whole

    def energies(self, weight: Tensor) -> Tensor:
        """Return Σ w² on each tap as float64 on the CPU, in the layout of :meth:`shape`.

        Args:
            weight: (out, in/groups, *kernel_size), or (in, out/groups, *kernel_size) if transposed, or more leading
                axes.
        """
        weight = weight.detach()
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight = weight.float()
        squares = weight.abs().square() if weight.is_complex() else weight.square()
        if self.offsets is None:
            return squares.sum(dim=tuple(range(squares.ndim - self.rank)), dtype=torch.float64).cpu()
        rows = self._pattern_rows()
        per_channel = squares.view(rows.shape[0], -1, rows.shape[1], math.prod(self.kernel_size)).sum(
            1, dtype=torch.float64
        )
        total = torch.zeros(self.offsets.shape[:2], dtype=torch.float64)
        return total.index_add_(0, rows.flatten(), per_channel.flatten(0, 1).cpu())

    def scale_(self, weight: Tensor, factors: Tensor) -> Tensor:
        """Multiply each tap of ``weight`` by its factor (laid out as :meth:`shape`), in place; return ``weight``."""
        if self.offsets is None:
            return weight.mul_(factors.to(weight))
        rows = self._pattern_rows()
        grouped = weight.view(rows.shape[0], -1, rows.shape[1], math.prod(self.kernel_size))
        grouped.mul_(factors[rows].unsqueeze(1).to(weight))
        return weight

    def _pattern_rows(self) -> Tensor:
        """Return which row of ``offsets`` each input channel has, (groups, in/groups): equal runs of channels."""
        assert self.offsets is not None
        channels, groups = int(self.module.in_channels), int(self.module.groups)  # type: ignore[arg-type]
        return (torch.arange(channels) * len(self.offsets) // channels).view(groups, channels // groups)

    def std(self, energies: Tensor) -> float:
        """Return the std of the taps' energy in input pixels of the layer: root of the mean of the axis variances.

        Transposed kernels: root of the mean over output phases. NaN if there is no energy.
        """
        places = [(tap_coordinates(cell.size), energies[cell.where].flatten()) for cell in self.cells]
        if self.offsets is not None:
            places = [(self.offsets.flatten(0, 1).double().cpu(), energies.flatten())]
        variances = []
        for taps, energy in places:
            share = (energy / energy.sum()).unsqueeze(1)
            coordinates = taps * torch.tensor(self.spacing, dtype=torch.float64)
            mean = (share * coordinates).sum(dim=0)
            variances.append((share * (coordinates - mean) ** 2).sum() / self.rank)
        return math.sqrt(float(torch.stack(variances).mean()))

    def std_range(self) -> tuple[float, float]:
        """Return the stds of strength 0 and 1."""
        return self.std(self.shape(0.0)), self.std(self.shape(1.0))


def _kernel(name: str, module: Any) -> Kernel:
    rank = len(module.kernel_size)
    offsets = getattr(module, "offsets", None)
    return Kernel(
        name,
        module,
        kernel_size=tuple(module.kernel_size),
        stride=ntuple(module.stride, rank, "stride"),
        dilation=ntuple(module.dilation, rank, "dilation"),
        transposed=isinstance(module, _ConvTransposeNd),
        offsets=offsets if isinstance(offsets, Tensor) and not offsets.is_floating_point() else None,
    )


def find_kernels(model: nn.Module) -> list[Kernel]:
    """Return every convolution of ``model`` in the order of its modules, each module once."""
    require(isinstance(model, nn.Module), "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    kernels = []
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) or any(cls.__name__ == "CondConv2d" for cls in type(module).__mro__):
            kernels.append(_kernel(name, module))
    return kernels


def select(kernels: Sequence[Kernel], model: nn.Module, selector: Selector, argument: str) -> set[str]:
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
