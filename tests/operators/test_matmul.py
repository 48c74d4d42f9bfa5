"""Products with vectors are those with matrices of one row or column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from widerf import measure, predict, receptive_field
from widerf.errors import ClippedWarning


class Mixed(nn.Module):
    """A 1×1 convolution with one output channel, written as a product with a vector or with a matrix."""

    def __init__(self, vector: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.row = nn.Parameter(torch.linspace(-1, 2, 4))
        self.vector = vector

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).tanh()
        rows = x.movedim(1, -1).reshape(-1, 4)
        mixed = torch.mv(rows, self.row) if self.vector else torch.mm(rows, self.row[:, None])
        return mixed.reshape(x.shape[0], 1, *x.shape[2:])


class Gated(nn.Module):
    """A gate out of one scalar product with the whole map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.row = nn.Parameter(torch.randn(32 * 9 * 9) / 50)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).tanh()
        return self.last(x * torch.stack([torch.dot(image.flatten(), self.row) for image in x]).view(-1, 1, 1, 1))


def built(make: type[nn.Module], *arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return make(*arguments).double()


def test_a_vector_is_a_matrix_of_one_column() -> None:
    vector, matrix = built(Mixed, True), built(Mixed, False)
    field = receptive_field(vector, (2, 9, 9))
    assert (field.size, field.jump) == ((3, 3), (1.0, 1.0)) and field == receptive_field(matrix, (2, 9, 9))
    assert torch.equal(predict(vector, (2, 9, 9)).map, predict(matrix, (2, 9, 9)).map)
    roads = [measure(model, (2, 9, 9), samples=4) for model in (vector, matrix)]
    assert roads[0].trf_size == (3, 3)
    torch.testing.assert_close(roads[0].map, roads[1].map)


def test_a_scalar_product_with_the_whole_map_is_a_global_path() -> None:
    model = built(Gated)
    field = receptive_field(model, (2, 9, 9))
    assert (field.size, field.global_paths) == ((5, 5), ("",))
    for road in (lambda: predict(model, (2, 9, 9)), lambda: measure(model, (2, 9, 9), samples=8)):
        with pytest.warns(ClippedWarning, match="whole image"):
            erf = road()
        assert int((erf.map > 0).sum()) == 81 and erf.trf_size is None
