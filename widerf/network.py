"""Where each convolution stands in the network: its jump, the maps before and after it, what zero padding costs it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widerf.convolutions import Kernel
from widerf.energy import backpropagate
from widerf.layers import probe_input, spatial_layer
from widerf.sandbox import untouched
from widerf.tape import Step, Tape
from widerf.trace import record

_NEARLY = 1.4  # ratio of neighbouring map sizes below which a map was cropped or padded, not resampled


@dataclass(frozen=True)
class Place:
    """One convolution in the network, at its first call.

    Attributes:
        jump: input pixels of the network between neighbouring units of the layer's input; ``None`` off the path to
            the map.
        before: spatial shape of the layer's input.
        after: spatial shape of its output.
    """

    jump: tuple[float, ...] | None
    before: tuple[int, ...]
    after: tuple[int, ...]


def find_places(model: nn.Module, input_size: Sequence[int], kernels: Sequence[Kernel]) -> dict[str, Place]:
    """Return the place of each convolution on the way to the last spatial map, in the order in which they run.

    One forward pass in a sandbox; the model comes back as it was.
    """
    site = spatial_layer(model, input_size)
    before: dict[str, tuple[int, ...]] = {}
    after: dict[str, tuple[int, ...]] = {}

    def note(kernel: Kernel) -> None:
        def enter(_: nn.Module, inputs: Any) -> None:
            before.setdefault(kernel.name, tuple(inputs[0].shape[-kernel.rank :]))

        def leave(_: nn.Module, __: Any, output: Tensor) -> None:
            after.setdefault(kernel.name, tuple(output.shape[-kernel.rank :]))

        kernel.module.register_forward_pre_hook(enter)
        kernel.module.register_forward_hook(leave)

    with untouched(model), torch.no_grad():
        for kernel in kernels:
            note(kernel)
        tape = record(model, probe_input(model, input_size, batch=1), site)
    jumps = _jumps(tape)
    # The recording ends inside the layer that makes the map, before its hook.
    return {name: Place(jumps.get(name), size, after.get(name, site.shape[1:])) for name, size in before.items()}


def _jumps(tape: Tape) -> dict[str, tuple[float, ...]]:
    """Return the jump of each convolution's input, by module name, as strides and map sizes tell it."""
    image = tape.values[0].shape[2:]
    rank = len(image)
    known: dict[int, tuple[float, ...]] = {0: (1.0,) * rank}
    found: dict[str, tuple[float, ...]] = {}
    for step in tape.needed():
        shapes = {value: tuple(tape.values[value].shape) for value in step.inputs.values()}
        maps = [value for value, shape in shapes.items() if len(shape) == rank + 2]
        if step.name == "convolution" and maps:
            guess = tuple(max(1.0, round(n / m)) for n, m in zip(image, shapes[maps[0]][2:], strict=True))
            known.setdefault(maps[0], guess)  # behind tokens or other layouts: from the sizes
            found.setdefault(step.module, known[maps[0]])
        source = next((value for value in maps if value in known), None)
        for out in step.outputs:
            if source is not None and out is not None and len(tape.values[out].shape) == rank + 2:
                ratio = _ratio(step, tape, shapes[source][2:], tuple(tape.values[out].shape[2:]))
                known[out] = tuple(jump * r for jump, r in zip(known[source], ratio, strict=True))
    return found


