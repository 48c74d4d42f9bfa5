"""The package as a whole: its names, and what importing it costs."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

import widerf

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch._dynamo",
    "cvxpy",
    "timm",
    "matplotlib",
    "jinja2",
    "tqdm",
    "torchvision",
    "lightning",
    "tensorboard",
    "pandas",
)


def loaded_by(code: str) -> set[str]:
    check = f"{code}\nimport sys; print(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    return set(subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout.split())


def test_importing_widerf_loads_nothing_heavy_that_torch_does_not() -> None:
    every = "; ".join(f"widerf.{name}" for name in widerf.__all__ if name != "ERFTracker")
    assert loaded_by(f"import torch, widerf; {every}") <= loaded_by("import torch")


@pytest.mark.parametrize("name", widerf.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(widerf, name).__doc__
    assert name in dir(widerf)


def test_a_function_is_not_hidden_by_the_module_that_holds_it() -> None:
    import widerf.conversion.swap
    import widerf.erf.measurement
    import widerf.erf.prediction

    assert callable(widerf.measure)
    assert callable(widerf.predict)
    assert callable(widerf.convert)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'mesure'"):
        _ = widerf.mesure


# ── the house
# ────────────────────────────────────────────────────────────────────────────────────────────────────────


def rooms() -> list[str]:
    """Everything in `widerf/` that is imported, packages and modules."""
    entries = [path for path in (ROOT / "widerf").iterdir() if path.name != "__pycache__"]
    return sorted(path.stem for path in entries if path.suffix in ("", ".py") and path.stem != "__init__")


def layers() -> list[str]:
    """The rooms as import-linter has them, from the top; one in brackets need not be there."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter", encoding="utf-8")
    return re.findall(r"\w+|\(\w+\)", contracts["importlinter:contract:layers"]["layers"])


def test_the_house_has_at_most_19_entries() -> None:
    entries = [path.name for path in (ROOT / "widerf").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 19, sorted(entries)


def test_every_room_has_its_layer_and_its_sentence() -> None:
    told = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(told) == rooms()
    there = [layer.strip("()") for layer in layers() if layer.strip("()") in told]
    assert there == told
    assert {layer for layer in layers() if "(" not in layer} <= set(told)


def test_every_room_that_is_a_folder_has_tests_in_a_folder_of_its_name() -> None:
    folders = [name for name in rooms() if (ROOT / "widerf" / name).is_dir()]
    assert len(folders) > 5
    assert [name for name in folders if not [*(ROOT / "tests" / name).rglob("test_*.py")]] == []


# ── lower bounds that were never run ────────────────────────────────────────────────────────────────────


def requirements() -> dict[str, str]:
    """What pyproject.toml asks of packages, whatever for: name → its rule about versions."""
    text = (ROOT / "pyproject.toml").read_text()
    core = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    lists = [core, text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]]
    found = [re.match(r"([\w-]+)(\[[\w,]+\])?(.*)", one) for many in lists for one in re.findall(r'"([^"]+)"', many)]
    return {match[1]: match[3] for match in found if match and match[1] != "widerf"}


def test_every_requirement_has_a_lowest_version_and_the_workflow_runs_all_of_them() -> None:
    """A bound that no test runs is a guess: one without a bound, or a job that installs others, would be such."""
    rules = requirements()
    assert {"torch", "timm", "numpy", "pandas", "transformers", "pytest"} <= rules.keys()
    assert [f"{name}{rule}" for name, rule in rules.items() if not re.fullmatch(r"(>=|==)\d[\w.]*", rule)] == []
    job = (ROOT / ".github/workflows/tests.yml").read_text().partition("  lowest:\n")[2]
    assert "--resolution lowest-direct" in job and "'.[test]'" in job and 'pytest -n auto -m "not slow"' in job
