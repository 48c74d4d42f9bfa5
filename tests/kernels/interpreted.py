"""Numbers of the Triton kernels on CPU tensors: for a process of its own, which interprets the kernels, see `begin`."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.reference import scattered_convolution

ROUNDING = {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}  # relative error of one rounding, either way
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One layer and its input; ``rows[c]`` numbers the pattern of input channel c."""

    rows: tuple[int, ...]
    outs: int
    groups: int = 1
    kernel: tuple[int, int] = (3, 3)
    batch: int = 2
    size: tuple[int, int] = (7, 6)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    reach: int = 3
    dtype: str = "float32"
    layout: str = "contiguous"
    settings: tuple[tuple[str, Any], ...] = ()  # names of `widerf.kernels.cuda` for this case
    sizes: tuple[int, int, int] | None = None  # pixels, outputs and inputs of a program of `box_kernels`
    boxes: bool = False  # whether it is a layer for `box_kernels`
    seed: int = 0


def begin() -> None:
    """Triton reads this when it is imported: not to be called where other tests run."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaNs: what no kernel writes is seen


@contextmanager
def interpreting() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets: it decides that when it is imported, for good."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=begin) as pool:
        yield pool


def wrong(found: dict[str, float], case: Case) -> list[str]:
    """The maps that are not right to one rounding of their numbers; what is no number is wrong."""
    return [name for name, error in found.items() if not error <= ROUNDING[case.dtype]]


@contextmanager
def _changed(module: Any, kernel: str, old: str, new: str) -> Iterator[Any]:
    """The module as it would be with one place of one kernel changed: in a file, where Triton looks for sources."""
    source = Path(module.__file__).read_text()
    start = source.index(f"\ndef {kernel}(")
    end = source.find("\n@jit", start)
    body = source[start:end]
    assert body.count(old) == 1, (kernel, body.count(old), old)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mutant.py")
        path.write_text(source[:start] + body.replace(old, new) + source[end:])
        spec = importlib.util.spec_from_file_location("mutant", path)
        assert spec and spec.loader
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        yield changed


def errors_of_mutant(case: Case, kernel: str, old: str, new: str) -> dict[str, float]:
    """Return `errors` with ``old`` in the kernel's source replaced by ``new``."""
    from widerf.kernels import box_kernels, cuda, cuda_boxes, triton_kernels

    module, user = (box_kernels, cuda_boxes) if case.boxes else (triton_kernels, cuda)
    with _changed(module, kernel, old, new) as changed, mock.patch.object(user, "_kernels", lambda: changed):
        return errors(case)


def arranged(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in memory of another order."""
    if layout == "channels_last":
        return tensor.to(memory_format=torch.channels_last)
    if layout == "sliced":  # within numbers that show up wherever they are read
        wide = torch.full([n + 2 for n in tensor.shape], torch.nan, dtype=tensor.dtype)
        inner = wide[tuple(slice(1, -1) for _ in tensor.shape)]
        return inner.copy_(tensor)
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    return tensor


def problem(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, weight, offsets (in, taps, 2) of distinct taps from the centre, and the shifts that they amount to."""
    draw = torch.Generator().manual_seed(case.seed)
    side, taps = 2 * case.reach + 1, case.kernel[0] * case.kernel[1]
    cells = [torch.randperm(side**2, generator=draw)[:taps] for _ in range(max(case.rows) + 1)]
    patterns = torch.stack([torch.stack([c // side, c % side], -1) - case.reach for c in cells])
    offsets = patterns[list(case.rows)]
    centre = torch.tensor([(k - 1) // 2 for k in case.kernel])
    if case.size[0] == 1:  # a signal as an image of one row
        offsets = offsets.clone()
        offsets[..., 0] = 0
        offsets[..., 1] = torch.arange(taps) * 2 - taps + torch.tensor(case.rows)[:, None]
    shifts = torch.tensor(case.dilation) * (offsets + centre) - torch.tensor(case.padding)
    dtype = DTYPES[case.dtype]
    x = torch.randn(case.batch, len(case.rows), *case.size, generator=draw).to(dtype)
    weight = torch.randn(case.outs, len(case.rows) // case.groups, *case.kernel, generator=draw).to(dtype)
    return x, weight, offsets, shifts


@contextmanager
def _set(case: Case) -> Iterator[None]:
    """Take the settings and sizes of the case."""
    from widerf.kernels import configurations, cuda

    def sized(shape: configurations.Shape) -> configurations.Configuration:
        assert case.sizes
        return configurations.fit(shape, configurations.Configuration(*case.sizes, 4, 3, programs=40))

    choose = sized if case.sizes else configurations.from_table
    settings = dict(case.settings)
    taken = mock.patch.multiple(cuda, **settings) if settings else nullcontext()
    with taken, mock.patch.object(configurations, "choose", choose):
        yield


def errors(case: Case) -> dict[str, float]:
    """Return the greatest error of each of the three maps over the greatest number, against float64 `F.conv2d`."""
    from widerf.kernels import cuda

    x, weight, offsets, shifts = problem(case)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    options = (case.stride, case.padding, case.dilation, case.groups)
    exact_y = scattered_convolution(exact_x, exact_weight, None, offsets, *options)
    grad = torch.randn(exact_y.shape, generator=torch.Generator().manual_seed(case.seed + 1)).to(x.dtype)
    exact = (exact_y, *torch.autograd.grad(exact_y, (exact_x, exact_weight), grad.double()))
    x, grad = arranged(x, case.layout), arranged(grad, case.layout)
    with _set(case):
        assert cuda.unsupported(x, weight) is None
        assert (cuda.why_not_boxes(shifts, x, case.stride, case.outs, case.groups) is None) == case.boxes
        common = (shifts, case.stride, case.groups)
        maps = {
            "forward": lambda: cuda.forward(x, weight, *common, exact_y.shape[2:]),
            "grad_input": lambda: cuda.grad_input(grad, weight, *common, x.shape[2:]),
            "grad_weight": lambda: cuda.grad_weight(x, grad, *common).reshape(weight.shape),
        }
        found = {}
        for (name, compute), wanted in zip(maps.items(), exact, strict=True):
            value = compute()
            assert value.dtype == x.dtype and value.shape == wanted.shape, (name, value.dtype, value.shape)
            source = {"forward": x, "grad_input": grad}.get(name)
            # A tensor of one channel or pixel is in both formats at once.
            if source is not None and min(*source.shape[1:], *value.shape[1:]) > 1 and value.numel():
                last = value.is_contiguous(memory_format=torch.channels_last)
                assert last == (case.layout == "channels_last"), (name, value.stride())
            difference = (value.double() - wanted.detach()).abs()
            scale = wanted.detach().abs().max() if difference.numel() else torch.zeros(())
            # No tap on the image: all must be zero.
            found[name] = float(difference.max() / (scale if scale > 0 else 1)) if difference.numel() else 0.0
        return found
