"""Predicted ERFs against exact sums over weight signs, known stacks, and the measured road."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference import fingerprint
from widerf import SparseConv2d, measure, predict, receptive_field
from widerf.erf.energy import backpropagate
from widerf.erf.prediction import expected_energy
from widerf.errors import UntreatedOperatorError
from widerf.trace.recorder import record
from widerf.trace.sandbox import untouched
from widerf.trace.scene import Scene
from widerf.trace.site import spatial_layer


def energy_of(model: nn.Module, image: Tensor, unit: tuple[int, ...]) -> Tensor:
    """Energy at each element of the image, on its own scale."""
    site = spatial_layer(model, tuple(image.shape[1:]), "")
    with untouched(model), torch.no_grad():
        tape = record(model, image, site)
        seed = torch.zeros_like(tape.values[tape.target])
        seed[(slice(None), slice(None), *unit)] = 1
        return backpropagate(tape, seed)


def squared_jacobian(function: nn.Module, image: Tensor, unit: tuple[int, ...]) -> Tensor:
    """Σ over a unit's channels of the squared gradient, one channel after another: the slow twin."""
    total = torch.zeros_like(image)
    image = image.clone().requires_grad_()
    for value in function(image)[(0, slice(None), *unit)]:
        total += torch.autograd.grad(value, image, retain_graph=True)[0].square()
    return total


def image_of(*shape: int) -> Tensor:
    return torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# ── one operator: the rule is its squared Jacobian ──────────────────────────────────────────────────────


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.kind = nn.Parameter(torch.zeros(()))  # its type is that of the model

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


