"""Weights that are computed before each forward pass: what really is convolved has the profile, and keeps it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from timm.layers import CondConv2d, MixedConv2d, create_conv2d
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode

import widerf
from tests.reference import fingerprint
from widerf.init import apply
from widerf.profile import soft_corners


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


class Convolved(TorchFunctionMode):
    """Keeps the weight that each call of a convolution really gets: the oracle of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func in (F.conv1d, F.conv2d, F.conv3d):
            self.weights.append((args[1] if len(args) > 1 else kwargs["weight"]).detach().clone())
        return func(*args, **(kwargs or {}))


def convolved(layer: nn.Module, *inputs: Tensor) -> Tensor:
    """Return the weight that the layer's forward pass convolves with."""
    with Convolved() as mode:
        layer(*inputs)
    (weight,) = mode.weights
    return weight


def shares(weight: Tensor) -> Tensor:
    energy = weight.double().square().sum(dim=(0, 1))
    return energy / energy.sum()


def with_old_hook(function: Callable[..., nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(nn.Conv2d(8, 16, 3))


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.Conv2d(8, 16, 3), "weight", amount=0.3)


COMPUTED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(8, 16, 3)),
    "weight_norm over all": lambda: parametrizations.weight_norm(nn.Conv2d(8, 16, 3), dim=None),
    "old weight_norm": lambda: with_old_hook(nn.utils.weight_norm),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(8, 16, 3)),
    "old spectral_norm": lambda: with_old_hook(nn.utils.spectral_norm),
    "pruned": pruned,
    "StdConv2d": lambda: StdConv2d(8, 16, 3),
    "StdConv2dSame": lambda: StdConv2dSame(8, 16, 3),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(8, 16, 3),
    "ScaledStdConv2dSame": lambda: ScaledStdConv2dSame(8, 16, 3),
}


@pytest.mark.parametrize("strength", [0.3, 0.8])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())
def test_convolved_weight_has_the_profile_and_a_later_forward_keeps_it(
    make: Callable[[], nn.Module], training: bool, strength: float
) -> None:
    layer, x = make().train(training), torch.randn(2, 8, 9, 9)
    before = shares(convolved(layer.eval(), x))
    layer.train(training)
    (row,) = apply(nn.Sequential(layer), strength)
    assert row.widened
    wanted = before * soft_corners((3, 3), strength)
    for _ in range(3):
        now = convolved(layer, x)
        assert (shares(now) - wanted / wanted.sum()).abs().max() < 1e-4
    layer.eval()
    assert (shares(convolved(layer, x)) - wanted / wanted.sum()).abs().max() < 1e-4


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())
def test_profile_survives_steps_of_an_optimiser_that_does_not_move(make: Callable[[], nn.Module]) -> None:
    layer = make()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.0)
    apply(nn.Sequential(layer), 0.5)
    first = shares(convolved(layer, torch.randn(1, 8, 5, 5)))
    layer(torch.randn(1, 8, 5, 5)).square().sum().backward()
    optimiser.step()
    assert torch.allclose(shares(convolved(layer, torch.randn(1, 8, 5, 5))), first, atol=1e-6)


@pytest.mark.parametrize("name", ["weight_norm", "weight_norm over all", "old weight_norm", "pruned"])
def test_sum_of_squares_of_the_convolved_weight_is_kept(name: str) -> None:
    layer, x = COMPUTED[name](), torch.randn(1, 8, 5, 5)
    before = convolved(layer, x).double().square().sum()
    apply(nn.Sequential(layer), 0.5)
    assert float(convolved(layer, x).double().square().sum() / before) == pytest.approx(1.0, abs=2e-6)


@pytest.mark.parametrize("name", ["spectral_norm", "old spectral_norm"])
def test_spectral_norm_keeps_its_norm_and_is_told(name: str) -> None:
    layer, x = COMPUTED[name](), torch.randn(1, 8, 5, 5)
    (row,) = apply(nn.Sequential(layer), 0.8)
    assert "sets its scale" in row.verdict
    largest = torch.linalg.matrix_norm(convolved(layer.eval(), x).flatten(1), ord=2)
    assert float(largest) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())
def test_state_dict_keeps_its_shape_and_parameters_their_identity(make: Callable[[], nn.Module]) -> None:
    layer = make()
    before = {k: (v.shape, v.dtype, v.stride(), v.requires_grad, id(v)) for k, v in layer.named_parameters()}
    keys = list(layer.state_dict())
    apply(nn.Sequential(layer), 0.5)
    assert {k: (v.shape, v.dtype, v.stride(), v.requires_grad, id(v)) for k, v in layer.named_parameters()} == before
    assert list(layer.state_dict()) == keys


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())
def test_dry_run_and_look_leave_every_bit(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make()).train()
    before = fingerprint(model)
    apply(model, 0.5, dry_run=True)
    assert fingerprint(model) == before


@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED.keys())
def test_base_draws_the_convolved_weight(make: Callable[[], nn.Module]) -> None:
    layer = make()
    (row,) = apply(nn.Sequential(layer), 0.5, base=nn.init.normal_)
    assert row.widened
    assert (shares(convolved(layer, torch.randn(1, 8, 5, 5))) - soft_corners((3, 3), 0.5)).abs().max() < 0.12


def test_pruned_taps_stay_pruned() -> None:
    layer = pruned()
    apply(nn.Sequential(layer), 0.5)
    assert bool((convolved(layer, torch.randn(1, 8, 5, 5))[layer.weight_mask == 0] == 0).all())


