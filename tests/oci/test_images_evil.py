"""Images that are damaged or hostile: refused in one line, nothing hangs, nothing is written or read
outside."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from layerfs.errors import ImageError, LayerError
from layerfs.oci.append import ImageOptions, append_layer
from layerfs.oci.image import (
    CONFIG,
    INDEX,
    MANIFEST,
    MAX_CONFIG,
    MAX_LAYERS,
    MAX_MANIFEST,
    Image,
    digest_of,
    parse_config,
    parse_index,
    parse_manifest,
)
from layerfs.oci.layout import Layout
from layerfs.oci.references import open_image
from layerfs.oci.strict_json import encode
from tests.oci.images import PLAIN, config_of, entry, make_image, scratch_place, tar_of
from tests.support.tree import assert_equal, snapshot

LAYER = tar_of({"file": b"content"})
REF = "org.opencontainers.image.ref.name"
HEX = "0" * 64


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch_place("evil") as path:
        yield path


def read_all(image: Image) -> None:
    """As everybody reads layers: the bytes, then the verdict."""
    for layer in image.layers:
        with layer.open() as opened:
            while opened.source.read(1 << 16):
                pass
            opened.verify()


def blob_path(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def put(layout: Path, data: bytes) -> dict[str, Any]:
    """A blob and its place, written without layerfs."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    blob_path(layout, digest).write_bytes(data)
    return {"digest": digest, "size": len(data)}


def tag(layout: Path, **descriptor: Any) -> None:
    index = {
        "schemaVersion": 2,
        "manifests": [{"mediaType": MANIFEST, "annotations": {REF: "t"}, **descriptor}],
    }
    (layout / "index.json").write_text(json.dumps(index))


def with_documents(layout: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """The image again, with manifest and config changed, all digests right."""
    config = config_of([LAYER])
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "config": {"mediaType": CONFIG},
        "layers": [{"mediaType": PLAIN, **put(layout, LAYER)}],
    }
    change(manifest, config)
    if isinstance(manifest.get("config"), dict) and "digest" not in manifest["config"]:
        manifest["config"].update(put(layout, json.dumps(config).encode()))
    tag(layout, **put(layout, json.dumps(manifest).encode()))


def document(**changes: Any) -> Callable[[Path], None]:
    """Fields of the manifest changed; None as a value is no field."""

    def damage(layout: Path) -> None:
        with_documents(layout, lambda manifest, config: manifest.update(changes))

    return damage


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(layout: Path) -> None:
        with_documents(layout, lambda manifest, config: config.update(changes))

    return damage


def layer(**changes: Any) -> Callable[[Path], None]:
    """Fields of the one layer's descriptor changed."""

    def damage(layout: Path) -> None:
        with_documents(layout, lambda manifest, config: manifest["layers"][0].update(changes))

    return damage


