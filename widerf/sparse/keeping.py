"""How a layer keeps its offsets: through copies, checkpoints, moves, averages, and writes of whoever has the buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from widerf import patterns
from widerf.functional import read_taps
from widerf.kernels.plan import Layout, Taps
from widerf.sparse import following
from widerf.sparse.offsets import check_pattern
from widerf.sparse.spec import LayerSpec, Pairs, lay_out
from widerf.trace.certain import held

STALE = (
    "offsets must not be changed after compilation, got others than those compiled "
    "(call the layer once in eager mode; then it is compiled anew)"
)


def _hash_now(offsets: Tensor) -> int:
    """Return the hash of the taps that the buffer holds when the compiler runs; it compiles slices, not the buffer."""
    return hash(read_taps(offsets))


# All that torch.compiler.assume_constant_result does, without its import of the compiler: two seconds.
_hash_now._dynamo_marked_constant = True  # type: ignore[attr-defined]


class KeepsOffsets(_ConvNd):
    """A convolution with a buffer ``offsets``, which is saved and moved, and the same integers in Python, ``_taps``.

    `_follow` keeps the two equal: whatever way new values came into the buffer, they are what the layer computes with,
    or an error if they are no pattern of its window. Only what a running average of the model rounds off is put back.
    """

    offsets: Tensor
    extent: tuple[int, ...]
    _taps: Taps
    _witness: Tensor  # 0, 1, 2, …, to see what an average does to integers

    def _keep(self, taps: Taps) -> None:
        """Register the buffers of a new layer."""
        device = self.weight.device
        with held(torch.device("cpu"), following.unwatched()):
            furthest = int(patterns.window(self.kernel_size, self.extent).abs().max())
        self._taps, self._hash = taps, hash(taps)
        self.register_buffer("offsets", torch.tensor(taps, device=device))
        self.register_buffer("_witness", torch.arange(furthest + 1, device=device), persistent=False)
        self._forget()

    def _forget(self) -> None:
        """Drop what is derived: the layout, and the memory of the offsets that it was made from."""
        self._planned: tuple[LayerSpec, Layout, Pairs, Pairs] | None = None
        self._seen: following.Seen | None = None
        self._compiled_with: Tensor | None = None
        self._lent: tuple[Tensor, int | None, int | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_planned": None, "_seen": None, "_compiled_with": None, "_lent": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._hash = hash(self._taps)  # of this process
        self._layout()

    def _spec(self) -> LayerSpec:
        sizes = (self.in_channels, self.kernel_size, self.stride)
        return LayerSpec(*sizes, self.padding, self.dilation, self.groups, self.padding_mode)

    def _layout(self) -> tuple[Layout, Pairs, Pairs]:
        """Return the layout, the padding it works with, and what to add to the image beforehand."""
        spec = self._spec()
        if self._planned is None or self._planned[0] != spec:
            self._planned = (spec, *lay_out(spec, self._taps))
        return self._planned[1:]

    def reset_parameters(self) -> None:
        """Draw weight and bias as PyTorch's convolutions do; the offsets stay (and come back after ``to_empty``)."""
        super().reset_parameters()
        if "offsets" in self._buffers and not self.offsets.is_meta:
            self.offsets.copy_(self._remembered())
            self._swear_in()

    def _swear_in(self) -> None:
        self._witness.copy_(torch.arange(len(self._witness), device="cpu"))

    def _remembered(self) -> Tensor:
        return torch.tensor(self._taps, device="cpu")

    def _follow(self) -> bool:
        """Bring ``_taps`` up to date with the values of the buffer, whoever wrote them or put another tensor there.

        Returns:
            Whether that can be done; False if `torch.vmap` runs an ensemble whose members have different offsets.

        Raises:
            ValueError: if the new offsets are no pattern of this layer.
            RuntimeError: if their memory was freed.
        """
        if following.unchanged(self.offsets, self._seen):
            return True
        members = following.read_members(self.offsets)
        if members is None:  # no values to read: those that were read last
            return True
        with following.unwatched():
            found = [read_taps(member) for member in members]
            if any(taps != found[0] for taps in found):
                for member in members:
                    check_pattern(member, self.kernel_size, self.extent, self.in_channels)
                return False
            if found[0] != self._taps:
                self._adopt(found[0], members[0])
            if len(members) == 1 and type(self.offsets) is Tensor:
                self._note()
        return True

    def _adopt(self, taps: Taps, values: Tensor) -> None:
        """Go over to new taps; or put the old ones back, if they are what an average of the model made of them."""
        if self._was_averaged(taps):
            self.offsets.copy_(self._remembered())
            self._swear_in()
            return
        check_pattern(values, self.kernel_size, self.extent, self.in_channels)
        self._taps, self._hash, self._planned = taps, hash(taps), None
        self._layout()

    def _was_averaged(self, taps: Taps) -> bool:
        witness = following.read_members(self._witness)
        if witness is not None and len(witness) == 1 and following.averaged(taps, self._taps, witness[0].tolist()):
            return True
        if self._lent is None:
            return False
        lent, version, own = self._lent
        through_it = lent._version != version and following.version_of(self.offsets) == own
        return through_it and following.shortened(taps, self._taps)

    def _note(self) -> None:
        """Remember what the buffer holds now, which is what ``_taps`` say."""
        with following.unwatched():
            self._seen = following.look(self.offsets, self._remembered())
            self._compiled_with = self._remembered().to(self.offsets.device)

    def _follow_compiled(self) -> None:
        """Follow the offsets when the compiler runs, outside of what it compiles, and refuse others at each call."""
        if _hash_now(self.offsets) != self._hash:
            _follow_outside(self)
        known = self._compiled_with
        if known is None or known.device != self.offsets.device:
            known = torch.tensor(self._taps, device=self.offsets.device)
        torch._assert_async((self.offsets == known).all(), STALE)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save as usual; the offsets in the state dict share memory with the buffer but count their own writes.

        So averages that go over state dicts are told from whatever else writes into the buffer.
        """
        self._follow()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and type(self.offsets) is Tensor and not self.offsets.is_inference():
            destination[prefix + "offsets"] = lent = self.offsets.data
            self._lent = (lent, lent._version, self.offsets._version)

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
                if not isinstance(state_dict[key], Tensor) or following.read_members(state_dict[key]) is not None:
                    check_pattern(state_dict[key], self.kernel_size, self.extent, self.in_channels)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{key}: {error}")
                state_dict[key] = self._remembered()
            if state_dict[key].shape != self.offsets.shape:  # patterns shared by other runs of channels than ours
                self.offsets = self.offsets.new_zeros(state_dict[key].shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        found = following.read_members(self.offsets)
        if found is not None:
            self._taps = read_taps(found[0])
            self._hash = hash(self._taps)
            self._swear_in()
            self._forget()
            self._layout()  # here, so that a compiler finds it done


def _follow(layer: KeepsOffsets) -> None:
    layer._follow()


_follow_outside: Any = torch._disable_dynamo(_follow)  # type: ignore[attr-defined]
