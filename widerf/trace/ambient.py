"""The state of the world around a computation, brought to one that does not depend on who calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction


@contextmanager
def own_state(*, gradients: bool | None = None) -> Iterator[None]:
    """Neither the caller's ``inference_mode`` nor autocast; nothing compiled, no checkpoint; gradients as told."""
    on = torch.is_grad_enabled() if gradients is None else gradients
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(on))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_eager())
        stack.enter_context(_without_checkpoints())
        yield


@contextmanager
def plain_pass() -> Iterator[None]:
    """A model's pass as it is by itself, whoever calls, in operators that can be seen.

    What the model itself does stays: its own ``no_grad`` is part of it. Compiled modules and functions run as they were
    written, attention as matrix products.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with own_state(gradients=True), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # The recorder's hooks on all modules are also called for the compiler's wrappers, which is meant.
            warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def plain_arithmetic(*, gradients: bool | None = None) -> Iterator[None]:
    """Arithmetic on a recording: in float32 on the CPU where nothing else is said, whatever the caller's defaults."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    # Where it is the default, the context would only be gone through by every operator.
    there = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    try:
        with own_state(gradients=gradients), there:
            yield
    finally:
        torch.set_default_dtype(kept)


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Reentrant checkpoints run what they hold as it stands: inside them nothing has a gradient before the backward."""

    def apply(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args)

    kept = CheckpointFunction.__dict__.get("apply")
    CheckpointFunction.apply = staticmethod(apply)
    try:
        yield
    finally:
        if kept is None:
            del CheckpointFunction.apply
        else:
            CheckpointFunction.apply = kept


def _eager() -> Any:
    """Nothing is compiled; below torch 2.6, which has no stance, by the compiler's own switch."""
    if hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    from torch import _dynamo

    return _dynamo.config.patch(disable=True)
