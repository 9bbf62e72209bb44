"""`layerfs squash`: the tree stays the same, config and history stay true. What layers are together is
test_flatten.py's, where their bytes go test_join.py's."""

from __future__ import annotations

import json
import os
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfs.errors import LayerError, TarError, UsageError
from layerfs.oci.append import ImageOptions, append_layer
from layerfs.oci.image import MANIFEST, Image
from layerfs.oci.join import join_layers
from layerfs.oci.layout import Layout
from layerfs.oci.member import Kind, Member
from layerfs.oci.references import open_image
from layerfs.oci.squash import squash
from layerfs.oci.streams import LayerSink, Written
from tests.oci import images
from tests.oci import members as m
from tests.oci.images import Tools, manifest_of, scratch_place
from tests.oci.test_flatten import Layer, _settings, _stack, flat, made_up_time, sensible
from tests.oci.test_images_evil import EVIL as EVIL_IMAGES
from tests.oci.test_images_evil import LAYER, TAKEN
from tests.oci.test_live import run
from tests.support.mounts import layerfs_command
from tests.support.tree import assert_equal, snapshot

__all__ = ["made_up_time"]  # a fixture for every test here
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (owners, devices)")


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch_place("squash") as path:
        yield path


def make_image(
    path: Path, tag: str, layers: Sequence[Layer], base: Image | None = None, compression: str = "none"
) -> Image:
    """An image of these layers, one command each."""
    image = base
    for number, layer in enumerate(layers):

        def write(fd: int, layer: Layer = layer) -> Written:
            return m.write_to(fd, layer, compression)

        append_layer(str(path), tag, image, ImageOptions(f"step {number}"), write)
        image = open_image(f"{path}:{tag}")
    assert image is not None
    return image


def exported(image: Image, to: Path) -> bytes:
    """The flat root: one form for one tree."""
    with open(to, "wb") as file, LayerSink(file.fileno()) as sink:
        join_layers(image.layers, sink, whole=True)
        sink.finish()
    return to.read_bytes()


