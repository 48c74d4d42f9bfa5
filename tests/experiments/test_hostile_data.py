"""Files: folders, tars, images and caches that others made are read within bounds, and damage is one line."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness import archives, camvid, data
from experiments.harness.inputs import InputError

Files = dict[str, bytes]


def png(width: int, height: int, value: int = 7, grey: bool = False) -> bytes:
    written = io.BytesIO()
    shape = (height, width) if grey else (height, width, 3)
    Image.fromarray(np.full(shape, value, np.uint8)).save(written, "png")
    return written.getvalue()


def claimed(width: int, height: int) -> bytes:
    """An image whose header promises more than lies behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def cifar() -> Files:
    return {f"{split}/class{n}/0.png": png(32, 32, 20 * n) for split in ("train", "test") for n in range(10)}


def street() -> Files:
    images = {f"{split}/{n}.png": png(12, 9, n) for split in ("train", "val") for n in range(7)}
    return images | {
        f"{split}annot/{n}.png": png(12, 9, n % 3, grey=True) for split in ("train", "val") for n in range(7)
    }


def packed(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def laid(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


CIFAR_FORMS: dict[str, Callable[[Path, Files], None]] = {
    "folder": lambda folder, files: laid(folder / "cifar10", files),
    "tar": lambda folder, files: packed(folder / "cifar10.tar", files),
    "tar.gz": lambda folder, files: packed(folder / "cifar10.tar.gz", files),
}
# A file in place of one image of a class, and what is said of it.
CONTENTS: dict[str, tuple[bytes, str]] = {
    "no image": (b"text", "readable"),
    "nothing": (b"", "readable"),
    "cut short": (png(32, 32)[:60], "readable"),
    "a bomb": (claimed(60_000, 60_000), "32×32|readable|pixels"),
    "a wide one": (claimed(5000, 5000), "32×32|pixels"),
    "a promise": (claimed(32, 32), "readable"),
    "a gibibyte of zeros": (b"\0" * (archives.LARGEST + 1), "bytes"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refused(call: Callable[[], Any], *said: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert len(str(error.value).splitlines()) == 1
    for words in said:
        assert any(word in str(error.value) for word in words.split("|")), error.value


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("form", CIFAR_FORMS)
def test_a_hostile_image_is_one_line_that_names_it(form: str, content: str, tmp_path: Path) -> None:
    CIFAR_FORMS[form](tmp_path, cifar() | {"train/class3/1.png": CONTENTS[content][0]})
    refused(lambda: data.cifar10(tmp_path), CONTENTS[content][1], "train/class3/1.png")


@pytest.mark.parametrize("content", [name for name in CONTENTS if "promise" not in name and "wide" not in name])
def test_a_hostile_frame_is_one_line_that_names_it(content: str, tmp_path: Path) -> None:
    packed(tmp_path / "camvid.tar", street() | {"train/9.png": CONTENTS[content][0]})
    refused(lambda: camvid.load(tmp_path, (6, 8)), CONTENTS[content][1], "train/9.png")


def test_frames_without_labels_are_told(tmp_path: Path) -> None:
    packed(tmp_path / "camvid.tar", {name: content for name, content in street().items() if name != "valannot/3.png"})
    refused(lambda: camvid.load(tmp_path, (6, 8)), "as many labels as images")


@pytest.mark.parametrize("name", ["cifar10.tar", "cifar10.tar.gz", "camvid.tar"])
def test_a_tar_cut_anywhere_or_that_lies_of_sizes_is_one_line(name: str, tmp_path: Path) -> None:
    street_scenes = name.startswith("camvid")
    packed(tmp_path / name, street() if street_scenes else cifar())
    whole = (tmp_path / name).read_bytes()
    lies = bytearray(whole)
    lies[124:136] = b"%011o\0" % 2**32 if not name.endswith("gz") else lies[124:136]
    faults = [whole[: len(whole) * k // 7] for k in range(5)] + ([bytes(lies)] if lies != whole else [])
    for fault in faults:
        (tmp_path / name).write_bytes(fault)
        refused(lambda: camvid.load(tmp_path, (6, 8)) if street_scenes else data.cifar10(tmp_path), str(tmp_path))


def test_more_files_than_a_data_set_has_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST", 15)
    CIFAR_FORMS["tar"](tmp_path, cifar())
    refused(lambda: data.cifar10(tmp_path), "at most 15 files")


@pytest.mark.parametrize("name", ["cifar10.tar", "camvid.tar"])
def test_a_damaged_cache_is_told_and_made_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed(tmp_path / name, street() if name == "camvid.tar" else cifar())

    def read() -> torch.Tensor:
        return camvid.load(tmp_path, (6, 8)).train[0] if name == "camvid.tar" else data.cifar10(tmp_path).train

    wanted = read()
    (cache,) = (tmp_path / "cache" / "widerf").iterdir()
    whole = cache.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 255
    with io.BytesIO() as other:
        np.savez(other, something=np.zeros(3))
        others = other.getvalue()
    for damage in (b"", b"text", whole[:100], whole[: len(whole) // 2], whole[:-1], bytes(flipped), others):
        cache.write_bytes(damage)
        capsys.readouterr()
        assert torch.equal(read(), wanted)
        said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert len(said) == 1 and str(cache) in said[0]
        assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    assert torch.equal(read(), wanted) and "damaged" not in capsys.readouterr().err
