"""The measured ERF: back-propagation from a unit, averaged over inputs or over weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from widerf._checks import require
from widerf.erf.frame import Frame
from widerf.erf.images import Images
from widerf.erf.map import ERF
from widerf.erf.receptive import from_tape
from widerf.errors import UntreatedOperatorError
from widerf.report import progress_bar
from widerf.trace.ambient import own_state, plain_arithmetic
from widerf.trace.arguments import check_unit, probe_input
from widerf.trace.sandbox import untouched
from widerf.trace.scene import Scene, noise
from widerf.trace.site import MapSite

_MAX_BLOCKS = 32
_LEAST_DRAWS = 8  # before rtol may stop the measurement
_SEED = 0

Unit = int | Sequence[int]
Redraw = Callable[[nn.Module, torch.Generator], object]


def measure(
    model: nn.Module,
    input_size: Sequence[int] = (3, 224, 224),
    *,
    layer: str | nn.Module | None = None,
    unit: Unit | Sequence[Unit] | None = None,
    inputs: Tensor | Iterable[Any] | None = None,
    samples: int = 32,
    rtol: float | None = None,
    redraw: Redraw | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    batch_size: int | None = None,
) -> ERF:
    """Measure the effective receptive field of a unit by back-propagation.

    The energy map is ``A(p) = Σ_c E[(∂y/∂x_cp)²]`` (Luo et al. 2016, section 2), y being the unit and c the input's
    channels, summed over the channels of the unit as well. One backward pass per draw is enough: with random signs s
    over the unit's channels, ``E_s[(∂(Σ_k s_k y_k)/∂x)²] = Σ_k (∂y_k/∂x)²`` (docs/theory.md (1) and (2)).

    The model is measured in the mode in which it is (``model.eval()`` first, if that is meant) and comes back
    bit-identical, as does the global random state. In training mode batch normalisation ties all positions of all
    images of a pass together: a share of the energy of about 1/(images · positions) for each such layer lies on every
    pixel, so that the ERF of a batch of one, which is what ``predict`` sees, is the wider one.

    Args:
        model: any module that maps ``(batch, *input_size)`` to anything.
        input_size: ``(channels, *spatial)``, spatial rank 1 to 3.
        layer: module or its name; by default the last spatial map before global pooling.
        unit: index on that map, by default the centre one; a list of indices gives the field of all of them together,
            the sum of their energies.
        inputs: real images: a tensor ``(n, *input_size)``, or an iterable (``DataLoader``) of batches or single
            images, or of tuples or dicts that begin with them. By default N(0, 1).
        samples: draws at most. A draw is one image; with ``redraw``, one set of weights.
        rtol: stop as soon as the standard error of ``std`` is below ``rtol · std``.
        redraw: called as ``redraw(model, generator)`` before each draw to re-initialise the weights in place: the
            expected ERF at initialisation. Each call finds the model as it was given.
        generator: source of the signs, the N(0, 1) images and ``redraw``; by default one with a fixed seed.
        progress: whether to show a progress bar.
        batch_size: images in one pass; by default 8, but 1 with ``redraw`` and where batch statistics tie the images
            of a pass together. A model that normalises 1×1 maps by them needs at least 2.

    Returns:
        The ERF, with a standard error and an interval for every figure.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument breaks its rule, or the gradient is not finite.
        DeadUnitError: (a ``ValueError``) if the gradient is zero in all draws.

    Warns:
        ClippedWarning: if the image border cuts off more than one per cent of the mass.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
        >>> erf = measure(model, (1, 9, 9), samples=16)
        >>> erf.map.shape, erf.center, erf.trf_size
        (torch.Size([9, 9]), (4.0, 4.0), (5, 5))
    """
    require(isinstance(samples, int) and samples > 0, "samples", "be a positive integer", samples)
    require(rtol is None or rtol > 0, "rtol", "be positive", rtol)
    require(batch_size is None or batch_size > 0, "batch_size", "be positive", batch_size)
    require(redraw is None or callable(redraw), "redraw", "be callable", redraw, TypeError)
    known = generator is None or isinstance(generator, torch.Generator)
    require(known, "generator", "be a torch.Generator", generator, TypeError)
    scene = Scene.of(model, input_size, layer)
    units = _units(unit, scene.site.spatial_shape)
    generator = torch.Generator().manual_seed(_SEED) if generator is None else generator
    batch = batch_size or (1 if redraw or _ties_images(model) else min(8, samples))
    images = Images(inputs, scene.input_size, probe_input(model, scene.input_size, 0), generator)
    backward = _Backward(model, scene.site, units, generator)
    blocks = _Blocks()
    frame = _frame(scene, units)
    with untouched(model), progress_bar(shown=progress, what="measure", unit="draw", total=samples) as bar:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        # What the forward pass draws (dropout) comes from the generator too.
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator, device=generator.device)))
        for energies in _draws(model, images, backward, redraw, batch, samples):
            for energy in energies:
                blocks.add(energy)
            bar.update(len(energies))
            if rtol is not None and blocks.count >= _LEAST_DRAWS and blocks.precise(rtol, frame):
                break
    return blocks.erf(frame)


def _units(unit: Unit | Sequence[Unit] | None, spatial_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    several = not isinstance(unit, int) and unit is not None and any(not isinstance(u, int) for u in unit)
    if several:
        assert isinstance(unit, Sequence)
        return [check_unit(u, spatial_shape) for u in unit]
    return [check_unit(unit, spatial_shape)]  # type: ignore[arg-type]


def _ties_images(model: nn.Module) -> bool:
    norms = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return any(norm.training or norm.running_mean is None for norm in norms)


def _draws(
    model: nn.Module, images: Images, backward: _Backward, redraw: Redraw | None, batch: int, samples: int
) -> Iterator[Tensor]:
    """Yield the energies ``(draws, *spatial)`` of one pass after another, ``samples`` draws in all."""
    done = 0
    per_pass = 1 if redraw else batch
    while done < samples:
        x = images.take(batch if redraw else min(batch, samples - done))
        if not len(x):
            return
        if redraw is None:
            energies = backward(x)
        else:
            with untouched(model):
                redraw(model, backward.generator)
                energies = backward(x).mean(0, keepdim=True)
        done += per_pass
        yield energies


class _Backward:
    """One forward pass up to the layer and one backward pass to the images."""

    def __init__(
        self, model: nn.Module, site: MapSite, units: list[tuple[int, ...]], generator: torch.Generator
    ) -> None:
        self.model, self.site, self.units, self.generator = model, site, units, generator

    def __call__(self, images: Tensor) -> Tensor:
        """Return the energy ``(images, *spatial)``, float64, of the units at fresh random signs."""
        with own_state(gradients=True):
            images = images.detach().clone().requires_grad_()
            score = self._signed(self.site.reach(self.model, images))
            gradient = torch.zeros_like(images)
            if score.requires_grad:
                found = torch.autograd.grad(score, images, allow_unused=True)[0]
                gradient = gradient if found is None else found
        energy = gradient.detach().to("cpu", torch.float64).square().sum(1)
        require(bool(energy.isfinite().all()), "model", "have finite gradients", "NaN or infinity")
        return energy

    def _signed(self, output: Tensor) -> Tensor:
        strides = [math.prod(self.site.spatial_shape[axis + 1 :]) for axis in range(output.ndim - 2)]
        places = [sum(i * s for i, s in zip(unit, strides, strict=True)) for unit in self.units]
        flat = torch.tensor(places, device=output.device)
        values = output.flatten(2)[..., flat]
        coins = torch.randint(2, values.shape, generator=self.generator, device=self.generator.device)
        return (values * (2 * coins - 1).to(values)).sum()


def _frame(scene: Scene, units: list[tuple[int, ...]]) -> Frame:
    """Box that the units see together, by the trace of the model; where there is none, the units' cells stand in."""
    try:
        # The field is the same in both modes; in eval mode a single image will do.
        tape = scene.record(noise(scene.model, scene.input_size, scene.image_seed), evaluating=True)
        return Frame.of(from_tape(tape, scene.site.name), units)
    except UntreatedOperatorError as error:
        return Frame.of_cells(scene.input_size[1:], scene.site.spatial_shape, units, str(error))


