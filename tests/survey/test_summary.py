"""A summary tells of every layer what the calls for that one layer tell, from one recording."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import widerf
from tests.reference import fingerprint
from widerf.errors import ClippedWarning
from widerf.trace import recorder


class Block(nn.Module):
    """x + f(x), the branch ended by a norm."""

    def __init__(self, channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, dilation, dilation)
        self.conv2 = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.down = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.down(x) + self.bn2(self.conv2(torch.relu(self.conv1(x)))))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))


class Unknown(nn.Module):
    """An operator without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cummax(x, -1).values


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2), Block(8), Block(8, 2), Gate(8), Block(8)
    ).eval()  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)
        yield


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layers", [None, ["3", "4.conv1", "1", "6.bn2"]], ids=["default", "named"])
def test_every_row_is_what_the_calls_for_its_layer_give(training: bool, layers: list[str] | None) -> None:
    model = network().train(training)
    size = (3, 40, 32)
    for row in widerf.summary(model, size, layers=layers):
        field = widerf.receptive_field(model, size, layer=row.name)
        erf = widerf.predict(model, size, layer=row.name)
        assert (row.jump, row.field.center()) == (field.jump, field.center())
        assert row.trf_size == (None if field.global_paths else field.size)
        assert row.field.misaligned == field.misaligned
        torch.testing.assert_close(row.erf.map, erf.map, rtol=1e-5, atol=1e-12)
        assert (row.std, row.size, row.clipped) == pytest.approx((erf.std, erf.size(), erf.clipped), rel=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [None, "test_resnet", "test_convnext", "test_efficientnet", "test_vit"])
def test_passes_that_share_a_recording_give_bit_for_bit_what_passes_of_their_own_give(
    name: str | None, training: bool
) -> None:
    import timm

    torch.manual_seed(1)
    model = network() if name is None else timm.create_model(name)
    model, size = model.train(training), (3, 160, 160) if name == "test_vit" else (3, 64, 64)
    found = [row for row in widerf.summary(model, size) if row.erf is not None]
    assert len(found) > 4
    for row in found[:: 1 if name is None else 3]:
        alone = widerf.predict(model, size, layer=row.name)
        assert torch.equal(row.erf.map, alone.map)
        assert (row.std, row.size, row.clipped) == (alone.std, alone.size(), alone.clipped)


def test_the_layers_that_change_what_is_seen_have_a_row_in_the_order_in_which_they_run() -> None:
    names = [row.name for row in widerf.summary(network(), (3, 40, 32))]
    assert names == ["0", "2", "3.conv1", "3", "4.down", "4.conv1", "4", "5", "6.conv1", "6"]


def test_one_recording_is_enough_and_the_model_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network().train()
    before, passes = fingerprint(model), []
    taken = recorder.record
    monkeypatch.setattr("widerf.trace.scene.record", lambda *given: passes.append(1) or taken(*given))
    widerf.summary(model, (3, 40, 32))
    assert len(passes) == 1
    assert fingerprint(model) == before


def test_layers_in_silent_branches_are_marked_and_those_beside_them_are_not() -> None:
    model = network()
    nn.init.zeros_(model[3].bn2.weight)
    found = widerf.summary(model, (3, 40, 32))
    assert [row.name for row in found if row.silent] == ["3.conv1"]
    assert "silent at these weights: 1 branch" in found.warnings[0] and "3.bn2.weight" in found.warnings[0]
    assert not any(row.silent for row in widerf.summary(network(), (3, 40, 32)))


def test_layer_scale_silences_its_branch() -> None:
    import timm

    found = widerf.summary(timm.create_model("test_convnext").eval(), (3, 64, 64))
    silent = [row.name for row in found if row.silent]
    assert silent and all(".conv_dw" in name for name in silent)


def test_a_global_path_has_no_theoretical_size_and_says_who_sees_all() -> None:
    row = widerf.summary(network(), (3, 40, 32))["5"]
    assert row.trf_size is None and row.used is None and row.std is not None
    assert row.note == "sees the whole image by 5"


def test_an_operator_without_a_rule_costs_the_figures_of_what_is_behind_it_and_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Unknown(), nn.Conv2d(4, 4, 3))
    before, at, behind = widerf.summary(model, (3, 20, 20))
    assert before.std is not None and before.note == ""
    for row in (at, behind):
        assert row.std is None and "no rule for operator aten.cummax.default in module '1'" in row.note


