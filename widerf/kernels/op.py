"""The sparse convolution and its two transposes as operators of PyTorch, whichever kernel computes them.

The convolution f(x, w) is bilinear, and so are its transposes; the three are closed under differentiation, so that
derivatives of any order stay on the fast path. A compiler sees each as one closed operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from widerf import kernels
from widerf.kernels import columns, cpu, cuda, gate
from widerf.kernels.cuda_tables import Shifts, read_shifts
from widerf.kernels.plan import Layout, Plan, read_plan, slices, trim

_library: Any = torch.library.Library("widerf", "DEF")  # type: ignore[no-untyped-call]
FAR = 1 << 12  # a border of more pixels is not added in earnest: taps out there read zeros
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)


def _opened() -> bool:
    """Whether what a compiler compiles is to hold stock operators: it exports, or `torch.func` transforms it."""
    return torch.compiler.is_exporting() or torch._C._are_functorch_transforms_active()


# Asked within what it compiles, torch 2.11 answers that it exports, whatever it does.
_opened._dynamo_marked_constant = True  # type: ignore[attr-defined]


def watched(*tensors: Tensor) -> bool:
    """Whether somebody follows the operators one by one: an exporter, a tracer, a counter of operations, a transform.

    They get operators that all of them know. A compiler takes the closed operator, but an exported program has to run
    where widerf is not installed.
    """
    if torch.compiler.is_dynamo_compiling():
        return _opened()
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or _get_current_dispatch_mode() is not None
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or not _plain(tensors)
    )


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are tensors and nothing else; those of many gradients at once say so too, and are not."""
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or torch._C._functorch.is_legacy_batchedtensor(t):
            return False
    return True


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the format of a result computed from ``x``: channels_last stays channels_last."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if wanted is None or x.is_contiguous() or not x.is_contiguous(memory_format=wanted):
        return torch.contiguous_format
    return wanted


@lru_cache(maxsize=512)
def shifts_of(plan: str) -> Shifts:
    """Return the shifts as the CUDA kernels take them: of one row for a signal."""
    return read_shifts([[(0, *map(gate.narrow, shift))[-2:] for shift in taps] for taps in read_plan(plan).shifts])


def _on_cuda(name: str, first: Tensor, second: Tensor, plan: Plan, shape: Sequence[int], last: bool) -> Tensor:
    """Call `widerf.kernels.cuda`, which takes images only: a signal is one of one row."""
    flat = first.dim() == 3
    if flat:
        first, second = first.unsqueeze(2), second.unsqueeze(2)
    common = (shifts_of(plan.text), (1, *plan.stride)[-2:], plan.groups)
    if name == "grad_weight":
        return cuda.grad_weight(first, second, *common, last).view(shape)
    size = (1, *(shape if name == "forward" else shape[2:]))[-2:]
    result: Tensor = getattr(cuda, name)(first, second, *common, size, last)
    # No view: autograd would not let the bias be added to it in place.
    return torch.ops.aten._unsafe_view(result, [*result.shape[:2], *result.shape[3:]]) if flat else result


def _compute(name: str, first: Tensor, second: Tensor, text: str, shape: Sequence[int]) -> Tensor:
    """Compute one of the three maps, which bear the same names in all kernels, by the path for such tensors."""
    call, plan = gate.admit(name, first, second, text, shape), read_plan(text)
    form = memory_format(first)
    dtype, (path, _) = first.dtype, kernels.path(first.device, first.dtype, first.dim() - 2)
    if call.empty:
        result = torch.zeros(call.result, dtype=dtype, device=first.device)
    elif path == "cuda" and call.small:
        result = _on_cuda(name, first, second, plan, shape, form == torch.channels_last)
    elif path == "cpu" and call.small:
        result = getattr(cpu, name)(first.float(), second.float(), plan, shape).to(dtype)
    else:
        x, _, y = gate.shapes(name, first.shape, second.shape, shape)
        result = getattr(columns, name)(first, second, trim(text, tuple(x[2:]), tuple(y[2:])), shape)
    result = result.contiguous(memory_format=form)
    if name == "grad_weight" and result.shape[1] == 1 and form != torch.contiguous_format:
        # In both formats at once; the strides are to say channels_last as those of the weight do: DDP looks at them.
        return result.as_strided(result.shape, (result.stride(0), 1, *result.stride()[2:]))
    return result


