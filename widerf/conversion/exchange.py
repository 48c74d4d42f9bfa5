"""Putting modules in the places of others: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

Result = TypeVar("Result")


def exchange(
    model: nn.Module, pairs: Mapping[nn.Module, nn.Module], work: Callable[[], Result], stay: bool = True
) -> Result:
    """Put new modules in the places of old ones, wherever ``model`` holds them, and call ``work``.

    If anything is raised, KeyboardInterrupt included, and if not ``stay``, all old ones are back afterwards.

    Args:
        model: what holds them; it cannot be one of them.
        pairs: old module → new module.
        work: what to do while the new modules are in place.
        stay: whether they stay.

    Returns:
        what ``work`` returns.

    Example:
        >>> net = nn.Sequential(nn.ReLU())
        >>> exchange(net, {net[0]: nn.GELU()}, lambda: type(net[0]).__name__, stay=False), type(net[0]).__name__
        ('GELU', 'ReLU')
    """
    places = [
        (module._modules, name, child, pairs[child])
        for module in model.modules()
        for name, child in module._modules.items()
        if child is not None and child in pairs
    ]

    def put_back() -> None:
        for held, name, old, _ in places:
            held[name] = old

    try:
        try:
            for held, name, _, new in places:
                held[name] = new
            result = work()
            if not stay:
                put_back()
        except BaseException:
            put_back()
            raise
    except BaseException:  # once more, should an interrupt have struck the putting back
        put_back()
        raise
    return result
