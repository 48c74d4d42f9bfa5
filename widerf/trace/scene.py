"""What one call looks at: a model at an input size, the map found once, the forward pass recorded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from widerf._checks import require
from widerf.trace.arguments import check_input_size, check_unit, probe_input
from widerf.trace.certain import held
from widerf.trace.hooks import names_of
from widerf.trace.recorder import record
from widerf.trace.sandbox import untouched
from widerf.trace.site import MapSite, spatial_layer, spatial_layers
from widerf.trace.tape import Tape


@dataclass
class Scene:
    """A model, the map that is looked at and one unit of it; every reading of one call shares it.

    Attributes:
        model: as the user gave it; it comes back bit-identical from everything that is done here.
        input_size: ``(channels, *spatial)``, checked.
        site: the layer that makes the map.
        unit: index on the map.
        image_seed: of the N(0, 1) image that is recorded.
        also: maps of other layers on the way, which the recording marks.
    """

    model: nn.Module
    input_size: tuple[int, ...]
    site: MapSite
    unit: tuple[int, ...]
    image_seed: int = 0
    also: tuple[MapSite, ...] = ()
    _tape: Tape | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        input_size: Sequence[int],
        layer: str | nn.Module | None = None,
        unit: Sequence[int] | int | None = None,
    ) -> Scene:
        """Check the arguments and find the map, by one probing pass.

        Raises:
            TypeError: if ``model``, ``layer`` or a size has the wrong type.
            ValueError: see :func:`widerf.trace.site.spatial_layer` and :func:`widerf.trace.site.check_unit`.
        """
        require(isinstance(model, nn.Module), "model", "be a torch.nn.Module", type(model).__name__, TypeError)
        size = check_input_size(input_size)
        site = spatial_layer(model, size, layer)
        return cls(model, size, site, check_unit(unit, site.spatial_shape))

    @classmethod
    def over(
        cls, model: nn.Module, input_size: Sequence[int], layers: Sequence[str | nn.Module] | None = None
    ) -> Scene:
        """Look at several maps at once, all of them by default: the scene of the last one, which marks the others.

        Raises:
            TypeError: see :meth:`of`.
            ValueError: see :func:`widerf.trace.site.spatial_layers`.
        """
        require(isinstance(model, nn.Module), "model", "be a torch.nn.Module", type(model).__name__, TypeError)
        size = check_input_size(input_size)
        *also, last = spatial_layers(model, size, layers)
        return cls(model, size, last, check_unit(None, last.spatial_shape), also=tuple(also))

    @property
    def sites(self) -> tuple[MapSite, ...]:
        """All maps that are looked at, in the order in which they are reached."""
        return (*self.also, self.site)

    def at(self, site: MapSite) -> Scene:
        """The scene of another of its maps and the centre unit there, on the same recording."""
        unit = check_unit(None, site.spatial_shape)
        return replace(self, site=site, unit=unit, also=(), _tape=self.tape.at(site.name))

    @property
    def tape(self) -> Tape:
        """The recording of one N(0, 1) image, the same in every call; taken when first asked for."""
        if self._tape is None:
            self._tape = self.record(noise(self.model, self.input_size, self.image_seed))
        return self._tape

    def record(self, images: Tensor, *, evaluating: bool = False) -> Tape:
        """Record a pass over other images, in eval mode if so told; the model comes back as it was."""
        with held(untouched(self.model), torch.no_grad()):
            return record(self.model.eval() if evaluating else self.model, images, self.site, self.also)

    def differentiable(self) -> Scene:
        """Return the scene whose recording hangs on the model's parameters: what is read off it has derivatives.

        The steps are run once more on the recorded image, as autograd sees them: without in-place writes, and with
        weights, plain or computed, that hang on their parameters.
        """
        images = noise(self.model, self.input_size, self.image_seed)
        with untouched(self.model), torch.no_grad():
            tape = record(self.model, images, self.site, freeze=False)
        tape = replace(tape, values=[value.detach() for value in tape.values])
        with untouched(self.model), torch.enable_grad():
            return replace(self, also=(), _tape=tape.replayed())

    def changed(self, *, in_place: bool) -> Scene:
        """Return the scene of the model after its weights were changed, at the same map and image.

        Args:
            in_place: whether all that changed are parameters that the recorded operators read themselves: the
                recording is then run through again; else (computed weights, new modules) the model is recorded anew.
        """
        if not in_place or self._tape is None or not self._tape.replayable:
            # A module may have been put in the place of the one that makes the map.
            modules = {name: module for module, name in names_of(self.model).items()}
            site, *also = (replace(s, module=modules[s.name]) for s in (self.site, *self.also))
            return replace(self, _tape=None, site=site, also=tuple(also))
        with held(untouched(self.model), torch.no_grad()):
            return replace(self, _tape=self._tape.replayed())

    def seed(self) -> Tensor:
        """Return the unit's gradient at the map: 1 at the unit in every channel, 0 elsewhere."""
        seed = torch.zeros_like(self.tape.values[self.tape.target], memory_format=torch.contiguous_format)
        place: tuple[Any, ...] = (slice(None), slice(None), *self.unit)
        seed[place] = 1
        return seed


def noise(model: nn.Module, input_size: tuple[int, ...], seed: int) -> Tensor:
    """Return one N(0, 1) image on the device and in the floating type of the model."""
    like = probe_input(model, input_size, batch=1)
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device="cpu", dtype=torch.float32).to(like)