def test_depthwise_standardised_weights_have_the_profile_where_plain_scaling_is_far_off() -> None:
    layer = StdConv2d(64, 64, 3, groups=64)
    plain = copy.deepcopy(layer)
    x = torch.randn(1, 64, 5, 5)
    before = shares(convolved(layer, x))
    apply(nn.Sequential(layer), 0.8)
    with torch.no_grad():
        plain.weight.mul_((9 * soft_corners((3, 3), 0.8)).sqrt())
    wanted = before * soft_corners((3, 3), 0.8)
    wanted = wanted / wanted.sum()
    assert (shares(convolved(layer, x)) - wanted).abs().max() < 1e-5
    assert (shares(convolved(plain, x)) - wanted).abs().max() > 0.02


def test_a_parametrisation_that_cannot_keep_a_profile_is_left_alone_and_told() -> None:
    class Flat(nn.Module):
        """All taps alike: no profile survives it."""

        def forward(self, weight: Tensor) -> Tensor:
            return weight.mean((2, 3), keepdim=True).expand_as(weight)

    class Squashed(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.tanh()

    layers = [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]
    parametrize.register_parametrization(layers[0], "weight", Flat(), unsafe=True)
    nn.init.normal_(layers[1].weight)
    parametrize.register_parametrization(layers[1], "weight", Squashed())
    model = nn.Sequential(*layers)
    before = copy.deepcopy(model.state_dict())
    report = apply(model, 0.5)
    assert [row.verdict.split(" (")[0] for row in report] == [
        "left alone: parametrised by Flat does not keep the profile",
        "left alone: parametrised by Squashed does not keep the profile",
    ]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "parametrised in a way that does not keep a profile" in report.warnings[0]


def test_an_unknown_hook_is_told() -> None:
    layer = nn.Conv2d(4, 4, 3)
    own = layer.weight
    del layer._parameters["weight"]
    layer.register_parameter("raw", own)
    layer.weight = own.detach() * 2
    assert apply(nn.Sequential(layer), 0.5)[0].verdict.startswith("left alone: its weight is not a parameter")


# ── timm's own layers
# ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_expert_of_cond_conv_is_widened() -> None:
    layer = CondConv2d(8, 16, 3, num_experts=4)
    before = layer.weight.detach().view(4, 16, 8, 3, 3).clone()
    (row,) = apply(nn.Sequential(layer), 0.5)
    ratio = (layer.weight.detach().view(4, 16, 8, 3, 3) / before).square()
    profile = 9 * soft_corners((3, 3), 0.5).float()
    assert row.verdict == "widened" and torch.allclose(ratio, ratio[0, 0, 0, 0, 0] / profile[0, 0] * profile, rtol=1e-4)
    routing = torch.softmax(torch.randn(1, 4), -1)
    assert shares(convolved(layer, torch.randn(1, 8, 5, 5), routing))[0, 0] > 1.3 / 9


def test_mixed_convolutions_are_widened_branch_by_branch() -> None:
    report = apply(MixedConv2d(8, 8, [3, 5, 7]), 0.5)
    assert [(row.kernel_size, row.verdict) for row in report] == [((k, k), "widened") for k in (3, 5, 7)]


def test_same_padding_is_widened() -> None:
    layer = create_conv2d(8, 8, 3, stride=2, padding="same")
    assert type(layer).__name__ == "Conv2dSame"
    assert apply(nn.Sequential(layer), 0.5)[0].verdict == "widened"


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_reparametrised_blocks_say_that_their_branches_undo_the_widening(name: str) -> None:
    report = apply(timm.create_model(name), 0.5)
    undone = [row for row in report if "undone in part" in row.verdict]
    assert undone and all(row.verdict.startswith("widened, undone in part: the ") for row in undone)
    assert any("identity" in row.verdict for row in undone) and any("1×1" in row.verdict for row in undone)
    assert any("narrower branches of the same block" in text for text in report.warnings)


def test_a_plain_residual_network_is_not_called_reparametrised() -> None:
    assert not any("undone" in row.verdict for row in apply(timm.create_model("resnet18"), 0.5))
    assert not any("undone" in row.verdict for row in apply(timm.create_model("levit_128s"), 0.5))


# ── taps that are no grid
# ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_sparse_layers_are_widened_at_their_real_taps(groups: int) -> None:
    layer = widerf.SparseConv2d(8, 16, 3, padding=1, groups=groups, extent=9, pattern="partition", seed=1)
    nn.init.ones_(layer.weight)
    (row,) = apply(nn.Sequential(layer), 0.6)
    assert row.verdict == "widened" and row.std_after > row.std_before
    dense = layer.to_conv2d().weight.detach().double()
    energy = dense.square().sum((0, 1))
    places = torch.arange(dense.shape[-1]) - (dense.shape[-1] - 1) / 2
    share = energy / energy.sum()
    variances = []
    for axis in (0, 1):
        marginal = share.sum(1 - axis)
        variances.append(float((marginal * places**2).sum() - (marginal * places).sum() ** 2))
    assert row.std_after == pytest.approx((sum(variances) / 2) ** 0.5, rel=1e-6)
    assert float(layer.weight.detach().square().sum()) == pytest.approx(layer.weight.numel(), rel=1e-6)


def test_sparse_layers_on_a_grid_are_widened_like_the_grid() -> None:
    dense = nn.Conv2d(4, 4, 3, padding=1)
    sparse = widerf.SparseConv2d.from_conv2d(dense, extent=3, pattern="centered")
    apply(nn.Sequential(dense), 0.5)
    apply(nn.Sequential(sparse), 0.5)
    assert torch.allclose(sparse.to_conv2d().weight, dense.weight, atol=1e-6)