def documents(path: Path, tag: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Manifest and config, read without layerfs."""
    manifest = manifest_of(path, tag)
    digest = manifest["config"]["digest"].split(":")[1]
    return manifest, json.loads((path / "blobs/sha256" / digest).read_bytes())


@given(_stack, st.data())
@settings(_settings, max_examples=40)
def test_the_root_stays_the_same(layers: list[Layer], data: st.DataObject) -> None:
    layers = sensible([[m.directory(b"", mode=0o700)], *layers])
    first = data.draw(st.integers(0, len(layers) - 1))
    with scratch_place("squash") as place:
        image = make_image(place / "l", "a", layers, compression="gzip")
        sink = partial(LayerSink, compression="zstd")
        try:
            made, _, written = squash(str(place / "l"), "b", image, first, ImageOptions("x"), sink)
        except LayerError as error:
            assert not isinstance(error, TarError) and "lies below the layers" in str(error)
            return
        joined = open_image(f"{place}/l:b")
        assert joined.config_digest == made.image_id
        assert [layer.diff_id for layer in joined.layers] == [
            *(layer.diff_id for layer in image.layers[:first]),
            written.diff_id,
        ]
        assert exported(joined, place / "after") == exported(image, place / "before")


_LAYERS: list[Layer] = [
    [m.directory(b"d", mode=0o700), m.file(b"d/a", b"1"), m.file(b"d/b", b"2"), m.file(b"x", b"3")],
    [m.file(b"d/.wh.a"), m.file(b"d/c", b"4"), m.file(b"y", b"5")],
    [m.file(b".wh.x"), m.file(b".wh.y"), m.hardlink(b"z", b"d/c")],
]


@pytest.mark.parametrize(
    ("options", "kept"),
    [([], 0), (["--last", "3"], 0), (["--last", "2"], 1), (["--from", "3"], 2), (["--from", "1"], 0)],
)
def test_config_and_history(place: Path, options: list[str], kept: int) -> None:
    path = place / "l"
    base = make_image(path, "a", _LAYERS[:1])
    changed = ImageOptions("env", changes=("ENV A=1",))
    append_layer(str(path), "a", base, changed, lambda fd: None)
    make_image(path, "a", _LAYERS[1:], open_image(f"{path}:a"))
    before, old = documents(path, "a")
    run("squash", f"{path}:a", "--layout", f"{path}:b", *options, "-m", "why", "-a", "me")
    after, new = documents(path, "b")

    assert (len(after["layers"]), len(new["rootfs"]["diff_ids"])) == (kept + 1, kept + 1)
    assert after["layers"][:kept] == before["layers"][:kept]
    assert new["rootfs"]["diff_ids"][:kept] == old["rootfs"]["diff_ids"][:kept]
    assert new["config"] == old["config"] == {"Env": ["A=1"]}
    assert [entry["created_by"] for entry in new["history"]] == [
        "step 0",
        "env",
        "step 0",
        "step 1",
        " ".join(["layerfs squash", *options]),
    ]
    full = [not entry.get("empty_layer", False) for entry in new["history"]]
    assert full == [kept > 0, False, kept > 1, False, True]
    assert (new["history"][-1]["comment"], new["history"][-1]["author"], new["author"]) == ("why", "me", "me")
    assert "annotations" not in after or not [key for key in after["annotations"] if ".base." in key]


def test_what_we_do_not_know_is_kept(place: Path) -> None:
    raw = [m.tar_bytes(layer) for layer in _LAYERS]
    images.make_image(
        place / "l",
        "a",
        raw,
        manifest={"annotations": {"org.example": "1"}, "x-ours": [1]},
        config={"Cmd": ["/bin/sh"], "OnBuild": ["RUN x"]},
        history=None,
        **{"os.version": "7"},
    )
    run("squash", f"{place}/l:a", "--layout", f"{place}/m:b", "--last", "2")
    manifest, config = documents(place / "m", "b")
    assert (manifest["annotations"], manifest["x-ours"]) == ({"org.example": "1"}, [1])
    assert (config["config"], config["os.version"]) == ({"Cmd": ["/bin/sh"], "OnBuild": ["RUN x"]}, "7")
    # there was no history: an entry for each layer, so that the numbers are right
    assert [entry.get("comment") for entry in config["history"]] == [None, "2 layers joined"]


def test_base_annotations_are_kept_while_they_are_true(place: Path) -> None:
    path = place / "l"
    base = make_image(path, "base", _LAYERS[:2])
    make_image(path, "a", _LAYERS[2:], base)
    make_image(path, "a", [[m.file(b"new")]], open_image(f"{path}:a"))
    manifest, _ = documents(path, "a")  # its base is the image before; make it the first one
    annotations = manifest["annotations"]
    assert base.descriptor is not None
    annotations["org.opencontainers.image.base.digest"] = base.descriptor.digest
    annotations["org.opencontainers.image.base.name"] = "base"
    layout = Layout.open(str(path))
    layout.tag("a", layout.put_json(manifest, MANIFEST))
    told = {}
    for last in (1, 2, 3, 4):
        run("squash", f"{path}:a", "--layout", f"{path}:b", "--last", str(last))
        told[last] = documents(path, "b")[0].get("annotations", {})
    assert told[1] == told[2] == annotations
    assert told[3] == told[4] == {}
    # elsewhere the base is not to be seen
    run("squash", f"{path}:a", "--layout", f"{place}/other:b", "--last", "1")
    assert "annotations" not in documents(place / "other", "b")[0]


def test_json_and_words(place: Path) -> None:
    make_image(place / "l", "a", _LAYERS)
    done = run("squash", f"{place}/l:a", "--layout", f"{place}/l:b", "--json", "--compression", "gzip")
    told = json.loads(done.stdout)
    manifest, config = documents(place / "l", "b")
    assert [told["digest"]] == [layer["digest"] for layer in manifest["layers"]]
    assert [told["diff_id"]] == config["rootfs"]["diff_ids"]
    assert (told["joined"], told["members"], told["notes"]) == (3, 4, [])
    assert told["image"]["id"] == manifest["config"]["digest"]
    assert manifest["layers"][0]["mediaType"].endswith("+gzip")
    done = run("squash", f"{place}/l:a", "--layout", f"{place}/l:b")
    assert "Joined   3 layers, 4 members\n" in done.stdout and done.stderr == ""


def test_tarballs(place: Path) -> None:
    tars = [m.layer_file(place / f"{number}.tar", layer, "zstd") for number, layer in enumerate(_LAYERS)]
    run("squash", *tars[1:], "-o", place / "top.tar")
    assert m.read_bytes((place / "top.tar").read_bytes()) == flat(_LAYERS[1:], whole=False)
    run("squash", "--whole", *tars, "-o", place / "all.tar.gz", "--compression", "gzip")
    assert m.read_bytes((place / "all.tar.gz").read_bytes()) == flat(_LAYERS, whole=True)
    command = [*layerfs_command(), "squash", tars[0], "-"]
    with open(tars[1], "rb") as stdin:
        done = subprocess.run(command, stdin=stdin, capture_output=True, check=True)
    assert m.read_bytes(done.stdout) == flat(_LAYERS[:2], whole=False)
    assert done.stderr.startswith(b"DiffID   sha256:")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["L:a", "--layout", "L:b", "--last", "4"], "--last 4: the image has 3 layers"),
        (["L:a", "--layout", "L:b", "--from", "0"], "--from 0: the image has 3 layers"),
        (["L:a", "--layout", "L:b", "--from", "1", "--last", "1"], "either --from or --last"),
        (["L:a", "L:a", "--layout", "L:b"], "give one IMAGE"),
        (["L:a", "--layout", "L:b", "-o", "x"], "--output and --whole are for tarballs"),
        (["L:a", "--layout", "L:no tag"], "is no tag"),
        (["L:a", "--last", "1"], "need --layout"),
        (
            ["L:a", "--layout", "L:b", "--compression", "gzip", "--level", "99"],
            "gzip has levels 1 to 9, not 99",
        ),
        (["absent", "-o", "x.tar"], "absent: No such file"),
        (["x.tar", "-o", "/absent/y"], "/absent/y: cannot be written"),
    ],
)
def test_wrong_usage(place: Path, words: list[str], message: str) -> None:
    make_image(place / "l", "a", _LAYERS)
    m.layer_file(place / "x.tar", _LAYERS[0])
    before = sorted(os.walk(place))
    told = [word.replace("L:", f"{place}/l:").replace("x.tar", f"{place}/x.tar") for word in words]
    done = run("squash", *told, code=2)
    assert message in done.stderr
    assert sorted(os.walk(place)) == before


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_damaged_blob_is_refused_and_nothing_appears(place: Path, compression: str, number: int) -> None:
    layers: list[Layer] = [[m.file(b"%d" % each, os.urandom(5000))] for each in range(3)]
    image = make_image(place / "l", "a", layers, compression=compression)
    descriptor = image.layers[number].descriptor
    assert descriptor is not None
    blob = place / "l/blobs" / descriptor.digest.replace(":", "/")
    raw = bytearray(blob.read_bytes())
    raw[len(raw) // 2] ^= 1
    blob.write_bytes(raw)
    before = sorted(os.walk(place))
    index = (place / "l/index.json").read_bytes()
    done = run("squash", f"{place}/l:a", "--layout", f"{place}/l:b", code=1)
    assert f"layer {number + 1} of 3: " in done.stderr
    assert (place / "l/index.json").read_bytes() == index
    assert sorted(os.walk(place)) == before


def test_a_hard_link_that_cannot_be_kept(place: Path) -> None:
    make_image(place / "l", "a", [[m.file(b"p", b"1")], [m.hardlink(b"n", b"p")], [m.file(b".wh.p")]])
    done = run("squash", f"{place}/l:a", "--layout", f"{place}/l:b", "--last", "2", code=1)
    assert (
        "hard link n to p: that lies below the layers, which hide it later; begin with a lower" in done.stderr
    )
    run("squash", f"{place}/l:a", "--layout", f"{place}/l:b")
    assert exported(open_image(f"{place}/l:b"), place / "x") == m.tar_bytes([m.file(b"n", b"1")])


@pytest.mark.parametrize("name", [name for name in EVIL_IMAGES if name not in TAKEN])
def test_no_evil_image_is_squashed_or_exported(place: Path, name: str) -> None:
    damage, message = EVIL_IMAGES[name]
    layout = place / "evil-1/l"  # the table knows its place by this name
    layout.parent.mkdir()
    images.make_image(layout, layers=[LAYER])
    damage(layout)
    make_image(place / "target", "t", _LAYERS[:1])
    before = (place / "target/index.json").read_bytes()
    with pytest.raises(LayerError) as refused:
        squash(str(place / "target"), "t", open_image(f"{layout}:t"), 0, ImageOptions("x"), LayerSink)
    assert message in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert (place / "target/index.json").read_bytes() == before
    assert len(os.listdir(place / "target/blobs/sha256")) == 3


def test_too_many_layers_to_count(place: Path) -> None:
    image = make_image(place / "l", "a", _LAYERS)
    with pytest.raises(UsageError, match="has 3 layers"):
        squash(str(place / "l"), "b", image, 3, ImageOptions("x"), LayerSink)


def as_nobody(work: Callable[[], None]) -> None:
    """Runs `work` in a process of an ordinary user, who may read what there is (the interpreter itself may be
    out of his reach)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@root
def test_owners_and_devices_need_no_privilege(place: Path) -> None:
    image = make_image(place / "l", "t", _RICH, compression="gzip")
    expected = exported(image, place / "by root")
    mine = place / "mine"
    mine.mkdir()
    os.chown(mine, 65534, 65534)
    place.chmod(0o755)
    as_nobody(lambda: squash(str(mine / "l"), "t", image, 1, ImageOptions("x"), LayerSink) and None)
    as_nobody(lambda: exported(open_image(f"{mine}/l:t"), mine / "by nobody") and None)
    assert (mine / "by nobody").read_bytes() == expected


# --- against others ---

#: containers/storage sets the attributes of a hard link's member on the file
_LINK = Member(b"etc/p", Kind.HARDLINK, uid=7, gid=8, mtime_ns=10**18, target=b"etc/passwd-"), b""
_RICH: list[Layer] = [
    [
        m.directory(b"", mode=0o711),
        m.directory(b"etc"),
        m.file(b"etc/passwd", b"root", uid=7, gid=8, mtime_ns=10**18),
        m.file(b"etc/shadow", b"secret", mode=0o600),
        m.hardlink(b"etc/passwd-", b"etc/passwd"),
        m.directory(b"var"),
        m.file(b"var/a", b"a"),
        m.file(b"var/b", b"b" * 100_000),
        (Member(b"null", Kind.CHAR, 0o666, rdev=(1, 3)), b""),
        (Member(b"fifo", Kind.FIFO, 0o600), b""),
        m.link(b"lib", b"usr/lib"),
        m.file(b"caps", b"x", xattrs={"user.k": b"v\0"}),
    ],
    [
        m.directory(b"etc", mode=0o750),
        m.file(b"etc/.wh.passwd"),
        m.file(b"etc/shadow", b"new"),
        m.file(b".wh.lib"),
    ],
    [
        m.directory(b"var"),
        m.file(b"var/.wh..wh..opq"),
        m.file(b"var/c", b"c", mode=0o4755),
        m.directory(b"lib"),
        m.file(b"lib/so"),
    ],
    [m.file(b"fifo", b"a file now"), m.file(b".wh.null"), _LINK],
]


@root
@pytest.mark.parametrize("last", [4, 3, 2, 1])
def test_umoci_unpacks_the_same_tree(place: Path, last: int) -> None:
    # umoci 0.4.7 leaves out links to layers below: every name of a group must be in one layer
    layers = [*_RICH[:3], [entry for entry in _RICH[3] if entry[0].kind is not Kind.HARDLINK]]
    make_image(place / "l", "a", layers, compression="gzip")
    run("squash", f"{place}/l:a", "--layout", f"{place}/l:b", "--last", str(last), "--compression", "gzip")
    trees = []
    for tag in ("a", "b"):
        subprocess.run(
            ["umoci", "raw", "unpack", "--image", f"{place}/l:{tag}", place / tag],
            check=True,
            capture_output=True,
        )
        trees.append(snapshot(place / tag))
    assert trees[0].keys() >= {b"etc/passwd-", b"var/c", b"lib/so", b"fifo", b"caps"}
    assert_equal(trees[0], trees[1], labels=("before", "squashed"))


@root
def test_skopeo_copies_it_and_buildah_mounts_it(place: Path) -> None:
    make_image(place / "l", "a", _RICH, compression="gzip")
    run("squash", f"{place}/l:a", "--layout", f"{place}/l:b", "--last", "3", "--compression", "gzip")
    run("squash", f"{place}/l:a", "--layout", f"{place}/l:z", "--last", "3", "--compression", "zstd")
    tools = Tools(place)
    tools.skopeo_copy(f"oci:{place}/l:b", f"docker-archive:{place}/b.tar:x:b")
    # by way of docker's format, and squashed from there, it is the same root
    run("squash", f"{place}/b.tar", "--layout", f"{place}/back:t")
    original = exported(open_image(f"{place}/l:a"), place / "1")
    assert exported(open_image(f"{place}/back:t"), place / "2") == original
    container = tools.buildah("from", f"oci:{place}/l:z").strip()
    try:
        mounted = tools.buildah("mount", container).strip()
        found = snapshot(mounted)
        found[b"."] = replace(found[b"."], mtime_ns=0)  # its store's, not the image's
        (place / "flat").mkdir()
        subprocess.run(
            [
                "tar",
                "--xattrs",
                "--xattrs-include=*",
                "--numeric-owner",
                "-xpf",
                place / "1",
                "-C",
                place / "flat",
            ],
            check=True,
        )
        assert_equal(snapshot(place / "flat"), found, labels=("flat", "buildah"))
    finally:
        tools.buildah("rm", container)
