"""How a tensor lays its map out: told from the input's shape and from the maps seen before in the same pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

_MAX_PREFIX = 8  # class and register tokens in front of the patch tokens
_GROSS = 2.0

AxisOrderName = Literal["channels_first", "channels_last", "tokens", "no_channels"]
Shape = tuple[int, ...]


class AxisOrder(NamedTuple):
    """A map in a tensor.

    Attributes:
        shape: ``(channels, *spatial)``; one channel where the tensor has no axis for them.
        name: how the map is laid out.
        prefix: tokens in front of the map.
    """

    shape: Shape
    name: AxisOrderName
    prefix: int = 0


class Reader:
    """Reads the tensors of one forward pass in their order."""

    def __init__(self, model: nn.Module, input_shape: Shape) -> None:
        self.input_shape = input_shape
        self.channels: dict[Shape, int | None] = {input_shape: None}  # of the last map on each grid; latest grid last
        self.token_grids: set[Shape] = set()
        self.lost: set[int] = set()  # lengths of sequences whose tokens were picked out of a grid
        self.last_leaf_is_linear = False
        declared = getattr(model, "num_prefix_tokens", None)
        first = [declared] if isinstance(declared, int) else []
        self.prefixes = [*first, *(n for n in range(_MAX_PREFIX + 1) if n not in first)]
        self.says_tokens = bool(first) or any(map(_attends, model.modules()))

    def enter(self, module: nn.Module) -> None:
        """Note which kind of leaf has run."""
        if isinstance(module, nn.Linear | nn.LayerNorm):
            self.last_leaf_is_linear = True
        elif isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
            self.last_leaf_is_linear = False

    def layout(self, module: nn.Module, inputs: Any, shape: Shape) -> AxisOrder | None:
        """The map in a module's output of shape ``(batch, …)``; ``None`` if there is none."""
        rank = len(self.input_shape)
        found = self._map(shape) if len(shape) == rank + 2 else None
        if found is None and len(shape) in (rank + 1, 3):
            found = self._flat(module, inputs, shape)
        if found is None or math.prod(found.shape[1:]) <= 1:
            return None
        grid = found.shape[1:]
        self.channels.pop(grid, None)
        self.channels[grid] = found.shape[0]
        return found

    def _map(self, shape: Shape) -> AxisOrder:
        first, last = self._distortion(shape[2:]), self._distortion(shape[1:-1])
        # Rectangular kernels distort a map a little, a channel axis read as a spatial one much: without a hint that the
        # channels are last, only a gross distortion counts.
        if last <= first if self.last_leaf_is_linear else _GROSS * last < first:
            return AxisOrder((shape[-1], *shape[1:-1]), "channels_last")
        return AxisOrder(shape[1:], "channels_first")

    def _distortion(self, spatial: Shape) -> float:
        """How far the map's aspect is from the input's: 1 where all axes have the same jump."""
        jumps = [n / m for n, m in zip(self.input_shape, spatial, strict=True)]
        return max(jumps) / min(jumps)

    def _flat(self, module: nn.Module, inputs: Any, shape: Shape) -> AxisOrder | None:
        """A map without an axis for channels, or tokens; of two readings that of the later grid."""
        rank = len(self.input_shape)
        for grid in reversed(self.channels):
            if len(shape) == rank + 1 and shape[1:] == grid and self._may_lack_channels(grid):
                return AxisOrder((1, *grid), "no_channels")
            if len(shape) == 3 and self._are_channels(grid, shape[2]) and math.prod(grid) == shape[1]:
                return self._as_tokens(shape, grid, 0)
        return self._tokens(module, inputs, shape) if len(shape) == 3 else None

    def _may_lack_channels(self, grid: Shape) -> bool:
        """Features of a linear layer are no map; along one axis neither is a vector, unless there was one channel."""
        return not self.last_leaf_is_linear and (len(grid) > 1 or self.channels[grid] == 1)

    def _are_channels(self, grid: Shape, channels: int) -> bool:
        return grid in self.token_grids or self.channels[grid] == channels

    def _tokens(self, module: nn.Module, inputs: Any, shape: Shape) -> AxisOrder | None:
        """Tokens only where attention, a linear layer or the model itself says so."""
        _, tokens, channels = shape
        if tokens in self.lost or not (self.says_tokens or self.last_leaf_is_linear):
            return None
        for prefix in self.prefixes:
            for grid in reversed(self.channels):
                if math.prod(grid) == tokens - prefix and math.prod(grid) > 1:
                    return self._as_tokens(shape, grid, prefix)
        if self._were_picked(module, inputs, tokens, channels):
            self.lost.add(tokens)
            return None
        for prefix in self.prefixes:
            for grid in self._guesses():
                if math.prod(grid) == tokens - prefix and math.prod(grid) > 1:
                    return self._as_tokens(shape, grid, prefix)
        return None

    def _were_picked(self, module: nn.Module, inputs: Any, tokens: int, channels: int) -> bool:
        """Whether a sequence holds a part of the last grid's elements: no module merged them that had all of them."""
        grid, before = next(reversed(self.channels.items()))
        if tokens >= math.prod(grid) or channels != before:
            return False
        merged = any(math.prod(t.shape[1:]) >= math.prod(grid) * channels for t in tensors_in(inputs))
        return not merged or any(word in type(module).__name__.lower() for word in ("drop", "mask"))

    def _as_tokens(self, shape: Shape, grid: Shape, prefix: int) -> AxisOrder:
        self.token_grids.add(grid)
        return AxisOrder((shape[2], *grid), "tokens", prefix)

    def _guesses(self) -> Iterator[Shape]:
        for jump in range(2, max(self.input_shape)):
            yield tuple(-(-n // jump) for n in self.input_shape)


def _attends(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return any(word in name for word in ("attention", "attn", "transformer"))


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)


def by_preference(output: Any) -> list[int]:
    """Positions of the tensors of a module's output, that which is most likely meant first.

    Of a dict what is called ``"out"`` and then what is not called auxiliary; of several tensors of one shape the first;
    of a pyramid, whose shapes differ, the last, which is the deepest.
    """
    positions = list(range(len(list(tensors_in(output)))))
    if isinstance(output, Mapping):
        ranked = [_rank(key) for key, value in output.items() for _ in tensors_in(value)]
        return sorted(positions, key=lambda position: (ranked[position], -position))
    alike = len({t.shape for t in tensors_in(output)}) == 1
    return positions if alike else positions[::-1]


def _rank(key: Any) -> int:
    return 0 if key == "out" else 2 if "aux" in str(key).lower() else 1
