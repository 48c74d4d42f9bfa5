"""Convolution layers whose taps are not a grid: drop-in replacements for torch.nn.Conv1d, Conv2d and Conv3d."""

from __future__ import annotations

from torch import nn

from widerf.geometry import Size
from widerf.sparse.layer import Pattern, SparseConv


class SparseConv1d(SparseConv):
    """`SparseConv2d` with one spatial axis, for ``nn.Conv1d``.

    Example:
        >>> import torch
        >>> SparseConv1d(8, 8, 3, padding="same", extent=9)(torch.randn(2, 8, 20)).shape
        torch.Size([2, 8, 20])
    """

    RANK = 1
    DENSE = nn.Conv1d

    @classmethod
    def from_conv1d(
        cls,
        conv: nn.Conv1d,
        *,
        extent: Size | None = None,
        pattern: Pattern | None = None,
        seed: int | None = None,
        block: int | None = None,
    ) -> SparseConv1d:
        """Return a sparse layer that shares the parameters of ``conv``; see `SparseConv2d.from_conv2d`."""
        return cls.from_dense(conv, extent, pattern, seed, block)  # type: ignore[no-any-return]

    def to_conv1d(self) -> nn.Conv1d:
        """Return the exact dense twin; see `SparseConv2d.to_conv2d`."""
        return self.to_dense()  # type: ignore[no-any-return]


