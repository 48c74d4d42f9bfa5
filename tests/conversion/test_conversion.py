"""Conversion keeps weights, shapes and checkpoints; it says what it left alone; densify is exact."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widerf
from tests.reference import fingerprint
from widerf import SparseConv2d, convert, densify
from widerf.conversion.windows import automatic_extent


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.norm(self.conv1(x)))))


class Net(nn.Module):
    """A stem, three stages of jumps 2, 4 and 8, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.stage1 = Block(16)
        self.down1 = nn.Conv2d(16, 16, 2, 2)
        self.stage2 = Block(16, groups=16)
        self.down2 = nn.Conv2d(16, 16, 3, 2, 1)
        self.stage3 = nn.Sequential(Block(16), Block(16))
        self.head = nn.Linear(16, 5)

    def features(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down1(self.stage1(self.stem(x))))
        return self.stage3(self.down2(x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arguments", [{"extent": 9}, {"input_size": (3, 64, 64)}])
def test_weights_checkpoints_and_shapes_carry_over_and_densify_is_exact(arguments: dict[str, Any]) -> None:
    net = Net()
    checkpoint, parameters = net.state_dict(), list(net.parameters())
    report = convert(net, **arguments)
    assert any(isinstance(m, SparseConv2d) for m in net.modules())
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert report.weights is not None
    assert report.weights[0] == report.weights[1]
    net.load_state_dict(checkpoint)
    net.eval()
    y = net(X)
    assert y.shape == (2, 5)
    y.sum().backward()
    dense = densify(net)
    assert not any(isinstance(m, SparseConv2d) for m in dense.modules())
    torch.testing.assert_close(dense(X), y, rtol=1e-4, atol=1e-5)


def test_stem_first_stage_1x1_and_patchify_stay_dense_and_multiplications_stay() -> None:
    report = convert(Net(), input_size=(3, 64, 64))
    verdicts = {row.name: row.verdict for row in report}
    assert verdicts["stem"] == "the stem stays dense"
    assert verdicts["stage1.conv1"] == "the first stage stays dense"
    assert verdicts["down1"] == "patchify (stride ≥ kernel)"
    assert verdicts["stage2.conv2"].startswith("1×1 kernel")
    assert [name for name, verdict in verdicts.items() if verdict == "sparse"] == [
        "stage2.conv1",
        "down2",
        "stage3.0.conv1",
        "stage3.1.conv1",
    ]
    assert report.multiplications is not None
    assert report.multiplications[0] == report.multiplications[1] > 0
    assert report["stage2.conv1"].jump == (4.0, 4.0)
    assert report["stage2.conv1"].map_size == (16, 16)
    assert report["stage3.1.conv1"].extent == automatic_extent((3, 3), (8, 8)) == (5, 5)


@pytest.mark.filterwarnings("ignore::widerf.errors.ClippedWarning")
def test_the_predicted_erf_is_that_of_the_two_models() -> None:
    net = Net()
    before = widerf.predict(net, (3, 64, 64)).std
    report = convert(net, extent=7, input_size=(3, 64, 64))
    after = widerf.predict(net, (3, 64, 64)).std
    assert report.erf_std == pytest.approx((before, after))
    assert report.gain == pytest.approx(after / before)
    assert after > 1.1 * before


def test_the_window_is_never_wider_than_the_map() -> None:
    for row in convert(Net(), extent=31, input_size=(3, 64, 64)):
        if row.converted:
            assert row.extent is not None
            assert row.map_size is not None
            assert all(s <= n for s, n in zip(row.extent, row.map_size, strict=True))


def test_at_one_resolution_the_first_half_stays_dense_and_the_windows_grow() -> None:
    net = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(6)])
    extents = [row.extent for row in convert(net, input_size=(8, 40, 40))]
    assert extents[:3] == [None] * 3
    assert extents[3:] == sorted(extents[3:])
    assert extents[-1] == (15, 15)


def test_a_dry_run_leaves_the_model_bit_identical_and_tells_the_same() -> None:
    net = Net()
    state, rng = fingerprint(net), torch.get_rng_state()
    report = convert(net, input_size=(3, 64, 64), dry_run=True)
    assert fingerprint(net) == state
    assert torch.equal(rng, torch.get_rng_state())
    done = convert(net, input_size=(3, 64, 64))
    assert done.rows == report.rows
    assert done.erf_std == pytest.approx(report.erf_std)


