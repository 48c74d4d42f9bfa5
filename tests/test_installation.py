"""What pip installs works with a compiler and without one. Slow: environments are made and packages built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import widerf
from widerf.kernels import STOCK, cpu

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="paths and names of programs as on Unix"),
]
USE = """
import torch, widerf
layer = widerf.SparseConv2d(32, 8, 3, padding=1, extent=9)
x = torch.randn(2, 32, 9, 9)
torch.testing.assert_close(layer(x), layer.to_conv2d()(x), rtol=1e-4, atol=1e-4)
print(widerf.__file__)
print(widerf.kernels.info()["cpu float32"].path)
"""


def run(*command: object, cwd: Path, path: str | None = None) -> str:
    """Run a command; ``path`` replaces PATH, and no compiler is named elsewhere."""
    env = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH", "WIDERF_KERNELS")}
    if path is not None:
        env["PATH"] = path
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of sources, made from a copy of the project in which nothing is compiled."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "widerf", copy / "widerf", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('.')", cwd=copy)
    (archive,) = copy.glob("*.tar.gz")
    return archive


def environment(folder: Path) -> Path:
    """A new virtual environment with nothing but pip; all other packages are those of this environment."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    for old in site.glob("setuptools*"):  # Python 3.11 brings one that knows no wheels
        shutil.rmtree(old)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin"


def installed(what: Path, folder: Path) -> str:
    """Install ``what`` where no compiler is to be found; return what computes there."""
    programs = environment(folder / "env")
    assert shutil.which("gcc", path=str(programs)) is None
    pip = (programs / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", what)
    run(*pip, cwd=folder, path=str(programs))
    where, computes = run(programs / "python", "-c", USE, cwd=folder, path=str(programs)).splitlines()
    told = run(programs / "widerf", "--help", cwd=folder, path=str(programs))
    assert all(command in told for command in ("erf", "init", "convert"))
    assert Path(where).is_relative_to(folder)
    return computes


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler to build the wheel with")
def test_a_wheel_works_where_there_is_no_compiler(sources: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, sources)
    run(*pip, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[1] == widerf.__version__
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert {Path(name).name.split(".")[0] for name in libraries} >= {f"_{name}" for name in cpu.runnable()}
    assert installed(wheel, tmp_path) == f"C++ for {cpu.runnable()[0]}"


def test_the_sources_install_without_a_compiler(sources: Path, tmp_path: Path) -> None:
    assert installed(sources, tmp_path) == STOCK