def _define(name: str, arguments: str, kernel: str, fake: Any, backward: Any, plain: Any) -> Any:
    """Register one operator (first, second, plan, shape) → tensor."""
    _library.define(f"{name}({arguments}) -> Tensor", tags=_TAGS)

    def compute(first: Tensor, second: Tensor, plan: str, shape: Sequence[int]) -> Tensor:
        return _compute(kernel, first, second, plan, shape)

    def setup(ctx: Any, inputs: Any, output: Tensor) -> None:
        _keep(ctx, *inputs)

    def derivatives(ctx: Any, up: Tensor) -> Any:
        return _derive(ctx, backward, up)

    def batched(info: Any, dims: Any, first: Tensor, second: Tensor, plan: str, shape: Sequence[int]) -> Any:
        def one(a: Tensor, b: Tensor) -> Tensor:
            gate.check(kernel, a.shape, b.shape, read_plan(plan), shape)
            result: Tensor = plain(a, b, read_plan(plan), shape)
            return result

        return torch.vmap(one, dims[:2])(first, second), 0

    def shaped(first: Tensor, second: Tensor, plan: str, shape: Sequence[int]) -> Tensor:
        gate.check_kinds(kernel, first, second)
        gate.check_channels(read_plan(plan), *gate.shapes(kernel, first.shape, second.shape, shape))
        result: Tensor = fake(first, second, shape)
        return result

    full = f"widerf::{name}"
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(full, shaped, lib=_library)
    torch.library.register_autograd(full, derivatives, setup_context=setup, lib=_library)
    if hasattr(torch.library, "register_vmap"):  # torch 2.5
        torch.library.register_vmap(full, batched, lib=_library)
    return getattr(torch.ops.widerf, name).default


def _shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _keep(ctx: Any, first: Tensor, second: Tensor, plan: str, shape: Sequence[int]) -> None:
    """Keep what the derivatives of a call need."""
    ctx.save_for_backward(first, second)
    ctx.plan = plan


