"""convert(target=) meets the wanted gain by the least growth of the windows, or names the largest there is."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widerf
from experiments.roads.convert_target import TCN, UNet
from tests.reference import fingerprint
from widerf import convert
from widerf.conversion.growth import TOLERANCE, grown, windows_for_gain
from widerf.conversion.plan import decide
from widerf.convolutions.places import find_places
from widerf.convolutions.selection import find_convolutions
from widerf.sparse.layer import SparseConv
from widerf.trace.scene import Scene

PLAIN = (8, 48, 48)


def plain(layers: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(layers)])


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet()


def tcn() -> nn.Module:
    torch.manual_seed(0)
    return TCN()


def check(model: nn.Module, report: Any) -> None:
    """No window off its map, no grid that shares a factor with its stride, ERF told before and after."""
    from tests.conversion.test_windows import cells_of, shared_spacing

    for row in report:
        layer = model.get_submodule(row.name)
        assert row.converted == isinstance(layer, SparseConv)
        if row.converted:
            assert all(cells <= side for cells, side in zip(cells_of(layer), row.map_size, strict=True))
            assert shared_spacing(layer) == 1
    assert report.erf_std is not None
    assert report.erf_kurtosis is not None
    assert f"{report.erf_kurtosis[1]:.2f}" in str(report)


def reached_or_named(model: nn.Module, size: tuple[int, ...], target: float) -> float:
    """The gain after ``convert(target=)``; where that is out of reach, of the largest possible that the error names."""
    state = fingerprint(model)
    try:
        report = convert(model, target=target, input_size=size)
    except ValueError as error:
        assert fingerprint(model) == state
        found = re.match(rf"target must be at most ([\d.]+), the largest predicted gain .*, got {target}$", str(error))
        assert found, str(error)
        target = float(found[1])
        assert target > 1
        report = convert(model, target=target, input_size=size)
    assert report.gain is not None
    assert report.target == target
    assert abs(report.gain / target - 1) <= TOLERANCE
    check(model, report)
    return report.gain


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
@pytest.mark.parametrize(
    ("build", "size", "target"),
    [(plain, PLAIN, 1.5), (unet, (3, 64, 64), 1.2), (tcn, (4, 256), 1.5), (plain, PLAIN, 50.0)],
)
def test_the_target_is_met_or_the_largest_possible_named(build: Any, size: tuple[int, ...], target: float) -> None:
    model = build()
    before = widerf.predict(model, size).std
    gain = reached_or_named(model, size, target)
    assert widerf.predict(model, size).std == pytest.approx(gain * before)
    if target < 2:
        assert gain == pytest.approx(target, rel=TOLERANCE)
    else:
        assert gain < 50


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
def test_a_greater_target_takes_wider_windows_and_a_dry_run_tells_the_same() -> None:
    last = 0
    for target in (1.2, 1.6, 2.2):
        model = plain()
        state = fingerprint(model)
        told = convert(model, target=target, input_size=PLAIN, dry_run=True)
        assert fingerprint(model) == state
        done = convert(model, target=target, input_size=PLAIN)
        assert done.rows == told.rows
        sides = [row.extent[0] if row.extent else row.kernel_size[0] for row in done]
        assert sides[3:] == sorted(sides[3:])  # they grow with depth, within what becomes sparse
        assert sum(sides) > last
        last = sum(sides)


def test_windows_grow_from_the_kernel_to_the_map_and_with_depth() -> None:
    model = plain()
    kernels = find_convolutions(model)
    steps = decide(model, kernels, {}, find_places(Scene.of(model, PLAIN), kernels), early=False)
    assert set(grown(steps, 0.0).values()) == {(3, 3)}
    assert set(grown(steps, 1.0).values()) == {(47, 47)}
    before = grown(steps, 0.0)
    for growth in (0.1, 0.3, 0.5, 0.7, 0.9):
        windows = grown(steps, growth)
        sides = [side for side, _ in windows.values()]
        assert sides == sorted(sides)
        assert all(side % 2 == 1 and side >= before[name][0] for name, (side, _) in windows.items())
        before = windows


@pytest.mark.parametrize("target", [1.05, 1.3, 2.0, 3.9])
def test_the_search_finds_the_least_growth_that_gives_the_gain(target: float) -> None:
    """A made-up gain with jumps in it; the slow twin tries every growth."""
    model = plain(9)
    kernels = find_convolutions(model)
    steps = decide(model, kernels, {}, find_places(Scene.of(model, PLAIN), kernels), early=False)
    calls = 0

    def gain_of(windows: dict[str, tuple[int, ...]]) -> float:
        nonlocal calls
        calls += 1
        return float((sum(side**2 - 1 for side, _ in windows.values()) / (8 * len(windows))) ** 0.25)

    found = windows_for_gain(steps, gain_of, target)
    assert abs(gain_of(found) / target - 1) <= TOLERANCE
    assert calls <= 4 + 7 + 24 + 1
    least = next(g for g in (i / 1000 for i in range(1001)) if gain_of(grown(steps, g)) >= target)
    assert gain_of(found) <= gain_of(grown(steps, least)) * (1 + TOLERANCE)
    most = gain_of(grown(steps, 1.0))
    with pytest.raises(ValueError, match=f"target must be at most {most:.3f}, the largest predicted gain .* got 99"):
        windows_for_gain(steps, gain_of, 99.0)


def test_where_whole_cells_are_too_coarse_single_layers_are_tried_and_the_nearest_is_taken() -> None:
    model = plain(2)
    kernels = find_convolutions(model)
    steps = decide(model, kernels, {}, find_places(Scene.of(model, PLAIN), kernels), early=False)
    values = {(3, 3): 0, (5, 5): 1}

    def gain_of(windows: dict[str, tuple[int, ...]]) -> float:
        return 1.0 + sum(values.get(side, 2) for side in windows.values())  # type: ignore[call-overload, no-any-return]

    found = windows_for_gain(steps, gain_of, 2.0)
    assert gain_of(found) == 2
    assert gain_of(windows_for_gain(steps, gain_of, 2.5)) in (2.0, 3.0)


class Scaled(nn.Module):
    """Two residual branches behind a layer scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv2d(8, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.gamma = nn.Parameter(torch.full((), scale))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for conv in self.convs:
            x = x + self.gamma * conv(x)
        return x


def test_a_target_that_silent_branches_keep_out_of_reach_is_refused_with_their_names() -> None:
    model = Scaled(1e-6)
    state = fingerprint(model)
    with pytest.raises(
        ValueError, match=r"target must be at most 1\.000, .*1 residual branches are \(nearly\) silent.*gamma"
    ):
        convert(model, target=1.5, input_size=(8, 24, 24))
    assert fingerprint(model) == state
    assert convert(Scaled(1.0), target=1.5, input_size=(8, 24, 24)).gain == pytest.approx(1.5, rel=TOLERANCE)


def test_an_erf_that_cannot_be_predicted_has_no_target() -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft2(x).real

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Unknown(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    )
    state = fingerprint(model)
    with pytest.raises(ValueError, match="target must be left out where the ERF cannot be predicted, got 1.5"):
        convert(model, target=1.5, input_size=(3, 16, 16))
    assert fingerprint(model) == state
    assert convert(model, input_size=(3, 16, 16), dry_run=True).gain is None


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "target must be a ratio above 1, got 1.0", {"target": 1.0}),
        (ValueError, "target must be a ratio above 1, got nan", {"target": float("nan")}),
        (TypeError, "target must be a number, got '2'", {"target": "2"}),
        (ValueError, "extent must not be given with target, which chooses it, got 7", {"target": 1.5, "extent": 7}),
        (ValueError, "input_size must be given with target, got None", {"target": 1.5, "input_size": None}),
        (ValueError, "block must be a positive multiple of 16, got 8", {"block": 8}),
        (TypeError, "pattern must be a name or hold pairs", {"pattern": 3}),
        (ValueError, "pattern must have shares that add up to 1", {"pattern": [("dense", 0.5)]}),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_changed(error: Any, message: str, arguments: Any) -> None:
    model = plain()
    state = fingerprint(model)
    with pytest.raises(error, match=message):
        convert(model, **{"input_size": PLAIN, **arguments})
    assert fingerprint(model) == state


def test_the_report_says_where_paths_around_the_sparse_layers_carry_the_erf() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.enter, self.conv = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            return x + 0.02 * self.conv(x)  # type: ignore[no-any-return]

    report = convert(Aside(), extent=7, input_size=PLAIN)
    assert report.gain is not None
    assert report.gain < 1.02
    assert "barely show in the ERF" in str(report.warnings)
    report = convert(plain(), extent=7, input_size=PLAIN)
    assert "barely show" not in str(report.warnings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("resnet50", {}),
        ("convnext_tiny", {"layer_scale": 1.0}),  # of 1e-6 otherwise: the test above
        ("efficientnet_b0", {}),
        ("mobilenet_v3_large", {}),
        ("deeplabv3_resnet50", {"weights_backbone": None}),
    ],
)
def test_torchvision_models_keep_their_windows_on_their_maps_and_meet_the_target(name: str, more: Any) -> None:
    from torchvision import models

    torch.manual_seed(0)
    builders: Any = models.segmentation if name.startswith("deeplab") else models
    size = (3, 448, 448)
    model = getattr(builders, name)(weights=None, **more).eval()
    report = convert(model, input_size=size, dry_run=True)
    assert sum(row.converted for row in report) >= 5
    reached_or_named(model, size, 1.5)
