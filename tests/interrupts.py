"""Interrupts at chosen lines, and what they have to leave alone."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch._dynamo import eval_frame
from torch.nn.modules import module as modules
from torch.utils.checkpoint import CheckpointFunction


class Interrupts:
    """Raises at the n-th line that runs in files whose name holds one of some parts, once, and counts the lines."""

    def __init__(self, at: int, rooms: tuple[str, ...] = ("/widerf/",)) -> None:
        self.at, self.rooms, self.lines, self.place = at, rooms, 0, ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename.replace("\\", "/")
        if not any(room in file for room in self.rooms):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.place = f"{file}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self


def interrupted(call: Callable[[], Any], at: int, rooms: tuple[str, ...] = ("/widerf/",)) -> Interrupts:
    """Run ``call`` with an interrupt at the ``at``-th line (0: with none); where it struck, "" if it did not."""
    interrupts, before = Interrupts(at, rooms), sys.gettrace()
    sys.settrace(interrupts)
    try:
        call()
    except KeyboardInterrupt:
        assert interrupts.place
    finally:
        sys.settrace(before)
    return interrupts


def surroundings() -> list[Any]:
    """The state of the process that a call may touch on its way and has to leave as it was."""
    hooks = [value for name, value in sorted(vars(modules).items()) if name.startswith("_global_")]
    return [
        *(list(hook) if isinstance(hook, dict) else hook for hook in hooks),
        *(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        *(torch.get_default_device(), torch.backends.mha.get_fastpath_enabled()),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        *(torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()),
        *(torch.autograd.Function.__dict__["apply"], CheckpointFunction.__dict__.get("apply")),
        *(torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        torch.are_deterministic_algorithms_enabled(),
        list(warnings.filters),
        repr(eval_frame._stance),
    ]
