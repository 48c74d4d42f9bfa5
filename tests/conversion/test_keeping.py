"""Checkpoints of converted models come back, or say in one line why not; nothing in them is run."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widerf
from widerf.conversion.keeping import read_state, write_state


def build(rank: int = 2, seed: int = 0, **arguments: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    return nn.Sequential(
        conv(3, 8, 3, padding=1), norm(8), nn.ReLU(),
        conv(8, 8, 3, padding=1, **arguments), nn.ReLU(), conv(8, 8, 3, padding=1), conv(8, 4, 1),
    ).eval()  # fmt: skip


def converted(**arguments: Any) -> nn.Sequential:
    model = build(**arguments)
    widerf.convert(model, extent=7)
    return model


def same(a: nn.Module, b: nn.Module, rank: int = 2) -> bool:
    x = torch.randn(2, 3, *[12] * rank, generator=torch.Generator().manual_seed(1))
    return torch.equal(a(x), b(x))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("arguments", [{}, {"groups": 8}, {"stride": 2}, {"bias": False}], ids=str)
def test_a_fresh_model_computes_what_the_saved_one_did(rank: int, arguments: dict[str, Any]) -> None:
    saved, fresh = converted(rank=rank, **arguments), build(rank=rank, seed=1, **arguments)
    parameters = dict(fresh.named_parameters())
    assert str(widerf.load_state_dict(fresh, saved.state_dict())) == "<All keys matched successfully>"
    assert same(saved, fresh, rank) and not same(build(rank=rank, seed=1, **arguments), fresh, rank)
    assert all(dict(fresh.named_parameters())[name] is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_a_file_brings_the_model_back(ending: str, tmp_path: Path) -> None:
    saved, fresh = converted(), build(seed=1)
    write_state(saved, tmp_path / f"a{ending}")
    assert [path.name for path in tmp_path.iterdir()] == [f"a{ending}"]
    widerf.load_state_dict(fresh, read_state(tmp_path / f"a{ending}")[0])
    assert same(saved, fresh)


def test_a_converted_model_takes_other_offsets_and_wider_windows() -> None:
    saved, other = build(), build(seed=1)
    widerf.convert(saved, extent=11)
    widerf.convert(other, extent=5, seed=3)
    widerf.load_state_dict(other, saved.state_dict())
    assert same(saved, other)


def test_a_plain_state_loads_into_plain_and_converted_models() -> None:
    plain, target = build(), converted(seed=1)
    offsets = target[3].offsets.clone()
    widerf.load_state_dict(target, plain.state_dict())
    assert torch.equal(target[3].weight, plain[3].weight) and torch.equal(target[3].offsets, offsets)
    fresh = build(seed=1)
    widerf.load_state_dict(fresh, plain.state_dict())
    assert same(plain, fresh)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_prefixes_of_wrappers_come_off(prefix: str) -> None:
    saved, fresh = converted(), build(seed=1)
    widerf.load_state_dict(fresh, {prefix + key: value for key, value in saved.state_dict().items()})
    assert same(saved, fresh)


@pytest.mark.parametrize("name", ["model", "timm_model", "net"])
def test_the_state_of_what_is_wrapped_loads_into_its_wrapper(name: str) -> None:
    saved, fresh = converted(), nn.ModuleDict({name: build(seed=1)})
    widerf.load_state_dict(fresh, saved.state_dict())
    assert same(saved, fresh[name])
    with pytest.raises(ValueError, match="unexpected"):  # nothing fits, with a prefix or without
        widerf.load_state_dict(fresh, {f"other.{key}": value for key, value in saved.state_dict().items()})


def test_an_average_and_a_compiled_model_come_back() -> None:
    saved = converted()
    average = torch.optim.swa_utils.AveragedModel(saved, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(saved)
    for state in (average.module.state_dict(), torch.compile(saved, backend="eager").state_dict()):
        fresh = build(seed=1)
        widerf.load_state_dict(fresh, state)
        assert same(saved, fresh)


def test_torch_itself_and_timm_refuse_a_sparse_state_loudly(tmp_path: Path) -> None:
    import timm

    with pytest.raises(RuntimeError, match=r"Unexpected key.*3\.offsets"):
        build().load_state_dict(converted().state_dict())
    model = timm.create_model("test_resnet")
    widerf.convert(model, extent=7)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match=r"offsets"):
        timm.create_model("test_resnet", checkpoint_path=str(tmp_path / "a.pth"))
    fresh = timm.create_model("test_resnet")
    widerf.load_state_dict(fresh, read_state(tmp_path / "a.pth")[0])
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def spoilt(change: Any) -> dict[str, Tensor]:
    state = copy.deepcopy(converted().state_dict())
    change(state)
    return state


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (lambda s: s.pop("5.weight"), r"got 1 missing key \(5.weight\)"),
    "unexpected": (lambda s: s.update({"9.weight": torch.ones(1)}), r"got 1 unexpected key \(9.weight\)"),
    "offsets of nothing": (lambda s: s.update({"9.offsets": torch.ones(1)}), r"unexpected key \(9.offsets\)"),
    "shape": (lambda s: s.update({"6.weight": torch.ones(5, 8, 1, 1)}), "size mismatch for 6.weight"),
    "offsets of a wrong shape": (lambda s: s.update({"3.offsets": s["3.offsets"][:, :4]}), "3.offsets: offsets must"),
    "offsets of reals": (lambda s: s.update({"3.offsets": s["3.offsets"] * 1.0}), "3.offsets: offsets must"),
    "too many groups": (lambda s: s.update({"3.offsets": s["3.offsets"].repeat(9, 1, 1)}), "no more groups than the 8"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("start", [build, converted])
def test_what_does_not_fit_is_one_line_and_changes_nothing(fault: str, start: Any) -> None:
    change, said = FAULTS[fault]
    model = start(seed=1)
    modules, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match=said) as raised:
        widerf.load_state_dict(model, spoilt(change))
    assert "\n" not in str(raised.value)
    assert dict(model.named_modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_without_strict_missing_and_unexpected_keys_are_told() -> None:
    state = spoilt(lambda s: s.update({"9.weight": s.pop("5.weight")}))
    result = widerf.load_state_dict(build(), state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["5.weight"], ["9.weight"])


def test_a_layer_with_a_forward_of_its_own_is_no_place_for_offsets() -> None:
    class Odd(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = build()
    model[3] = Odd(8, 8, 3, padding=1)
    with pytest.raises(ValueError, match="Odd has its own forward"):
        widerf.load_state_dict(model, converted().state_dict())


@pytest.mark.parametrize("given", [(3, {}), (build(), [1]), (build(), {1: torch.ones(1)})])
def test_arguments_of_the_wrong_type_are_named(given: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match=r"(model|state) must be"):
        widerf.load_state_dict(*given)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["WIDERF_MARK"],)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDERF_MARK", str(tmp_path / "executed"))
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="path must hold tensors only"):
        read_state(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "state_dict", "model"])
def test_the_weights_are_found_where_training_scripts_keep_them(key: str, tmp_path: Path) -> None:
    torch.save({"epoch": 3, key: build().state_dict()}, tmp_path / "a.pth")
    state, where = read_state(tmp_path / "a.pth")
    assert where == key and state.keys() == build().state_dict().keys()


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_damaged_file_is_one_line(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    write_state(build(), path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="path must") as raised:
        read_state(path)
    assert "\n" not in str(raised.value)


def test_what_is_no_state_dict_is_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(ValueError, match="path must hold a state dict"):
        read_state(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="path must be a file that exists"):
        read_state(tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"path must end in .safetensors, .pth or .pt"):
        write_state(build(), tmp_path / "a.onnx")
