"""Where a run takes place, and how the record names it."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from typing import Any

import torch

from experiments.harness.inputs import InputError
from experiments.harness.runs import Record


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA if there is one, then MPS, then the CPU.

    Raises:
        InputError: the device is unknown or absent.
    """
    if name == "auto":
        accelerators = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        name = next((kind for kind, there in accelerators.items() if there), "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device must be auto or a device that this machine has, got {name!r}") from error
    return device


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast on CUDA, full precision elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


class StepClock:
    """Seconds of a training step. The first one is left out: it pays for what is made once.

    Attributes:
        steps, seconds: counted so far, the first step left out.

    Example:
        >>> clock = StepClock(torch.device("cpu"))
        >>> for _ in range(3):
        ...     with clock:
        ...         pass
        >>> clock.steps, clock.seconds_a_step < 1
        (2, True)
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.steps, self.seconds = device, -1, 0.0

    def __enter__(self) -> None:
        self._started = self._now()

    def __exit__(self, *_: object) -> None:
        self.steps += 1
        if self.steps:
            self.seconds += self._now() - self._started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @property
    def seconds_a_step(self) -> float | None:
        """Mean over the steps counted; None without one."""
        return self.seconds / self.steps if self.steps > 0 else None


def machine(device: torch.device) -> Record:
    """Kind of machine and versions, for the record."""
    import timm

    import widerf

    kind = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()}-core {platform.machine()}"
    )
    return {
        "device": f"{device.type}: {kind}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "widerf": widerf.__version__,
    }
