"""The sparse convolution is the framework's convolution with the scattered kernel, and differentiates like it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.reference import scattered_convolution
from widerf import SparseConv1d, SparseConv2d, SparseConv3d, patterns
from widerf.functional import sparse_conv1d, sparse_conv2d, sparse_conv3d

# What PyTorch says of its own: its padding, which some of the twins use, and its forward mode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning"),
]

LAYERS: Any = {1: SparseConv1d, 2: SparseConv2d, 3: SparseConv3d}
FUNCTIONS = {1: sparse_conv1d, 2: sparse_conv2d, 3: sparse_conv3d}
PLAIN: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def layers(draw: Any) -> tuple[Any, Tensor]:
    """A sparse layer of any kind and an input that it takes."""
    rank = draw(st.integers(1, 3))
    small = rank == 3
    k = tuple(draw(st.integers(1, 2 if small else 4)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = tuple(draw(st.integers(1, 1 if padding == "same" else 3)) for _ in range(rank))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 3)) for _ in range(rank))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 3 if small else 5))
    extent = tuple(n + draw(st.integers(0, 2 if small else 5)) for n in k)
    layer = LAYERS[rank](
        channels,
        groups * draw(st.integers(1, 2)),
        k,
        stride,
        padding,
        dilation,
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
        extent=extent,
        pattern=draw(st.sampled_from(sorted(set(patterns.NAMED) - ({"rings"} if rank != 2 else set())))),
        seed=draw(st.integers(0, 2**31)),
    )
    needed = [d * (n - 1) + 1 for n, d in zip(k, dilation, strict=True)]
    if isinstance(padding, tuple):
        needed = [max(1, n - 2 * p) for n, p in zip(needed, padding, strict=True)]
    elif padding == "same":
        needed = [1] * rank
    spatial = [n + draw(st.integers(0, 3 if small else 6)) for n in needed]
    batch = draw(st.sampled_from([None, 0, 1, 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = [channels, *spatial] if batch is None else [batch, channels, *spatial]
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return layer, x


def agree(layer: Any, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    inputs = [x, *layer.parameters()]
    y = layer(x)
    twin = scattered_convolution(
        x,
        layer.weight,
        layer.bias,
        layer.offsets,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.padding_mode,
    )
    assert y.shape == twin.shape
    torch.testing.assert_close(y, twin, rtol=1e-9, atol=1e-9)
    up = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    for a, b in zip(torch.autograd.grad(y, inputs, up), torch.autograd.grad(twin, inputs, up), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers())
def test_outputs_and_gradients_equal_those_of_the_scattered_kernel(case: tuple[Any, Tensor]) -> None:
    agree(*case)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(layers())
def test_outputs_and_gradients_equal_those_of_the_scattered_kernel_in_2000_cases(case: tuple[Any, Tensor]) -> None:
    agree(*case)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers())
def test_the_output_has_the_size_that_the_plain_layer_gives(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    plain = PLAIN[layer.RANK](x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert layer(x).shape == plain.shape


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(layers())
def test_the_dense_twin_gives_the_same_output(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    twin = layer.to_dense()
    if (
        layer.padding_mode != "zeros"
    ):  # padding modes of plain layers refuse small images and empty batches: move inside
        x = torch.randn(2, layer.in_channels, *[40] * layer.RANK if layer.RANK < 3 else [14] * 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow  # importing PyTorch's own test inputs takes longer than the tests
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_pytorchs_own_sample_inputs(rank: int) -> None:
    from torch.testing._internal.common_methods_invocations import op_db

    samples = next(op for op in op_db if op.name == f"nn.functional.conv{rank}d").sample_inputs("cpu", torch.float64)
    count = 0
    for sample in samples:
        weight, *rest = sample.args
        bias = rest[0] if rest else sample.kwargs.pop("bias", None)
        kernel_size, channels = tuple(weight.shape[2:]), weight.shape[1] * sample.kwargs.get("groups", 1)
        dense = patterns.dense_taps(kernel_size)[None]
        y = FUNCTIONS[rank](sample.input, weight, bias, dense, **sample.kwargs)
        torch.testing.assert_close(y, PLAIN[rank](sample.input, weight, bias, **sample.kwargs), rtol=1e-9, atol=1e-9)
        wide = patterns.partition(kernel_size, tuple(n + 3 for n in kernel_size), groups=channels)
        y = FUNCTIONS[rank](sample.input, weight, bias, wide, **sample.kwargs)
        twin = scattered_convolution(sample.input, weight, bias, wide, **sample.kwargs)
        torch.testing.assert_close(y, twin, rtol=1e-9, atol=1e-9)
        count += 1
    assert count >= 10


@pytest.mark.parametrize("spacing", [1, 2, 3, 5])
@pytest.mark.parametrize("k", [3, 5])
def test_a_grid_of_spacing_d_is_the_dilated_layer(k: int, spacing: int) -> None:
    torch.manual_seed(0)
    extent = spacing * (k - 1) + 1
    layer = SparseConv2d(4, 6, k, padding=k // 2, extent=extent, pattern="grid", dtype=torch.float64)
    dilated = nn.Conv2d(4, 6, k, padding=spacing * (k // 2), dilation=spacing, dtype=torch.float64)
    dilated.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "offsets"})
    x = torch.randn(2, 4, 13, 9, dtype=torch.float64)
    assert torch.equal(layer(x), dilated(x))


@pytest.mark.parametrize("pattern", sorted(patterns.NAMED))
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_with_extent_k_it_is_the_plain_layer(pattern: str, padding_mode: Any, groups: int) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 8, (3, 2), 2, (1, 0), 2, groups, padding_mode=padding_mode, dtype=torch.float64)
    layer = SparseConv2d(
        4,
        8,
        (3, 2),
        2,
        (1, 0),
        2,
        groups,
        padding_mode=padding_mode,
        dtype=torch.float64,
        extent=(3, 2),
        pattern=pattern,
    )
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


# ── differentiation
# ─────────────────────────────────────────────────────────────────────────────────────────────────────


def tiny(groups: int = 1, pattern: str = "partition") -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layer = SparseConv2d(4, 4, (3, 2), (2, 1), 1, groups=groups, extent=5, pattern=pattern, dtype=torch.float64)
    return layer, torch.randn(2, 4, 4, 3, dtype=torch.float64, requires_grad=True)


def as_function(layer: Any) -> Any:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sparse_conv2d(x, weight, bias, layer.offsets, layer.stride, layer.padding, layer.dilation, layer.groups)

    return call


@pytest.mark.parametrize(("groups", "pattern"), [(1, "partition"), (2, "mixed"), (4, "centered"), (1, "grid")])
def test_first_and_second_derivatives_and_forward_mode_are_exact(groups: int, pattern: str) -> None:
    layer, x = tiny(groups, pattern)
    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(as_function(layer), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(as_function(layer), inputs, check_fwd_over_rev=True)


def test_forward_mode_through_the_layer() -> None:
    layer, x = tiny()
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), tangent)))
    torch.testing.assert_close(y.tangent, layer(tangent) - layer(torch.zeros_like(tangent)))


@pytest.mark.parametrize("groups", [1, 4])
def test_vmap_over_inputs_and_over_weights(groups: int) -> None:
    layer, x = tiny(groups)
    xs = torch.randn(3, *x.shape, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(layer)(xs), torch.stack([layer(a) for a in xs]))
    ws = torch.randn(3, *layer.weight.shape, dtype=torch.float64)
    call = as_function(layer)
    both = torch.vmap(lambda a, w: call(a, w, layer.bias))(xs, ws)
    torch.testing.assert_close(both, torch.stack([call(a, w, layer.bias) for a, w in zip(xs, ws, strict=True)]))


@pytest.mark.parametrize("groups", [1, 4])
def test_per_sample_gradients_are_those_of_one_sample_at_a_time(groups: int) -> None:
    layer, x = tiny(groups)
    parameters = dict(layer.named_parameters())

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (sample[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.detach())
    for i, sample in enumerate(x.detach()):
        wanted = torch.autograd.grad(layer(sample[None]).square().sum(), list(parameters.values()))
        for name, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(found[name][i], gradient)


def test_jacobian_and_hessian_transforms_compose() -> None:
    layer, x = tiny()
    flat = torch.func.jacrev(layer)(x.detach()[:1])
    torch.testing.assert_close(flat, torch.func.jacfwd(layer)(x.detach()[:1]))


# ── bad input
# ───────────────────────────────────────────────────────────────────────────────────────────────────────────

X, W = torch.zeros(1, 4, 5, 5), torch.zeros(2, 4, 3, 3)
TAPS = patterns.dense_taps(3)[None]
SAME, MANY = TAPS * 0, TAPS.repeat(5, 1, 1)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "offsets must be an integer tensor.*float32", lambda: sparse_conv2d(X, W, None, TAPS.float())),
        (TypeError, "offsets must be an integer tensor.*list", lambda: sparse_conv2d(X, W, None, TAPS.tolist())),
        (ValueError, r"offsets must be .*shape \(groups, 9, 2\)", lambda: sparse_conv2d(X, W, None, TAPS[:, :4])),
        (ValueError, r"offsets\[0\] must hold no tap twice, got \[\(0, 0\)\]", lambda: sparse_conv2d(X, W, None, SAME)),
        (ValueError, "offsets must have no more groups than the 4", lambda: sparse_conv2d(X, W, None, MANY)),
        (ValueError, "stride must be positive, got 0", lambda: sparse_conv2d(X, W, None, TAPS, stride=0)),
        (ValueError, "dilation must be positive, got 0", lambda: sparse_conv2d(X, W, None, TAPS, dilation=0)),
        (ValueError, "padding must not be negative, got -1", lambda: sparse_conv2d(X, W, None, TAPS, padding=-1)),
        (ValueError, "padding must be one of 'same', 'valid'", lambda: sparse_conv2d(X, W, None, TAPS, padding="some")),
        (ValueError, "stride must be 1", lambda: sparse_conv2d(X, W, None, TAPS, stride=2, padding="same")),
        (ValueError, "groups must divide the 2 outputs, got 3", lambda: sparse_conv2d(X, W, None, TAPS, groups=3)),
        (RuntimeError, "channels", lambda: sparse_conv2d(X, W, None, TAPS, groups=2)),
        (RuntimeError, "Kernel size can't be greater", lambda: sparse_conv2d(X[..., :2], W, None, TAPS)),
        (RuntimeError, "Expected 3D", lambda: sparse_conv2d(X[0, 0], W, None, TAPS)),
        (RuntimeError, "bias must have shape", lambda: sparse_conv2d(X, W, torch.zeros(3), TAPS)),
        (ValueError, "weight must have 4 axes", lambda: sparse_conv2d(X, W[0], None, TAPS)),
    ],
)  # fmt: skip
def test_bad_input_names_argument_rule_and_value(error: Any, message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()
