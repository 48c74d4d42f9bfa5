"""Batches of random or real images for a measurement."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from widerf._checks import require
from widerf.trace.layout import tensors_in


class Images:
    """Batches of random or real images, of the size asked for."""

    def __init__(
        self, source: Tensor | Iterable[Any] | None, size: tuple[int, ...], like: Tensor, generator: torch.Generator
    ) -> None:
        self.size, self.like, self.generator = size, like, generator
        self.random = source is None
        known = source is None or isinstance(source, Tensor | Iterable)
        require(known, "inputs", "be a tensor, an iterable or None", type(source).__name__, TypeError)
        self.batches = iter(()) if source is None else iter([source] if isinstance(source, Tensor) else source)
        self.rest = like

    def take(self, count: int) -> Tensor:
        """Up to ``count`` images; fewer when the source is at its end."""
        if self.random:
            device, dtype = self.generator.device, self.like.dtype
            x = torch.randn((count, *self.size), generator=self.generator, device=device, dtype=torch.float32)
            return x.to(self.like.device, dtype)
        while len(self.rest) < count:
            batch = next(self.batches, None)
            if batch is None:
                break
            self.rest = torch.cat([self.rest, self._checked(batch)])
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken

    def _checked(self, batch: Any) -> Tensor:
        first = next(tensors_in(batch), None)
        require(first is not None, "inputs", "yield tensors", type(batch).__name__, TypeError)
        assert first is not None
        images = first[None] if first.ndim == len(self.size) else first
        require(images.is_floating_point(), "inputs", "hold floating-point images", images.dtype, TypeError)
        shape = tuple(images.shape)
        require(
            shape[1:] == self.size, "inputs", f"have the shape of input_size {self.size} after the batch axis", shape
        )
        require(bool(images.isfinite().all()), "inputs", "be finite", "NaN or infinity")
        return images.to(self.like.device, self.like.dtype)
