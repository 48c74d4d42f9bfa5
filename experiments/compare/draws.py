"""Base draws of an initialiser from one stream of normal numbers, and profiles that are controls of the widened one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from scipy import optimize
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrize

import widerf

Base = Callable[[Tensor, Generator], object]


def _torch_default(weight: Tensor, generator: Generator) -> None:
    """Fill as ``nn.Conv2d`` does, uniform within ± 1/√fan_in, but by the normal numbers that the other draws use.

    The distribution function Φ takes a normal number to a uniform one: Φ(z) = (1 + erf(z/√2))/2.
    """
    bound = 1 / math.sqrt(weight[0].numel())
    weight.normal_(generator=generator).div_(math.sqrt(2)).erf_().mul_(bound)


BASES: dict[str, Base] = {
    "he": lambda weight, generator: nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator),
    "xavier": lambda weight, generator: nn.init.xavier_normal_(weight, generator=generator),
    "torch": _torch_default,
    "orthogonal": lambda weight, generator: nn.init.orthogonal_(weight, math.sqrt(2), generator=generator),
}


@torch.no_grad()
def draw(net: nn.Module, base: str, seed: int) -> None:
    """Fill every weight of ``net``; draws of one seed use the same normal numbers under every ``base``.

    Biases are zero, but under ``torch``: uniform within ± 1/√fan_in, from a stream of their own.
    """
    generator, of_biases = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 2**32)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, widerf.SparseConv2d, nn.Linear)):
            BASES[base](module.weight, generator)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel()) if base == "torch" else 0.0
                module.bias.uniform_(-bound, bound, generator=of_biases)


def centre_weighted(kernel_size: Sequence[int], strength: float) -> Tensor:
    """Return the mirror image of soft corners: the profile nearest to uniform with as much *less* variance.

    On an axis of k taps soft corners add s·(((k − 1)/2)² − (k² − 1)/12) to the variance of equal taps. This takes it
    away (at most s times all of it). The optimum is again a Gibbs law exp(β m²)/Z, with β < 0.

    Example:
        >>> profile = centre_weighted((3, 3), 0.5)
        >>> [round(36 * float(profile[tap]), 4) for tap in [(0, 0), (0, 1), (1, 1)]]
        [2.25, 4.5, 9.0]
    """
    profile = torch.ones((), dtype=torch.float64)
    for taps in kernel_size:
        squares = torch.linspace(-1, 1, taps, dtype=torch.float64) ** 2 if taps > 1 else torch.zeros(1).double()
        uniform = float(squares.mean())
        wanted = uniform - strength * min(1 - uniform, uniform)

        def law(beta: float, squares: Tensor = squares) -> Tensor:
            return torch.softmax(beta * squares, 0)

        def excess(beta: float, squares: Tensor = squares, wanted: float = wanted) -> float:
            return float(law(beta, squares) @ squares) - wanted

        beta = optimize.brentq(excess, -1e4, 0.0, xtol=1e-13) if taps > 2 and strength > 0 else 0.0
        profile = profile.unsqueeze(-1) * law(beta)
    return profile


@torch.no_grad()
def reweight(net: nn.Module, profile: Callable[[tuple[int, ...]], Tensor]) -> None:
    """Multiply the taps of every convolution by √(n·v), v its profile over n taps; each kernel keeps its Σ w²."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 2:
            weight, energy = module.weight, module.weight.square().sum()
            shares = profile(tuple(module.kernel_size))
            weight.mul_((shares * shares.numel()).sqrt().to(weight.dtype))
            weight.mul_((energy / weight.square().sum()).sqrt())


def shuffled(strength: float, seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    """Return soft corners whose shares lie on random taps, another permutation a layer: as uneven, not outward."""
    generator = torch.Generator().manual_seed(seed)

    def profile(size: tuple[int, ...]) -> Tensor:
        shares = widerf.profile.soft_corners(size, strength).flatten()
        return shares[torch.randperm(len(shares), generator=generator)].view(size)

    return profile


@torch.no_grad()
def rates_alone(net: nn.Module, strength: float) -> None:
    """Give every convolution a lasting profile, and its weights back: other learning rates, nothing else."""
    drawn = {module: module.weight.detach().clone() for module in net.modules() if isinstance(module, nn.Conv2d)}
    widerf.init.apply(net, strength, lasting=True)
    for module, weight in drawn.items():
        if parametrize.is_parametrized(module, "weight"):
            module.weight = weight  # type: ignore[assignment]


def covariance(kernel_size: Sequence[int], width: float) -> Tensor:
    r"""Return the covariance of a filter's taps of Trockman, Willmott and Kolter (2022, arXiv 2210.03651, § 4).

    With a Gaussian bump :math:`Z_\sigma(p) = \exp(-|p|^2/2\sigma)` about the kernel's centre,

    .. math:: \Sigma(p, q) = \tfrac12\,[Z(p) + Z(q)]\, Z(p - q) - \tfrac12\, Z(p)\, Z(q),

    the block-symmetrised product of their static part (variance falls off from the centre) and their dynamic part
    (taps vary with their neighbours); negative eigenvalues are cut off, as there. Written down from the paper's
    construction and not compared with its authors' code.

    Args:
        kernel_size: taps on each axis.
        width: :math:`\sigma`, a variance in taps².

    Returns:
        (n, n) in float64 for n taps, positive semi-definite.

    Example:
        >>> matrix = covariance((3, 3), 1.0)
        >>> matrix.shape, bool(torch.linalg.eigvalsh(matrix).min() > -1e-12)
        (torch.Size([9, 9]), True)
    """
    axes = [torch.arange(k, dtype=torch.float64) - k // 2 for k in kernel_size]
    places = torch.stack([grid.flatten() for grid in torch.meshgrid(*axes, indexing="ij")], 1)
    static = (-places.square().sum(1) / (2 * width)).exp()
    dynamic = (-(places[:, None] - places[None]).square().sum(2) / (2 * width)).exp()
    matrix = (static[:, None] + static[None]) * dynamic / 2 - static[:, None] * static[None] / 2
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0)) @ vectors.T


def width_at(depth: float) -> float:
    """Return the width of :func:`covariance` at a relative depth of 0 to 1, as that paper has it for ConvMixer.

    Example:
        >>> [round(width_at(depth), 2) for depth in (0, 0.5, 1)]
        [0.16, 0.68, 1.92]
    """
    return 0.16 + 0.32 * depth + 2.88 * depth**2 / 2


@torch.no_grad()
def covary(net: nn.Module) -> None:
    """Turn a draw of independent taps into one with :func:`covariance`, wider with depth; kernels keep their Σ w².

    The paper does so in depthwise layers. Here layers between channels get it, too: each of their filters, alike.
    """
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 2]
    for index, conv in enumerate(convs):
        values, vectors = torch.linalg.eigh(covariance(conv.kernel_size, width_at(index / max(len(convs) - 1, 1))))
        half = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        weight, energy = conv.weight, conv.weight.square().sum()
        weight.copy_((weight.double().flatten(2) @ half).view_as(weight))
        weight.mul_((energy / weight.square().sum()).sqrt())