GATE = torch.linspace(0.5, 2, 4, dtype=torch.float64).view(1, 4, 1, 1)
OPERATORS = {
    "conv": nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
    "grouped conv": nn.Conv2d(4, 8, (3, 2), padding=1, groups=2),
    "transposed conv": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "leaky": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(4),
    "mish": nn.Mish(),
    "swish by hand": Apply(lambda x: x * torch.sigmoid(x)),
    "hardswish by hand": Apply(lambda x: x * F.relu6(x + 3) / 6),
    "square": Apply(lambda x: x * x),
    "relu after a scaled skip": Apply(lambda x: F.relu(x + 0.3 * x)),
    "layer scale": Apply(lambda x: x * GATE),
    "average pooling": nn.AvgPool2d(2),
    "overlapping average pooling": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "adaptive pooling": nn.AdaptiveAvgPool2d(4),
    "max pooling": nn.MaxPool2d(3, stride=2, padding=1),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": nn.Upsample(size=(9, 11), mode="bicubic", align_corners=True),
    "nearest": nn.Upsample(scale_factor=2),
    "batch norm, running": nn.BatchNorm2d(4).eval(),
    "group norm": nn.GroupNorm(2, 4),
    "layer norm": Apply(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)),
    "softmax": nn.Softmax(dim=1),
    "mean over channels": Apply(lambda x: x.mean(1, keepdim=True)),
    "largest channel": Apply(lambda x: x.amax(1, keepdim=True)),
    "norm over channels": Apply(lambda x: x.norm(dim=1, keepdim=True)),
    "linear": Apply(lambda x: F.linear(x.permute(0, 2, 3, 1), GATE.view(1, 4)).permute(0, 3, 1, 2)),
    "pixel shuffle": nn.PixelShuffle(2),
    "fold": Apply(lambda x: F.fold(x.flatten(2), (7, 7), 2)),
    "unfold": Apply(lambda x: F.unfold(x, 3, stride=3).unflatten(2, (2, 2))),
    "copy in place": Apply(lambda x: torch.zeros_like(x).copy_(x[:, :1])),
    "roll and slice": Apply(lambda x: torch.roll(x, 2, -1)[:, 1:, 1:, 1:]),
    "padding": nn.ZeroPad2d((1, 2, 0, 1)),
    "reflection": nn.ReflectionPad2d(2),
    "einsum": Apply(lambda x: torch.einsum("bchw,kc->bkhw", x, GATE.view(2, 2).repeat(1, 2))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_each_rule_is_the_squared_jacobian_of_its_operator(name: str) -> None:
    torch.manual_seed(0)
    model = OPERATORS[name].double()
    image = image_of(4, 6, 6)
    shape = model(image).shape[2:]
    for unit in {tuple(n // 2 for n in shape), tuple(0 for _ in shape)}:
        expected = squared_jacobian(model, image, unit)
        torch.testing.assert_close(energy_of(model, image, unit), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("model", [nn.BatchNorm2d(3).double().train(), nn.InstanceNorm2d(3).double()])
def test_batch_statistics_take_and_give_the_energy_of_their_jacobian(model: nn.Module) -> None:
    """All but the cross term of the two parts that go to all positions, which is zero on average."""
    image = image_of(3, 8, 8)
    with untouched(model):
        expected = squared_jacobian(model, image, (4, 4))
    found = energy_of(model, image, (4, 4))
    torch.testing.assert_close(found[..., 4, 4], expected[..., 4, 4], rtol=1e-2, atol=0)
    torch.testing.assert_close(found.sum((2, 3)), expected.sum((2, 3)), rtol=1e-2, atol=0)


def test_a_norm_made_of_single_operators_is_right_but_for_one_over_n() -> None:
    """Its direct path and that through the mean square are taken as uncorrelated: an error of 2/n in the energy."""
    model = Apply(lambda x: x * x.square().mean(1, keepdim=True).rsqrt()).double()
    image = image_of(64, 2, 2)
    found, expected = energy_of(model, image, (1, 1)).sum(), squared_jacobian(model, image, (1, 1)).sum()
    assert abs(float(found / expected) - 1) < 3 / 64


# ── a network: the rule is the mean over all signs of the weights ───────────────────────────────────────


def test_a_linear_network_is_the_exact_mean_over_weight_signs() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv1d(1, 2, 2, bias=False), nn.Conv1d(2, 1, 2, bias=False)).double()
    weights = [m.weight.data.clone() for m in model]
    image, total, count = image_of(1, 7), torch.zeros(1, 1, 7, dtype=torch.float64), 0
    predicted = energy_of(model, image, (2,))
    for signs in itertools.product((-1.0, 1.0), repeat=8):
        for m, w, s in zip(model, weights, (signs[:4], signs[4:]), strict=True):
            m.weight.data = w * torch.tensor(s, dtype=torch.float64).view_as(w)
        total += squared_jacobian(model, image, (2,))
        count += 1
    torch.testing.assert_close(predicted, total / count)


@pytest.mark.parametrize(
    ("depth", "energy", "amplitude"),
    [(5, 8.307, 10.440), (10, 11.705, 15.524), (20, 16.155, 22.738), (40, 22.738, 31.953)],
)
def test_uniform_stacks_have_their_known_sizes(depth: int, energy: float, amplitude: float) -> None:
    model = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(depth))).double()
    for conv in model:
        nn.init.ones_(conv.weight)
    erf = predict(model, (1, 2 * depth + 1, 2 * depth + 1))
    assert round(erf.size(of="energy"), 3) == energy
    assert round(erf.size(of="amplitude"), 3) == amplitude
    assert math.isclose(erf.std**2, depth * 2 / 3, rel_tol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 2), st.integers(1, 3)), min_size=1, max_size=4),
    rank=st.integers(1, 2),
)
def test_variances_add_up_over_layers(layers: list[tuple[int, int, int]], rank: int) -> None:
    """σ² = Σ (J d)² (k² − 1)/12 for uniform profiles without padding (Luo et al. 2016, eq. 11)."""
    conv = (nn.Conv1d, nn.Conv2d)[rank - 1]
    model = nn.Sequential(*(conv(1, 1, k, stride=s, dilation=d, bias=False) for k, s, d in layers)).double()
    for module in model:
        nn.init.ones_(module.weight)
    jump, variance = 1, 0.0
    for k, s, d in layers:
        variance += (jump * d) ** 2 * (k * k - 1) / 12
        jump *= s
    extent = 1 + sum((k - 1) * d * math.prod(s for _, s, _ in layers[:i]) for i, (k, _, d) in enumerate(layers))
    erf = predict(model, (1, *(extent + 2 * jump,) * rank), layer=str(len(layers) - 1))
    assert math.isclose(erf.std**2, variance, rel_tol=1e-9, abs_tol=1e-9)
    assert erf.clipped == 0
    assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(erf.centroid, erf.center, strict=True))


class Block(nn.Module):
    def __init__(self, channels: int, norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))


def residual(norm: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 24, 3, padding=1, bias=False), *(Block(24, norm) for _ in range(4)))


def redraw(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)


@pytest.mark.parametrize("norm", [False, True])
def test_relu_after_the_addition_agrees_with_the_measured_road(norm: bool) -> None:
    """The pair's common sign is counted: without it the prediction was 3 % low."""
    model = residual(norm).train()
    generator = torch.Generator().manual_seed(0)
    measured = measure(model, (1, 25, 25), samples=160, redraw=redraw)
    maps = []
    for _ in range(12):
        redraw(model, generator)
        maps.append(predict(model, (1, 25, 25)).map)
    offset = torch.arange(25, dtype=torch.float64) - 12
    predicted = math.sqrt(float((torch.stack(maps).mean(0).sum(0) * offset**2).sum()))
    assert abs(predicted / measured.std - 1) < 0.02 + 2 * measured.standard_error("std") / measured.std


