"""Finding the layer whose output is looked at, and laying that output out as (batch, channels, *spatial)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from widerf._checks import require, require_known
from widerf.trace.sandbox import untouched

_PROBES = 2  # images in the probing pass: more than one, so that the batch axis shows
_MAX_PREFIX = 8  # class and register tokens in front of the patch tokens

_GROSS = 2.0
Layout = Literal["channels_first", "channels_last", "tokens"]


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
    layout: Layout = "channels_first"
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
        if self.layout == "tokens":
            batch, _, channels = tensor.shape
            tensor = tensor[:, self.prefix :].reshape(batch, *self.spatial_shape, channels)
        return tensor.movedim(-1, 1)


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
    names = {module: name for name, module in model.named_modules()}
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
    names = {module: name for name, module in model.named_modules()}
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


def _site_of(calls: list[_Call], wanted: str, input_size: tuple[int, ...]) -> MapSite:
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


def check_input_size(input_size: Sequence[int]) -> tuple[int, ...]:
    """Return ``input_size`` as a tuple after checking that it is (channels, *spatial) of rank 1 to 3."""
    require(isinstance(input_size, Sequence), "input_size", "be (channels, *spatial)", input_size, TypeError)
    sizes = tuple(input_size)
    rule = "be (channels, *spatial): 2 to 4 positive integers"
    require(all(isinstance(n, int) and not isinstance(n, bool) for n in sizes), "input_size", rule, sizes, TypeError)
    require(2 <= len(sizes) <= 4 and min(sizes) > 0, "input_size", rule, sizes)
    return sizes


def check_unit(unit: Sequence[int] | int | None, spatial_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index of a unit on a map after checking it; by default the centre unit, ``n // 2`` on each axis.

    Negative indices count from the end. On a map with one axis an integer will do.

    Raises:
        TypeError: if an entry is not an integer.
        ValueError: if the unit lies outside the map or has the wrong number of axes.

    Example:
        >>> check_unit(None, (7, 7)), check_unit((0, -1), (7, 7))
        ((3, 3), (0, 6))
    """
    if unit is None:
        return tuple(n // 2 for n in spatial_shape)
    index = (unit,) if isinstance(unit, int) else tuple(unit)
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in index)
    require(whole, "unit", "hold integers only", unit, TypeError)
    inside = len(index) == len(spatial_shape) and all(-n <= i < n for i, n in zip(index, spatial_shape, strict=True))
    require(inside, "unit", f"lie on the map of shape {tuple(spatial_shape)}", unit)
    return tuple(i % n for i, n in zip(index, spatial_shape, strict=True))


def check_finite(model: nn.Module) -> None:
    """Raise ``ValueError`` that names the first parameter or buffer with a value that is not finite."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or bool(tensor.detach().sum().isfinite()):  # one look is enough
            continue
        # Masks of -inf are lawful buffers (Swin's shifted windows); NaN nowhere is.
        bad = bool(tensor.isnan().any() if not isinstance(tensor, nn.Parameter) else (~tensor.isfinite()).any())
        require(not bad, "model", "hold finite weights", f"NaN or infinity in {name!r}")


def probe_input(model: nn.Module, input_size: Sequence[int], batch: int = _PROBES) -> Tensor:
    """Zeros of shape ``(batch, *input_size)`` on the device and in the floating type of the model's first parameter."""
    tensors = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
    options: dict[str, Any] = {"device": tensors[0].device, "dtype": tensors[0].dtype} if tensors else {}
    return torch.zeros((batch, *input_size), **options)


@dataclass
class _Call:
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
    every = dict(model.named_modules(remove_duplicate=False))
    if layer:  # "" is the model itself
        require_known(layer, filter(None, every), "layer")
    return names[every[layer]]


