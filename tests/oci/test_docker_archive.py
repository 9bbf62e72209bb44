"""Images in tars: as `docker save`, podman, buildah and skopeo write them, and as old dockers did."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from layerfs.errors import ImageError
from layerfs.oci.image import Image, digest_of
from layerfs.oci.references import open_image
from tests.oci.images import Tools, config_of, make_image, needs_skopeo, scratch_place, tar_of

ONE, TWO = tar_of({"one": b"1" * 3000}), tar_of({"two": b"2"})

needs_podman = pytest.mark.skipif(
    not shutil.which("podman") or os.geteuid() != 0, reason="needs podman, and root for its storage"
)


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch_place("da") as path:
        yield path


def layers_of(image: Image) -> list[bytes]:
    """The tars of the layers, verified."""
    found = []
    for layer in image.layers:
        with layer.open() as opened:
            data = b""
            while piece := opened.source.read(1 << 16):
                data += piece
            opened.verify()
        assert str(layer.diff_id) == digest_of(data)
        found.append(data)
    return found


def archive(path: Path, members: Mapping[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> Path:
    """bytes are a file; text is where a symbolic link leads, `=NAME` a hard link."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            elif isinstance(content, str):
                info.type = tarfile.LNKTYPE if content.startswith("=") else tarfile.SYMTYPE
                info.linkname = content.removeprefix("=")
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def entry(config: str, tags: list[str] | None, layers: list[str]) -> dict[str, Any]:
    return {"Config": config, "RepoTags": tags, "Layers": layers}


CONFIG = json.dumps(config_of([ONE, TWO, ONE])).encode()
NAME = digest_of(CONFIG).partition(":")[2]


def old_form(**more: bytes | str) -> dict[str, bytes | str]:
    """As docker 1.10 to 24 write: a directory a layer, and a link where a layer comes again."""
    return {
        f"{NAME}.json": CONFIG,
        "aa/": b"",
        "aa/VERSION": b"1.0",
        "aa/json": b"{}",
        "aa/layer.tar": ONE,
        "bb/layer.tar": TWO,
        "cc/layer.tar": "../aa/layer.tar",
        "manifest.json": json.dumps(
            [entry(f"{NAME}.json", ["repo/x:1", "x:2"], [f"{name}/layer.tar" for name in ("aa", "bb", "cc")])]
        ).encode(),
        "repositories": b'{"repo/x":{"1":"cc"}}',
        **more,
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("link", ["../aa/layer.tar", "=aa/layer.tar"])
def test_the_form_of_old_dockers(place: Path, form: int, link: str) -> None:
    path = archive(place / "a.tar", {**old_form(), "cc/layer.tar": link}, form)
    for tag in ("", ":repo/x:1", ":docker.io/repo/x:1", ":x:2", ":docker.io/library/x:2", f"@sha256:{NAME}"):
        image = open_image(f"{path}{tag}")
        assert image.config_digest == f"sha256:{NAME}"
        assert layers_of(image) == [ONE, TWO, ONE]
        assert image.manifest is None and image.descriptor is None
    for tag in (":repo/x", ":x:1", ":library/x:1", ":repo/x:latest", f"@sha256:{'0' * 64}"):
        with pytest.raises(ImageError):
            open_image(f"{path}{tag}")


def test_members_in_any_order(place: Path) -> None:
    members = old_form()
    path = archive(place / "a.tar", {name: members[name] for name in sorted(members, reverse=True)})
    assert layers_of(open_image(str(path))) == [ONE, TWO, ONE]


def test_several_images(place: Path) -> None:
    other = json.dumps(config_of([TWO])).encode()
    manifest = json.loads(old_form()["manifest.json"])
    manifest.append(entry("other.json", ["y:latest"], ["bb/layer.tar"]))
    manifest.append(entry("other.json", None, ["bb/layer.tar"]))
    path = archive(
        place / "a.tar",
        {**old_form(), "other.json": other, "manifest.json": json.dumps(manifest).encode()},
    )
    assert layers_of(open_image(f"{path}:y")) == [TWO]
    assert layers_of(open_image(f"{path}:x:2")) == [ONE, TWO, ONE]
    with pytest.raises(ImageError, match=r"there is repo/x:1, x:2, y:latest"):
        open_image(str(path))


def test_layers_may_be_compressed(place: Path) -> None:
    import gzip

    path = archive(place / "a.tar", {**old_form(), "bb/layer.tar": gzip.compress(TWO)})
    assert layers_of(open_image(str(path))) == [ONE, TWO, ONE]


def test_a_compressed_archive_says_what_to_do(place: Path) -> None:
    import gzip

    path = archive(place / "a.tar", old_form())
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ImageError, match="decompress it first"):
        open_image(str(path))