def test_patterns_are_the_same_in_every_process_and_differ_between_layers() -> None:
    nets = [Net(), Net()]
    torch.manual_seed(9)
    for net in nets:
        convert(net, extent=9, seed=4)
    for a, b in zip(nets[0].modules(), nets[1].modules(), strict=True):
        if isinstance(a, SparseConv2d) and isinstance(b, SparseConv2d):
            assert torch.equal(a.offsets, b.offsets)
    stage: Any = nets[0].stage3
    assert not torch.equal(stage[0].conv1.offsets, stage[1].conv1.offsets)


def test_only_and_skip_by_name_and_type() -> None:
    report = convert(Net(), extent=7, only=["stem", "stage3"], skip="stage3.1")
    assert [row.name for row in report if row.converted] == ["stem", "stage3.0.conv1"]
    assert report["stage3.1.conv1"].verdict == "in skip"
    assert report["down2"].verdict == "not in only"


def test_a_layer_held_in_two_places_stays_one_layer() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), shared, nn.ReLU(), shared)
    convert(net, extent=7)
    assert isinstance(net[1], SparseConv2d)
    assert net[1] is net[3]


def test_what_could_lose_the_offsets_stays_dense_with_a_reason() -> None:
    class Fusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def fuse(self) -> None:
            raise NotImplementedError

    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    net = nn.Sequential(nn.Conv2d(4, 4, 3), Fusing(), Own(4, 4, 3), normed, nn.ConvTranspose2d(4, 4, 3))
    reasons = [row.verdict for row in convert(net, extent=7)][1:]
    for reason, words in zip(
        reasons, ["Fusing.fuse()", "own forward", "weight is computed", "transposed"], strict=True
    ):
        assert words in reason


@pytest.mark.parametrize("name", ["repghostnet_050", "repvgg_a0", "levit_128s", "mobileone_s0"])
def test_timm_blocks_that_fuse_themselves_hold_no_sparse_layer(name: str) -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    convert(model, extent=7)
    for block in model.modules():
        if any(hasattr(block, method) for method in ("fuse", "reparameterize", "switch_to_deploy")):
            assert not any(isinstance(m, SparseConv2d) for m in block.modules())


def test_timms_pruning_of_layers_leaves_the_offsets_alone() -> None:
    from timm.utils import freeze, unfreeze

    net = Net()
    convert(net, extent=9)
    before = {k: v.clone() for k, v in net.state_dict().items() if k.endswith("offsets")}
    freeze(net)
    unfreeze(net)
    assert before
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())


def test_models_of_one_and_three_axes() -> None:
    for conv, size in ((nn.Conv1d, (4, 40)), (nn.Conv3d, (4, 9, 9, 9))):
        net: Any = nn.Sequential(*[conv(4, 4, 3, padding=1) for _ in range(3)])
        report = convert(net, extent=5)
        assert sum(row.converted for row in report) == 2
        x = torch.randn(1, *size)
        torch.testing.assert_close(densify(net)(x), densify(net)(x))


def test_a_trained_model_can_be_fine_tuned_by_the_optimiser_that_it_has() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    convert(net, extent=7)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(net(X), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_report_reads_as_text_html_and_json() -> None:
    report = convert(Net(), extent=7, dry_run=True)
    assert "would become sparse (dry run)" in str(report)
    assert "<table>" in report._repr_html_()
    rows = json.loads(report.to_json())["rows"]
    assert {row["verdict"] for row in rows} >= {"sparse", "the stem stays dense"}


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "input_size must be given if extent is not, got None", {}),
        (ValueError, "pattern must be one of .*did you mean 'mixed'", {"extent": 7, "pattern": "mixt"}),
        (TypeError, "extent must be an integer, got 7.5", {"extent": 7.5}),
        (ValueError, "extent must be positive, got 0", {"extent": 0}),
        (ValueError, "only must match a convolution .*got 'stage9'", {"extent": 7, "only": "stage9"}),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_changed(error: Any, message: str, arguments: dict[str, Any]) -> None:
    net = Net()
    state = fingerprint(net)
    with pytest.raises(error, match=message):
        convert(net, **arguments)
    assert fingerprint(net) == state
