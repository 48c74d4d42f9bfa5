"""The state of the world around a computation, brought to one that does not depend on who calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointFunction

from widerf.trace.certain import certainly, held


@contextmanager
def own_state(*, gradients: bool | None = None) -> Iterator[None]:
    """Neither the caller's ``inference_mode`` nor autocast; nothing compiled, no checkpoint; gradients as told."""
    on = torch.is_grad_enabled() if gradients is None else gradients
    cast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    with held(
        torch.inference_mode(False),
        _grad_mode(on),
        *(torch.autocast(device, enabled=False) for device in cast),
        _eager(),
        _without_checkpoints(),
    ):
        yield


@contextmanager
def _grad_mode(on: bool) -> Iterator[None]:
    # torch.set_grad_enabled sets the mode when it is made, not when it is entered
    kept = torch.is_grad_enabled()
    with certainly(lambda: torch.set_grad_enabled(kept)):
        torch.set_grad_enabled(on)
        yield


@contextmanager
def plain_pass() -> Iterator[None]:
    """A model's pass as it is by itself, whoever calls, in operators that can be seen.

    What the model itself does stays: its own ``no_grad`` is part of it. Compiled modules and functions run as they were
    written, attention as matrix products.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with certainly(lambda: torch.backends.mha.set_fastpath_enabled(fast)):
        torch.backends.mha.set_fastpath_enabled(False)
        with held(own_state(gradients=True), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings()):
            # The recorder's hooks on all modules are also called for the compiler's wrappers, which is meant.
            warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
            yield


@contextmanager
def plain_arithmetic(*, gradients: bool | None = None) -> Iterator[None]:
    """Arithmetic on a recording: in float32 on the CPU where nothing else is said, whatever the caller's defaults."""
    kept = torch.get_default_dtype()
    # Where it is the default, the context would only be gone through by every operator.
    there = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with certainly(lambda: torch.set_default_dtype(kept)):
        torch.set_default_dtype(torch.float32)
        with held(own_state(gradients=gradients), there):
            yield


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Reentrant checkpoints run what they hold as it stands: inside them nothing has a gradient before the backward."""

    def apply(function: Any, preserve: bool, *args: Any) -> Any:
        return function(*args)

    kept = CheckpointFunction.__dict__.get("apply")

    def restore() -> None:
        if kept is not None:
            CheckpointFunction.apply = kept
        elif "apply" in CheckpointFunction.__dict__:
            del CheckpointFunction.apply

    with certainly(restore):
        CheckpointFunction.apply = staticmethod(apply)
        yield


@contextmanager
def _eager() -> Iterator[None]:
    """Nothing is compiled."""
    stances: list[Any] = []  # a stance is taken when it is made, and the one before it again when it is left
    with certainly(lambda: [stance.__exit__(None, None, None) for stance in stances]):
        stances.append(torch.compiler.set_stance("force_eager"))
        yield