def _ratio(step: Step, tape: Tape, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[float, ...]:
    """Return by how much a step multiplies the jump."""
    if step.name == "convolution" or ("pool" in step.name and "adaptive" not in step.name):
        arguments = step.arguments(tape.values)
        stride = [float(s) for s in arguments["stride"]] or [float(k) for k in arguments["kernel_size"]]
        stride = stride * len(before) if len(stride) == 1 else stride
        return tuple(1.0 / s if arguments.get("transposed") else s for s in stride)
    ratios = []
    for n, m in zip(before, after, strict=True):
        ratio = n / max(m, 1)
        snapped = round(ratio) if ratio >= 1 else 1.0 / round(1.0 / ratio) if ratio > 0 else 1.0
        ratios.append(1.0 if 1 / _NEARLY < ratio < _NEARLY else float(snapped))
    return tuple(ratios)


def axis_operator(kernel: Kernel, place: Place, axis: int, shares: Tensor) -> Tensor:
    """Return the matrix that takes the energy along an input axis to that along the output axis, zeros outside.

    Args:
        kernel: a layer of stride and dilation, not transposed.
        place: its maps.
        axis: which.
        shares: energy of each tap of the axis, sums to 1.

    Returns:
        (output positions, input positions); a row sums to 1 in the interior and to less at a zero-padded border.
    """
    n, m = place.before[axis], place.after[axis]
    k, s, d = kernel.kernel_size[axis], kernel.stride[axis], kernel.dilation[axis]
    told = getattr(kernel.module, "padding", 0)
    padding = told[axis] if isinstance(told, tuple) else None
    if padding is None or (m - 1) * s + d * (k - 1) + 1 - padding > n + padding:
        padding = max((m - 1) * s + d * (k - 1) + 1 - n, 0) // 2  # "same", static or dynamic
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for tap in range(k):
        source = torch.arange(m) * s + tap * d - padding
        inside = (source >= 0) & (source < n)
        matrix[torch.arange(m)[inside], source[inside]] += shares[tap]
    return matrix


def border_loss(kernel: Kernel, place: Place, energies: Tensor) -> float | None:
    """Return the share of a layer's output energy that its zero padding costs on an even map; ``None`` if not known.

    The energies of a profile are nearly a product of their axes, and are taken to be one.
    """
    padded = getattr(kernel.module, "padding_mode", "zeros") == "zeros"
    if kernel.transposed or kernel.offsets is not None or not padded:
        return None
    kept = 1.0
    for axis in range(kernel.rank):
        kept *= float(axis_operator(kernel, place, axis, _marginal(energies, axis)).sum(dim=1).mean())
    return 1.0 - kept


def chain_energy(layers: Sequence[tuple[Kernel, Place, Tensor]]) -> float:
    """Return the mean energy at the end of a chain of layers over that without zero padding, layer after layer.

    Each axis is followed on its own, which is exact for product profiles; where the map's size changes between layers
    (pooling) the energy is interpolated.
    """
    total = 1.0
    for axis in range(max(kernel.rank for kernel, _, _ in layers)):
        energy = torch.ones(layers[0][1].before[axis], dtype=torch.float64)
        for kernel, place, energies in layers:
            if place.before[axis] != len(energy):
                energy = F.interpolate(energy[None, None], size=place.before[axis], mode="linear")[0, 0]
            energy = axis_operator(kernel, place, axis, _marginal(energies, axis)) @ energy
        total *= float(energy.mean())
    return total


def _marginal(energies: Tensor, axis: int) -> Tensor:
    others = tuple(i for i in range(energies.ndim) if i != axis)
    shares = energies.sum(dim=others) if others else energies
    return shares / shares.sum()


@dataclass(frozen=True)
class Sensitivity:
    """How the variance of a network's ERF answers to the energies of its kernels.

    Attributes:
        variance: of the ERF now, in input pixels², mean over axes.
        slopes: layer name → ∂ variance / ∂ log(energy of each tap), summed over all calls, in the weight's spatial
            layout.
    """

    variance: float
    slopes: dict[str, Tensor]


def sensitivity(
    model: nn.Module, input_size: Sequence[int], kernels: Sequence[Kernel], layer: str | nn.Module | None = None
) -> Sensitivity:
    """Differentiate the predicted variance of the ERF with respect to the energy of every tap of every kernel.

    The prediction takes each weight by its square, so W·∂σ²/∂W/2, summed over a tap's weights, is the derivative with
    respect to the logarithm of the tap's energy. One forward pass, one energy pass and its derivative.
    """
    site = spatial_layer(model, input_size, layer)
    names = {kernel.name for kernel in kernels}
    with untouched(model), torch.no_grad():
        images = probe_input(model, input_size, batch=1)
        images = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
        tape = record(model, images, site)
    weights: list[tuple[str, Tensor]] = []
    for index, step in enumerate(tape.steps):
        if step.name == "convolution" and step.module in names and isinstance(step.leaves[1], Tensor):
            weight = step.leaves[1].detach().clone().requires_grad_()
            tape.steps[index] = replace(step, leaves=(step.leaves[0], weight, *step.leaves[2:]))
            weights.append((step.module, weight))
    seed = torch.zeros_like(tape.values[tape.target], memory_format=torch.contiguous_format)
    centre: Any = (slice(None), slice(None), *(n // 2 for n in site.spatial_shape))
    seed[centre] = 1
    with torch.enable_grad():
        energy = backpropagate(tape, seed).double().sum(1).mean(0)
        variance = _variance(energy)
        gradients = torch.autograd.grad(variance, [w for _, w in weights], allow_unused=True)
    slopes: dict[str, Tensor] = {}
    rank = len(input_size) - 1
    for (name, weight), gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            tap = (weight.detach() * gradient / 2).double().sum(dim=tuple(range(weight.ndim - rank)))
            slopes[name] = slopes.get(name, 0) + tap.cpu()
    return Sensitivity(float(variance.detach()), slopes)


def _variance(energy: Tensor) -> Tensor:
    """Return the mean over axes of the variance of an energy map about its centroid."""
    share = energy / energy.sum()
    variances = []
    for axis, n in enumerate(energy.shape):
        place = torch.arange(n, dtype=energy.dtype, device=energy.device)
        marginal = share.sum(dim=tuple(i for i in range(energy.ndim) if i != axis)) if energy.ndim > 1 else share
        mean = (marginal * place).sum()
        variances.append((marginal * (place - mean) ** 2).sum())
    return torch.stack(variances).mean()


def predicted_std(model: nn.Module, input_size: Sequence[int] | None) -> tuple[float | None, str]:
    """Return the predicted std of the network's ERF or ``None``, and what is wrong with it or nothing."""
    if input_size is None:
        return None, ""
    from widerf.prediction import predict

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            std = float(predict(model, tuple(input_size)).std)
        except (NotImplementedError, ValueError) as error:
            return None, f"the ERF's gain cannot be predicted: {error}"
    clipped = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return std, (f"the ERF's gain is understated: {clipped[0]}" if clipped else "")
