"""A block in which anything may be done to a model, which comes back bit-identical."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Give ``model`` to a block and restore it afterwards, also when the block raises or is interrupted.

    Restored bit by bit: parameters, buffers and plain tensor attributes, their ``grad`` and ``requires_grad``, the
    mode of every module, hooks, submodules, further attributes (with the contents of dicts, lists and sets one level
    deep), and the global random states of torch (all devices), NumPy and Python. Tensors keep their identity and,
    where nothing was written, their version, so that a graph that was recorded before the block can still be
    differentiated.

    Args:
        model: any module; a second copy of its tensors is held while the block runs.

    Yields:
        ``model`` itself.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with untouched(model):
        ...     _ = model(torch.ones(4, 2))
        >>> model.running_mean.tolist(), model.num_batches_tracked.item()
        ([0.0, 0.0], 0)
    """
    steps = [_snapshot(model), _random_states()]

    def restore() -> None:
        while steps:  # a step is struck off when it is done: what an interrupt breaks off is begun again
            steps[-1]()
            steps.pop()

    try:
        try:
            yield model
        finally:
            restore()
    finally:
        restore()


def _snapshot(model: nn.Module) -> Callable[[], None]:
    modules = list(model.modules())
    attributes = [(module, _attributes(module)) for module in modules]
    tensors: dict[int, tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool]] = {}
    for module in modules:
        for tensor in _tensors(module):
            if id(tensor) not in tensors:
                grad = tensor.grad if tensor.is_leaf else None
                kept = None if grad is None else grad.detach().clone()
                tensors[id(tensor)] = (tensor, tensor.detach().clone(), grad, kept, tensor.requires_grad)

    def undo() -> None:
        for module, saved in attributes:
            _restore_attributes(module, saved)
        for tensor, value, grad, grad_value, requires_grad in tensors.values():
            _write_back(tensor, value)
            if tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
                tensor.grad = grad
            if grad is not None and grad_value is not None:
                _write_back(grad, grad_value)

    return undo


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    values = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    for value in values:
        if isinstance(value, Tensor) and value.device.type != "meta":
            yield value


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a shallow copy of its contents where it is a plain container."""
    containers = (dict, list, set)
    return {
        name: (value, value.copy() if isinstance(value, containers) else None) for name, value in vars(module).items()
    }


def _restore_attributes(module: nn.Module, saved: dict[str, tuple[Any, Any]]) -> None:
    # Through __dict__, since nn.Module.__setattr__ would file tensors and modules elsewhere.
    attributes = vars(module)
    for name in attributes.keys() - saved.keys():
        del attributes[name]
    for name, (value, contents) in saved.items():
        if contents is not None:
            _refill(value, contents)
        attributes[name] = value


def _refill(container: Any, contents: Any) -> None:
    if isinstance(container, list):
        container[:] = contents
    else:
        container.clear()
        container.update(contents)


def _write_back(tensor: Tensor, value: Tensor) -> None:
    # Written only where it differs, and through `.data`, which leaves the version alone.
    if tensor.shape != value.shape:
        tensor.data = value
    elif not torch.equal(tensor.detach(), value):
        tensor.data.copy_(value)


def _random_states() -> Callable[[], None]:
    cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def restore() -> None:
        torch.set_rng_state(cpu)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return restore
