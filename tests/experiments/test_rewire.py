"""Rewiring taps while a network trains."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from experiments.patterns.rewire import Rewirer, demand, one_row_each
from widerf import SparseConv2d
from widerf.patterns import window


def layer_of(extent: int = 7) -> SparseConv2d:
    torch.manual_seed(0)
    return one_row_each(SparseConv2d(4, 5, 3, padding=1, bias=False, extent=extent, seed=1).double())


def test_demand_at_the_layers_own_taps_is_the_energy_of_its_weights_gradient() -> None:
    layer = layer_of()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    wanted = demand(layer, x, grad)
    cells = {tuple(c): i for i, c in enumerate(window((3, 3), (7, 7)).tolist())}
    own = torch.stack([wanted[c, [cells[tuple(t)] for t in row]] for c, row in enumerate(layer.offsets.tolist())])
    assert layer.weight.grad is not None
    torch.testing.assert_close(own, layer.weight.grad.square().sum(0).flatten(1))


def test_one_row_each_changes_no_output() -> None:
    torch.manual_seed(0)
    layer = SparseConv2d(6, 5, 3, padding=1, extent=5, seed=1).double()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    before = layer(x)
    torch.testing.assert_close(one_row_each(layer)(x), before)
    assert len(layer.offsets) == 6


def test_rewiring_keeps_the_strong_taps_and_moves_the_weak_ones_inside_the_window() -> None:
    layer = layer_of()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
    rewirer = Rewirer(layer, optimizer, steps=100, every=10)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    before = layer.offsets.clone()
    with rewirer.after(10):
        F.mse_loss(layer(x), x[:, :1].expand(-1, 5, -1, -1)).backward()
        optimizer.step()
    moved = (layer.offsets != before).any(-1)
    assert moved.sum(1).tolist() == [3] * 4  # share 0.3 of 9 taps at the start, rounded
    strength = layer.weight.square().sum(0).flatten(1)
    assert (strength[moved] == 0).all()
    assert (strength[~moved] > 0).all()
    assert layer(x).shape == (2, 5, 9, 8)  # the layer accepts its new offsets: inside the window, none twice


def test_a_target_that_lies_far_away_is_found() -> None:
    """y is x shifted by 3 pixels: no dense 3×3 tap reads there, a rewired layer learns to."""
    layer = layer_of()
    with torch.no_grad():
        layer.offsets = window((3, 3), (3, 3)).expand(4, -1, -1).clone()  # starts dense, may go as far as 3
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    rewirer = Rewirer(layer, optimizer, steps=200, every=10)
    losses = []
    for step in range(1, 201):
        x = torch.randn(4, 4, 9, 9, dtype=torch.float64)
        target = F.pad(x, (0, 3, 0, 0))[..., 3:][:, [0, 1, 2, 3, 0]]
        with rewirer.after(step):
            loss = F.mse_loss(layer(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
