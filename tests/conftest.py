"""Options and fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

DTYPES = ("float64", "float32", "bfloat16", "float16")


def pytest_addoption(parser: pytest.Parser) -> None:
    where = parser.getgroup("widerf", "where tests that ask for `device` and `dtype` compute")
    where.addoption("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps, …")
    where.addoption("--dtype", default="float32", choices=DTYPES, help="float32 by default")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of ``--device``; one that is not there is an error, not a skip."""
    asked = torch.device(request.config.getoption("--device"))
    return torch.empty(1, device=asked).device


@pytest.fixture(scope="session")
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The precision of ``--dtype``."""
    found: torch.dtype = getattr(torch, request.config.getoption("--dtype"))
    return found


@pytest.fixture
def double_precision() -> Iterator[None]:
    """float64 by default, and a fixed seed."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
