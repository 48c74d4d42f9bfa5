"""What a layer was before a change, to undo one that did not hold."""

from __future__ import annotations

from typing import Any

from torch import nn

from widerf.init.weights import MARK, Held


class Backup:
    """Copies of a layer's sources and small state, and which class, parameters and submodules it had."""

    def __init__(self, held: Held) -> None:
        self.tensors = [(source, source.data, source.detach().clone()) for source in held.sources()]
        buffers = [b for b in nn.Module.buffers(held.module) if b is not None]
        self.tensors += [(buffer, buffer.data, buffer.detach().clone()) for buffer in buffers]
        self.held, self.mark = held, vars(held.module).get(MARK)
        self.shapes = [_shape_of(module) for module in held.module.modules()]

    def undo(self) -> None:
        """Put the layer together as it was, and write the copies back into the tensors they came from."""
        for module, kind, computed, dicts in self.shapes:
            module.__class__ = kind
            if computed is not None:  # removing a parametrisation takes the property off the class
                kind.weight = computed
            for name, contents in dicts.items():
                held = vars(module)[name]
                held.clear()
                held.update(contents)
        for tensor, data, value in self.tensors:
            data.copy_(value)
            tensor.data = data
        vars(self.held.module).pop(MARK, None)
        if self.mark is not None:
            setattr(self.held.module, MARK, self.mark)


def _shape_of(module: nn.Module) -> tuple[nn.Module, Any, Any, dict[str, dict[str, Any]]]:
    dicts = {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")}
    return module, type(module), vars(type(module)).get("weight"), dicts
