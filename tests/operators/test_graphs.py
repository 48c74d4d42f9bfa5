"""Random graphs: what the gradient reaches lies in the box or on a path that is named, and the two roads agree."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.operators.graphs import Function, Gate, Graphs
from widerf import measure, predict, receptive_field
from widerf.errors import ClippedWarning, UntreatedOperatorError

FAST, ALL = 60, 500
FAST_ROADS, ROADS = 12, 100


def seen_by(model: nn.Module, size: tuple[int, ...], unit: tuple[int, ...], rank: int) -> Tensor:
    """Pixels that a unit's gradient reaches for one of several images: the oracle."""
    seen = torch.zeros(size[1:], dtype=torch.bool)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(1, *size, dtype=torch.float64, generator=generator).requires_grad_()
        y = model(x)
        y = y.unsqueeze(1) if y.ndim == rank + 1 else y
        channels = y[(0, slice(None), *unit)]
        (gradient,) = torch.autograd.grad((channels * torch.rand(channels.shape, generator=generator)).sum(), x)
        seen |= gradient[0].abs().sum(0) > 1e-13 * gradient.abs().max()
    return seen


def global_modules(model: nn.Module, size: tuple[int, ...], rank: int) -> set[str]:
    """Modules with an output unit whose gradient reaches all positions of the module's own input: the oracle."""
    met: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, x, y, name=name: met.update({name: (x[0], y)}))
        for name, module in model.named_modules()
        if isinstance(module, Gate) or not list(module.children())
    ]
    x = torch.rand(1, *size, dtype=torch.float64).requires_grad_()
    model(x)
    for handle in handles:
        handle.remove()
    found = set()
    for name, (came, went) in met.items():
        if came.ndim == went.ndim == rank + 2:
            centre = went[(0, slice(None), *(n // 2 for n in went.shape[2:]))]
            weights = torch.rand(centre.shape, dtype=torch.float64)
            (gradient,) = torch.autograd.grad((centre * weights).sum(), came, retain_graph=True)
            if bool((gradient[0].abs().sum(0) > 0).all()):
                found.add(name)
    return found


def check(seed: int) -> None:
    torch.manual_seed(seed)
    model, size = Graphs(seed).model()
    field = receptive_field(model, size, layer="")
    rank = len(size) - 1
    with torch.no_grad():
        y = model(torch.zeros(1, *size, dtype=torch.float64))
    shape = tuple(y.shape[-rank:])
    for unit in {tuple(n // 2 for n in shape), tuple(0 for _ in shape), tuple(n - 1 for n in shape)}:
        first, last = field.interval(unit)
        seen = seen_by(model, size, unit, rank)
        inside = torch.zeros_like(seen)
        inside[tuple(slice(max(a, 0), max(b + 1, 0)) for a, b in zip(first, last, strict=True))] = True
        outside = bool((seen & ~inside).any())
        assert not outside or field.global_paths, f"graph {seed}, unit {unit}: a path is silent\n{model}\n{field}"
    assert set(field.global_paths) == global_modules(model, size, rank), f"graph {seed}\n{model}\n{field}"


@pytest.mark.parametrize("seed", range(FAST))
def test_no_path_of_a_random_graph_is_silent(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FAST, ALL))
def test_no_path_of_many_random_graphs_is_silent(seed: int) -> None:
    check(seed)


# ── the two roads ───────────────────────────────────────────────────────────────────────────────────────


def redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of mean zero that keep the signal's size."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.data = noise / math.sqrt(parameter[0].numel())
            else:
                nn.init.ones_(parameter)


def compare_roads(seed: int) -> None:
    """Variances over redrawn weights, pair by pair; what statistics and gates make common is treated less well."""
    torch.manual_seed(seed)
    model, size = Graphs(seed).model()
    field = receptive_field(model, size, layer="")
    generator, pairs = torch.Generator().manual_seed(0), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClippedWarning)
        for _ in range(16):
            redraw(model, generator)
            roads = predict(model, size, layer=""), measure(model, size, layer="", samples=4, batch_size=4)
            pairs.append([erf.std**2 for erf in roads])
    variances = torch.tensor(pairs, dtype=torch.float64)
    gap = variances[:, 1] - variances[:, 0]
    error = float(gap.std() / math.sqrt(len(gap)))
    allowed = (0.6 if field.global_paths else 0.15) * float(variances[:, 1].mean()) + 3 * error
    assert abs(float(gap.mean())) < allowed, f"graph {seed}: {variances.mean(0).sqrt()}\n{model}"


@pytest.mark.parametrize("seed", range(FAST_ROADS))
def test_the_roads_agree_on_a_random_graph(seed: int) -> None:
    compare_roads(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FAST_ROADS, ROADS))
def test_the_roads_agree_on_many_random_graphs(seed: int) -> None:
    compare_roads(seed)


@pytest.mark.parametrize("seed", range(10))
def test_an_operator_without_a_rule_is_named_wherever_it_stands(seed: int) -> None:
    model, size = Graphs(seed).model()
    place = seed % len(model) + 1
    layers = [*model[:place], Function("running sum", lambda x: x.cumsum(-1)), *model[place:]]
    for road in (receptive_field, predict):
        with pytest.raises(UntreatedOperatorError, match=rf"cumsum.* in module '{place}'"):
            road(nn.Sequential(*layers), size, layer="")
