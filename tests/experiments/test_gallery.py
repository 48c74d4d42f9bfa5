"""The gallery says of each model what predict says of it, and draws them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import widerf
from experiments.timm import gallery
from widerf.report import cell


@pytest.mark.filterwarnings("ignore::widerf.ClippedWarning")
def test_the_page_has_a_row_a_model_with_what_predict_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "hero_erfs", lambda size: {"one": gallery.looked_at("test_resnet", size)})
    names = ["test_resnet", "test_efficientnet"]
    gallery.main(["--models", *names, "--size", "64", "--out", str(tmp_path), "--hero", str(tmp_path / "hero.png")])
    rows = [line for line in (tmp_path / "gallery.md").read_text(encoding="utf-8").splitlines() if "| test_" in line]
    for name, row in zip(names, rows, strict=True):
        torch.manual_seed(0)
        erf = widerf.predict(gallery.woken(timm.create_model(name)), (3, 64, 64))
        assert (
            row.startswith(f"| {name} | {cell(erf.trf_size) or 'the whole image'} | ") and f"| {erf.std:.1f} |" in row
        )
    for path in ("gallery.png", "hero.png"):
        with Image.open(tmp_path / path) as image:
            assert min(image.size) > 100


def test_the_list_holds_24_models_that_timm_knows() -> None:
    assert len(set(gallery.MODELS)) == 24 and all(timm.is_model(name) for name in gallery.MODELS)


def test_hero_shows_one_network_that_grows() -> None:
    with pytest.warns(widerf.ClippedWarning):
        before, weights, taps = gallery.hero_erfs(128).values()
    assert before.std < weights.std < taps.std
