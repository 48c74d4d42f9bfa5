"""Names of modules, and hooks that come off whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils.hooks import RemovableHandle

from widerf.trace.certain import certainly


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """Names of all modules, unwrapped."""
    return {module: unwrapped(name) for name, module in model.named_modules()}


def unwrapped(name: str) -> str:
    """Return a module's name without the wrappers that compilation puts around it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


@contextmanager
def after(module: nn.Module, hook: Callable[[nn.Module, Any, Any], None]) -> Iterator[None]:
    """Call ``hook(module, inputs, output)`` after each call of a module, be it a scripted one, which takes no hooks."""

    def other(called: nn.Module, inputs: Any, output: Any) -> None:
        if called is module:
            hook(called, inputs, output)

    handles: list[RemovableHandle] = []
    with certainly(lambda: remove(handles)):
        if isinstance(module, torch.jit.ScriptModule):
            handles.append(module_hooks.register_module_forward_hook(other))
        else:
            handles.append(module.register_forward_hook(hook))
        yield


def remove(handles: Sequence[RemovableHandle]) -> None:
    """Take hooks off."""
    for handle in handles:
        handle.remove()
