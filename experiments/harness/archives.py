"""Folders, tars and images that others made, read within bounds, and caches of what was decoded from them."""

from __future__ import annotations

import io
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from experiments.harness.inputs import InputError
from experiments.harness.runs import replacing

LARGEST, MOST = 16 * 2**20, 250_000  # bytes of a file, and files; of CIFAR-10 and CamVid half a MiB and 60,000
_PIXELS = 2**24
_DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError)  # what tarfile raises for damaged ones

# What NumPy raises for files that are no archive of arrays, or another one.
_CACHE_DAMAGE = (*_DAMAGE, KeyError, TypeError, AttributeError, zipfile.BadZipFile)


def read_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every file of a folder or tar, in order.

    Raises:
        InputError: it cannot be read, a file is larger than ``LARGEST``, or there are more than ``MOST``.
    """
    try:
        for count, (name, content) in enumerate(_folder(source) if source.is_dir() else _tar(source)):
            if count >= MOST:
                raise InputError(f"--data-dir must hold at most {MOST:,} files, got more in {str(source)!r}")
            yield name, content
    except _DAMAGE as error:
        if isinstance(error, InputError):
            raise
        kind = "folder" if source.is_dir() else "tar"
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"--data-dir must hold a readable {kind}, got {str(source)!r} ({why})") from error


def _folder(source: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(source.rglob("*")):
        if path.is_file():
            name = path.relative_to(source).as_posix()
            with path.open("rb") as file:
                yield name, _bounded(file, name, source)


def _tar(source: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(source) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                content = _bounded(file, member.name, source)
                if len(content) != member.size:
                    raise EOFError(f"{member.name} is cut short")
                yield member.name, content


def _bounded(file: IO[bytes], name: str, source: Path) -> bytes:
    """Read a file as far as the bound, whatever its header says of its size."""
    content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise InputError(f"every file must have at most {LARGEST:,} bytes, got more in {name!r} of {str(source)!r}")
    return content


def read_image(content: bytes, name: str, source: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image, after a look at what it says of its size, ``size`` (width, height) if that is given.

    Raises:
        InputError: it is none, damaged, too large or of another size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # looked at here
            image = Image.open(io.BytesIO(content))
        width, height = image.size
        if size is not None and (width, height) != size:
            raise InputError(f"every image must be {size[0]}×{size[1]}, got {width}×{height} in {name!r}")
        if width * height > _PIXELS:
            raise InputError(f"every image must have at most {_PIXELS:,} pixels, got {width}×{height} in {name!r}")
        image.load()
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise InputError(f"every image must be readable, got {name!r} in {str(source)!r} ({error})") from error
    return image


def cached(path: Path, names: Sequence[str], make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return arrays from a cache; what is missing is made, and what is damaged is told in one line and made again."""
    if path.exists():
        try:
            with path.open("rb") as raw, np.load(raw) as file:  # np.load leaves what it fails at open
                return {name: file[name] for name in names}
        except _CACHE_DAMAGE as error:
            print(f"{path} is damaged ({error}): decoding again", file=sys.stderr)
    arrays = dict(make())
    with replacing(path) as part:
        np.savez(part, **arrays)
    return arrays
