"""Convert's idea of the model.

A block that can still fuse its convolutions loses no offsets; a block that has fused them already is converted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import fingerprint
from widerf import SparseConv2d, convert
from widerf.convolutions.branches import FUSING, fusing_methods, undone
from widerf.convolutions.selection import find_convolutions


class ConvNorm(nn.Module):
    """A convolution and its norm, which may be folded into it."""

    def __init__(self, a: int, b: int, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn(self.conv(x)) if hasattr(self, "bn") else self.conv(x)).relu()  # type: ignore[no-any-return]

    def fold(self) -> None:
        if hasattr(self, "bn"):
            old, bn = self.conv, self.bn
            new = nn.Conv2d(old.in_channels, old.out_channels, 3, old.stride, old.padding)  # type: ignore[arg-type]
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()  # type: ignore[operator]
            new.weight.data = old.weight.data * scale.data.view(-1, 1, 1, 1)
            new.bias.data = bn.bias.data - bn.running_mean * scale.data  # type: ignore[union-attr, operator]
            self.conv = new
            del self.bn


class Body(nn.Module):
    """A stack of them, with the method that folds all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(ConvNorm(3, 8, 2), ConvNorm(8, 16, 2), ConvNorm(16, 16), ConvNorm(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]

    def _fold_all(self) -> Body:
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()
        return self


CHANGING = [method for method in FUSING if method != "get_equivalent_kernel_bias"]
X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_with(method: str, where: str) -> tuple[nn.Module, nn.Module, Any]:
    """A model with a fusing method: the module to convert, the outermost one, and what calls the method."""
    torch.manual_seed(0)
    if where == "block":
        kind = type("Block", (ConvNorm,), {method: ConvNorm.fold})
        body = nn.Sequential(kind(3, 8, 2), kind(8, 16, 2), kind(16, 16), kind(16, 16)).eval()
        return body, body, lambda: [getattr(block, method)() for block in body]
    kind = type("Body", (Body,), {method: Body._fold_all})
    model = kind().eval()
    outer = nn.ModuleDict({"inner": model}) if where == "far above" else model
    return (model if where == "model" else model.layers), outer, getattr(model, method)


@pytest.mark.parametrize("where", ["block", "model", "above", "far above"])
@pytest.mark.parametrize("method", CHANGING)
def test_what_can_still_be_fused_stays_dense_and_is_named_and_what_was_fused_is_converted(
    method: str, where: str
) -> None:
    part, outer, fuse = model_with(method, where)
    state = fingerprint(outer)
    verdicts = [row.verdict for row in convert(part, extent=7)]
    assert all(f".{method}()" in verdict and "would rebuild it" in verdict for verdict in verdicts)
    assert all(("above what is converted" in verdict) == ("above" in where) for verdict in verdicts)
    assert fingerprint(outer) == state  # trying the method left everything as it was, random states included
    fuse()
    report = convert(part, extent=7)
    assert [row.verdict for row in report] == ["the stem stays dense", "sparse", "sparse", "sparse"]
    inner = next(iter(outer.children())) if where == "far above" else outer
    wanted = inner(X)
    fuse()  # nothing is left to do
    assert sum(isinstance(m, SparseConv2d) for m in outer.modules()) == 3
    torch.testing.assert_close(inner(X), wanted)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "repghostnet_050", "repvit_m0_9"])
def test_timm_models_convert_after_fusing_only(name: str) -> None:
    import timm
    from timm.utils.model import reparameterize_model

    model = timm.create_model(name).eval()
    for block in model.modules():
        if fusing_methods(block):
            names = {id(m) for m in block.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1}
            break
    assert names
    before = {row.name: row for row in convert(model, extent=7, dry_run=True)}
    assert any("would rebuild it" in row.verdict for row in before.values())
    fused = reparameterize_model(model)
    report = convert(fused, extent=7)
    assert not any("would rebuild it" in row.verdict for row in report)
    assert sum(row.converted for row in report) > sum(row.converted for row in before.values())


def test_a_submodule_called_fuse_is_no_method_that_fuses() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fuse = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fuse(self.conv(x))  # type: ignore[no-any-return]

    report = convert(nn.Sequential(nn.Conv2d(3, 8, 3), Head()), extent=7)
    assert report["1.conv"].converted


def test_a_method_that_fails_on_the_copy_may_do_anything() -> None:
    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def switch_to_deploy(self, argument: int) -> None:
            print(argument)

    report = convert(nn.Sequential(nn.Conv2d(3, 8, 3), Needs()), extent=7)
    assert report["1.conv"].verdict == "Needs.switch_to_deploy() would rebuild it as a plain convolution"


@pytest.mark.parametrize("method", FUSING)
def test_init_warns_of_the_same_blocks_that_conversion_leaves_dense(method: str) -> None:
    """One list: a block that is undone in part by its fusing is one that would rebuild its convolution."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.narrow(x)  # type: ignore[no-any-return]

        def merge(self) -> None:
            self.wide = nn.Conv2d(8, 8, 3, padding=1)
            self.narrow = nn.Identity()  # type: ignore[assignment]

    block = type("Block", (Branches,), {method: Branches.merge})
    net = nn.Sequential(nn.Conv2d(3, 8, 3), block())
    assert set(undone(net, find_convolutions(net))) == {"1.wide"}
    assert f".{method}() would rebuild it" in convert(net, extent=7)["1.wide"].verdict
