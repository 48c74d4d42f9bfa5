"""One sitting of a new user, each step in a process of its own: from the demo to a file that another runtime reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NET = """
import torch
from torch import nn

class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        block = lambda i, o, s=1: nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.BatchNorm2d(o), nn.ReLU())
        self.enter, self.down, self.deep = block(3, 8), block(8, 16, 2), block(16, 16)
        self.up, self.join, self.head = nn.Upsample(scale_factor=2), block(24, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        fine = self.enter(x)
        return self.head(self.join(torch.cat([fine, self.up(self.deep(self.down(fine)))], 1)))

def image():
    return torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(3))
"""

TRAIN = """
import json, sys, warnings
warnings.simplefilter("ignore")
import lightning.pytorch as L, torch, widerf
from lightning.pytorch.loggers import CSVLogger
from net import UNet, image
from widerf.conversion.keeping import write_state

torch.manual_seed(0)
net = UNet()
gain = widerf.init.apply(net, strength=0.5, input_size=(3, 48, 32)).gain
widerf.convert(net, extent=7)
sparse = sum(isinstance(layer, widerf.SparseConv2d) for layer in net.modules())

class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

images, labels = torch.randn(8, 3, 48, 32), torch.randint(2, (8, 48, 32))
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=2)
tracker = widerf.ERFTracker(net, every=2, input_size=(3, 48, 32), samples=2)
trainer = L.Trainer(
    max_epochs=1, accelerator="cpu", logger=CSVLogger("logs", name="", version=""), log_every_n_steps=1,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[tracker.lightning()], enable_checkpointing=False,
)
task = Task()
trainer.fit(task, data)
trainer.save_checkpoint("task.ckpt")
net.eval()
write_state(net, "net.safetensors")
with torch.no_grad():
    torch.save(net(image()), "output.pt")
print(json.dumps({"gain": gain, "sparse": sparse, "steps": trainer.global_step, "history": tracker.history,
                  "std": widerf.predict(net, (3, 48, 32)).std}))
"""

LOAD = """
import json, warnings
warnings.simplefilter("ignore")
import onnxruntime, torch, widerf
from net import UNet, image
from widerf.conversion.keeping import read_state

said, nets = {}, {}
for name in ("task.ckpt", "net.safetensors"):
    torch.manual_seed(7)
    net = UNet()
    state, _ = read_state(name)
    state = {key.removeprefix("net."): value for key, value in state.items()}
    widerf.load_state_dict(net, state)
    with torch.no_grad():
        said[name] = torch.equal(net.eval()(image()), torch.load("output.pt"))
    said["std"] = widerf.predict(net, (3, 48, 32)).std
torch.onnx.export(net, (image(),), "net.onnx", dynamo=True, verbose=False)
session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
(found,) = session.run(None, {session.get_inputs()[0].name: image().numpy()})
said["onnx"] = float((torch.from_numpy(found) - torch.load("output.pt")).abs().max())
print(json.dumps(said))
"""


def in_process(folder: Path, *command: str) -> str:
    """What a process of its own prints; it may warn, but not fail."""
    paths = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    for name, text in {"net.py": NET, "train.py": TRAIN, "load.py": LOAD}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_small_demo_writes_its_page(desk: Path) -> None:
    said = in_process(
        desk, "-m", "experiments.compare", "far-pair", "--seeds", "1", "--arms", "he", "widened", "--strengths", "0.5",
        "--depth", "2", "--radius", "2", "--steps", "20", "--erf-samples", "2", "--workers", "1", "--out", "demo",
    )  # fmt: skip
    assert "report.html" in said and (desk / "demo" / "report.html").stat().st_size > 10_000


def test_the_doctor_knows_a_network_of_ones_own(desk: Path) -> None:
    command = ("-m", "widerf.cli.commands", "doctor", "net:UNet", "--input-size", "3x48x32", "--object-size", "24")
    found = json.loads(in_process(desk, *command, "--json"))
    names = [row["name"] for row in found["report"]["rows"]]
    assert "field_too_small" in names
    (call,) = {row["call"] for row in found["report"]["rows"] if row["name"] == "field_too_small"}
    assert call.startswith("widerf.convert(model")
    assert "field_too_small" in in_process(desk, *command)


def test_what_was_widened_and_trained_comes_back_in_a_fresh_process_and_in_onnx(desk: Path) -> None:
    trained = json.loads(in_process(desk, "train.py").splitlines()[-1])
    assert trained["gain"] > 1.05 and trained["sparse"] >= 3 and trained["steps"] == 4
    assert [row["step"] for row in trained["history"]] == [0, 2]
    logged = (desk / "logs" / "metrics.csv").read_text(encoding="utf-8")
    assert "erf/std" in logged.splitlines()[0]
    assert str(trained["history"][0]["std"])[:8] in logged
    loaded = json.loads(in_process(desk, "load.py").splitlines()[-1])
    assert loaded["task.ckpt"] is True and loaded["net.safetensors"] is True
    assert loaded["std"] == trained["std"]
    assert loaded["onnx"] < 1e-5