def _record(model: nn.Module, names: dict[nn.Module, str], input_size: tuple[int, ...]) -> list[_Call]:
    """List every call of every module in one forward pass, in the order of completion.

    The pass runs on tensors that have a shape and no content; only where the model cannot do with these, in full.
    """
    images = probe_input(model, input_size)
    try:
        state = {name: tensor.to("meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        return _listen(model, names, input_size[1:], partial(functional_call, model, state, (images.to("meta"),)))
    except Exception:  # whatever it is, the full pass will tell
        pass
    try:
        return _listen(model, names, input_size[1:], partial(model, images))
    except Exception as error:
        shown = tuple(input_size)
        raise ValueError(f"input_size must be one that the model accepts, got {shown}: {error}") from error


def _listen(
    model: nn.Module, names: dict[nn.Module, str], input_shape: tuple[int, ...], forward: Callable[[], Any]
) -> list[_Call]:
    calls: list[_Call] = []
    counts: dict[str, int] = {}
    keep: list[Tensor] = []  # alive, so that identities stay unique
    reader = _Reader(model, input_shape)

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        name = names[module]
        tensors = list(tensors_in(output))
        keep.extend(tensors)
        index = counts[name] = counts.get(name, -1) + 1
        site = reader.site(name, module, index, tensors)
        calls.append(_Call(name, index, [tuple(t.shape) for t in tensors], [id(t) for t in tensors], site))

    with untouched(model), torch.no_grad():
        for module in names:
            module.register_forward_hook(hook)
        forward()
    return calls


def _last_map(calls: list[_Call], input_size: tuple[int, ...]) -> MapSite:
    maps = [call for call in calls if call.site is not None]
    if not maps:
        raise ValueError(f"model must yield a spatial map somewhere, got none at input_size {input_size}")
    last = maps[-1]
    if last.name == "":  # the model itself: prefer a named module that returns the very same tensor
        same = [call for call in maps[:-1] if call.output == last.output]
        last = same[-1] if same else last
    assert last.site is not None
    return last.site


class _Reader:
    """Tells how a tensor lays out its map, from the input's shape and from the maps seen before in the same pass."""

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.input_shape = input_shape
        self.grids: list[tuple[int, ...]] = [input_shape]
        self.last_leaf_is_linear = False
        declared = getattr(model, "num_prefix_tokens", None)
        first = [declared] if isinstance(declared, int) else []
        self.prefixes = [*first, *(n for n in range(_MAX_PREFIX + 1) if n not in first)]

    def site(self, name: str, module: nn.Module, call: int, tensors: list[Tensor]) -> MapSite | None:
        if isinstance(module, nn.Linear | nn.LayerNorm):
            self.last_leaf_is_linear = True
        elif isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
            self.last_leaf_is_linear = False
        for position in reversed(range(len(tensors))):
            tensor = tensors[position]
            site = MapSite(name, module, call, (), position=position)
            if tensor.ndim == len(self.input_shape) + 2:
                site = self._map(site, tuple(tensor.shape))
            elif tensor.ndim == 3:
                site = self._tokens(site, tuple(tensor.shape))
            if site.shape and math.prod(site.spatial_shape) > 1 and tensor.shape[0] == _PROBES:
                self.grids.append(site.spatial_shape)
                return site
        return None

    def _map(self, site: MapSite, shape: tuple[int, ...]) -> MapSite:
        first, last = self._distortion(shape[2:]), self._distortion(shape[1:-1])
        # Rectangular kernels distort a map a little, a channel axis read as a spatial one much: without a hint that the
        # channels are last, only a gross distortion counts.
        if last <= first if self.last_leaf_is_linear else _GROSS * last < first:
            return dataclasses.replace(site, shape=(shape[-1], *shape[1:-1]), layout="channels_last")
        return dataclasses.replace(site, shape=shape[1:])

    def _distortion(self, spatial: tuple[int, ...]) -> float:
        """How far the map's aspect is from the input's: 1 where all axes have the same jump."""
        jumps = [n / m for n, m in zip(self.input_shape, spatial, strict=True)]
        return max(jumps) / min(jumps)

    def _tokens(self, site: MapSite, shape: tuple[int, ...]) -> MapSite:
        _, tokens, channels = shape
        for prefix in self.prefixes:
            for grid in self._candidates():
                if math.prod(grid) == tokens - prefix and math.prod(grid) > 1:
                    return dataclasses.replace(site, shape=(channels, *grid), layout="tokens", prefix=prefix)
        return site

    def _candidates(self) -> Iterator[tuple[int, ...]]:
        yield from reversed(self.grids)
        for jump in range(2, max(self.input_shape)):
            yield tuple(-(-n // jump) for n in self.input_shape)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)
