"""Where a layer keeps its weight, and how to re-weight the kernel that it really convolves with.

A weight may be a parameter, or be computed from parameters before each forward pass: by weight normalisation, spectral
normalisation, pruning, or a standardisation inside ``forward``. Writing to ``module.weight`` is lost there (the classic
loss of an initialisation under weight normalisation). Each class here knows the tensors that hold the weight
(*sources*), reads the *effective* weight without side effects, and scales its taps so that the next forward pass
keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from widerf.convolutions.convolution import Convolution
from widerf.init.lasting import profile_of
from widerf.trace.certain import certainly

MARK = "_widerf_profile"  # attribute of a module: what an earlier call did to it
_POWER_ITERATIONS = 30  # spectral normalisation after a change; its estimate starts from the one before
_STANDARDISED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}


class Held:
    """A weight that is a plain parameter.

    Attributes:
        kernel: the layer.
        note: what a reader of the verdict should know, or ``""``.
    """

    note = ""

    def __init__(self, kernel: Convolution) -> None:
        self.kernel = kernel
        self.module: Any = kernel.module

    def sources(self) -> list[Tensor]:
        """Return the tensors that hold the weight."""
        return [self.module.weight]

    def read(self) -> Tensor:
        """Return the effective weight, detached, in the layout of the kernel."""
        weight: Tensor = self.module.weight.detach()
        return weight

    def scale_(self, factors: Tensor) -> None:
        """Multiply the effective weight by ``factors``, laid out as ``Convolution.target_energies`` lays them out."""
        self.kernel.scale_(self.module.weight.detach(), factors)

    def replace_(self, weight: Tensor) -> None:
        """Make ``weight`` the effective weight."""
        target = self.read()
        if target is not weight:
            target.copy_(weight)

    def blank(self) -> Tensor:
        """Return a tensor for :meth:`replace_`; for a plain weight the weight itself, which spares a copy."""
        return self.read()

    def storage(self) -> object:
        """Return a key that two layers share if they share their weight."""
        return storage_of(self.sources()[0])


class _Computed(Held):
    """A weight that is computed from its sources."""

    def blank(self) -> Tensor:
        """See :class:`Held`."""
        return torch.empty_like(self.read())


class Experts(Held):
    """``timm``'s ``CondConv2d``: rows of experts, each a flattened kernel; every expert is scaled alike."""

    def read(self) -> Tensor:
        """See :class:`Held`."""
        weight: Tensor = self.module.weight.detach()
        return weight.view(self.module.num_experts, *self.module.weight_shape)

    def scale_(self, factors: Tensor) -> None:
        """See :class:`Held`."""
        self.kernel.scale_(self.read(), factors)


class Hooked(_Computed):
    """``torch.nn.utils.weight_norm``, ``spectral_norm`` and ``prune``: a forward pre-hook writes ``module.weight``."""

    def __init__(self, kernel: Convolution, hook: WeightNorm | SpectralNorm | BasePruningMethod) -> None:
        super().__init__(kernel)
        self.hook = hook
        if isinstance(hook, SpectralNorm):
            self.note = "spectral_norm sets its scale"

    def sources(self) -> list[Tensor]:
        """See :class:`Held`."""
        names = ("weight_g", "weight_v") if isinstance(self.hook, WeightNorm) else ("weight_orig",)
        return [getattr(self.module, name) for name in names]

    def read(self) -> Tensor:
        """See :class:`Held`."""
        weight: Tensor
        if isinstance(self.hook, WeightNorm):
            weight = self.hook.compute_weight(self.module)
        elif isinstance(self.hook, SpectralNorm):
            weight = self.hook.compute_weight(self.module, do_power_iteration=False)
        else:
            weight = self.hook.apply_mask(self.module)  # type: ignore[no-untyped-call]
        return weight.detach()

    def scale_(self, factors: Tensor) -> None:
        """See :class:`Held`."""
        if isinstance(self.hook, WeightNorm):
            self.replace_(self.kernel.scale_(self.read().clone(), factors))
        else:
            self.kernel.scale_(self.module.weight_orig.detach(), factors)
            self._refresh()

    def replace_(self, weight: Tensor) -> None:
        """See :class:`Held`."""
        if isinstance(self.hook, WeightNorm):
            self.module.weight_v.detach().copy_(weight)
            self.module.weight_g.detach().copy_(torch.norm_except_dim(weight, 2, self.hook.dim))
        else:
            self.module.weight_orig.detach().copy_(weight)
        self._refresh()

    def _refresh(self) -> None:
        if isinstance(self.hook, SpectralNorm):
            for _ in range(_POWER_ITERATIONS):
                self.hook.compute_weight(self.module, do_power_iteration=True)
        self.module.weight = self.read()


