"""What the sparse layers of all ranks share: arguments, offsets and their keeping, the way to and from plain layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from widerf import patterns
from widerf._checks import require
from widerf.functional import apply_layout, check_offsets, extend, read_taps, resolve_padding
from widerf.geometry import ntuple
from widerf.kernels.plan import Layout, make_layout, reach
from widerf.sparse.offsets import averaged, check_pattern, draw_offsets, fresh_seed, window_of

Size = int | Sequence[int]
Pairs = tuple[tuple[int, int], ...]


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
        return "its weight is computed (weight norm, spectral norm, …)"
    if kind.forward is not plain.forward or kind._conv_forward is not plain._conv_forward:
        return f"{kind.__name__} has its own forward"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "it has hooks" if any(hooks) else None


CHANGED = "not be changed in place just before compilation (call the layer once in eager mode first)"


def _hash_now(offsets: Tensor) -> int:
    """Return the hash of the taps that the buffer holds when the compiler runs; it compiles slices, not the buffer."""
    return hash(read_taps(offsets))


# All that torch.compiler.assume_constant_result does, without its import of the compiler: two seconds.
_hash_now._dynamo_marked_constant = True  # type: ignore[attr-defined]


class SparseConv(_ConvNd):
    """What the three ranks share. The spatial rank is ``RANK``, the plain layer is ``DENSE``.

    It is no subclass of ``nn.Conv2d`` on purpose: code that asks ``isinstance(m, nn.Conv2d)`` may rebuild a plain
    convolution from ``m.weight`` and would lose the offsets without a word.

    The buffer ``offsets`` is what is saved and moved; ``_taps`` are the same integers in Python, which slicing needs.
    `_follow` keeps the two equal.
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
        pattern: str | Tensor = "mixed",
        seed: int | None = None,
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
        seed = fresh_seed() if seed is None else seed
        with torch.device("cpu"):  # also where the model is built on another device, or on none ("meta")
            if isinstance(pattern, str):
                window = tuple(2 * n + 1 for n in k) if extent is None else ntuple(extent, rank, "extent")
                offsets = draw_offsets(pattern, k, window, in_channels, groups, seed)
            else:
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
        self.pattern = pattern if isinstance(pattern, str) else "custom"
        self.register_buffer("offsets", offsets.to(self.weight.device))
        self._taps = taps
        self._forget()
        self._follow()
        self._layout()  # here, so that a compiler finds it done

    def _forget(self) -> None:
        """Drop what is derived: the layout, and the mark of the offsets that it was made from."""
        self._planned: tuple[Any, Layout, Pairs, Pairs] | None = None
        self._mark: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_planned": None, "_mark": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._layout()

    def reset_parameters(self) -> None:
        """Draw weight and bias as PyTorch's convolutions do; the offsets stay (and come back after ``to_empty``)."""
        super().reset_parameters()
        if "offsets" in self._buffers and not self.offsets.is_meta:
            self.offsets.copy_(self._remembered())

    def _remembered(self) -> Tensor:
        return torch.tensor(self._taps, device="cpu")

    def _follow(self) -> None:
        """Bring ``_taps`` up to date with the buffer, if something wrote to it: a load, a broadcast, another device.

        Running averages of models also average integer buffers: 0.999·3 + 0.001·3 may be 2.9999998, which becomes 2.
        Such a change is undone.

        Raises:
            ValueError: if the new offsets are no pattern of this layer.
        """
        offsets = self.offsets
        if offsets.is_meta or type(offsets) is not Tensor:  # no values to read, or tracing with the ones we know
            return
        mark = (id(offsets), -1 if offsets.is_inference() else offsets._version)
        if mark == self._mark and mark[1] >= 0:
            return
        taps = read_taps(offsets)
        if taps != self._taps:
            in_place = self._mark is None or mark[0] == self._mark[0]
            if in_place and averaged(taps, self._taps):
                offsets.copy_(self._remembered())
                mark = (mark[0], offsets._version)
            else:
                check_pattern(offsets, self.kernel_size, self.extent, self.in_channels)
                self._taps, self._planned = taps, None
        self._mark = mark

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._follow()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load as usual; the checkpoint of a plain convolution has no offsets, and the layer keeps its own."""
        key = prefix + "offsets"
        if key not in state_dict:
            state_dict[key] = self._remembered()
        else:
            try:
                check_pattern(state_dict[key], self.kernel_size, self.extent, self.in_channels)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{key}: {error}")
                state_dict[key] = self._remembered()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not self.offsets.is_meta:
            self._taps = read_taps(self.offsets)
            self._forget()
            self._layout()

    def _layout(self) -> tuple[Layout, Pairs, Pairs]:
        """Return the layout, the padding it works with, and what to add to the image beforehand."""
        key = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        if self._planned is None or self._planned[0] != key:
            pads = resolve_padding(self.padding, self.kernel_size, self.stride, self.dilation)
            added: Pairs = ((0, 0),) * self.RANK
            if self.padding_mode != "zeros":
                offsets = [tap for group in self._taps for tap in group]
                added = tuple(zip(*reach(offsets, self.kernel_size, pads, self.dilation), strict=True))
                pads = tuple((low - a, high - b) for (low, high), (a, b) in zip(pads, added, strict=True))
            layout = make_layout(
                self._taps, self.in_channels, self.kernel_size, self.stride, pads, self.dilation, self.groups
            )
            self._planned = (key, layout, pads, added)
            self._hash = hash(self._taps)
        return self._planned[1:]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input``, (batch, in, *spatial) or (in, *spatial)."""
        if not torch.compiler.is_compiling():
            self._follow()
        elif torch.compiler.is_dynamo_compiling():
            require(_hash_now(self.offsets) == self._hash, "offsets", CHANGED, "other offsets than in the last call")
        layout, pads, added = self._layout()
        wide = extend(input, added, self.padding_mode)
        return apply_layout(wide, self.weight, self.bias, layout, pads, self.dilation)

    def readers(self) -> tuple[int, int]:
        """Return how many of the input channels of one group of connections read a cell of the window: (fewest, most).

        Example:
            >>> from widerf import SparseConv2d
            >>> SparseConv2d(54, 8, 3, extent=9, pattern="partition").readers()
            (6, 6)
        """
        with torch.device("cpu"):
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
    def _from_dense(cls, conv: nn.Module, extent: Size | None, pattern: str | Tensor, seed: int | None) -> Any:
        rule = f"be a plain {cls.DENSE.__name__} (its forward not overridden, its weight a parameter, no hooks)"
        plain = why_not_plain(conv, cls.DENSE) is None
        require(plain, "conv", rule, type(conv).__name__, TypeError)
        assert isinstance(conv, _ConvNd)
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
        )
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.offsets = layer._remembered().to(conv.weight.device)
        layer._forget()
        return layer.train(conv.training)

    def _to_dense(self) -> Any:
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
        conv.weight = nn.Parameter(self._scatter_weight(more, size), self.weight.requires_grad)
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