def test_the_archive_may_be_replaced_while_it_is_read(place: Path) -> None:
    path = archive(place / "a.tar", old_form())
    image = open_image(str(path))
    path.unlink()
    assert layers_of(image) == [ONE, TWO, ONE]


@needs_skopeo
def test_skopeos_archives(place: Path) -> None:
    make_image(place / "l", layers=[ONE, TWO, ONE], author="ü")
    tools = Tools(place)
    tools.skopeo_copy(f"oci:{place}/l:t", f"docker-archive:{place}/d.tar:x/y:1")
    tools.skopeo_copy(f"oci:{place}/l:t", f"oci-archive:{place}/o.tar:t")
    for reference in ("d.tar", "d.tar:x/y:1", "o.tar", "o.tar:t"):
        image = open_image(f"{place}/{reference}")
        assert layers_of(image) == [ONE, TWO, ONE]
        assert image.config.author == "ü"


@needs_podman
@pytest.mark.root
def test_podmans_archives(place: Path) -> None:
    """podman save writes docker's form, one image or several, and OCI layouts in a tar."""
    for name, layers in (("one", [ONE]), ("two", [ONE, TWO])):
        make_image(place / name, layers=layers)
    tools = Tools(place)
    for name in ("one", "two"):
        tools.buildah("from", "--name", name, f"oci:{place}/{name}:t")
        tools.buildah("config", "--user", "u", name)
        tools.buildah("commit", "-q", "--rm", name, f"localhost/{name}:1")
    tools.podman("save", "-q", "-o", place / "both.tar", "--multi-image-archive", "one:1", "two:1")
    tools.podman("save", "-q", "-o", place / "docker.tar", "two:1")
    tools.podman("save", "-q", "-o", place / "oci.tar", "--format", "oci-archive", "two:1")
    assert layers_of(open_image(f"{place}/both.tar:localhost/one:1"))[0] == ONE
    assert layers_of(open_image(f"{place}/both.tar:localhost/two:1"))[:2] == [ONE, TWO]
    for name in ("docker.tar", "oci.tar"):
        image = open_image(f"{place}/{name}")
        assert layers_of(image)[:2] == [ONE, TWO]
        assert image.config.config.user == "u"


@needs_skopeo
def test_a_new_docker_writes_both_forms(place: Path) -> None:
    """docker 25 and later: an OCI layout with a manifest.json that names its blobs."""
    layout = place / "l"
    make_image(layout, layers=[ONE, TWO])
    image = open_image(f"{layout}:t")
    config = image.config_digest.replace(":", "/")
    names = [f"blobs/{layer.diff_id.replace(':', '/')}" for layer in image.layers]
    members: dict[str, bytes | str] = {
        str(path.relative_to(layout)): path.read_bytes() for path in layout.rglob("*") if path.is_file()
    }
    both = {
        **members,
        "manifest.json": json.dumps([entry(f"blobs/{config}", ["x:latest"], names)]).encode(),
    }
    path = archive(place / "a.tar", both)
    assert layers_of(open_image(f"{path}:x")) == [ONE, TWO]
    # skopeo takes the same tar for the same image
    Tools(place).skopeo_copy(f"docker-archive:{path}", f"oci:{place}/back:t")
    assert open_image(f"{place}/back:t").config.rootfs == image.config.rootfs
    del both["manifest.json"]
    assert layers_of(open_image(f"{archive(place / 'b.tar', both)}:t")) == [ONE, TWO]