class Parametrised(_Computed):
    """``torch.nn.utils.parametrize``: of weight normalisation, spectral normalisation, or the user's own.

    One original of the weight's shape is scaled itself; otherwise the wanted weight goes through ``right_inverse``.
    Whether the effective weight then is what was wanted is for the caller to see.
    """

    def __init__(self, kernel: Convolution) -> None:
        super().__init__(kernel)
        self.chain: Any = self.module.parametrizations["weight"]
        self.names = " and ".join(type(step).__name__.removeprefix("_") for step in self.chain)
        self.note = "" if profile_of(self.module) is not None else f"parametrised by {self.names}"
        if any(hasattr(step, "_power_method") for step in self.chain):
            self.note += ", which sets its scale"

    def sources(self) -> list[Tensor]:
        """See :class:`Held`."""
        if hasattr(self.chain, "original"):
            return [self.chain.original]
        return [getattr(self.chain, f"original{index}") for index in range(self.chain.ntensors)]

    @contextmanager
    def _still(self) -> Iterator[None]:
        """Keep the chain in evaluation mode: spectral normalisation moves its estimate on every look else."""
        modes = [(module, module.training) for module in self.chain.modules()]

        def restore() -> None:
            for module, training in modes:
                module.training = training

        with certainly(restore):
            self.chain.eval()
            yield

    def read(self) -> Tensor:
        """See :class:`Held`."""
        with self._still():
            weight: Tensor = self.module.weight
        return weight.detach()

    def scale_(self, factors: Tensor) -> None:
        """See :class:`Held`."""
        sources = self.sources()
        if len(sources) == 1 and sources[0].shape == self.read().shape:
            self.kernel.scale_(sources[0].detach(), factors)
            self._refresh()
        else:
            self.replace_(self.kernel.scale_(self.read().clone(), factors))

    def replace_(self, weight: Tensor) -> None:
        """See :class:`Held`."""
        if not all(hasattr(step, "right_inverse") for step in self.chain):
            raise NotImplementedError(f"{self.names} has no right_inverse")
        originals = [source.data for source in self.sources()]
        with self._still():
            self.module.weight = weight
        # right_inverse may have put other storage in place, with strides of its own: keep what optimisers know.
        for source, original in zip(self.sources(), originals, strict=True):
            if source.shape == original.shape and source.dtype == original.dtype:
                original.copy_(source.data)
                source.data = original
        self._refresh()

    def _refresh(self) -> None:
        source = self.sources()[0].detach()
        for step in self.chain:
            # Spectral normalisation holds the singular vectors of the old weight.
            if hasattr(step, "_power_method") and hasattr(step, "_u"):
                step._power_method(step._reshape_weight_to_matrix(source), _POWER_ITERATIONS)


class Standardised(_Computed):
    """Weight standardisation in ``forward``: each filter less its mean, over its std (Qiao et al. 2019).

    Scaling the raw weight is not enough: the mean taken off afterwards puts energy back on every tap, by 1/9 of the
    whole in a depthwise 3×3 layer. So the stored filter is made to have mean 0 already, which leaves nothing to take
    off: with φ the factor of each tap, the filter u becomes φu − αφ², α = Σφu/Σφ². The φ that give the wanted
    energies are found by iterated proportional fitting.
    """

    note = ""
    _STEPS = 500
    _TOLERANCE = 1e-7

    def read(self) -> Tensor:
        """See :class:`Held`."""
        return self._standard(self.module.weight.detach())

    def _standard(self, raw: Tensor) -> Tensor:
        rows = raw.flatten(1).to(torch.float64 if raw.dtype == torch.float64 else torch.float32)
        rows = rows - rows.mean(dim=1, keepdim=True)
        rows = rows / (rows.square().mean(dim=1, keepdim=True) + self.module.eps).sqrt()
        if hasattr(self.module, "gain"):
            rows = rows * (self.module.gain.detach() * self.module.scale).view(-1, 1).to(rows)
        standard: Tensor = rows.view(raw.shape)
        return standard

    def scale_(self, factors: Tensor) -> None:
        """See :class:`Held`."""
        raw = self.module.weight.detach()
        energy = raw.double().square().sum()
        start = self.read()
        kernel_energies = self.kernel.energies(start)
        wanted = kernel_energies * factors**2
        wanted = wanted / wanted.sum()
        phi = factors.clone()
        for _ in range(self._STEPS):
            spread = phi.to(start).expand_as(start).flatten(1)
            filters = spread * start.flatten(1)
            filters = filters - filters.sum(1, keepdim=True) / spread.square().sum(1, keepdim=True) * spread.square()
            filters = filters.view_as(start)
            shares = self.kernel.energies(self._standard(filters))
            shares = shares / shares.sum()
            if float((shares - wanted).abs().max()) < self._TOLERANCE:
                break
            phi = torch.where(shares > 0, phi * (wanted / shares.clamp_min(1e-300)).sqrt(), phi)
        raw.copy_(filters * (energy / filters.double().square().sum()).sqrt())

    def replace_(self, weight: Tensor) -> None:
        """See :class:`Held`."""
        self.module.weight.detach().copy_(weight)


def hold(kernel: Convolution) -> Held | str:
    """Return how the layer keeps its weight, or in words why widerf does not know."""
    module: Any = kernel.module
    if parametrize.is_parametrized(module, "weight"):
        return Parametrised(kernel)
    for hook in module._forward_pre_hooks.values():
        known = isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod))
        if known and getattr(hook, "name", getattr(hook, "_tensor_name", None)) == "weight":
            return Hooked(kernel, hook)
    if "weight" not in module._parameters:
        return "its weight is not a parameter, but computed in a way that widerf does not know"
    names = {cls.__name__ for cls in type(module).__mro__}
    if names & _STANDARDISED:
        return Standardised(kernel)
    return Experts(kernel) if "CondConv2d" in names else Held(kernel)


def storage_of(source: Tensor) -> object:
    """Return a key that two tensors share if they are the same, or lie in the same memory."""
    if isinstance(source, UninitializedParameter) or source.is_meta or source.numel() == 0:
        return id(source)
    return source.device, source.data_ptr(), source.shape


def unchangeable(held: Held) -> str | None:
    """Return why the weight cannot be changed now, or ``None``."""
    for source in held.sources():
        if isinstance(source, UninitializedParameter):
            return "lazy, without a weight yet: run one forward pass first"
        if source.is_meta:
            return "on the meta device, without values: materialise it first"
        if any(n > 1 and step == 0 for n, step in zip(source.shape, source.stride(), strict=True)):
            return "an expanded tensor, whose elements share memory: clone it first"
    return None


def is_frozen(held: Held) -> bool:
    """Return whether no tensor that holds the weight is to be trained."""
    return not any(source.requires_grad for source in held.sources())
