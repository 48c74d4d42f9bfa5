"""What is measured is remembered; where there is nothing to choose, `tune` says so and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from widerf import SparseConv2d, kernels
from widerf.kernels import configurations, tuning
from widerf.kernels.configurations import Configuration, Shape

SHAPE = Shape("forward", "16-bit", 64, 128, 128, 784, 128)


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(configurations, "_measured", {})
    yield


def test_the_fastest_candidate_is_used_from_then_on() -> None:
    wanted = configurations.candidates(SHAPE)[3]
    used: list[Configuration] = []

    def clock(step: Callable[[], object]) -> float:
        step()
        if used[-1].pixels == 64:
            raise RuntimeError("out of resource: shared memory")
        return 10.0 if used[-1] == wanted else 20.0

    (row,) = tuning.search(lambda: used.append(configurations.choose(SHAPE)), clock)
    refused = sum(c.pixels == 64 for c in configurations.candidates(SHAPE))
    assert refused >= 1
    assert (row.name, row.before, row.after, row.configuration) == ("forward", 20.0, 10.0, wanted)
    assert row.tried == (len(configurations.candidates(SHAPE)) - refused, refused)
    assert configurations.choose(SHAPE) == wanted
    other = SHAPE._replace(outs=64)
    assert configurations.choose(other) == configurations.from_table(other)


def test_where_nothing_is_faster_the_table_stays() -> None:
    tuning.search(lambda: configurations.choose(SHAPE), lambda step: 5.0)
    assert configurations.choose(SHAPE) == configurations.from_table(SHAPE)


def test_on_a_cpu_there_is_nothing_to_tune_and_nothing_changes() -> None:
    layer = SparseConv2d(8, 8, 3, padding=1, seed=0)
    before = copy.deepcopy(layer.state_dict())
    report = kernels.tune(layer, torch.zeros(1, 8, 9, 9))
    assert len(report) == 0
    assert "nothing to tune" in str(report)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_every_layer_has_a_path_with_a_reason() -> None:
    x = torch.zeros(1, 8, 9, 9)
    grid = SparseConv2d(8, 8, 3, padding=1, pattern="grid", extent=7)
    assert kernels.path_of(grid, x).path == "PyTorch's convolution"
    layer = SparseConv2d(8, 8, 3, padding=1, seed=0)
    assert kernels.path_of(layer, x).path == kernels.info()["cpu float32"].path
    assert kernels.path_of(layer.double(), x.double()) == kernels.Path(
        "SparseConv2d", kernels.STOCK, "the compiled kernels take float32, bfloat16 and float16 with one or two axes"
    )


@pytest.mark.parametrize("ask", [kernels.tune, kernels.path_of])
def test_what_is_no_sparse_layer_is_refused(ask: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="layer must be a sparse convolution, got 'Conv2d'"):
        ask(nn.Conv2d(3, 3, 3), torch.zeros(1, 3, 9, 9))
    with pytest.raises(TypeError, match="input must be a tensor, got 'tuple'"):
        ask(SparseConv2d(3, 3, 3, seed=0), (3, 9, 9))


def test_on_a_gpu_the_grouping_of_the_taps_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from widerf.kernels import cuda

    taps = torch.arange(2 * 9 * 2).reshape(2, 9, 2)
    x = torch.empty(1, 64, 4, 4)
    shared = taps.repeat_interleave(32, 0)
    assert cuda.why_not_boxes(shared, x, (1, 1), 64, 1) is None
    assert "blocks of 16, 32 or 64" in (cuda.why_not_boxes(taps.repeat(32, 1, 1), x, (1, 1), 64, 1) or "")
    assert "no multiple of 4" in (cuda.why_not_boxes(shared, x, (1, 1), 63, 1) or "")
    assert "2 groups" in (cuda.why_not_boxes(shared, x, (1, 1), 64, 2) or "")
    assert "16 bits" in (cuda.why_not_boxes(shared + 40000, x, (1, 1), 64, 1) or "")
    monkeypatch.setattr(cuda.device, "capability", lambda device: (8, 0))
    assert "compute capability 9.0" in (cuda.why_not_boxes(shared, x, (1, 1), 64, 1) or "")
    assert cuda.why_not_boxes(shared, x, (1, 1), 64, 64) is None  # depthwise layers need no descriptors


@pytest.mark.parametrize(("capability", "found"), [((9, 0), "blocks of 16, 32 or 64"), ((8, 0), "only depthwise")])
def test_info_names_both_paths_of_a_gpu(
    capability: tuple[int, int], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(kernels, "path", lambda device, dtype, rank: ("cuda" if device.type == "cuda" else "torch", ""))
    rows = [row for row in kernels.info() if row.name.startswith("cuda")]
    assert [row.path for row in rows] == ["Triton, by boxes", "Triton, gathered"]
    assert found in rows[0].why