class SparseConv2d(SparseConv):
    """A convolution whose taps are not a grid: the field of view of a wide kernel for the price of a small one.

    Takes all arguments of ``nn.Conv2d``, in the same order, and has its weights, its initialisation (the same numbers
    after the same ``torch.manual_seed``) and its output size. Each output reads ``kernel_size`` taps from every input
    channel, like ``nn.Conv2d``, but groups of input channels read them at different places in a window of side
    ``extent``. Luo et al. (2016, section 4) propose such connections to widen the effective receptive field;
    `widerf.functional.sparse_conv2d` has the equation.

    *What lies outside the image.* ``padding`` is meant for the small kernel: it fixes the output size. The layer
    behaves as a dense convolution of ``extent`` taps with padding ``padding + dilation·(extent − kernel_size)/2``, so
    the window may always hang over the border, even with ``padding=0``, and may be larger than the image. With
    ``padding_mode="zeros"`` taps out there read zeros. With the other modes they read the image continued in that mode,
    as far as the window reaches: reflected again and again, repeated, or its border pixel.

    *Even sizes.* The window has the kernel's centre; if ``extent − kernel_size`` is odd it reaches one cell further
    on the high side. "same" pads as ``nn.Conv2d`` does, the odd pixel on the high side.

    *Checkpoints.* The state dict has ``offsets`` beside weight and bias. The checkpoint of an ``nn.Conv2d`` loads as
    it is,
    strictly: the layer keeps its own offsets, and weight ``[o, c, i, j]`` serves the tap that `patterns.match_dense`
    has made the partner of dense tap (i, j).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: taps per axis.
        stride: output step, in pixels.
        padding: pixels on each side, "same" or "valid", as for a dense kernel of this size.
        dilation: pixels between neighbouring cells of the window.
        groups: blocks of connections; ``in_channels`` for a depthwise layer, whose channels then take turns in the
            patterns.
        bias: whether to add a learned bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where the parameters live.
        dtype: of the parameters.
        extent: side of the window, in cells, per axis; at least ``kernel_size``, and equal to it for ``nn.Conv2d``
            itself. Default 2k + 1. It should not exceed the map.
        pattern: a name of `widerf.patterns` ("mixed": half of the channels keep the dense kernel, the other half
            partition the window; "stratified", "foveal", "halfgrid", "grid": dilated, …), a list of (name or
            function, share of the channels), or offsets of your own: integers (pattern groups, taps, 2). Default:
            that of `widerf.patterns.default_pattern` for this kind of layer.
        seed: of the pattern; by default it follows from torch's global generator, which is not advanced.
        block: how many neighbouring input channels share their taps at most, a multiple of 16; a GPU reads them at
            once. Default 64, or 32 or 16 so that they divide the channels and leave two blocks at least; with fewer
            than 32 channels each pattern has as few as its number of patterns asks for. Wider blocks mean fewer
            patterns: `widerf.patterns.coverage` tells what that leaves unread.

    Attributes:
        weight: (out, in/groups, kH, kW), as in ``nn.Conv2d``.
        offsets: int64 buffer (pattern groups, kH·kW, 2); input channel c belongs to pattern group ⌊c·groups/in⌋.
        extent: side of the window per axis.

    Raises:
        TypeError: if a size is not an integer, or offsets are not.
        ValueError: if an argument breaks a rule named in the message.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> layer = SparseConv2d(36, 36, 3, stride=2, padding=1, extent=9)
        >>> layer.weight.shape, layer.offsets.shape
        (torch.Size([36, 36, 3, 3]), torch.Size([18, 9, 2]))
        >>> x = torch.randn(1, 36, 17, 17)
        >>> torch.allclose(layer(x), layer.to_conv2d()(x), atol=1e-5)
        True
        >>> layer.load_state_dict(nn.Conv2d(36, 36, 3).state_dict())
        <All keys matched successfully>
    """

    RANK = 2
    DENSE = nn.Conv2d

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        *,
        extent: Size | None = None,
        pattern: Pattern | None = None,
        seed: int | None = None,
        block: int | None = None,
    ) -> SparseConv2d:
        """Return a sparse layer that shares the parameters of ``conv``, each weight at its partner tap.

        Parameters are shared, not copied: an optimiser that holds them goes on.

        Raises:
            TypeError: if ``conv`` is not a plain ``nn.Conv2d``: a subclass with its own forward, a weight that is
                computed (weight norm), or hooks, none of which would carry over.

        Example:
            >>> import torch
            >>> conv = nn.Conv2d(8, 8, 3, padding=1)
            >>> sparse = SparseConv2d.from_conv2d(conv, extent=3)
            >>> x = torch.randn(1, 8, 6, 6)
            >>> torch.allclose(conv(x), sparse(x), atol=1e-5)
            True
        """
        return cls.from_dense(conv, extent, pattern, seed, block)  # type: ignore[no-any-return]

    def to_conv2d(self) -> nn.Conv2d:
        """Return the exact dense twin, an ``nn.Conv2d`` of ``extent`` taps per axis.

        It has one tap more if ``extent − kernel_size`` is odd.

        The weights are copied. With a ``padding_mode`` other than "zeros" the twin refuses images smaller than its
        padding, as every ``nn.Conv2d`` does.

        Example:
            >>> SparseConv2d(4, 8, 3, padding=1, extent=9).to_conv2d()
            Conv2d(4, 8, kernel_size=(9, 9), stride=(1, 1), padding=(4, 4))
        """
        return self.to_dense()  # type: ignore[no-any-return]


class SparseConv3d(SparseConv):
    """`SparseConv2d` with three spatial axes, for ``nn.Conv3d``.

    Example:
        >>> import torch
        >>> SparseConv3d(4, 2, 3, padding=1, extent=5)(torch.randn(1, 4, 6, 6, 6)).shape
        torch.Size([1, 2, 6, 6, 6])
    """

    RANK = 3
    DENSE = nn.Conv3d

    @classmethod
    def from_conv3d(
        cls,
        conv: nn.Conv3d,
        *,
        extent: Size | None = None,
        pattern: Pattern | None = None,
        seed: int | None = None,
        block: int | None = None,
    ) -> SparseConv3d:
        """Return a sparse layer that shares the parameters of ``conv``; see `SparseConv2d.from_conv2d`."""
        return cls.from_dense(conv, extent, pattern, seed, block)  # type: ignore[no-any-return]

    def to_conv3d(self) -> nn.Conv3d:
        """Return the exact dense twin; see `SparseConv2d.to_conv2d`."""
        return self.to_dense()  # type: ignore[no-any-return]
