"""Kernels on layers that leave one tile, and the proof that these layers show faults: each is put in and seen."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.kernels.interpreted import errors, errors_of_mutant, interpreting, wrong
from tests.kernels.mutants import MUTANTS, Mutant
from tests.kernels.tiles import FAST, drawn_blocks, several_tiles

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CASES = several_tiles()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with interpreting() as pool:
        yield pool


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_layers_of_several_tiles_agree_with_the_scattered_kernel(name: str, interpreter: ProcessPoolExecutor) -> None:
    found = interpreter.submit(errors, CASES[name]).result(timeout=600)
    assert not wrong(found, CASES[name]), found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_layers_of_blocks_drawn_at_random_agree(seed: int, interpreter: ProcessPoolExecutor) -> None:
    case = drawn_blocks(seed)
    found = interpreter.submit(errors, case).result(timeout=600)
    assert not wrong(found, case), (case, found)


def first_of_each_kind(mutant: Mutant) -> bool:
    """Whether no earlier fault of this kernel is of the same kind, by the first word: shift, mask, chunk, ..."""
    kind = mutant.fault.split()[0]
    return next(m for m in MUTANTS if m.kernel == mutant.kernel and m.fault.split()[0] == kind) is mutant


@pytest.mark.parametrize(
    "mutant",
    [m if first_of_each_kind(m) else pytest.param(m, marks=pytest.mark.slow) for m in MUTANTS],
    ids=lambda m: f"{m.kernel}, {m.fault}",
)
def test_a_fault_of_a_kernel_is_seen_by_a_layer_above(mutant: Mutant, interpreter: ProcessPoolExecutor) -> None:
    assert mutant.case in FAST
    case = CASES[mutant.case]
    found = interpreter.submit(errors_of_mutant, case, mutant.kernel, mutant.old, mutant.new).result(timeout=600)
    assert wrong(found, case), found
