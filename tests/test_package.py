"""The package as a whole: its names, and what importing it costs."""

import subprocess
import sys

import pytest

import widerf

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