@dataclass
class _Blocks:
    """Energies summed over at most 32 blocks of draws; full, neighbours are merged, so that 16 to 32 are held."""

    sums: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    size: int = 1

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, energy: Tensor) -> None:
        if self.counts and self.counts[-1] < self.size:
            self.sums[-1] = self.sums[-1] + energy
            self.counts[-1] += 1
            return
        if len(self.sums) == _MAX_BLOCKS:
            self.sums = [a + b for a, b in zip(self.sums[::2], self.sums[1::2], strict=True)]
            self.counts = [a + b for a, b in zip(self.counts[::2], self.counts[1::2], strict=True)]
            self.size *= 2
        self.sums.append(energy)
        self.counts.append(1)

    def precise(self, rtol: float, frame: Frame) -> bool:
        erf = self.erf(frame, warn=False)
        return bool(erf.standard_error("std") <= rtol * erf.std)

    def erf(self, frame: Frame, warn: bool = True) -> ERF:
        require(self.count > 0, "inputs", "hold at least one image", "none")
        blocks = torch.stack(self.sums)
        with plain_arithmetic():
            return self._erf(frame, blocks, warn)

    def _erf(self, frame: Frame, blocks: Tensor, warn: bool) -> ERF:
        return ERF.from_energy(
            blocks.sum(0),
            center=frame.center,
            trf_size=frame.trf_size,
            jump=frame.jump,
            untraced=frame.untraced,
            samples=self.count,
            blocks=blocks,
            block_samples=self.counts,
            warn=warn,
        )
