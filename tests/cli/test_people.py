"""Whole networks, advice, checkpoints and slips of the keyboard on the command line."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from torch import nn

import widerf
from tests.cli.test_commands import HERE, SMALL
from widerf.cli.commands import main


def asleep() -> nn.Module:
    """A network whose branch is silent."""
    from tests.survey.test_summary import Block

    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Block(8))
    nn.init.zeros_(model[1].bn2.weight)
    return model


def leaves() -> nn.Module:
    """A builder that ends the process."""
    raise SystemExit(0)


NAME = __name__
SLEEPER = f"{NAME}:asleep"


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_summary_prints_a_row_a_layer_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", HERE, *SMALL, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2σ size" in printed and printed.startswith("weights: as ")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json", "summary.csv"}
    assert "ERF against depth" in (tmp_path / "report.html").read_text(encoding="utf-8")
    rows = told(capsys, "summary", HERE, *SMALL, "--layers", "2")["report"]["rows"]
    assert [row["name"] for row in rows] == ["2"] and rows[0]["trf_size"] == [5, 5]


def test_doctor_says_what_advise_says(capsys: pytest.CaptureFixture[str]) -> None:
    rows = told(capsys, "doctor", HERE, *SMALL, "--object-size", "9")["report"]["rows"]
    assert [row["name"] for row in rows] == ["field_too_small"] and rows[0]["call"].startswith("widerf.convert(")
    assert main(["doctor", SLEEPER, *SMALL]) == 0
    assert "1. silent" in capsys.readouterr().out


def test_several_models_make_one_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["erf", HERE, SLEEPER, *SMALL, "--samples", "0", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model") and lines[2].startswith(HERE) and lines[3].startswith(SLEEPER)
    assert {"1-predicted.npz", "2-predicted.npz", "erf.png"} <= {path.name for path in tmp_path.iterdir()}
    both = told(capsys, "erf", HERE, SLEEPER, *SMALL, "--samples", "0")["models"]
    one = told(capsys, "erf", HERE, *SMALL, "--samples", "0")
    assert both[0]["erf"]["predicted"]["std"] == one["erf"]["predicted"]["std"]


def test_erf_warns_of_silent_branches_and_of_them_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["erf", SLEEPER, *SMALL, "--samples", "0"]) == 0
    assert "silent branches at these weights: 1.bn2.weight" in capsys.readouterr().err
    assert main(["erf", HERE, *SMALL, "--samples", "0"]) == 0
    assert "silent" not in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_converted_model_goes_to_a_file_and_comes_back(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / f"wide{ending}")
    found = told(capsys, "convert", HERE, *SMALL, "--extent", "9", "--save", path)
    assert found["report"]["dry_run"] is False
    again = told(capsys, "erf", HERE, *SMALL, "--checkpoint", path, "--samples", "0")
    assert again["erf"]["predicted"]["std"] == pytest.approx(found["erf"]["after"]["std"], rel=1e-5)
    assert again["weights"] == path
    by_name = told(capsys, "erf", path, "--timm", HERE, *SMALL, "--samples", "0")
    assert by_name["erf"] == again["erf"]


def test_the_source_of_the_weights_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import timm

    size = ["--input-size", "3x64x64", "--samples", "0"]
    assert told(capsys, "erf", "test_resnet", *size)["weights"] == "drawn at random, seed 0"
    torch.save({"state_dict_ema": timm.create_model("test_resnet").state_dict()}, tmp_path / "a.pth")
    found = told(capsys, "erf", str(tmp_path / "a.pth"), "--timm", "test_resnet", *size)
    assert found["weights"] == f"{tmp_path / 'a.pth'}, its state_dict_ema"


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["WIDERF_MARK"],)


def test_code_in_a_checkpoint_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WIDERF_MARK", str(tmp_path / "executed"))
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    assert main(["erf", str(tmp_path / "evil.pth"), "--timm", "test_resnet", "--samples", "0"]) == 2
    assert "must hold tensors only" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["erf", "resnet18.a1_in1k"], "MODEL must go without the tag 'a1_in1k', which names trained weights"),
        (["erf", "resnet18.a9"], "MODEL must be one of 'resnet18.a1_in1k'"),
        (["erf", HERE, "--pretrained"], "--pretrained must come with a timm name"),
        (["erf", HERE, *SMALL, "--samples", "-5"], "must be a whole number from 0 on, got '-5'"),
        (["erf", HERE, "--input-size", "3x100000x100000"], "hold at most 268,435,456 numbers"),
        (["erf", HERE, "--input-size", "3x0x4"], "must be positive"),
        (["erf", f"{NAME}:leaves"], "it ended the process with status 0"),
        (["erf", HERE, "--set", "width=3"], "unexpected keyword argument 'width'"),
        (["erf", HERE, "--checkpoint", "nowhere.pth"], "path must be a file that exists"),
        (["convert", HERE, *SMALL, "--save", "a.onnx"], "path must end in .safetensors, .pth or .pt"),
        (["doctor", HERE, *SMALL, "--object-size", "0"], "object_size must be positive"),
        (["summary", HERE, *SMALL, "--layers", "9"], "layer must be one of"),
    ],
)  # fmt: skip
def test_slips_are_one_line_with_status_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert status == 2 and printed.out == ""
    assert said in printed.err and printed.err.count("\n") == 1


def test_the_checkpoint_of_another_model_is_told_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 8, 3)).state_dict(), tmp_path / "a.pth")
    assert main(["erf", HERE, *SMALL, "--checkpoint", str(tmp_path / "a.pth")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "size mismatch for 0.weight" in said and "size mismatch for 0.bias" in said


def test_a_fault_of_ours_shows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("ours")

    monkeypatch.setattr("widerf.erf.prediction.predicted", broken)
    with pytest.raises(TypeError, match="ours"):
        main(["erf", HERE, *SMALL])


def test_a_terminal_without_greek_letters_gets_the_table() -> None:
    command = [sys.executable, "-m", "widerf.cli.commands", "summary", "torch.nn:Conv2d", "--input-size", "1x9x9"]
    command += ["--set", "in_channels=1", "--set", "out_channels=1", "--set", "kernel_size=3"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(widerf.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "? size" in done.stdout or "?? size" in done.stdout


def on_a_terminal(*command: str, columns: int) -> str:
    """What a command shows on a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if name not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "widerf.cli.commands", *command], stdout=theirs, stderr=subprocess.PIPE, env=environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(timeout=120) == 0, process.stderr.read() if process.stderr else ""
    if process.stderr:
        process.stderr.close()
    return shown.decode()


