"""A profile that lasts: the same function, other learning rates, and a parametrisation that comes and goes whole."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import widerf
from tests.init.test_whole_or_not import interrupted, same, state
from widerf.init import apply
from widerf.init.lasting import LastingProfile, profile_of
from widerf.profile import soft_corners


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 5, padding=2, groups=3)).double()


def transposed() -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(2, 6, 6, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()


def sparse() -> nn.Sequential:
    one = widerf.SparseConv2d(2, 6, 3, padding=1, extent=9, pattern="stratified", seed=0)
    two = widerf.SparseConv2d(6, 6, 3, padding=1, extent=7, pattern="mixed", seed=1, groups=6)
    return nn.Sequential(one, nn.ReLU(), two).double()


def volume() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(2, 4, 3, bias=False), nn.Conv3d(4, 4, (1, 3, 5))).double()


NETS = {"plain": plain, "transposed": transposed, "sparse": sparse, "volume": volume}
all_nets = pytest.mark.parametrize("build", NETS.values(), ids=NETS)


def image(net: nn.Module) -> Tensor:
    return torch.randn(2, 2, *([9] * (3 if isinstance(net[0], nn.Conv3d) else 2)), dtype=torch.float64)


def twins(build: Callable[[], nn.Sequential], strength: float = 0.5) -> tuple[nn.Sequential, nn.Sequential]:
    """The same draw, widened once and widened to last."""
    once = build()
    lasting = copy.deepcopy(once)
    apply(once, strength)
    apply(lasting, strength, lasting=True)
    return once, lasting


def scales(net: nn.Module) -> list[Tensor]:
    return [m.scale for m in net.modules() if isinstance(m, LastingProfile)]


@all_nets
def test_a_lasting_profile_leaves_the_function_and_its_report(build: Callable[[], nn.Sequential]) -> None:
    once, lasting = twins(build)
    x = image(once)
    torch.testing.assert_close(lasting(x), once(x), rtol=1e-12, atol=1e-12)
    again = apply(lasting, 0.5, lasting=True)
    assert [row.verdict for row in again if row.widened] == ["widened by an earlier call, lasting"] * len(
        scales(lasting)
    )
    assert scales(lasting)


@all_nets
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_of_descent_moves_each_tap_by_its_squared_factor(
    build: Callable[[], nn.Sequential], momentum: float
) -> None:
    # The oracle scales the gradient of each weight of the plain twin by s² and knows nothing of v.
    once, lasting = twins(build)
    x = image(once)
    optimisers = [torch.optim.SGD(net.parameters(), 1e-2, momentum=momentum) for net in (once, lasting)]
    factors = {name: profile.scale for name, m in lasting.named_modules() if (profile := profile_of(m)) is not None}
    for _ in range(3):
        for net, optimiser in zip((once, lasting), optimisers, strict=True):
            optimiser.zero_grad()
            net(x).square().sum().backward()
        for name, module in once.named_modules():
            if name in factors:
                module.weight.grad.mul_(factors[name] ** 2)
        for optimiser in optimisers:
            optimiser.step()
    for name, module in once.named_modules():
        if hasattr(module, "kernel_size"):
            torch.testing.assert_close(lasting.get_submodule(name).weight, module.weight, rtol=1e-10, atol=1e-12)


def test_the_factors_are_those_of_soft_corners_of_mean_square_one() -> None:
    (scale,) = scales(twins(lambda: nn.Sequential(nn.Conv2d(2, 3, (3, 5))).double(), 0.3)[1])
    torch.testing.assert_close(scale[0, 0].square() / 15, soft_corners((3, 5), 0.3))
    assert float(scale.square().mean()) == pytest.approx(1)


def test_weight_decay_shrinks_all_taps_alike() -> None:
    _, lasting = twins(plain)
    before = lasting[0].weight.detach().clone()
    optimiser = torch.optim.SGD(lasting.parameters(), 0.1, weight_decay=0.5)
    (0.0 * lasting(image(lasting)).sum()).backward()
    optimiser.step()
    torch.testing.assert_close(lasting[0].weight, 0.95 * before)


def test_weights_given_afterwards_keep_the_rates_without_the_profile() -> None:
    # The recipe of docs/initialisation.md: He's weights, lasting.
    net = plain()
    drawn = {name: m.weight.detach().clone() for name, m in net.named_modules() if hasattr(m, "kernel_size")}
    apply(net, 0.5, lasting=True)
    for name, weight in drawn.items():
        net.get_submodule(name).weight = weight
        torch.testing.assert_close(net.get_submodule(name).weight, weight)
    assert len(scales(net)) == 2


@all_nets
def test_removing_it_leaves_the_weights_and_the_parameters_themselves(build: Callable[[], nn.Sequential]) -> None:
    once, lasting = twins(build)
    parameters = {id(p) for p in lasting.parameters()}
    for module in list(lasting.modules()):
        if profile_of(module) is not None:
            parametrize.remove_parametrizations(module, "weight")
    assert {id(p) for p in lasting.parameters()} == parameters
    assert [type(m) for m in lasting] == [type(m) for m in once]
    one, two = once.state_dict(), lasting.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-14, atol=0)


@all_nets
def test_a_state_dict_goes_round(build: Callable[[], nn.Sequential]) -> None:
    net, other = twins(build, 0.5)[1], twins(build, 0.2)[1]
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = image(net)
    assert torch.equal(other(x), net(x))
    assert all(torch.equal(a, b) for a, b in zip(scales(net), scales(other), strict=True))


@all_nets
def test_a_deep_copy_is_its_own(build: Callable[[], nn.Sequential]) -> None:
    net = twins(build)[1]
    replica, x = copy.deepcopy(net), image(net)
    expected = net(x).detach()
    assert torch.equal(replica(x), expected)
    second = copy.deepcopy(replica)
    apply(replica, 0.2)  # takes the parametrisation off the copy
    assert not scales(replica)
    assert torch.equal(net(x), expected) and torch.equal(second(x), expected)
    with torch.no_grad():
        next(net.parameters()).zero_()
    assert torch.equal(second(x), expected)


def test_pickling_is_refused_as_torch_refuses_it() -> None:
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(twins(plain)[1])


@all_nets
def test_it_compiles_in_one_graph(build: Callable[[], nn.Sequential]) -> None:
    net = twins(build)[1].float()
    x = image(net).float()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, net(x))
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@all_nets
def test_an_ensemble_runs_as_one_under_vmap(build: Callable[[], nn.Sequential]) -> None:
    nets = [twins(build)[1] for _ in range(3)]
    if build is sparse:
        for net in nets[1:]:  # of one pattern
            net[0].offsets, net[2].offsets = nets[0][0].offsets, nets[0][2].offsets
    parameters, buffers = torch.func.stack_module_state(nets)
    x = image(nets[0])

    def one(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(nets[0], (p, b), (x,))

    together = torch.vmap(one)(parameters, buffers)
    for net, y in zip(nets, together, strict=True):
        torch.testing.assert_close(y, net(x))


def test_it_trains_under_ddp(tmp_path: object) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = twins(plain)[1]
        model = nn.parallel.DistributedDataParallel(net)
        model(image(net)).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()


@all_nets
def test_the_ruler_sees_the_weights_that_are_convolved(build: Callable[[], nn.Sequential]) -> None:
    once, lasting = twins(build)
    size = (2, *(31 for _ in image(once).shape[2:]))
    assert widerf.predict(lasting, size).std == pytest.approx(widerf.predict(once, size).std, rel=1e-12)
    measured = [
        widerf.measure(net, size, samples=2, generator=torch.Generator().manual_seed(0)).std for net in (once, lasting)
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-9)
    assert widerf.summary(lasting, size)[-1].std == pytest.approx(widerf.summary(once, size)[-1].std, rel=1e-12)


def test_the_report_predicts_the_network_as_it_is_now() -> None:
    one, two = plain(), plain()
    two.load_state_dict(one.state_dict())
    expected = apply(one, 0.5, input_size=(2, 15, 15))
    dry = apply(two, 0.5, input_size=(2, 15, 15), lasting=True, dry_run=True)
    assert not scales(two)
    assert [row.verdict for row in dry] == ["widened, lasting"] * 2
    found = apply(two, 0.5, input_size=(2, 15, 15), lasting=True)
    assert found.gain == pytest.approx(expected.gain, rel=1e-9)
    assert dry.gain == pytest.approx(expected.gain, rel=1e-9)
    back = apply(two, 0.0, input_size=(2, 15, 15))
    assert back.gain == pytest.approx(1 / expected.gain, rel=1e-6)
    assert not scales(two)


@pytest.mark.parametrize("second", [0.0, 0.2, 0.8])
@pytest.mark.parametrize("lasts", [True, False])
def test_strength_and_lasting_are_a_state_that_the_last_call_sets(second: float, lasts: bool) -> None:
    fresh = plain()
    twice = copy.deepcopy(fresh)
    apply(twice, 0.5, lasting=True)
    apply(twice, second, lasting=lasts)
    apply(fresh, second, lasting=lasts)
    one, two = fresh.state_dict(), twice.state_dict()
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-10, atol=1e-12)


def test_a_target_lasts() -> None:
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    assert apply(net, target=1.1, input_size=(4, 31, 31), lasting=True).gain == pytest.approx(1.1, rel=2e-3)
    assert scales(net)


def test_other_draws_are_lasting_too() -> None:
    one, two = plain(), plain()
    for net, lasting in ((one, False), (two, False), (two, True)):
        apply(net, 0.5, base="kaiming_normal", generator=torch.Generator().manual_seed(1), lasting=lasting)
    apply(two, 0.5, base="kaiming_normal", generator=torch.Generator().manual_seed(1), lasting=True)
    torch.testing.assert_close(two[0].weight, one[0].weight)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": 1.0}, "strength must be below 1"),
        ({"target": 1.225, "input_size": (2, 99, 99)}, "cap must be below 1"),
    ],
)
def test_taps_that_could_never_learn_are_refused_before_anything_changes(arguments: dict, message: str) -> None:
    net = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1, bias=False) for _ in range(2)))
    for conv in net:
        nn.init.ones_(conv.weight)
    before = state(net)
    with pytest.raises(ValueError, match=message):
        apply(net, lasting=True, **arguments)
    assert same(state(net), before)


def test_lasting_is_a_truth_value() -> None:
    with pytest.raises(TypeError, match="lasting must be True or False, got 'yes'"):
        apply(plain(), lasting="yes")


def test_computed_and_tied_weights_are_left_alone_and_told() -> None:
    net = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
    )
    net[2].weight = net[1].weight
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = apply(net, lasting=True)
    assert [row.verdict.code for row in report] == ["not_lasting", "not_lasting", "tied", "widened"]
    assert any("lasting" in warning for warning in report.warnings)
    for name in before:
        assert torch.equal(net.state_dict().get(name, before[name]), before[name]) or name.startswith("3")


def test_convert_leaves_lasting_layers_dense_and_says_why() -> None:
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    apply(net, only="1", lasting=True)
    report = widerf.convert(net, extent=7)
    assert [bool(row.converted) for row in report] == [False, False, True]
    assert "lasting profile" in report[1].verdict


def test_a_lasting_sparse_layer_is_made_dense_with_its_weights() -> None:
    net = twins(sparse)[1]
    x = image(net)
    expected = net(x)
    with torch.no_grad():
        widerf.densify(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-12)
    assert not scales(net)
    assert all(p.requires_grad for p in net.parameters())


# ── all or nothing ──────────────────────────────────────────────────────────────────────────────────────


def several() -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 5), parametrizations.weight_norm(nn.Conv2d(4, 4, 3)))
    apply(net, 0.3, only="1", lasting=True)
    return net


@pytest.mark.parametrize("step", [97, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("lasts", [True, False])
def test_an_interrupt_at_any_line_leaves_the_layers_whole(lasts: bool, step: int) -> None:
    def call(model: nn.Module) -> None:
        apply(model, 0.6, lasting=lasts)

    torch.manual_seed(0)
    before = state(several())
    torch.manual_seed(0)
    whole = several()
    call(whole)
    after, at, ends = state(whole), 1, set()
    while True:
        torch.manual_seed(0)
        model = several()
        if not interrupted(lambda: call(model), at).place:  # noqa: B023
            break
        found = state(model)
        done = [len(found) == len(wanted) and same(found, wanted) for wanted in (before, after)]
        assert any(done), f"half changed by an interrupt at line {at}"
        model(torch.randn(1, 2, 12, 12))
        ends.add(done[0])
        at += step
    assert True in ends and at > 100


def test_a_failure_within_torch_takes_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = 0, parametrize.ParametrizationList.__init__

    def failing(*args: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        original(*args, **options)

    net = plain()
    before, x = state(net), image(net)
    expected = net(x)
    monkeypatch.setattr(parametrize.ParametrizationList, "__init__", failing)
    with pytest.raises(MemoryError):
        apply(net, lasting=True)
    assert same(state(net), before)
    assert torch.equal(net(x), expected)


def test_a_state_with_other_windows_is_refused_in_words() -> None:
    net = twins(sparse)[1]
    other = nn.Sequential(
        widerf.SparseConv2d(2, 6, 3, padding=1, extent=13, pattern="stratified", seed=5), nn.ReLU(), sparse()[2]
    )
    with pytest.raises(ValueError, match="0: parametrised"):
        widerf.load_state_dict(net, other.state_dict())
