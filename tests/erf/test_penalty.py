"""The penalty: what `predict` computes, with its derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import widerf
from tests.reference import fingerprint


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def conv(inputs: int, outputs: int, k: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, k, padding=k // 2, **options)


class Residual(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module], act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv(4, 4, bias=False), norm(4), act(), conv(4, 4, bias=False), norm(4))
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.branch(x))


def residual(norm: Callable[[int], nn.Module], act: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(conv(1, 4), Residual(norm, act), Residual(norm, act))


def computed() -> nn.Sequential:
    net = nn.Sequential(conv(1, 4), nn.ReLU(), parametrizations.weight_norm(conv(4, 4)), nn.ReLU(), conv(4, 4))
    widerf.init.apply(net, 0.4, only="0", lasting=True)
    return net


def sparse() -> nn.Sequential:
    one = widerf.SparseConv2d(4, 4, 3, padding=1, extent=7, pattern="stratified", seed=0)
    two = widerf.SparseConv2d(4, 4, 3, padding=1, extent=5, seed=1, groups=4)
    return nn.Sequential(conv(1, 4), nn.ReLU(), one, nn.ReLU(), two)


def mobile() -> nn.Sequential:
    pool = nn.Sequential(conv(1, 4, stride=2), nn.BatchNorm2d(4), nn.Hardswish(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(pool, conv(4, 4, 5, groups=4), nn.Hardsigmoid(), nn.Upsample(scale_factor=2), conv(4, 4))


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(conv(1, 4), nn.ReLU(inplace=True), conv(4, 4, 5), nn.ReLU(), conv(4, 3)),
    "batch statistics": lambda: residual(nn.BatchNorm2d, nn.ReLU),
    "running statistics": lambda: residual(nn.BatchNorm2d, nn.ReLU).eval(),
    "smooth": lambda: residual(nn.BatchNorm2d, nn.SiLU),
    "group norm": lambda: residual(lambda c: nn.GroupNorm(2, c), nn.GELU),
    "computed": computed,
    "sparse": sparse,
    "mobile": mobile,
}
SIZE = (1, 15, 15)
all_nets = pytest.mark.parametrize("build", NETS.values(), ids=NETS)
pytestmark = pytest.mark.filterwarnings("ignore::widerf.ClippedWarning")  # maps are small here, and equal on both roads


def minus_log_std(net: nn.Module) -> float:
    return -math.log(widerf.predict(net, SIZE).std)


@all_nets
def test_it_is_minus_the_logarithm_of_the_predicted_std(build: Callable[[], nn.Module]) -> None:
    net = build().double()
    penalty = widerf.erf_penalty(net, SIZE)
    assert (penalty.shape, penalty.dtype, penalty.requires_grad) == ((), torch.float64, True)
    assert penalty.item() == pytest.approx(minus_log_std(net), abs=1e-12)
    for wanted in (1.0, 50.0):
        gap = max(0.0, math.log(wanted) + minus_log_std(net)) ** 2
        assert widerf.erf_penalty(net, SIZE, target=wanted).item() == pytest.approx(gap, abs=1e-12)


@all_nets
def test_its_gradient_is_the_slope_of_the_prediction_along_every_parameter(build: Callable[[], nn.Module]) -> None:
    net, step = build().double(), 1e-6
    parameters = dict(net.named_parameters())
    widerf.erf_penalty(net, SIZE).backward()
    steep = 0
    for name, parameter in parameters.items():
        direction = torch.randn_like(parameter)
        ends = []
        for shift in (step, -2 * step):
            parameter.data.add_(direction, alpha=shift)
            ends.append(minus_log_std(net))
        parameter.data.add_(direction, alpha=step)
        slope = 0.0 if parameter.grad is None else float((parameter.grad * direction).sum())
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8), name
        steep += abs(slope) > 1e-4
    assert steep >= 3


def test_in_a_chain_without_non_linearities_it_is_the_sum_of_the_profiles_variances() -> None:
    net = nn.Sequential(conv(2, 4, bias=False), conv(4, 4, 5, bias=False, padding_mode="zeros")).double()
    with torch.no_grad():
        for layer in net:  # every pair of channels has one profile, so that channels do not mix them
            layer.weight.copy_(torch.rand(layer.kernel_size, dtype=torch.float64).expand_as(layer.weight))

    def variance(weight: Tensor) -> Tensor:
        share = weight.square().sum((0, 1)) / weight.square().sum()
        places = torch.arange(len(share), dtype=torch.float64)
        means = [(share.sum(1 - axis) * places).sum() for axis in (0, 1)]
        return sum((share.sum(1 - axis) * (places - means[axis]) ** 2).sum() for axis in (0, 1)) / 2

    by_hand = -(variance(net[0].weight) + variance(net[1].weight)).log() / 2
    penalty = widerf.erf_penalty(net, (2, 15, 15))
    assert penalty.item() == pytest.approx(by_hand.item(), abs=1e-12)
    total = [torch.autograd.grad(value, net[1].weight)[0].sum((0, 1)) for value in (penalty, by_hand)]
    torch.testing.assert_close(*total)


@pytest.mark.parametrize("name", ["plain", "batch statistics", "computed", "sparse"])
def test_alone_it_widens_the_predicted_erf_of_an_untrained_network(name: str) -> None:
    size = (1, 41, 41)
    net = NETS[name]()
    before = widerf.predict(net, size).std
    optimiser = torch.optim.SGD(net.parameters(), 0.5)
    course = [before]
    for _ in range(10):
        optimiser.zero_grad()
        widerf.erf_penalty(net, size).backward()
        optimiser.step()
        course.append(widerf.predict(net, size).std)
    assert course[-1] > 1.04 * before, course


def test_it_goes_beyond_the_ceiling_of_one_profile_for_all_channels() -> None:
    # √3 is the most that three 3×3 profiles can have; channels that go on in one direction each have up to 3.
    net = nn.Sequential(*(conv(1 if i == 0 else 8, 8, bias=False) for i in range(3))).double()
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        optimiser.zero_grad()
        widerf.erf_penalty(net, SIZE).backward()
        optimiser.step()
    assert widerf.predict(net, SIZE).std > 1.1 * math.sqrt(3)


def test_with_a_target_it_stops_there() -> None:
    net = NETS["plain"]().double()
    wide = widerf.predict(net, SIZE).std
    optimiser = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(60):
        optimiser.zero_grad()
        widerf.erf_penalty(net, SIZE, target=1.05 * wide).backward()
        optimiser.step()
    assert widerf.predict(net, SIZE).std == pytest.approx(1.05 * wide, rel=0.01)
    at_rest, weights = widerf.erf_penalty(net, SIZE, target=0.9 * wide), [net[0].weight, net[2].weight]
    assert at_rest.item() == 0
    assert all(float(g.abs().max()) == 0 for g in torch.autograd.grad(at_rest, weights) if g is not None)


def test_its_gradient_adds_to_that_of_the_loss() -> None:
    net, x = NETS["batch statistics"]().double(), torch.randn(3, *SIZE, dtype=torch.float64)
    weight = net[1].branch[0].weight
    # The penalty is taken between the loss's forward and backward pass, whose graph it must leave whole.
    loss = F.mse_loss(net(x), torch.zeros(3, 4, 15, 15, dtype=torch.float64))
    penalty = widerf.erf_penalty(net, SIZE)
    of_loss, of_penalty = (torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (loss, penalty))
    (loss + 0.3 * penalty).backward()
    torch.testing.assert_close(weight.grad, of_loss + 0.3 * of_penalty)


@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
@all_nets
def test_the_model_and_its_gradients_are_untouched(build: Callable[[], nn.Module], around: type) -> None:
    net = build()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(net.parameters()).requires_grad_(False)
    before = fingerprint(net)
    with around():
        penalty = widerf.erf_penalty(net, SIZE)
    assert penalty.requires_grad
    assert fingerprint(net) == before


def test_frozen_weights_get_no_gradient() -> None:
    net = NETS["plain"]()
    net[0].weight.requires_grad_(False)
    widerf.erf_penalty(net, SIZE).backward()
    assert net[0].weight.grad is None
    assert net[2].weight.grad is not None


def test_half_precision_is_predicted_as_it_is() -> None:
    net = NETS["plain"]().bfloat16()
    penalty = widerf.erf_penalty(net, SIZE)
    assert penalty.item() == pytest.approx(minus_log_std(net), abs=1e-6)
    penalty.backward()
    assert net[0].weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": 0.0}, ValueError, "target must be positive, got 0.0"),
        ({"target": float("nan")}, ValueError, "target must be positive"),
        ({"target": "wide"}, TypeError, "target must be a number of pixels, got 'wide'"),
        ({"input_size": 15}, TypeError, "input_size"),
        ({"layer": "nowhere"}, ValueError, "layer must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        widerf.erf_penalty(NETS["plain"](), **{"input_size": SIZE, **arguments})


def test_a_dead_unit_and_a_single_pixel_have_no_penalty() -> None:
    net = NETS["plain"]()
    nn.init.zeros_(net[2].weight)
    with pytest.raises(widerf.DeadUnitError, match="dead or silent"):
        widerf.erf_penalty(net, SIZE)
    with pytest.raises(ValueError, match="see more than one pixel"):
        widerf.erf_penalty(nn.Conv2d(1, 1, 1), SIZE)