# ── contracts ───────────────────────────────────────────────────────────────────────────────────────────


def test_prediction_is_deterministic_and_leaves_no_trace() -> None:
    model = residual(norm=True).train()
    before = fingerprint(model)
    first = predict(model, (1, 16, 16))
    assert fingerprint(model) == before
    assert torch.equal(first.map, predict(model, (1, 16, 16)).map)


def test_the_scale_of_weights_does_not_matter_even_in_deep_stacks() -> None:
    """Energies of 60 layers at 1e-3 would underflow to zero in float32."""
    model = nn.Sequential(*(nn.Conv1d(1, 1, 3, padding=1, bias=False) for _ in range(60)))
    for conv in model:
        nn.init.constant_(conv.weight, 1e-3)
    assert math.isclose(predict(model, (1, 121)).std ** 2, 60 * 2 / 3, rel_tol=1e-4)


def test_the_true_scale_of_the_energy_is_told() -> None:
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(12))).double()

    def log_energy() -> float:
        energy, log_scale = expected_energy(Scene.of(model, (2, 9, 9)))
        return math.log(float(energy.sum())) + log_scale

    before = log_energy()
    for parameter in model.parameters():
        parameter.data *= 1e-3
    assert log_energy() == pytest.approx(before + 12 * 2 * math.log(1e-3))


def test_any_unit_may_be_asked_for() -> None:
    erf = predict(nn.Conv2d(1, 1, 3, padding=1), (1, 9, 9), unit=(2, -3))
    assert erf.center == (2.0, 6.0)
    assert erf.map.nonzero().amin(0).tolist() == [1, 5]


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x))


def test_an_operator_without_a_rule_is_named_with_its_module() -> None:
    with pytest.raises(UntreatedOperatorError, match=r"fft.*module '1'"):
        predict(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), Fourier()), (1, 8, 8), layer="1")


def test_a_dead_unit_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU())
    nn.init.constant_(model[0].bias, -100.0)
    with pytest.raises(ValueError, match="dead"):
        predict(model, (1, 8, 8))


def test_a_silent_residual_branch_leaves_the_field_of_the_skip() -> None:
    torch.manual_seed(0)  # one of 16 draws has a dead unit
    block = Block(4, norm=False)
    nn.init.zeros_(block.second.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        erf = predict(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), block), (1, 11, 11))
    assert int((erf.map > 0).sum()) <= 9


@pytest.mark.parametrize("pattern", ["mixed", "partition", "grid"])
def test_a_sparse_convolution_is_predicted_and_traced_like_its_dense_twin(pattern: str) -> None:
    torch.manual_seed(0)
    sparse = [SparseConv2d(8, 8, 3, stride=s, padding=1, extent=7, pattern=pattern, seed=s) for s in (1, 2)]
    first = nn.Conv2d(1, 8, 3, padding=1)
    roads = [nn.Sequential(first, nn.ReLU(), sparse[0], nn.ReLU(), sparse[1])]
    roads.append(nn.Sequential(first, nn.ReLU(), sparse[0].to_conv2d(), nn.ReLU(), sparse[1].to_conv2d()))
    maps = [predict(model.double(), (1, 32, 32)).map for model in roads]
    torch.testing.assert_close(maps[0], maps[1])
    fields = [receptive_field(model, (1, 32, 32)) for model in roads]
    assert fields[0].size == fields[1].size == (15, 15)
    assert fields[0].center((8, 8)) == fields[1].center((8, 8)) == (16.0, 16.0)


def test_dropping_a_path_half_of_the_time_is_no_special_case() -> None:
    """The dispatcher leaves out a probability that equals the default, 0.5."""

    class Half(nn.Module):
        def __init__(self, keep: float) -> None:
            super().__init__()
            self.conv, self.keep = nn.Conv2d(2, 2, 3, padding=1), keep

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x) * x.new_empty(len(x), 1, 1, 1).bernoulli_(self.keep) / self.keep

    stds = []
    for keep in (0.499999, 0.5, 0.500001):
        torch.manual_seed(0)
        stds.append(predict(Half(keep).double(), (2, 9, 9)).std)
    assert stds == sorted(stds, reverse=True)
    assert stds[1] == pytest.approx((stds[0] + stds[2]) / 2, rel=1e-9)
