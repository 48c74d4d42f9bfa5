"""Ends of blocks that come about wherever an interrupt strikes, be it on the way out of the block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


@contextmanager
def certainly(undo: Callable[[], Any]) -> Iterator[None]:
    """Call ``undo`` when the block ends, and once more should an interrupt have struck it: it has to bear that.

    Example:
        >>> done = []
        >>> with certainly(lambda: done.append("undone")):
        ...     done.append("done")
        >>> done
        ['done', 'undone', 'undone']
    """
    try:
        try:
            yield
        finally:
            undo()
    finally:
        undo()


@contextmanager
def held(*contexts: AbstractContextManager[Any]) -> Iterator[list[Any]]:
    """Enter contexts in order and leave all of them, also where an interrupt keeps ``with`` from calling its exit.

    ``with`` itself forgets a context that is no generator if something is raised between the block and the exit.

    Example:
        >>> import torch
        >>> with held(torch.no_grad(), torch.device("cpu")):
        ...     torch.is_grad_enabled()
        False
    """
    stack = ExitStack()
    with certainly(stack.close):
        yield [stack.enter_context(context) for context in contexts]
