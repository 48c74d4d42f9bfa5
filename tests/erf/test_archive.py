"""What is read from a file is checked: shape, finiteness, sum; a damaged file is named in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import widerf
from widerf import ERF


def saved(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "whole.npz"
    widerf.measure(nn.Conv2d(1, 2, 3, padding=1), (1, 9, 9), samples=6).save(path)
    return path


SENSELESS: dict[str, Any] = {
    "NaN in the map": lambda z: {**z, "map": z["map"] * np.nan},
    "negative energy": lambda z: {**z, "map": -z["map"]},
    "a sum of 7": lambda z: {**z, "map": z["map"] * 7},
    "five centres": lambda z: {**z, "center": np.zeros(5)},
    "an infinite centre": lambda z: {**z, "center": np.array([np.inf, 4.0])},
    "a map of words": lambda z: {**z, "map": z["map"].astype(str)},
    "a map of four axes": lambda z: {**z, "map": z["map"][None, None]},
    "blocks of another shape": lambda z: {**z, "blocks": z["blocks"][:, :4]},
    "blocks without their samples": lambda z: {k: v for k, v in z.items() if k != "block_samples"},
    "no map": lambda z: {k: v for k, v in z.items() if k != "map"},
    "a name of its own": lambda z: {**z, "weights": np.zeros(3)},
    "an object": lambda z: {**z, "map": np.array([{}], dtype=object)},
}


@pytest.mark.parametrize("name", SENSELESS)
def test_a_file_without_sense_is_a_value_error_that_names_it(name: str, tmp_path: Path) -> None:
    arrays = dict(np.load(saved(tmp_path)))
    np.savez(tmp_path / "bad.npz", **SENSELESS[name](arrays))
    with pytest.raises(ValueError, match=r"bad\.npz"):
        ERF.load(tmp_path / "bad.npz")


WRONG = {"a word": np.array("x"), "four axes": np.zeros((2, 2, 2, 2)), "NaN": np.array(np.nan)}
LAWFUL = [("untraced", "a word")]
FIELDS = [field.name for field in dataclasses.fields(ERF)]
WRONG_FIELDS = [(name, wrong) for name in FIELDS for wrong in WRONG if (name, wrong) not in LAWFUL]


@pytest.mark.parametrize(("field", "wrong"), WRONG_FIELDS)
def test_no_field_is_taken_on_trust(field: str, wrong: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **{**np.load(saved(tmp_path)), field: WRONG[wrong]})
    with pytest.raises(ValueError, match=r"bad\.npz"):
        ERF.load(tmp_path / "bad.npz")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(end=st.integers(0, 3000), flip=st.integers(0, 3000))
def test_a_damaged_file_is_a_value_error_or_the_same_erf(tmp_path: Path, end: int, flip: int) -> None:
    whole = saved(tmp_path)
    data = bytearray(whole.read_bytes())
    data[flip % len(data)] ^= 0xFF
    for damaged in (bytes(data), whole.read_bytes()[: end % len(data)]):
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            erf = ERF.load(tmp_path / "bad.npz")
        except ValueError as error:
            assert "bad.npz" in str(error)
        else:
            assert torch.equal(erf.map, ERF.load(whole).map)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ERF.load(tmp_path / "none.npz")