def test_a_dead_layer_has_a_reason_instead_of_a_figure() -> None:
    model = network()
    nn.init.zeros_(model[0].weight)
    assert all(row.std is None and "dead or silent" in row.note for row in widerf.summary(model, (3, 40, 32)))


def test_tokens_are_rows_too() -> None:
    import timm

    found = widerf.summary(timm.create_model("test_vit").eval(), (3, 160, 160))
    assert found[0].map_size == found[-1].map_size == (10, 10)
    assert all(row.std is not None or row.note for row in found)
    assert any("sees the whole image" in row.note for row in found)


def test_measured_figures_are_those_of_measure() -> None:
    model = network()
    found = widerf.summary(model, (3, 40, 32), layers=["0", "4"], measure=4)
    for row in found:
        assert row.std_measured == widerf.measure(model, (3, 40, 32), layer=row.name, samples=4).std
    assert "measured" in str(found) and "measured" not in str(widerf.summary(model, (3, 40, 32), layers=["0"]))


def test_the_share_used_is_the_quotient_of_the_two_columns() -> None:
    for row in widerf.summary(network(), (3, 40, 32)):
        if row.trf_size is not None:
            assert row.used == pytest.approx(row.size / (row.trf_size[0] * row.trf_size[1]) ** 0.5)


def test_rows_go_out_as_text_html_json_csv_and_a_data_frame() -> None:
    found = widerf.summary(network(), (3, 40, 32))
    assert "2σ size" in str(found) and "<table>" in found._repr_html_()
    assert json.loads(found.to_json())["rows"][0]["trf_size"] == [5, 5]
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["name"] for row in rows] == [row.name for row in found]
    assert rows[0]["trf_size_0"] == rows[0]["trf_size_1"] == "5" and rows[-1]["trf_size_0"] == ""
    frame = found.to_pandas()
    assert list(frame["std"]) == [row.std for row in found]
    assert list(frame["jump_1"]) == [row.jump[1] for row in found]


def test_the_figure_draws_the_rows() -> None:
    model = network()
    nn.init.zeros_(model[3].bn2.weight)
    found = widerf.summary(model, (3, 40, 32))
    axes = found.plot()
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines["ERF, 2σ size"]) == [row.size for row in found]
    assert list(lines["ERF, 4 stds"]) == [4 * row.std for row in found]
    assert [text.get_text() for text in axes.get_xticklabels()] == [row.name for row in found]
    assert sum(text.get_text() == "in a silent branch" for text in axes.get_legend().get_texts()) == 1


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_any_rank(rank: int) -> None:
    conv = getattr(nn, f"Conv{rank}d")
    model = nn.Sequential(conv(2, 4, 3, padding=1), nn.ReLU(), conv(4, 4, 3, stride=2, padding=1))
    found = widerf.summary(model, (2, *[12] * rank))
    assert [row.trf_size for row in found] == [(3,) * rank, (5,) * rank]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"layers": ["9"]}, ValueError, "layer must be one of"),
        ({"layers": []}, ValueError, "layers must name at least one layer"),
        ({"layers": "0"}, TypeError, "layers must be a list of layers"),
        ({"measure": -1}, ValueError, "measure must be"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        widerf.summary(network(), (3, 40, 32), **arguments)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        widerf.summary(3)


@pytest.mark.slow
def test_a_resnet50_is_summed_up_several_times_faster_than_layer_by_layer() -> None:
    import time

    import timm

    model = timm.create_model("resnet50", zero_init_last=False).eval()
    start = time.perf_counter()
    found = widerf.summary(model, (3, 224, 224))
    took = time.perf_counter() - start
    start, asked = time.perf_counter(), found[::6]
    for row in asked:
        erf = widerf.predict(model, (3, 224, 224), layer=row.name)
        field = widerf.receptive_field(model, (3, 224, 224), layer=row.name)
        assert (row.std, row.size, row.trf_size) == (pytest.approx(erf.std, rel=1e-5), erf.size(), field.size)
    loop = (time.perf_counter() - start) / len(asked) * len(found)
    assert loop > 4 * took


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["byobnet", "coatnet", "convnext", "efficientnet", "mambaout", "maxvit", "nfnet", "vit"]
)
def test_no_row_of_a_family_of_timm_is_without_a_figure_or_a_reason(family: str) -> None:
    import timm

    model = timm.create_model(f"test_{family}").eval()
    found = widerf.summary(model, model.pretrained_cfg["input_size"])
    assert len(found) > 5
    assert [row.name for row in found if row.std is None and not row.note] == []
