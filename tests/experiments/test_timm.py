"""The sweeps over timm: their list, one model of each, and their pages."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from experiments.harness.ledger import RESULTS
from experiments.timm import convert, erf, init
from experiments.timm.models import SmallModel, input_sizes, read, small_models
from experiments.timm.sweep import convolutions, ledger


def test_the_list_has_one_model_per_module_of_timm() -> None:
    import timm

    known = {timm.models.model_entrypoint(name).__module__.rsplit(".", 1)[-1] for name in timm.list_models()}
    listed = small_models()
    # A later timm may have more modules than the version that the list was made with, an earlier one has fewer.
    made_with = (1, 0, 31)
    earlier = tuple(map(int, timm.__version__.split(".")[:3])) < made_with
    assert set(listed) <= known or (earlier and known <= set(listed))
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


def test_a_model_is_swept_and_a_model_that_cannot_be_built_says_so(tmp_path: Path) -> None:
    models = SmallModel("resnet", "test_resnet", (3, 64, 64), 0), SmallModel("x", "no_such_model", (3, 64, 64), 0)
    row, bad = ledger("timm_init", init.COLUMNS, tmp_path).fill({(m.module,): m for m in models}, init.look_at)
    assert init.good(row) and int(row["widened"]) > 0 and float(row["energy_error"]) < 1e-6
    assert not init.good(bad) and bad["error"]
    assert "1 passed in every column" in init.summary([row, bad])


class WithoutConvolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))


def test_a_model_without_convolutions_is_told_from_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", lambda name: WithoutConvolutions())
    small = SmallModel("x", "none", (3, 8, 8), 0)
    assert convolutions(WithoutConvolutions()) == []
    refused = init.look_at(small)
    assert refused["convolutions"] == 0
    assert refused["error"].startswith("ValueError")
    text = {key: str(refused.get(key, "")) for key in init.COLUMNS}
    assert "0 passed in every column, 1 hold no convolution and say so, 0 did not pass" in init.summary([text])
    assert convert.look_at(small) | {"seconds": 0} == {"model": "none", "convolutions": 0, "seconds": 0}


def test_the_pages_are_those_of_the_committed_tables() -> None:
    for name, module, page in (("timm_erf", erf, erf.summarise), ("timm_init", init, init.summary),
                               ("timm_convert", convert, convert.summary)):  # fmt: skip
        rows = ledger(name, module.COLUMNS).rows()
        assert list(rows[0]) == list(module.COLUMNS)
        assert page(rows) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")