def _derive(ctx: Any, backward: Any, up: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    """Return the derivatives of a call, by operators only where somebody follows them.

    An operator in Python costs as much time as a small kernel on a GPU.
    """
    first, second = ctx.saved_tensors
    followed = torch.is_grad_enabled() or watched(first, second, up)
    calls = zip(ctx.needs_input_grad[:2], backward(ctx.plan, first, second, up), strict=True)
    found = [
        (_OPERATORS[name](*call) if followed else _compute(name, *call)) if needed else None
        for needed, (name, *call) in calls
    ]
    return found[0], found[1], None, None


class _Convolution(torch.autograd.Function):
    """The convolution where nobody follows the operators: theirs is the same, after several layers of Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plan: str, size: Sequence[int]) -> Tensor:
        _keep(ctx, x, weight, plan, size)
        return _compute("forward", x, weight, plan, size)

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> Any:
        return _derive(ctx, _after_forward, up)


def _call(x: Tensor, weight: Tensor, plan: str, size: Sequence[int]) -> Tensor:
    """Convolve by the operator where a compiler is to see it or there is no memory, by what it does elsewhere."""
    if torch.compiler.is_compiling() or x.is_meta:
        by: Any = _forward
    elif torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        by = _Convolution.apply
    else:
        return _compute("forward", x, weight, plan, size)
    result: Tensor = by(x, weight, plan, size)
    return result


def _after_forward(plan: str, x: Tensor, weight: Tensor, up: Tensor) -> Any:
    return ("grad_input", up, weight, plan, x.shape), ("grad_weight", x, up, plan, weight.shape)


def _after_grad_input(plan: str, grad: Tensor, weight: Tensor, up: Tensor) -> Any:
    return ("forward", up, weight, plan, grad.shape[2:]), ("grad_weight", up, grad, plan, weight.shape)


def _after_grad_weight(plan: str, x: Tensor, grad: Tensor, up: Tensor) -> Any:
    return ("grad_input", grad, up, plan, x.shape), ("forward", x, up, plan, grad.shape[2:])


_forward: Any = _define(
    "sparse_conv",
    "Tensor input, Tensor weight, str plan, SymInt[] size",
    "forward",
    lambda x, weight, size: _shaped(x, (x.shape[0], weight.shape[0], *size)),
    _after_forward,
    columns.plain,
)
_grad_input: Any = _define(
    "sparse_conv_grad_input",
    "Tensor grad, Tensor weight, str plan, SymInt[] shape",
    "grad_input",
    lambda grad, weight, shape: _shaped(grad, shape),
    _after_grad_input,
    columns.plain_grad_input,
)
_grad_weight: Any = _define(
    "sparse_conv_grad_weight",
    "Tensor input, Tensor grad, str plan, SymInt[] shape",
    "grad_weight",
    lambda x, grad, shape: _shaped(x, shape),
    _after_grad_weight,
    columns.plain_grad_weight,
)
_OPERATORS = {"forward": _forward, "grad_input": _grad_input, "grad_weight": _grad_weight}


def native(plan: Plan, device: torch.device, dtype: torch.dtype, closed: bool = True) -> bool:
    """Whether PyTorch's own convolution computes a plan: where all channels read one grid.

    cuDNN's depthwise convolutions are an order of magnitude slower with a spacing than without: there ours are faster,
    where the operators may be ``closed``.
    """
    if plan.spacing is None or max(*plan.before, *plan.after) > FAR:
        return False
    spaced = plan.groups == plan.channels > 1 and max(plan.spacing) > 1
    ours = closed and spaced and device.type == "cuda" and kernels.compiled(device, dtype, len(plan.spacing))
    return not ours


def _convolve_piece(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, size: Sequence[int], closed: bool
) -> Tensor:
    if native(plan, x.device, x.dtype, closed):
        assert plan.spacing is not None
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
        first, last = plan.runs[0].shifts[0], plan.runs[0].shifts[-1]
        part = columns.pad(x, plan)[slices(plan, size, first, [b - a for a, b in zip(first, last, strict=True)])]
        return convolution(part, weight, bias, plan.stride, 0, plan.spacing, plan.groups)
    if closed:
        y = _call(x, weight, plan.text, size)
        return y if bias is None else y.add_(bias.view(-1, *(1,) * len(size)))
    stock = columns.exportable if torch.compiler.is_compiling() else columns.plain
    y = stock(x, weight, plan, size)
    return y if bias is None else y + bias.view(-1, *(1,) * len(size))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, size: Sequence[int]) -> Tensor:
    """Convolve ``x`` (batch, channels, *spatial), zero outside; returns (batch, out, *size)."""
    closed = not watched(x, weight) and not x.is_complex()  # the operators' derivatives are those of real numbers
    pieces = layout.pieces
    if len(pieces) == 1:
        return _convolve_piece(x, weight, bias, pieces[0], size, closed)
    if closed and kernels.compiled(x.device, x.dtype, len(size)):
        return _convolve_piece(x, weight, bias, layout.whole, size, closed)
    widths = [plan.channels for plan in pieces]
    parts = list(zip(torch.split(x, widths, 1), torch.split(weight, widths, 1), pieces, strict=True))
    parts.sort(key=lambda part: part[2].spacing is None)  # the native convolution adds the bias for nothing
    total = _convolve_piece(*parts[0][:2], bias, parts[0][2], size, closed)
    for part, w, plan in parts[1:]:
        total = total + _convolve_piece(part, w, None, plan, size, closed)
    return total
