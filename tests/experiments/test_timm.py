"""The sweeps over timm: their list, one model of each, and their pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.timm import erf, init
from experiments.timm.models import SmallModel, input_sizes, read, small_models


def test_the_list_has_one_model_per_module_of_timm() -> None:
    import timm

    known = {timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1] for name in timm.list_models()}
    listed = small_models()
    # A later timm may have more modules than the version that the list was made with.
    assert set(listed) <= known
    assert len(listed) == len(read()) == len(set(listed.values()))
    assert set(input_sizes()) == set(listed.values())


def test_a_listed_count_is_the_models_own() -> None:
    import timm

    small = min(read(), key=lambda model: model.parameters)
    assert sum(p.numel() for p in timm.create_model(small.name).parameters()) == small.parameters


def test_one_model_is_measured_predicted_and_traced_and_the_page_sums_it_up(tmp_path: Path) -> None:
    row = erf.look_at(SmallModel("resnet", "test_resnet", (3, 64, 64), 0), samples=2)
    assert row["measure_says"] == row["predict_says"] == row["trace_says"] == ""
    assert float(row["predicted_std"]) == pytest.approx(float(row["measured_std"]), rel=0.3)
    rows = [{name: str(row.get(name, "")) for name in erf.COLUMNS}]
    rows.append({**dict.fromkeys(erf.COLUMNS, ""), "module": "odd", "measure_says": "ValueError: no map"})
    page = erf.summarise(rows)
    assert "`measure` gives an ERF for 1 of 2" in page
    assert "ValueError: no map" in page


def test_a_model_is_swept_and_a_model_without_convolutions_says_so() -> None:
    row = init._as_text(init.look_at(SmallModel("resnet", "test_resnet", (3, 64, 64), 0)))
    assert init.good(row) and int(row["widened"]) > 0 and float(row["energy_error"]) < 1e-6
    bad = init._as_text(init.look_at(SmallModel("x", "no_such_model", (3, 64, 64), 0)))
    assert not init.good(bad) and bad["error"]
    assert "1 passed in every column" in init.summary([row, bad])
