"""What users may rely on: every public name is where it was, takes what it took, and gives what it gave.

The signatures are written out by hand: they are the contract, and the code is read off against them. A parameter may be
added behind those that were there, with a default; none is renamed, moved, or made to be needed.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widerf

LAYER = (
    "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, "
    'padding_mode="zeros", device=None, dtype=None, *, extent=None, pattern=..., seed=None'
)
CONVOLUTION = "input, weight, bias, offsets, stride=1, padding=0, dilation=1, groups=1"
PATTERN = "kernel_size, extent, groups=1, generator=None"

# Name below `widerf`: what it takes. A default of `...` is one that evidence chooses: there has to be one.
SIGNATURES = {
    "receptive_field": "model, input_size=(3, 224, 224), *, layer=None",
    "ReceptiveField.center": "self, unit=None",
    "measure": "model, input_size=(3, 224, 224), *, layer=None, unit=None, inputs=None, samples=32, rtol=None, "
    "redraw=None, generator=None, progress=False, batch_size=None",
    "summary": "model, input_size=(3, 224, 224), *, layers=None, measure=False",
    "advise": "model, input_size=(3, 224, 224), *, object_size=None, layer=None",
    "Summary.plot": "self, ax=None",
    "Summary.to_pandas": "self",
    "predict": "model, input_size=(3, 224, 224), *, layer=None, unit=None",
    "ERF.size": 'self, level=0.0455, of="amplitude"',
    "ERF.radius": "self, mass",
    "ERF.area_ratio": "self, mass",
    "ERF.gaussian_fit": "self",
    "ERF.interval": 'self, figure="std", confidence=0.95',
    "ERF.plot": "self, ax=None",
    "ERF.save": "self, path",
    "ERF.load": "path",
    "ERFTracker": "model, every=100, *, input_size=(3, 224, 224), layers=(None,), inputs=None, samples=8, log=None",
    "erf_penalty": "model, input_size=None, *, layer=None, unit=None, target=None",
    "init.apply": "model, strength=0.5, *, target=None, base=None, only=None, skip=None, input_size=None, "
    "generator=None, dry_run=False, cap=1.0, lasting=False",
    "init.periphery_": "tensor, strength=0.5, *, transposed=False, stride=1",
    "profile.soft_corners": "kernel_size, strength",
    "profile.allocate": "kernel_sizes, weights, gain, *, cap=1.0, fixed=0.0",
    "SparseConv1d": LAYER,
    "SparseConv2d": LAYER,
    "SparseConv3d": LAYER,
    "SparseConv1d.to_conv1d": "self",
    "SparseConv2d.to_conv2d": "self",
    "SparseConv3d.to_conv3d": "self",
    "SparseConv1d.from_conv1d": "conv, *, extent=None, pattern=..., seed=None",
    "SparseConv2d.from_conv2d": "conv, *, extent=None, pattern=..., seed=None",
    "SparseConv3d.from_conv3d": "conv, *, extent=None, pattern=..., seed=None",
    "functional.sparse_conv1d": CONVOLUTION,
    "functional.sparse_conv2d": CONVOLUTION,
    "functional.sparse_conv3d": CONVOLUTION,
    "patterns.mixed": PATTERN,
    "patterns.partition": PATTERN,
    "patterns.centered": PATTERN,
    "patterns.stratified": PATTERN,
    "patterns.multiscale": PATTERN,
    "patterns.rings": PATTERN,
    "patterns.gaussian": PATTERN,
    "patterns.random": PATTERN,
    "patterns.grid": PATTERN,
    "patterns.coverage": "list_of_offsets, jumps=None",
    "convert": "model, *, extent=None, pattern=..., only=None, skip=None, input_size=None, seed=0, dry_run=False",
    "densify": "model",
    "load_state_dict": "model, state, strict=True",
    "rebuild_on_load": "model",
    "kernels.info": "",
    "kernels.use": "choice",
}


def found(path: str) -> Any:
    """Read a dotted name below `widerf`."""
    thing: Any = widerf
    for name in path.split("."):
        thing = getattr(thing, name)
    return thing


def parameters(signature: str) -> list[inspect.Parameter]:
    """Parse the text of a signature with Python itself."""
    return list(inspect.signature(eval(f"lambda {signature}: None")).parameters.values())


def broken(taken: list[inspect.Parameter], promised: list[inspect.Parameter]) -> list[str]:
    """Say how a callable that takes ``taken`` breaks the promise; nothing where it keeps it."""
    by_name = {parameter.name: parameter for parameter in taken}
    faults = []
    for parameter in promised:
        mine = by_name.pop(parameter.name, None)
        if mine is None or mine.kind != parameter.kind:
            faults.append(f"{parameter} is gone or is given in another way")
        elif parameter.default is ...:
            faults += [f"{parameter.name} has no default"] if mine.default is inspect.Parameter.empty else []
        elif mine.default != parameter.default:
            faults.append(f"{parameter} has become {mine}")
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    faults += [
        f"{p} is new and needed"
        for p in by_name.values()
        if p.default is inspect.Parameter.empty and p.kind not in free
    ]
    places = [p.name for p in promised if p.kind != inspect.Parameter.KEYWORD_ONLY]
    if [p.name for p in taken][: len(places)] != places:
        faults.append(f"the first {len(places)} parameters are {[p.name for p in taken][: len(places)]}")
    return faults


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_public_callable_takes_what_it_took(name: str) -> None:
    taken = list(inspect.signature(found(name)).parameters.values())
    assert broken(taken, parameters(SIGNATURES[name])) == []


@pytest.mark.parametrize(
    ("taken", "fault"),
    [
        ("a, c=3, *, d=None", "b=2 is gone"),
        ("a, b=3, *, d=None", "b=2 has become b=3"),
        ("a, *, b=2, d=None", "b=2 is gone or is given in another way"),
        ("b=2, a=1, *, d=None", "a has become a=1"),
        ("z, a, b=2, *, d=None", "z is new and needed"),
        ("a, z=0, b=2, *, d=None", "the first 2 parameters are"),
        ("a, b=2, *, d", "d has no default"),
    ],
)
def test_a_broken_promise_is_seen(taken: str, fault: str) -> None:
    promised = parameters("a, b=2, *, d=...")
    assert broken(parameters("a, b=2, c=3, *, e=None, d=5"), promised) == []
    assert fault in "; ".join(broken(parameters(taken), promised))


# ── what the calls give back
# ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


def lacking(thing: object, names: str) -> list[str]:
    return [name for name in names.split() if not hasattr(thing, name)]


def test_the_field_and_the_erf_have_their_figures(model: nn.Module) -> None:
    assert lacking(widerf.receptive_field(model, (3, 15, 15)), "size jump center global_paths") == []
    erf = widerf.predict(model, (3, 15, 15))
    figures = "map amplitude center centroid std std_per_axis excess_kurtosis clipped size radius area_ratio"
    assert lacking(erf, f"{figures} gaussian_fit interval plot save load") == []
    assert lacking(erf.gaussian_fit(), "sigma r2") == []
    assert isinstance(erf, widerf.ERF)
    assert erf.map.dtype == torch.float64
    assert erf.map.shape == (15, 15)
    assert float(erf.map.sum()) == pytest.approx(1)
    low, high = widerf.measure(model, (3, 15, 15), samples=4).interval("std", confidence=0.9)
    assert low <= high


def test_a_summary_has_a_row_for_each_layer(model: nn.Module) -> None:
    found = widerf.summary(model, (3, 15, 15))
    assert isinstance(found, widerf.Summary)
    assert lacking(found, "to_pandas plot save warnings _repr_html_") == []
    for row in found:
        assert lacking(row, "name map_size jump trf_size std size used clipped silent") == []


def test_advice_has_findings_with_calls(model: nn.Module) -> None:
    advice = widerf.advise(model, (3, 15, 15), object_size=9)
    assert isinstance(advice, widerf.Advice)
    assert [row.name for row in advice] == ["field_too_small"]
    assert lacking(advice[0], "what how layers call figure before after") == []


def test_errors_and_reports_are_importable_from_the_top(model: nn.Module) -> None:
    assert issubclass(widerf.UntreatedOperatorError, NotImplementedError)
    assert issubclass(widerf.DeadUnitError, ValueError)
    assert issubclass(widerf.ClippedWarning, UserWarning)
    assert isinstance(widerf.convert(model, extent=5, dry_run=True), widerf.ConversionReport)
    assert isinstance(widerf.patterns.coverage([widerf.patterns.grid(3, 5)]), widerf.Coverage)


def test_the_initialiser_gives_its_report(model: nn.Module) -> None:
    report = widerf.init.apply(model, dry_run=True, input_size=(3, 15, 15))
    assert isinstance(report, widerf.InitReport)
    assert lacking(report, "gain warnings _repr_html_") == []
    fields = "name kind kernel_size jump strength std_before std_after verdict"
    for change in report:
        assert isinstance(change, widerf.LayerChange)
        assert lacking(change, fields) == []
        assert change.widened
    assert widerf.InitReport is widerf.init.InitReport
    assert widerf.LayerChange is widerf.init.LayerChange


def test_profiles_are_shares_in_double_precision() -> None:
    profile = widerf.profile.soft_corners((3, 5), 0.5)
    assert (profile.shape, profile.dtype) == ((3, 5), torch.float64)
    assert float(profile.sum()) == pytest.approx(1)
    shares = widerf.profile.allocate([(3, 3), (5, 5)], [1.0, 4.0], 1.1)
    assert [tuple(share.shape) for share in shares] == [(3, 3), (5, 5)]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_sparse_layer_has_the_weights_of_the_plain_one_and_offsets_beside_them(rank: int) -> None:
    layer = found(f"SparseConv{rank}d")(4, 6, 3, groups=2, seed=0)
    assert layer.weight.shape == (6, 2, *[3] * rank)
    assert layer.offsets.dtype == torch.int64
    assert layer.offsets.shape[1:] == (3**rank, rank)
    assert "offsets" in dict(layer.named_buffers())
    plain = getattr(layer, f"to_conv{rank}d")()
    assert isinstance(plain, getattr(nn, f"Conv{rank}d"))
    assert isinstance(getattr(type(layer), f"from_conv{rank}d")(plain), type(layer))
    x = torch.randn(1, 4, *[12] * rank)
    assert layer(x).shape == getattr(nn, f"Conv{rank}d")(4, 6, 3, groups=2)(x).shape


@pytest.mark.parametrize("name", [name.removeprefix("patterns.") for name in SIGNATURES if SIGNATURES[name] == PATTERN])
def test_a_pattern_is_a_function_a_name_and_groups_of_taps(name: str) -> None:
    taps: Tensor = found(f"patterns.{name}")((3, 3), (7, 7), groups=2, generator=torch.Generator().manual_seed(0))
    assert (taps.dtype, taps.shape) == (torch.int64, (2, 9, 2))
    assert widerf.SparseConv2d(4, 4, 3, extent=7, pattern=name, seed=0).offsets.shape[1:] == (9, 2)
    assert lacking(widerf.patterns.coverage([taps]), "holes side std sidelobe") == []


def test_a_model_is_converted_and_made_dense_again(model: nn.Module) -> None:
    kinds = [type(module) for module in model]
    assert list(widerf.convert(model, extent=5)) != []
    assert any(isinstance(module, widerf.SparseConv2d) for module in model)
    widerf.densify(model)
    assert [type(module) for module in model] == kinds


@pytest.mark.parametrize("command", ["erf", "init", "convert", "summary", "doctor"])
def test_the_command_line_has_its_commands_and_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from widerf.cli import main

    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert all(option in told for option in ("MODEL", "--out", "--json"))