@pytest.mark.parametrize("command", ["summary", "doctor"])
def test_a_terminal_gets_its_width_and_colours_and_a_pipe_plain_text(command: str) -> None:
    asked = (command, SLEEPER, *SMALL)
    shown = on_a_terminal(*asked, columns=60)
    assert "\x1b[" in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    held = [line for line in plain.splitlines() if not line.strip().startswith("do:")]  # a call is not cut
    assert max(map(len, held[1:])) <= 60
    piped = subprocess.run(
        [sys.executable, "-m", "widerf.cli.commands", *asked], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    ).stdout  # fmt: skip
    assert "\x1b" not in piped and max(map(len, piped.splitlines())) > 60


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_are_told_how_to_complete(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert ended.value.code == 0 and all(word in script for word in ("doctor", "--object-size", "summary"))


def test_without_shtab_completion_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 2 and "widerf[completion]" in capsys.readouterr().err


def test_what_takes_long_shows_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, said in (("summary", "predict"), ("doctor", "try")):
        main([command, HERE, *SMALL])
        assert said not in capsys.readouterr().err  # soon done
        for module in ("summary", "advice"):
            monkeypatch.setattr(f"widerf.survey.{module}.PATIENCE", 0)
        main([command, HERE, *SMALL])
        assert said in capsys.readouterr().err
        main([command, HERE, *SMALL, "--json"])
        assert said not in capsys.readouterr().err
        monkeypatch.undo()


def test_one_of_many_models_that_cannot_be_looked_at_keeps_its_reason_and_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["erf", HERE, "no_such_net", SLEEPER, *SMALL, "--samples", "0"]) == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == [HERE, SLEEPER, "no_such_net"]
    assert "MODEL must each be one that can be looked at, got 'no_such_net'" in err


def commands_of_the_readme() -> list[str]:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    return [line.partition("#")[0].strip() for line in text.splitlines() if line.startswith("widerf ")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", commands_of_the_readme())
def test_every_command_of_the_readme_runs_and_shows_something(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 4
    if "--save" in command:
        assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
