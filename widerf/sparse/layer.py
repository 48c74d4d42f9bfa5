"""What the sparse layers of all ranks share: arguments, offsets and their keeping, the way to and from plain layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from widerf import patterns
from widerf._checks import require
from widerf.functional import apply_layout, check_offsets, extend, read_taps, resolve_padding
from widerf.geometry import Size, ntuple
from widerf.sparse import following
from widerf.sparse.keeping import KeepsOffsets
from widerf.sparse.offsets import check_block, check_pattern, draw_offsets, fresh_seed, window_of
from widerf.sparse.spec import borders, convolve_as
from widerf.trace.certain import held

Pattern: TypeAlias = str | Tensor | patterns.Mixture


def why_not_plain(module: nn.Module, dense: type[_ConvNd]) -> str | None:
    """Return why ``module`` cannot stand for a plain convolution of type ``dense``, or None if it can.

    Example:
        >>> why_not_plain(nn.Conv2d(3, 4, 3), nn.Conv2d) is None
        True
        >>> why_not_plain(nn.Linear(3, 4), nn.Conv2d)
        'is no Conv2d'
    """
    if not isinstance(module, dense):
        return f"is no {dense.__name__}"
    kind: Any = type(module)
    plain: Any = dense
    if "weight" not in module._parameters or getattr(module, "parametrizations", None) is not None:
        return "its weight is computed (weight norm, spectral norm, a lasting profile, …)"
    if kind.forward is not plain.forward or kind._conv_forward is not plain._conv_forward:
        return f"{kind.__name__} has its own forward"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "it has hooks" if any(hooks) else None


class SparseConv(KeepsOffsets):
    """What the three ranks share. The spatial rank is ``RANK``, the plain layer is ``DENSE``.

    It is no subclass of ``nn.Conv2d`` on purpose: code that asks ``isinstance(m, nn.Conv2d)`` may rebuild a plain
    convolution from ``m.weight`` and would lose the offsets without a word.

    The layer computes with what the buffer ``offsets`` holds when it is called (`KeepsOffsets`). A compiled layer
    refuses other offsets than it was compiled with.
    """

    RANK: ClassVar[int]
    DENSE: ClassVar[type[_ConvNd]]
    offsets: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        extent: Size | None = None,
        pattern: Pattern | None = None,
        seed: int | None = None,
        block: int | None = None,
    ) -> None:
        rank = self.RANK
        k = ntuple(kernel_size, rank, "kernel_size")
        steps, spread = ntuple(stride, rank, "stride"), ntuple(dilation, rank, "dilation")
        pads = padding if isinstance(padding, str) else ntuple(padding, rank, "padding")
        for name, values in (("kernel_size", k), ("stride", steps), ("dilation", spread)):
            require(all(v >= 1 for v in values), name, "be positive", values)
        resolve_padding(pads, k, steps, spread)
        require(in_channels >= 1 and out_channels >= 1, "channels", "be positive", (in_channels, out_channels))
        require(groups >= 1 and in_channels % groups == 0, "groups", f"divide in_channels={in_channels}", groups)
        require(out_channels % groups == 0, "groups", f"divide out_channels={out_channels}", groups)
        check_block(block)
        pattern = patterns.default_pattern(k, depthwise=1 < groups == in_channels) if pattern is None else pattern
        # On the CPU and in integers also where the model is built on another device, on none ("meta"), or of fakes.
        with held(torch.device("cpu"), following.unwatched()):
            seed = fresh_seed() if seed is None else seed
            if not isinstance(pattern, Tensor):
                patterns.check_named(pattern)
                window = tuple(2 * n + 1 for n in k) if extent is None else ntuple(extent, rank, "extent")
                offsets = draw_offsets(pattern, k, window, in_channels, groups, seed, block, steps)
            else:
                require(block is None, "block", "not be given with offsets, which tell their own", block)
                offsets = check_offsets(pattern, math.prod(k), rank)
                window = window_of(offsets, k) if extent is None else ntuple(extent, rank, "extent")
                offsets = check_pattern(offsets, k, window, in_channels)
            taps = read_taps(offsets)
        super().__init__(
            in_channels,
            out_channels,
            k,
            steps,
            pads,
            spread,
            False,
            (0,) * rank,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.extent = window
        self.pattern = "custom" if isinstance(pattern, Tensor) else patterns.describe(pattern)
        self._keep(taps)
        self._follow()
        self._layout()  # here, so that a compiler finds it done

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input``, (batch, in, *spatial) or (in, *spatial)."""
        traced: Any = input
        if not isinstance(traced, Tensor) and hasattr(traced, "tracer"):
            return self._on_proxy(traced)  # type: ignore[no-any-return]
        if torch.compiler.is_dynamo_compiling():
            self._follow_compiled()
        elif not self._follow():
            return self._convolve_members(input)
        layout, pads, added = self._layout()
        wide = extend(input, added, self.padding_mode)
        return apply_layout(wide, self.weight, self.bias, layout, pads, self.dilation)

    def _convolve_members(self, input: Tensor) -> Tensor:
        """Convolve by offsets that `torch.vmap` has another set of for each member of an ensemble."""
        corners = patterns.window(self.kernel_size, self.extent)[[0, -1]].tolist()
        pads, added = borders(self._spec(), corners)
        wide = extend(input, added, self.padding_mode)
        return apply_layout(wide, self.weight, self.bias, self._layout()[0], pads, self.dilation, self.offsets)

    def _on_proxy(self, input: Any) -> Any:
        """Record one node for `torch.fx`, whose tracers take no layers but PyTorch's own for leaves.

        The layer is called if it is part of a model, as ``nn.Conv2d`` is; if it is traced by itself, its function is.
        """
        tracer = input.tracer
        if tracer.root is not self:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        bias = None if self.bias is None else tracer.create_proxy("get_attr", "bias", (), {})
        tensors = (input, *(tracer.create_proxy("get_attr", name, (), {}) for name in ("weight", "offsets")))
        return tracer.create_proxy("call_function", convolve_as, (*tensors, bias, *self._spec()), {})

    def readers(self) -> tuple[int, int]:
        """Return how many of the input channels of one group of connections read a cell of the window: (fewest, most).

        Example:
            >>> from widerf import SparseConv2d
            >>> SparseConv2d(54, 8, 3, extent=9, pattern="partition").readers()
            (6, 6)
        """
        with held(torch.device("cpu")):
            first = patterns.window(self.kernel_size, self.extent)[0]
            at = torch.tensor(self._taps) - first
            flat = torch.zeros(at.shape[:2], dtype=torch.int64)
            for axis, n in enumerate(self.extent):
                flat = flat * n + at[..., axis]
            row = torch.arange(self.in_channels) * len(self._taps) // self.in_channels
            read = flat[row].view(self.groups, -1)
            counts = torch.stack([torch.bincount(cells, minlength=math.prod(self.extent)) for cells in read])
        return int(counts.min()), int(counts.max())

    def extra_repr(self) -> str:
        """As for a plain convolution, then the extent, the pattern, and how evenly the window is read."""
        few, many = self.readers()
        per_group = self.in_channels // self.groups
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return (
            f"{plain}, extent={self.extent}, pattern={self.pattern}, "
            f"pattern_groups={len(self._taps)}, channels_per_cell={few}-{many} of {per_group}"
        )

    @classmethod
    def from_dense(
        cls,
        conv: nn.Module,
        extent: Size | None,
        pattern: Pattern | None,
        seed: int | None,
        block: int | None = None,
    ) -> Any:
        """Return a sparse layer that holds the very parameters of ``conv``.

        Raises:
            TypeError: if ``conv`` is not a plain convolution of the same rank.
        """
        rule = f"be a plain {cls.DENSE.__name__} (its forward not overridden, its weight a parameter, no hooks)"
        plain = why_not_plain(conv, cls.DENSE) is None
        require(plain, "conv", rule, type(conv).__name__, TypeError)
        assert isinstance(conv, _ConvNd)
        return cls._in_place_of(conv, extent, pattern, seed, block)

    @classmethod
    def _in_place_of(
        cls,
        conv: _ConvNd,
        extent: Size | None,
        pattern: Pattern | None,
        seed: int | None = None,
        block: int | None = None,
    ) -> Any:
        """Return a layer with the arguments and the very parameters of ``conv``, plain or sparse, at other taps."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            "meta",
            conv.weight.dtype,
            extent=extent,
            pattern=pattern,
            seed=seed,
            block=block,
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer._keep(layer._taps)  # on the device of the weight
        return layer.train(conv.training)

    def to_dense(self) -> Any:
        """Return the exact plain convolution of the same rank, with zeros where no tap lies."""
        self._follow()
        # Cells of the window before and after the dense taps; a plain convolution needs as many on both sides.
        more = [s - k - (s - k) // 2 for s, k in zip(self.extent, self.kernel_size, strict=True)]
        size = [k + 2 * m for k, m in zip(self.kernel_size, more, strict=True)]
        padding: Any = self.padding
        if padding != "same":
            plain = (0,) * self.RANK if padding == "valid" else padding
            padding = tuple(p + d * m for p, d, m in zip(plain, self.dilation, more, strict=True))
        build: Any = self.DENSE
        conv = build(
            self.in_channels,
            self.out_channels,
            tuple(size),
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device="meta",
            dtype=self.weight.dtype,
        )
        trained = any(p.requires_grad for name, p in self.named_parameters() if name != "bias")  # or what makes it
        conv.weight = nn.Parameter(self._scatter_weight(more, size), trained)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return conv.train(self.training)

    @torch.no_grad()
    def _scatter_weight(self, more: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return the dense kernel, (out, in/groups, *size): each weight in the cell of its tap, zero elsewhere."""
        per_group = self.in_channels // self.groups
        device = self.weight.device
        start = torch.tensor([(k - 1) // 2 + m for k, m in zip(self.kernel_size, more, strict=True)], device="cpu")
        cell = self._remembered() + start
        flat = torch.zeros(cell.shape[:2], dtype=torch.int64, device="cpu")
        for axis, n in enumerate(size):
            flat = flat * n + cell[..., axis]
        row = (
            torch.arange(self.in_channels, device="cpu") * len(self._taps) // self.in_channels
        )  # pattern group of each channel
        index = flat[row].view(self.groups, 1, per_group, -1).to(device)
        source = self.weight.detach().reshape(self.groups, -1, per_group, index.shape[-1])
        dense = source.new_zeros(*source.shape[:3], math.prod(size))
        return dense.scatter_(3, index.expand_as(source), source).reshape(*self.weight.shape[:2], *size)
