"""Ten networks with a known fault: the advice names it, and its call gives what it says."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widerf
from tests.reference import fingerprint
from tests.survey.test_summary import Block
from widerf.errors import ClippedWarning
from widerf.survey.structure import last_skip
from widerf.trace.scene import Scene


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)
        yield


def chain(layers: int = 6, kernel_size: int = 3, **arguments: Any) -> nn.Sequential:
    torch.manual_seed(0)
    pad = kernel_size // 2
    convs = [nn.Conv2d(3 if i == 0 else 8, 8, kernel_size, padding=pad, **arguments) for i in range(layers)]
    return nn.Sequential(*(module for conv in convs for module in (conv, nn.ReLU())))


class UNet(nn.Module):
    """Two scales down and up, with a skip at full resolution that ``gain`` scales."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain = gain
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1))
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Upsample(scale_factor=4)
        self.head = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enter(x)
        return self.head(torch.cat([self.gain * fine, self.up(self.deep(self.down(fine)))], 1))


class Deeper(nn.Module):
    """A U-Net as people write it: pairs of convolutions with norms, pooling, transposed convolutions, three scales."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(self.pair(before, after) for before, after in zip([3, *widths], widths, strict=False))
        self.lift = nn.ModuleList(nn.ConvTranspose2d(2 * after, after, 2, 2) for after in widths[:-1])
        self.up = nn.ModuleList(self.pair(2 * after, after) for after in widths[:-1])
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def pair(before: int, after: int) -> nn.Sequential:
        ends = ((before, after), (after, after))
        parts = [(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ends]
        return nn.Sequential(*(part for each in parts for part in each))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, pair in enumerate(self.down):
            x = pair(nn.functional.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for lift, up, skip in [*zip(self.lift, self.up, skips, strict=False)][::-1]:
            x = up(torch.cat([skip, lift(x)], 1))
        return self.head(x)


def segmenter() -> nn.Module:
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8)).eval()


def made(model: nn.Module, call: str) -> Any:
    """Make a proposed call as a user would: the value of an expression, or the effect of a statement."""
    scope = {"model": model, "widerf": widerf, "torch": torch}
    try:
        code = compile(call, "call", "eval")
    except SyntaxError:
        return exec(call, scope)
    return eval(code, scope)


def size_of(model: nn.Module, _: Any, size: tuple[int, ...]) -> float:
    return widerf.predict(model, size).size()


def std_of(model: nn.Module, _: Any, size: tuple[int, ...]) -> float:
    return widerf.predict(model, size).std


def read_by_all_units(model: nn.Module, _: Any, size: tuple[int, ...]) -> float:
    """Share of interior pixels that any unit depends on, by back-propagation."""
    image = torch.randn(1, *size, requires_grad=True)
    model(image).square().sum().backward()
    return float((image.grad.abs().sum(1)[0, 4:-4, 4:-4] > 0).double().mean())


def taps_on_the_map(model: nn.Module, _: Any, size: tuple[int, ...]) -> float:
    """Share of taps that read a pixel, by a kernel of ones on an image of ones."""
    conv = model[1]
    ones = torch.ones(1, 1, *size[1:])
    hits = nn.functional.conv2d(ones, torch.ones(1, 1, *conv.kernel_size), None, 1, conv.padding, conv.dilation)
    return float(hits.mean()) / 9


def taps_on_the_map_of_the_row(_: nn.Module, made: Any, __: tuple[int, ...]) -> float:
    """The same on the map that the call shows."""
    hits = nn.functional.conv2d(torch.ones(1, 1, *made["1"].map_size), torch.ones(1, 1, 7, 7), None, 1, 3)
    return float(hits.mean()) / 49


def clipped_in(_: nn.Module, made: Any, __: tuple[int, ...]) -> float:
    return made.clipped


def std_in(_: nn.Module, made: Any, __: tuple[int, ...]) -> float:
    return made.std


Case = tuple[Callable[[], nn.Module], tuple[int, ...], int | None, str, str, Callable[..., float]]


def silent() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8)).eval()
    nn.init.zeros_(model[1].bn2.weight)
    nn.init.zeros_(model[2].bn2.weight)
    return model


def strided_grid() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2))


def off_the_map() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=18, dilation=18))


def wide_by_its_taps() -> nn.Module:
    """As the last stage of a ConvNeXt at a small image: 7×7 on a map of 5×4."""
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 7, padding=3, groups=8))


def trained() -> nn.Module:
    model = nn.Sequential(
        *[m for i in range(4) for m in (nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.BatchNorm2d(8))]
    )
    model.train()(torch.randn(4, 3, 16, 16))
    return model.eval()


def vit() -> nn.Module:
    import timm

    return timm.create_model("test_vit").eval()


CASES: dict[str, Case] = {
    "field too small": (chain, (3, 64, 64), 40, "field_too_small", "widerf.convert(", size_of),
    "ERF too small": (lambda: chain(10), (3, 64, 64), 18, "erf_too_small", "widerf.init.apply(", size_of),
    "silent branches": (silent, (3, 32, 32), None, "silent", "torch.nn.init.ones_", std_of),
    "strided grid": (strided_grid, (3, 40, 40), None, "strided_grid", ".dilation", read_by_all_units),
    "ASPP off its map": (off_the_map, (3, 16, 16), None, "off_the_map", ".dilation", taps_on_the_map),
    "kernel off its map": (
        wide_by_its_taps,
        (3, 20, 16),
        None,
        "off_the_map",
        "widerf.summary(",
        taps_on_the_map_of_the_row,
    ),
    "U-Net skips": (lambda: UNet(1.0), (3, 64, 64), None, "skip_dominates", "widerf.convert(", std_of),
    "U-Net, field": (lambda: UNet(1.0), (3, 48, 48), 32, "field_too_small", "widerf.convert(", size_of),
    "U-Net, ERF": (lambda: Deeper().eval(), (3, 64, 64), 32, "erf_too_small", "only=['down.0.0'", size_of),
    "smp.Unet": (segmenter, (3, 96, 96), 85, "erf_too_small", "widerf.", size_of),
    "ViT": (vit, (3, 160, 160), None, "global_paths", "widerf.measure(", std_in),
    "trained weights": (trained, (3, 32, 32), None, "pretrained", "stratified", std_of),
    "clipped": (lambda: chain(8), (3, 12, 12), None, "clipped", "widerf.predict(", clipped_in),
}


@pytest.mark.parametrize("case", CASES)
def test_the_fault_is_named_and_the_call_gives_what_it_says(case: str) -> None:
    build, size, wanted, name, told, look = CASES[case]
    model = build()
    before = fingerprint(model)
    finding = widerf.advise(model, size, object_size=wanted)[name]
    assert fingerprint(model) == before
    assert finding.call is not None and told in finding.call
    if look not in (clipped_in, std_in, taps_on_the_map_of_the_row):  # these look at what the call returns
        assert finding.before == pytest.approx(look(model, None, size), rel=0.05)
    given = made(model, finding.call)
    assert finding.after == pytest.approx(look(model, given, size), rel=0.05)
    if look is not std_in:  # a measurement confirms; all others change something
        assert finding.after != pytest.approx(finding.before, rel=0.01)


def test_a_window_that_is_wide_by_its_taps_is_shown_the_least_image_that_holds_it() -> None:
    finding = widerf.advise(wide_by_its_taps(), (3, 20, 16))["off_the_map"]
    assert "nothing to mend in the layer" in finding.what and "(3, 35, 28)" in finding.call
    assert made(wide_by_its_taps(), finding.call)["1"].map_size == (8, 7)


@pytest.mark.parametrize("case", ["U-Net, field", "U-Net, ERF", "smp.Unet"])
def test_the_call_for_a_u_net_is_enough_and_says_so(case: str) -> None:
    build, size, wanted, name, *_ = CASES[case]
    finding = widerf.advise(build(), size, object_size=wanted)[name]
    assert finding.before < wanted <= finding.after
    assert "no lever" not in finding.what


def test_windows_are_no_wider_than_is_enough() -> None:
    model = chain(4)
    finding = widerf.advise(model, (3, 40, 40), object_size=32)["field_too_small"]
    extent = int(finding.call.split("extent=")[1].split(",")[0])
    made(model, finding.call.replace(f"extent={extent}", f"extent={extent - 2}"))
    assert size_of(model, None, (3, 40, 40)) < 32 <= finding.after


def test_a_size_that_no_lever_reaches_is_said_with_the_most_that_one_gives() -> None:
    model = chain()
    finding = widerf.advise(model, (3, 24, 24), object_size=200)["field_too_small"]
    made(model, finding.call)
    largest = size_of(model, None, (3, 24, 24))
    assert finding.after == largest < 200
    assert f"no lever reaches that: the largest that one call gives is {largest:.3g}" in finding.what
    for extent in (7, 13, 25):
        other = chain()
        widerf.convert(other, extent=extent, input_size=(3, 24, 24))
        assert size_of(other, None, (3, 24, 24)) <= largest


def test_an_erf_that_covers_the_object_is_said_to_and_nothing_is_proposed() -> None:
    advice = widerf.advise(chain(), (3, 64, 64), object_size=6)
    assert [row.name for row in advice] == ["covers"]
    assert advice[0].call is None and advice[0].before == widerf.predict(chain(), (3, 64, 64)).size()


def test_kernels_without_taps_are_named_and_no_call_is_proposed() -> None:
    advice = widerf.advise(chain(3, kernel_size=1), (3, 16, 16), object_size=9)
    assert advice["only_pointwise"].layers == ("0", "2", "4")
    assert "no lever reaches that: none widens it" in advice["field_too_small"].what
    assert advice["field_too_small"].call is None and all(row.call is None for row in advice)


def test_a_faultless_network_has_no_finding() -> None:
    assert list(widerf.advise(chain(), (3, 64, 64))) == []


def test_silent_branches_limit_the_erf_and_waking_them_comes_first() -> None:
    advice = widerf.advise(silent(), (3, 32, 32), object_size=5)
    assert advice["erf_too_small"].layers == ("1.bn2.weight", "2.bn2.weight")
    assert "ones_" in advice["erf_too_small"].call


def test_the_layer_that_limits_is_the_one_to_which_the_field_answers_most() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=4, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    )
    assert widerf.advise(model, (3, 64, 64), object_size=30)["field_too_small"].layers[0] == "2"


def test_a_trained_network_is_not_told_to_initialise_again() -> None:
    advice = widerf.advise(trained(), (3, 32, 32), object_size=8)
    assert all("init.apply" not in (row.call or "") for row in advice)


def test_the_share_of_a_skip_follows_its_gain() -> None:
    shares = [last_skip(Scene.of(UNet(gain), (3, 64, 64))).share for gain in (0.0, 0.5, 1.0, 2.0)]
    assert shares[0] == pytest.approx(0, abs=1e-6) and shares == sorted(shares)
    # The parts through the two paths add up: share/(1 − share) goes with the square of the gain.
    odds = [share / (1 - share) for share in shares]
    assert odds[2] / odds[1] == pytest.approx(4, rel=1e-3) and odds[3] / odds[2] == pytest.approx(4, rel=1e-3)


def test_a_silent_skip_and_a_residual_network_have_no_dominating_skip() -> None:
    assert "skip_dominates" not in [row.name for row in widerf.advise(UNet(1e-3), (3, 64, 64))]
    assert last_skip(Scene.of(silent(), (3, 32, 32))) is None


def test_an_operator_without_a_rule_is_a_finding() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cummax(x, -1).values

    advice = widerf.advise(nn.Sequential(nn.Conv2d(3, 4, 3), Odd()), (3, 20, 20), object_size=4)
    assert [row.name for row in advice] == ["not_predicted"] and "aten.cummax" in advice[0].what


def test_advice_prints_shows_and_goes_out() -> None:
    advice = widerf.advise(chain(), (3, 64, 64), object_size=40)
    assert "1. field_too_small" in str(advice) and "do: widerf.convert(model" in str(advice) and " → " in str(advice)
    assert "<table>" in advice._repr_html_() and "field_too_small" in advice.to_json()


@pytest.mark.parametrize(
    ("wanted", "error"),
    [(0, ValueError), (-3, ValueError), (float("nan"), ValueError), ("64", TypeError), (True, TypeError)],
)
def test_a_senseless_object_size_is_named(wanted: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="object_size must"):
        widerf.advise(chain(), (3, 64, 64), object_size=wanted)
