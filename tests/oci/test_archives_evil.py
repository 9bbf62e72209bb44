"""Docker archives that are damaged or hostile: refused in one line, and nothing outside of them is read."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerfs.errors import ImageError, LayerError
from layerfs.oci.image import MAX_CONFIG, MAX_MANIFEST
from layerfs.oci.references import open_image
from tests.oci.images import config_of, scratch_place, tar_of
from tests.oci.test_images_evil import HEX, read_all, refused_in_one_line

LAYER = tar_of({"file": b"content"})


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch_place("evil") as path:
        yield path


def archive(path: Path, members: list[tuple[str, bytes | str]]) -> None:
    """A tar: bytes are a file's content, text is where a symbolic link leads."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def manifest_json(**changes: Any) -> bytes:
    return json.dumps([{"Config": "c.json", "RepoTags": ["x:t"], "Layers": ["l.tar"], **changes}]).encode()


CONFIG_JSON = json.dumps(config_of([LAYER])).encode()
DOCKER = {"manifest.json": manifest_json(), "c.json": CONFIG_JSON, "l.tar": LAYER}
EVIL_ARCHIVES: dict[str, tuple[dict[str, bytes | str], str]] = {
    "no manifest": ({"manifest.json": "elsewhere"}, "neither manifest.json"),
    "manifest empty": ({"manifest.json": b""}, "malformed"),
    "manifest an object": ({"manifest.json": b"{}"}, "malformed"),
    "manifest of nothing": ({"manifest.json": b"[]"}, "0 images"),
    "manifest of texts": ({"manifest.json": b'["x"]'}, "malformed"),
    "manifest twice": ({"manifest.json": b'[{"Config":"c.json","Config":"d.json"}]'}, "given twice"),
    "manifest too large": ({"manifest.json": b" " * (MAX_MANIFEST + 1)}, "larger than"),
    "manifest deep": ({"manifest.json": b"[" * 100_000 + b"]" * 100_000}, "deeply"),
    "config outside": ({"manifest.json": manifest_json(Config="../../../etc/passwd")}, "outside"),
    "config missing": ({"manifest.json": manifest_json(Config="d.json")}, "lacks"),
    "config with a line": ({"manifest.json": manifest_json(Config="d\n\x1b[2J")}, "lacks"),
    "config a surrogate": ({"manifest.json": b'[{"Config":"\\ud800"}]'}, "UTF-8"),
    "config named wrongly": (
        {"manifest.json": manifest_json(Config=f"{HEX}.json"), f"{HEX}.json": CONFIG_JSON},
        "another digest",
    ),
    "config a link out": ({"c.json": "/etc/passwd"}, "lacks"),
    "config a link up": ({"c.json": "../../../../etc/passwd"}, "lacks"),
    "config a link to itself": ({"c.json": "c.json"}, "loop"),
    "links in a circle": ({"c.json": "d.json", "d.json": "c.json"}, "loop"),
    "config too large": ({"c.json": b" " * (MAX_CONFIG + 1)}, "larger than"),
    "layer outside": ({"manifest.json": manifest_json(Layers=["/etc/passwd"])}, "outside"),
    "layer missing": ({"manifest.json": manifest_json(Layers=["m.tar"])}, "lacks"),
    "layer too many": ({"manifest.json": manifest_json(Layers=["l.tar", "l.tar"])}, "2 layers, its config 1"),
    "layers null": ({"manifest.json": manifest_json(Layers=None)}, "0 layers, its config 1"),
    "layer of other bytes": ({"l.tar": LAYER[::-1]}, "DiffID"),
    "layer empty": ({"l.tar": b""}, "DiffID"),
    "another name": ({"manifest.json": manifest_json(RepoTags=["other:t"])}, "there is other:t"),
    "no name": ({"manifest.json": manifest_json(RepoTags=None)}, "without a name"),
}


@pytest.mark.parametrize("name", EVIL_ARCHIVES)
def test_archives_refused_in_one_line(place: Path, name: str) -> None:
    changes, message = EVIL_ARCHIVES[name]
    archive(place / "image.tar", [*({**DOCKER, **changes}).items()])
    refused_in_one_line(place, f"{place}/image.tar:x:t", message)


def test_the_archive_that_the_table_damages_is_good(place: Path) -> None:
    archive(place / "image.tar", [*DOCKER.items()])
    read_all(open_image(f"{place}/image.tar:x:t"))


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 700, 2048, -1, -512, -1024])
def test_a_cut_archive(place: Path, cut: int) -> None:
    path = place / "image.tar"
    archive(path, [*DOCKER.items()])
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[:cut])
    with pytest.raises(LayerError):
        read_all(open_image(str(path)))


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 10240, b"\x1f\x8b\x08" + bytes(600), b"PK\x03\x04" + bytes(600), os.urandom(4096)],
)
def test_no_archive_at_all(place: Path, content: bytes) -> None:
    (place / "file").write_bytes(content)
    with pytest.raises(ImageError) as refused:
        open_image(str(place / "file"))
    assert len(str(refused.value).splitlines()) == 1


def test_a_fifo_is_no_archive(place: Path) -> None:
    os.mkfifo(place / "fifo")
    with pytest.raises(ImageError):
        open_image(str(place / "fifo"))
