"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from widerf.cli.commands import main
from widerf.cli.loading import load_model


def net() -> nn.Module:
    """A network for ``module:callable``."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


HERE = f"{__name__}:net"
SMALL = ["--input-size", "3x24x24"]


def test_erf_prints_figures_of_both_roads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["erf", HERE, *SMALL, "--samples", "4"]) == 0
    printed = capsys.readouterr().out
    assert "predicted" in printed and "measured" in printed and "theoretical size: 5×5" in printed


def test_erf_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["erf", HERE, *SMALL, "--samples", "0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["input_size"] == [3, 24, 24] and told["receptive_field"]["theoretical size"] == [5, 5]
    assert 0.9 < told["erf"]["predicted"]["std"] < 1.4


def test_init_is_a_dry_run_with_a_page_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    assert main(["init", HERE, *SMALL, "--strength", "0.7", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 convolutions would be widened (dry run)" in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and 'src="http' not in page and "<td" in page
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json", "erf.png", "before.npz", "after.npz"}
    told = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert told["report"]["gain"] == pytest.approx(told["erf"]["after"]["std"] / told["erf"]["before"]["std"], rel=1e-6)


def test_a_checkpoint_is_loaded_with_its_timm_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    torch.manual_seed(5)
    model = timm.create_model("test_resnet")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    loaded = load_model(str(tmp_path / "weights.pth"), name="test_resnet")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert main(["init", str(tmp_path / "weights.pth")]) == 2
    assert "--timm must name the timm model that the checkpoint belongs to" in capsys.readouterr().err


def test_arguments_reach_the_builder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "test_resnet", "--input-size", "3x64x64", "--set", "zero_init_last=False", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not any("silent" in text for text in told["report"]["warnings"])
    assert main(["init", "test_resnet", "--input-size", "3x64x64", "--json"]) == 0
    assert any("silent" in text for text in json.loads(capsys.readouterr().out)["report"]["warnings"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["init", "resnet51x"], "did you mean 'resnet5"),
        (["init", "no_such_module:net"], "MODEL must name a module that can be imported"),
        (["init", f"{__name__}:nothing"], "MODEL must name something in"),
        (["init", f"{__name__}:HERE"], "MODEL must name a callable"),
        (["init", "nowhere/weights.pth"], "MODEL must be a file that exists"),
        (["init", HERE, *SMALL, "--strength", "2"], "strength must be in [0, 1], got 2.0"),
        (["init", HERE, *SMALL, "--only", "layer9"], "only must match a convolution"),
        (["init", HERE, *SMALL, "--target", "9"], "target must be at most 1."),
        (["init", HERE, "--set", "width"], "--set must be KEY=VALUE, got 'width'"),
        (["erf", HERE, *SMALL, "--layer", "9"], "layer must be one of"),
        (["erf", "torch.nn:Identity", "--input-size", "3xy"], "must be CHANNELSxHEIGHTxWIDTH"),
        (["erf"], "the following arguments are required: MODEL"),
    ],
)
def test_errors_are_one_line_with_exit_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as ended:  # argparse ends by itself
        status = ended.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert said in printed.err and printed.err.count("\n") == 1 and "Traceback" not in printed.err


@pytest.mark.parametrize("command", ["init", "convert"])
def test_a_model_without_convolutions_is_said_to_have_none(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "torch.nn:Flatten", "--input-size", "3x4x4"]) == 2
    assert "MODEL must hold at least one convolution, got 'torch.nn:Flatten'" in capsys.readouterr().err
