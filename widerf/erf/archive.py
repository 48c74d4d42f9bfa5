"""Reading an ERF from a file that may be damaged or hold something else: nothing in it is taken on trust."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from widerf._checks import require

_SUM = 1e-6  # how far a map's sum may be from 1


def read_fields(path: str | Path, known: Sequence[str]) -> dict[str, Any]:
    """Return the fields of an ERF from an ``.npz`` file that :meth:`widerf.ERF.save` wrote, by name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, lacks a map or a centre, holds unknown names, or figures without sense.
    """
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            values: dict[str, Any] = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # damage shows in many ways: zip, zlib, NumPy's header, struct, memory
        raise ValueError(f"path must name an .npz file that ERF.save wrote, got {str(path)!r}: {error}") from error
    missing = sorted({"map", "center"} - set(values))
    require(not missing, "path", f"name a file that holds {', '.join(missing) or 'an ERF'}", str(path))
    unknown = sorted(set(values) - set(known))
    require(not unknown, "path", f"name a file of an ERF, not one that holds {', '.join(unknown)}", str(path))
    _check(values, str(path))
    return {name: _read_field(name, array) for name, array in values.items()}


def _read_field(name: str, array: Any) -> Any:
    if name in ("map", "blocks"):
        return torch.from_numpy(array)
    return tuple(array.tolist()) if name in ("center", "trf_size", "jump", "block_samples") else array.item()


def _finite(array: Any) -> bool:
    return np.issubdtype(array.dtype, np.number) and bool(np.isfinite(array).all())


def _check(values: dict[str, Any], path: str) -> None:
    share = values["map"]
    real = np.issubdtype(share.dtype, np.floating) and 1 <= share.ndim <= 3 and share.size > 0
    require(real, "map", f"hold real numbers on 1 to 3 axes in {path}", (share.dtype, share.shape))
    sane = bool(np.isfinite(share).all() and (share >= 0).all())
    require(sane, "map", f"be finite and at least 0 in {path}", f"values from {share.min()} to {share.max()}")
    require(abs(float(share.sum()) - 1) < _SUM, "map", f"sum to 1 in {path}", float(share.sum()))
    for name in ("center", "trf_size", "jump"):
        if name in values:
            figures = values[name]
            whole = figures.shape == (share.ndim,) and _finite(figures)
            require(whole, name, f"hold {share.ndim} finite numbers, one an axis, in {path}", figures.tolist())
    for name, kind in (("untraced", np.str_), ("samples", np.integer), ("clipped", np.number)):
        if name in values:
            one = values[name].shape == () and np.issubdtype(values[name].dtype, kind)
            finite = kind is np.str_ or (one and _finite(values[name]))
            require(one and finite, name, f"be one {kind.__name__.strip('_')} in {path}", values[name].tolist())
    if "blocks" in values:
        blocks, counts = values["blocks"], values.get("block_samples", np.zeros(0))
        fit = blocks.shape[1:] == share.shape and counts.shape == (len(blocks),) and _finite(blocks) and _finite(counts)
        require(fit, "blocks", f"be finite maps of shape {share.shape}, each with its samples, in {path}", blocks.shape)
