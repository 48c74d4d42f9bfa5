"""Finding the layer whose output is looked at, and laying that output out as (batch, channels, *spatial)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from widerf._checks import require, require_known
from widerf.trace.ambient import plain_pass
from widerf.trace.arguments import PROBES, check_finite, check_input_size, probe_input
from widerf.trace.certain import held
from widerf.trace.hooks import after, names_of, unwrapped
from widerf.trace.layout import AxisOrderName, Reader, by_preference, tensors_in
from widerf.trace.sandbox import untouched


@dataclass(frozen=True)
class MapSite:
    """One call of one module whose output is a spatial map.

    Attributes:
        name: name of the module in the model; ``""`` is the model itself.
        module: the module.
        call: which call of the module within one forward pass, from 0.
        shape: ``(channels, *spatial)`` of the map.
        layout: how the module lays its output out.
        position: which tensor of the module's output, counted through nested tuples, lists and dicts.
        prefix: tokens in front of the map (class and register tokens), which are left out.
    """

    name: str
    module: nn.Module
    call: int
    shape: tuple[int, ...]
    layout: AxisOrderName = "channels_first"
    position: int = 0
    prefix: int = 0

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """Positions of the map per axis."""
        return self.shape[1:]

    def lay(self, output: Any) -> Tensor:
        """Return the map ``(batch, channels, *spatial)`` out of what the module returned, without copying."""
        tensor = list(tensors_in(output))[self.position]
        if self.layout == "channels_first":
            return tensor
        if self.layout == "no_channels":
            return tensor.unsqueeze(1)
        if self.layout == "tokens":
            batch, _, channels = tensor.shape
            tensor = tensor[:, self.prefix :].reshape(batch, *self.spatial_shape, channels)
        return tensor.movedim(-1, 1)

    def reach(self, model: nn.Module, images: Tensor) -> Tensor:
        """Run a forward pass of ``model`` that ends here, and return the map ``(batch, channels, *spatial)``.

        Raises:
            ValueError: if the module is called less often than in the probing pass.
        """
        calls = 0

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            nonlocal calls
            if calls == self.call:
                raise _Reached(self.lay(output))
            calls += 1

        with after(self.module, leave):
            try:
                model(images)
            except _Reached as stop:
                return stop.map
        raise ValueError(f"layer must be called in the same way in every forward pass, got {self.name!r}")


class _Reached(Exception):  # noqa: N818  (not an error: it ends the forward pass)
    def __init__(self, reached: Tensor) -> None:
        super().__init__()
        self.map = reached


def spatial_layer(model: nn.Module, input_size: Sequence[int], layer: str | nn.Module | None = None) -> MapSite:
    """Find the layer whose output is looked at, by one probing pass; the model comes back bit-identical.

    Args:
        model: the model; it gets one tensor of shape ``(batch, *input_size)``.
        input_size: ``(channels, *spatial)``, spatial rank 1 to 3.
        layer: a module of the model or its name; its last call counts. By default the last module whose output is a map
            with more than one position: the last spatial map before global pooling.

    Returns:
        The layer, with the way to lay its output out. Tokens are put back on their grid; class and register tokens are
        left out; channels are moved to axis 1.

    Raises:
        TypeError: if ``layer`` is neither a name nor a module.
        ValueError: if the layer is not in the model, is never called, or has no spatial map; if the model refuses
            ``input_size`` or holds weights that are not finite.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        >>> site = spatial_layer(model, (3, 16, 16))
        >>> site.name, site.shape
        ('1', (8, 14, 14))
    """
    input_size = check_input_size(input_size)
    names = names_of(model)
    wanted = _named(model, names, layer)
    check_finite(model)
    calls = _record(model, names, input_size)
    if wanted is None:
        return _last_map(calls, input_size)
    return _site_of(calls, wanted, input_size)


def spatial_layers(
    model: nn.Module, input_size: Sequence[int], layers: Sequence[str | nn.Module] | None = None
) -> list[MapSite]:
    """Find the maps of several layers by one probing pass, in the order in which they are reached.

    Args:
        model: see :func:`spatial_layer`.
        input_size: ``(channels, *spatial)``.
        layers: modules or their names; by default every module whose last call yields a map, up to the last of them.

    Raises:
        TypeError: if an entry of ``layers`` is neither a name nor a module.
        ValueError: see :func:`spatial_layer`; or if ``layers`` is empty.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        >>> [site.name for site in spatial_layers(model, (3, 16, 16))]
        ['0', '1']
    """
    input_size = check_input_size(input_size)
    names = names_of(model)
    require(layers is None or bool(layers), "layers", "name at least one layer", layers)
    wanted = None if layers is None else [str(_named(model, names, layer)) for layer in layers]
    check_finite(model)
    calls = _record(model, names, input_size)
    if wanted is not None:
        sites = [_site_of(calls, name, input_size) for name in dict.fromkeys(wanted)]
    else:
        last = _last_map(calls, input_size)
        ends = {call.name: call for call in calls}
        sites = [call.site for call in ends.values() if call.site is not None and call.name not in ("", last.name)]
        sites.append(last)
    order = {(call.name, call.call): index for index, call in enumerate(calls)}
    return sorted(sites, key=lambda site: order[site.name, site.call])


def _site_of(calls: list[_Seen], wanted: str, input_size: tuple[int, ...]) -> MapSite:
    """The map of a layer's last call."""
    own = [call for call in calls if call.name == wanted]
    require(bool(own), "layer", "be called in the model's forward pass", wanted)
    site = own[-1].site
    rule = f"yield a map with {len(input_size) - 1} spatial axes and more than one position"
    shapes = own[-1].shapes
    if site is None:
        raise ValueError(
            f"layer must {rule}, got {wanted!r} with output {', '.join(map(str, shapes)) or 'of no tensor'}"
        )
    return site


