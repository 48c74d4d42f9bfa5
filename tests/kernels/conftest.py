"""Fixtures of the compiled CPU kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.layers import BUILDS, built, skip_unless_runnable
from widerf.kernels import cpu


@pytest.fixture(params=list(BUILDS))
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> str:
    name: str = request.param
    skip_unless_runnable(name)
    library = built(name, tmp_path_factory.getbasetemp())
    monkeypatch.setattr(cpu, "library", lambda: library)
    return name


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
