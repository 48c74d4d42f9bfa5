"""A converted model goes out by every road that people use and comes back, or says in one line why not."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import widerf
from tests.conversion.test_keeping import build, converted, same
from widerf.conversion.keeping import read_state, write_state

ROOT = Path(__file__).parents[2]

RANK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, widerf
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.conversion.test_keeping import build, converted

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model = DistributedDataParallel(converted().train())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(rank)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.randn(2, 3, 12, 12)).square().mean().backward()
    optimizer.step()
if rank == 0:
    torch.save(model.state_dict(), sys.argv[3])
    torch.save(model.module.eval()(torch.ones(1, 3, 12, 12)).detach(), sys.argv[4])
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_train_one_converted_model_and_its_checkpoint_comes_back(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("meeting", "weights.pth", "output.pth")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), *paths], cwd=tmp_path, env=environment, stderr=subprocess.PIPE
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=300)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    state, _ = read_state(paths[1])
    assert all(key.startswith("module.") for key in state)
    fresh = build(seed=1)
    widerf.load_state_dict(fresh, state)
    assert torch.equal(fresh(torch.ones(1, 3, 12, 12)), torch.load(paths[2]))
    assert not torch.equal(fresh[3].weight, converted()[3].weight)  # it was trained


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_model_that_ran_comes_back() -> None:
    saved, fresh = converted(), build(seed=1)
    compiled = torch.compile(saved, backend="aot_eager")
    with torch.no_grad():
        compiled(torch.randn(1, 3, 12, 12))
    assert all(key.startswith("_orig_mod.") for key in compiled.state_dict())
    widerf.load_state_dict(fresh, compiled.state_dict())
    assert same(saved, fresh)


def test_the_average_of_timm_comes_back() -> None:
    from timm.utils import ModelEmaV3

    saved, fresh = converted(), build(seed=1)
    average = ModelEmaV3(saved, decay=0.5)
    nn.init.zeros_(saved[3].weight)
    average.update(saved)
    widerf.load_state_dict(fresh, average.state_dict())
    assert same(average.module, fresh) and not same(saved, fresh)


class Hub(nn.Module):
    """A network as people put it on the hub."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.net = build(seed=1)
        widerf.rebuild_on_load(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def hub_model() -> Any:
    hub = pytest.importorskip("huggingface_hub")
    return type("HubModel", (Hub, hub.PyTorchModelHubMixin), {})


def test_a_model_with_the_hook_comes_back_from_the_folder_of_save_pretrained(tmp_path: Path) -> None:
    kind = hub_model()
    saved = kind().eval()
    widerf.convert(saved, extent=7)
    saved.save_pretrained(tmp_path)
    fresh = kind.from_pretrained(tmp_path)
    assert isinstance(fresh.net[3], widerf.SparseConv2d) and same(saved, fresh)


def test_without_the_hook_that_folder_gives_another_network_and_a_strict_load_says_so(tmp_path: Path) -> None:
    kind = hub_model()
    saved = kind().eval()
    widerf.convert(saved, extent=7)
    saved.save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widerf, "rebuild_on_load", lambda model: None)
        assert not same(saved, kind.from_pretrained(tmp_path))  # why there is a hook
        with pytest.raises(RuntimeError, match=r"offsets"):
            kind.from_pretrained(tmp_path, strict=True)
        plain = kind().eval()
    widerf.load_state_dict(plain, read_state(tmp_path / "model.safetensors")[0])
    assert same(saved, plain)


def test_a_folder_of_transformers_comes_back_by_its_configuration(tmp_path: Path) -> None:
    """Its own from_pretrained reports offsets as unexpected, loads the rest and goes on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        given = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=4)
        saved = transformers.TimmWrapperModel(given).eval()
        widerf.convert(saved, extent=7)
        saved.save_pretrained(tmp_path)
        configuration = transformers.TimmWrapperConfig.from_pretrained(tmp_path)
        fresh = transformers.TimmWrapperModel(configuration).eval()
        _, told = transformers.TimmWrapperModel.from_pretrained(tmp_path, output_loading_info=True)
    offsets = {key for key in saved.state_dict() if key.endswith(".offsets")}
    assert offsets and set(told["unexpected_keys"]) == offsets
    widerf.load_state_dict(fresh, read_state(tmp_path / "model.safetensors")[0])
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fresh(x).last_hidden_state, saved(x).last_hidden_state)


def test_a_transformers_class_that_converts_itself_comes_back_sparse_and_refuses_other_taps(tmp_path: Path) -> None:
    """Its from_pretrained asks no hook of a module: what a checkpoint needs has to be there before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")

        class Wide(transformers.ResNetForImageClassification):
            taps: ClassVar[dict[str, Any]] = {"extent": 7}

            def __init__(self, config: Any) -> None:
                super().__init__(config)
                widerf.convert(self, **self.taps)

        other = type("Other", (Wide,), {"taps": {"extent": 9, "pattern": "stratified"}})
        fewer = type("Fewer", (Wide,), {"taps": {"extent": 7, "pattern": "stratified"}})
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
        saved, x = Wide(config).eval(), torch.randn(1, 3, 32, 32)
        saved.save_pretrained(tmp_path)
        fresh, told = Wide.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(told.values()) and torch.equal(fresh(x).logits, saved(x).logits)
        other(config).save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # another number of sets of taps
            Wide.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="offsets must lie in the window"):  # as many sets, of a wider window
            fewer.from_pretrained(tmp_path)(x)


def test_timm_loads_what_it_would_refuse_once_the_model_has_the_hook(tmp_path: Path) -> None:
    import timm

    saved, fresh = timm.create_model("test_resnet").eval(), timm.create_model("test_resnet").eval()
    widerf.convert(saved, extent=7)
    write_state(saved, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match="offsets"):
        timm.create_model("test_resnet", checkpoint_path=str(tmp_path / "a.safetensors"))
    with pytest.raises(RuntimeError, match="offsets"):
        timm.models.load_checkpoint(fresh, str(tmp_path / "a.safetensors"))
    widerf.rebuild_on_load(fresh)
    timm.models.load_checkpoint(fresh, str(tmp_path / "a.safetensors"))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fresh(x), saved(x))


def test_the_hook_works_within_a_larger_model_and_ends_when_told() -> None:
    saved = nn.ModuleDict({"net": converted(), "head": nn.Linear(2, 2)})
    fresh = nn.ModuleDict({"net": build(seed=1), "head": nn.Linear(2, 2)})
    handle = widerf.rebuild_on_load(fresh["net"])
    fresh.load_state_dict(saved.state_dict())
    assert same(saved["net"], fresh["net"])
    other = build(seed=1)
    handle.remove()
    widerf.rebuild_on_load(other).remove()
    with pytest.raises(RuntimeError, match=r"offsets"):
        other.load_state_dict(converted().state_dict())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        widerf.rebuild_on_load({})


@pytest.mark.parametrize("written", ["plain.pth", "list.pth", "text.pth", "text.safetensors", "other.safetensors"])
def test_a_wrong_file_or_the_file_of_a_wrong_model_is_one_clear_line(written: str, tmp_path: Path) -> None:
    path = tmp_path / written
    if written == "plain.pth":
        torch.save({"epoch": 3}, path)
    elif written == "list.pth":
        torch.save([torch.ones(2)], path)
    elif written.startswith("text"):
        path.write_text("not a checkpoint at all", encoding="utf-8")
    else:
        write_state(nn.Sequential(nn.Conv2d(3, 5, 3)), path)
    with pytest.raises(ValueError, match=r"(path|state) must") as raised:
        widerf.load_state_dict(build(), read_state(path)[0])
    assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value)