@dataclass
class _Seen:
    """One call of a module in the probing pass."""

    name: str
    call: int
    shapes: list[tuple[int, ...]]
    output: list[int]  # identities of the output's tensors
    site: MapSite | None


def _named(model: nn.Module, names: dict[nn.Module, str], layer: str | nn.Module | None) -> str | None:
    if layer is None:
        return None
    require(isinstance(layer, str | nn.Module), "layer", "be a module or its name", layer, TypeError)
    if isinstance(layer, nn.Module):
        require(layer in names, "layer", "be a module of the model", type(layer).__name__)
        return names[layer]
    # A module that is shared has several names, all of which are good.
    every = {unwrapped(name): module for name, module in model.named_modules(remove_duplicate=False)}
    wanted = unwrapped(layer)
    if wanted:  # "" is the model itself
        require_known(wanted, filter(None, every), "layer")
    return names[every[wanted]]


def _record(model: nn.Module, names: dict[nn.Module, str], input_size: tuple[int, ...]) -> list[_Seen]:
    """List every call of every module in one forward pass, in the order of completion.

    The pass runs on tensors that have a shape and no content; only where the model cannot do with these, in full.
    """
    with held(plain_pass(), torch.no_grad()):
        return _record_plainly(model, names, input_size)


def _record_plainly(model: nn.Module, names: dict[nn.Module, str], input_size: tuple[int, ...]) -> list[_Seen]:
    images = probe_input(model, input_size)
    try:
        state = {name: tensor.to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        return _listen(model, names, input_size[1:], partial(functional_call, model, state, (images.to("meta"),)))
    except Exception:  # whatever it is, the full pass will tell
        pass
    try:
        return _listen(model, names, input_size[1:], partial(model, images))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:  # what a wrong size leads to
        shown = f"{tuple(input_size)}, at which it raises {type(error).__name__}: {error}"
        raise ValueError(f"input_size must be one that the model accepts, got {shown}") from error


def _listen(
    model: nn.Module, names: dict[nn.Module, str], input_shape: tuple[int, ...], forward: Callable[[], Any]
) -> list[_Seen]:
    seen: list[_Seen] = []
    counts: dict[nn.Module, int] = {}
    keep: list[Tensor] = []  # alive, so that identities stay unique
    reader = Reader(model, input_shape)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        name = names[module]
        tensors = list(tensors_in(output))
        keep.extend(tensors)
        index = counts[module] = counts.get(module, -1) + 1
        reader.enter(module)
        site = None
        for position in by_preference(output):
            shape = tuple(tensors[position].shape)
            layout = reader.layout(module, inputs, shape) if shape[:1] == (PROBES,) else None
            if layout is not None:
                site = MapSite(name, module, index, layout.shape, layout.name, position, layout.prefix)
                break
        seen.append(_Seen(name, index, [tuple(t.shape) for t in tensors], [id(t) for t in tensors], site))

    with untouched(model), ExitStack() as hooks:
        for module in names:
            hooks.enter_context(after(module, hook))
        forward()
    return seen


def _last_map(calls: list[_Seen], input_size: tuple[int, ...]) -> MapSite:
    maps = [call for call in calls if call.site is not None]
    if not maps:
        raise ValueError(f"model must yield a spatial map somewhere, got none at input_size {input_size}")
    last = maps[-1]
    if last.name == "":  # the model itself: prefer a named module that returns the very same tensor
        same = [call for call in maps[:-1] if call.output == last.output]
        last = same[-1] if same else last
    assert last.site is not None
    return last.site