def index(text: bytes | str) -> Callable[[Path], None]:
    def damage(layout: Path) -> None:
        (layout / "index.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def entry_of(**changes: Any) -> Callable[[Path], None]:
    """Fields of the entry in index.json changed."""

    def damage(layout: Path) -> None:
        old = json.loads((layout / "index.json").read_text())["manifests"][0]
        tag(layout, **{**old, **changes})

    return damage


def in_place(of: bytes | str, do: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something done to a file of the layout, or to the blob with these bytes."""

    def damage(layout: Path) -> None:
        path = layout / of if isinstance(of, str) else blob_path(layout, digest_of(of))
        do(path)

    return damage


def as_link(path: Path) -> None:
    """The same bytes, but elsewhere."""
    outside = scratch_of(path) / "outside"
    outside.mkdir()
    os.rename(path, outside / path.name)
    path.symlink_to(outside / path.name)


def scratch_of(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name.startswith("evil-"))


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def blobs_as_link(layout: Path) -> None:
    os.rename(layout / "blobs", layout.parent / "elsewhere")
    (layout / "blobs").symlink_to(layout.parent / "elsewhere")


def nested(depth: int) -> Callable[[Path], None]:
    """Indexes in indexes."""

    def damage(layout: Path) -> None:
        inner = json.loads((layout / "index.json").read_text())["manifests"][0]
        for _ in range(depth):
            document = {"schemaVersion": 2, "manifests": [inner]}
            inner = {"mediaType": INDEX, **put(layout, json.dumps(document).encode())}
        tag(layout, **inner)

    return damage


def wide(layout: Path) -> None:
    """More nested indexes than anybody needs."""
    old = json.loads((layout / "index.json").read_text())["manifests"][0]
    inner = []
    for number in range(100):
        document = {"schemaVersion": 2, "manifests": [old], "annotations": {"n": str(number)}}
        inner.append({"mediaType": INDEX, **put(layout, json.dumps(document).encode())})
    top = {"schemaVersion": 2, "manifests": inner}
    tag(layout, mediaType=INDEX, **put(layout, json.dumps(top).encode()))


def itself(layout: Path) -> None:
    """A cycle needs a digest that lies."""
    document = {"schemaVersion": 2, "manifests": [{"mediaType": INDEX, "digest": f"sha256:{HEX}", "size": 9}]}
    data = json.dumps(document).encode()
    document["manifests"][0]["size"] = len(data) + 2  # type: ignore[index]
    blob_path(layout, f"sha256:{HEX}").write_bytes(json.dumps(document).encode())
    tag(layout, mediaType=INDEX, digest=f"sha256:{HEX}", size=len(json.dumps(document)))


GOOD = b'{"schemaVersion":2,"manifests":[]}'
EVIL: dict[str, tuple[Callable[[Path], None], str]] = {
    # blobs
    "layer missing": (in_place(LAYER, Path.unlink), "missing"),
    "layer shorter": (in_place(LAYER, lambda path: os.truncate(path, 100)), "100 bytes in place of"),
    "layer longer": (in_place(LAYER, lambda path: os.truncate(path, 1 << 20)), "bytes in place of"),
    "layer of other bytes": (in_place(LAYER, lambda path: path.write_bytes(LAYER[::-1])), "damaged"),
    "layer a link": (in_place(LAYER, as_link), "cannot be read"),
    "layer a fifo": (in_place(LAYER, as_fifo), "no regular file"),
    "layer a directory": (in_place(LAYER, as_directory), "no regular file"),
    "blobs elsewhere": (blobs_as_link, "cannot be read"),
    "layer not its DiffID": (config(rootfs={"type": "layers", "diff_ids": [f"sha256:{HEX}"]}), "DiffID"),
    "layer of xz": (
        lambda layout: with_documents(
            layout, lambda m, c: m["layers"][0].update(put(layout, b"\xfd7zXZ\0" + bytes(512)))
        ),
        "xz",
    ),
    "layer of truncated gzip": (
        lambda layout: with_documents(
            layout, lambda m, c: m["layers"][0].update(put(layout, b"\x1f\x8b\x08\0" + bytes(6)))
        ),
        "gzip",
    ),
    "manifest missing": (entry_of(digest=f"sha256:{HEX}"), "missing"),
    "manifest of another size": (entry_of(size=5), "bytes in place of 5"),
    "manifest of no size": (entry_of(size=0), "bytes in place of 0"),
    "manifest too large": (entry_of(size=MAX_MANIFEST + 1), "larger than"),
    "config too large": (
        document(config={"mediaType": CONFIG, "digest": f"sha256:{HEX}", "size": MAX_CONFIG + 1}),
        "larger than",
    ),
    "config missing": (
        document(config={"mediaType": CONFIG, "digest": f"sha256:{HEX}", "size": 1}),
        "missing",
    ),
    # descriptors
    "digest with a way out": (layer(digest="sha256:../../../../../../etc/passwd"), "malformed"),
    "digest with an algorithm that leads out": (layer(digest="../../etc:" + HEX), "malformed"),
    "digest of a weak algorithm": (layer(digest="md5:" + "0" * 32), "malformed"),
    "digest in capitals": (layer(digest="sha256:" + "A" * 64), "malformed"),
    "digest with a line behind it": (layer(digest=f"sha256:{HEX}\n"), "malformed"),
    "digest too short": (layer(digest="sha256:00"), "malformed"),
    "digest a number": (layer(digest=5), "malformed"),
    "negative size": (layer(size=-1), "malformed"),
    "huge size": (layer(size=1 << 62), "malformed"),
    "huger size": (layer(size=10**400), "malformed"),
    "size a fraction": (layer(size=1.5), "malformed"),
    "size true": (layer(size=True), "malformed"),
    "size a text": (layer(size="100"), "malformed"),
    "no size": (layer(size=None), "malformed"),
    "annotations a list": (layer(annotations=["a"]), "malformed"),
    "annotation a number": (layer(annotations={"a": 1}), "malformed"),
    "urls a text": (layer(urls="http://example.com"), "malformed"),
    "layer encrypted": (layer(mediaType=PLAIN + "+gzip+encrypted"), "not supported"),
    "foreign layer missing": (
        layer(
            mediaType="application/vnd.oci.image.layer.nondistributable.v1.tar",
            digest=f"sha256:{HEX}",
            urls=["http://127.0.0.1:1/x"],
        ),
        "not fetched",
    ),
    # manifests
    "manifest of version 1": (document(schemaVersion=1), "malformed"),
    "no version": (document(schemaVersion=None), "malformed"),
    "layers an object": (document(layers={}), "malformed"),
    "layers null in a list": (document(layers=[None]), "malformed"),
    "no config": (document(config=None), "malformed"),
    "an artifact": (
        document(config={"mediaType": "application/x", "digest": f"sha256:{HEX}", "size": 2}),
        "no image",
    ),
    "manifest and index": (document(manifests=[]), "index and as a manifest"),
    "manifest that calls itself an index": (document(mediaType=INDEX), "says of itself"),
    "too many layers": (
        lambda layout: with_documents(layout, lambda m, c: m.update(layers=m["layers"] * (MAX_LAYERS + 1))),
        "more than",
    ),
    "more layers than DiffIDs": (
        lambda layout: with_documents(layout, lambda m, c: m.update(layers=m["layers"] * 2)),
        "2 layers, its config 1",
    ),
    "no layers": (document(layers=[]), "0 layers, its config 1"),
    # configs
    "DiffID with a way out": (config(rootfs={"type": "layers", "diff_ids": ["sha256:../x"]}), "malformed"),
    "rootfs of another type": (config(rootfs={"type": "base", "diff_ids": []}), "malformed"),
    "no rootfs": (config(rootfs=None), "malformed"),
    "no os": (config(os=None), "malformed"),
    "architecture a list": (config(architecture=[]), "malformed"),
    "history of texts": (config(history=["step"]), "malformed"),
    "env a text": (config(config={"Env": "A=b"}), "malformed"),
    "labels a list": (config(config={"Labels": []}), "malformed"),
    # index.json
    "index empty": (index(""), "malformed"),
    "index no JSON": (index("{"), "malformed"),
    "index a list": (index("[]"), "no JSON object"),
    "index with more behind it": (index(GOOD + b"{}"), "malformed"),
    "index with a BOM": (index(b"\xef\xbb\xbf" + GOOD), "malformed"),
    "index in UTF-16": (index(GOOD.decode().encode("utf-16")), "malformed"),
    "index not UTF-8": (index(GOOD[:-1] + b',"x":"\xff"}'), "UTF-8"),
    "index with a lone surrogate": (index(GOOD[:-1] + b',"x":"\\ud800"}'), "UTF-8"),
    "index with a key twice": (index(GOOD[:-1] + b',"manifests":[]}'), "given twice"),
    "index with a key twice, deep": (index(GOOD[:-1] + b',"x":[{"a":1,"a":2}]}'), "given twice"),
    "index with NaN": (index(GOOD[:-1] + b',"x":NaN}'), "NaN"),
    "index with infinity": (index(GOOD[:-1] + b',"x":-Infinity}'), "Infinity"),
    "index with a number too large": (index(GOOD[:-1] + b',"x":1e999}'), "out of range"),
    "index with a number too long": (index(GOOD[:-1] + b',"x":' + b"9" * 5000 + b"}"), "malformed"),
    "index nested deeply": (index(GOOD[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "deeply"),
    "index nested a little too deeply": (
        index(GOOD[:-1] + b',"x":' + b"[" * 80 + b"]" * 80 + b"}"),
        "deeply",
    ),
    "index too large": (index(GOOD + b" " * MAX_MANIFEST), "larger than"),
    "index and manifest": (index(GOOD[:-1] + b',"layers":[]}'), "index and as a manifest"),
    "index a fifo": (in_place("index.json", as_fifo), "no regular file"),
    "index a link": (in_place("index.json", as_link), "index.json"),
    "index missing": (in_place("index.json", Path.unlink), "index.json"),
    "index empty of images": (index(GOOD), "there are none"),
    "no such tag": (entry_of(annotations={REF: "other\x1b[2J"}), r"'other\x1b[2J'"),
    "manifest under no known type": (entry_of(mediaType="application/x"), "no manifest"),
    "image for another machine": (entry_of(platform={"os": "plan9", "architecture": "amd64"}), ""),
    "indexes too deep": (nested(6), "too deeply"),
    "indexes too many": (wide, "too many"),
    "index that holds itself": (itself, "damaged"),
    # oci-layout
    "mark missing": (in_place("oci-layout", Path.unlink), "no OCI image layout"),
    "mark of another version": (
        in_place("oci-layout", lambda path: path.write_text('{"imageLayoutVersion":"2.0.0"}')),
        "version '2.0.0'",
    ),
    "mark a fifo": (in_place("oci-layout", as_fifo), "cannot be read"),
    "mark a link": (in_place("oci-layout", as_link), "cannot be read"),
    "mark of no version": (in_place("oci-layout", lambda path: path.write_text("{}")), "version None"),
}
#: Those that are not refused when they stand alone in the index.
TAKEN = {"image for another machine"}


def refused_in_one_line(place: Path, reference: str, message: str) -> None:
    """Nothing in `place` changes."""
    before = snapshot(place)
    with pytest.raises(LayerError) as refused:
        read_all(open_image(reference))
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert str(refused.value).isprintable()
    assert_equal(before, snapshot(place), labels=("before", "after"))


@pytest.mark.parametrize("name", EVIL)
def test_refused_in_one_line(place: Path, name: str) -> None:
    damage, message = EVIL[name]
    layout = place / "layout"
    make_image(layout, layers=[LAYER])
    damage(layout)
    if name in TAKEN:
        read_all(open_image(f"{layout}:t"))
        return
    refused_in_one_line(place, f"{layout}:t", message)


@pytest.mark.parametrize("name", [name for name in EVIL if name not in TAKEN])
def test_no_image_is_made_of_it(place: Path, name: str) -> None:
    """As the base of a commit: another layout does not get the image, nor any blob that is damaged."""
    damage, _ = EVIL[name]
    layout, target = place / "layout", place / "target"
    make_image(layout, layers=[LAYER])
    damage(layout)
    make_image(target, "old")
    before = (target / "index.json").read_bytes()

    def make() -> None:
        base = open_image(f"{layout}:t")
        append_layer(str(target), "new", base, ImageOptions("test", message="m"), lambda fd: None)

    if name in ("layer not its DiffID", "layer of xz", "layer of truncated gzip"):
        make()  # layers are copied by their digests, which are right: who unpacks them looks inside
    else:
        with pytest.raises(LayerError):
            make()
        assert (target / "index.json").read_bytes() == before
    for path in (target / "blobs/sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert not [path for path in target.iterdir() if path.name.endswith(".tmp")]


def write_into(target: Path) -> None:
    append_layer(str(target), "new", None, ImageOptions("test"), lambda fd: None)


def test_nothing_is_written_through_links(place: Path) -> None:
    """A layout whose directories lead elsewhere is not written to, and neither is elsewhere."""
    outside = place / "outside"
    outside.mkdir()
    for name, target in (("blobs", outside), ("blobs/sha256", outside), ("index.json", outside / "file")):
        layout = place / "layout"
        make_image(layout)
        victim = layout / name
        os.rename(victim, place / "was")
        victim.symlink_to(target)
        before = snapshot(outside)
        with pytest.raises(LayerError):
            write_into(layout)
        assert_equal(before, snapshot(outside), labels=("before", "after"))
        for path in (layout, place / "was"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_layout_that_is_a_link_is_that_layout(place: Path) -> None:
    """The path itself is the user's, who may have links in it."""
    make_image(place / "layout", layers=[LAYER])
    (place / "link").symlink_to("layout")
    read_all(open_image(f"{place}/link:t"))


def test_a_blob_is_the_file_that_was_opened(place: Path) -> None:
    """Replaced or cut while it is read: the verdict is about the bytes that were read."""
    layout = place / "layout"
    make_image(layout, layers=[LAYER])
    (opened_layer,) = open_image(f"{layout}:t").layers
    path = blob_path(layout, digest_of(LAYER))
    with opened_layer.open() as opened:
        path.unlink()
        opened.verify()
    path.write_bytes(LAYER)
    with opened_layer.open() as opened:
        os.truncate(path, 512)
        try:
            opened.verify()
        except LayerError:
            return
        # it had been read already


# -- at random ------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
_FIELDS = st.sampled_from(
    [
        "schemaVersion",
        "mediaType",
        "config",
        "layers",
        "manifests",
        "digest",
        "size",
        "annotations",
        "platform",
        "urls",
        "rootfs",
        "type",
        "diff_ids",
        "history",
        "architecture",
        "os",
        "empty_layer",
        "Env",
        "Cmd",
        "Labels",
    ]
)
_DOCUMENTS = st.recursive(
    st.none()
    | st.integers(-3, 3)
    | st.text(max_size=3)
    | st.sampled_from([MANIFEST, INDEX, CONFIG, PLAIN, f"sha256:{HEX}", "layers", "amd64", "linux"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_FIELDS, inner, max_size=5),
    max_leaves=30,
)


@given(st.binary() | _JSON.map(json.dumps).map(str.encode) | _DOCUMENTS.map(json.dumps).map(str.encode))
@example(b'{"schemaVersion":2}')
def test_any_bytes_are_taken_or_refused(data: bytes) -> None:
    for parse in (parse_index, parse_manifest, parse_config):
        try:
            document = parse(data)
        except ImageError as refused:
            assert len(str(refused).splitlines()) == 1
        else:
            assert parse(encode(document.raw)).raw == document.raw


def test_put_and_entry_agree(place: Path) -> None:
    """The helpers of this file and the store name blobs alike."""
    layout = Layout.create(str(place / "l"))
    told = entry(layout.put(LAYER, PLAIN))
    assert told == {"mediaType": PLAIN, **put(place / "l", LAYER)}
