"""`layerfs commit --layout`: the image that comes out, by the specification, and as umoci, skopeo, buildah
and runc see it."""

from __future__ import annotations

import copy
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerfs.errors import ImageError, UsageError
from layerfs.oci.append import Appended, ImageOptions, append_layer
from layerfs.oci.cache import LayerCache
from layerfs.oci.image import MAX_LAYERS, digest_of
from layerfs.oci.references import open_image
from layerfs.oci.streams import LayerSink, Written
from tests.oci.images import (
    PLAIN,
    Tools,
    blob,
    make_image,
    manifest_of,
    scratch_place,
    tar_of,
)
from tests.support.tree import assert_equal, snapshot

BASE_LAYER = tar_of({"base": b"base"})
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (owners, mounts)")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    with scratch_place("app") as path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(path / "cache"))
        yield path


def layerfs(*arguments: str | Path, code: int = 0) -> str:
    """stdout, or what it says when `code` is not 0."""
    done = subprocess.run(
        [sys.executable, "-m", "layerfs", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr if code else done.stdout


def upper_and_lower(place: Path) -> tuple[Path, Path]:
    """An upper that adds, changes and deletes."""
    lower, upper = place / "lower", place / "upper"
    (lower / "dir").mkdir(parents=True)
    (lower / "dir/gone").write_text("g")
    (lower / "changed").write_text("before")
    (upper / "dir").mkdir(parents=True)
    (upper / "dir/.wh.gone").write_text("")
    (upper / "changed").write_text("after")
    (upper / "added").write_bytes(b"added" * 1000)
    return upper, lower


def config_of(layout: Path, tag: str) -> Any:
    return blob(layout, manifest_of(layout, tag)["config"]["digest"])


def write_layer(files: dict[str, bytes], compression: str = "none") -> Callable[[int], Written]:
    def write(fd: int) -> Written:
        with LayerSink(fd, compression) as sink:
            sink.write(tar_of(files))
            return sink.finish()

    return write


def append(path: Path, tag: str, base: str | None = None, write: Any = None, **options: Any) -> Appended:
    options = {"created_by": "test", **options}
    image = open_image(base) if base is not None else None
    return append_layer(str(path), tag, image, ImageOptions(**options), write or write_layer({"new": b"new"}))


# -- documents ----------------------------------------------------------------------------------------


def test_from_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    upper, lower = upper_and_lower(place)
    layout = place / "l"
    said = json.loads(
        layerfs(
            "commit", "--upper", upper, "--lower", lower, "--layout", f"{layout}:t", "--json",
            "-m", "first", "-a", "me", "--created-by", "hand", "-c", 'CMD ["sh"]', "-c", "ENV A=b",
        )
    )  # fmt: skip
    manifest, config = manifest_of(layout, "t"), config_of(layout, "t")
    (told,) = manifest["layers"]
    assert manifest == {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": said["image"]["id"],
            "size": (layout / "blobs" / said["image"]["id"].replace(":", "/")).stat().st_size,
        },
        "layers": [{"mediaType": f"{PLAIN}+gzip", "digest": said["digest"], "size": said["size"]}],
    }
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine)
    assert config == {
        "architecture": machine or config["architecture"],
        "os": "linux",
        "created": "1970-01-02T00:00:00Z",
        "author": "me",
        "config": {"Cmd": ["sh"], "Env": ["A=b"]},
        "rootfs": {"type": "layers", "diff_ids": [said["diff_id"]]},
        "history": [
            {"created": "1970-01-02T00:00:00Z", "created_by": "hand", "author": "me", "comment": "first"}
        ],
    }
    data = (layout / "blobs" / told["digest"].replace(":", "/")).read_bytes()
    assert digest_of(data) == told["digest"] == said["digest"]
    assert digest_of(gzip.decompress(data)) == said["diff_id"]


def test_the_same_bytes_on_another_day(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    digests = {append(place / name, "t").manifest.digest for name in "ab"}
    assert len(digests) == 1
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "9" * 12)
    with pytest.raises(UsageError):
        append(place / "c", "t")
    assert not (place / "c").exists()


def test_upon_a_base(place: Path) -> None:
    layout = place / "l"
    unknown = {"x-unknown": [1, {"deep": None}], "os.version": "1"}
    base = make_image(
        layout,
        "base",
        [BASE_LAYER],
        manifest={
            "annotations": {"a": "kept", "org.opencontainers.image.base.name": "older"},
            "x-manifest": {"n": 1.5},
            "subject": {"mediaType": "x", "digest": digest_of(b""), "size": 0},
        },
        config={"Cmd": ["base"], "Env": ["A=a"], "Healthcheck": {"Test": ["NONE"]}},
        author="them",
        created="2020-01-01T00:00:00Z",
        container="0123",
        container_config={"Cmd": ["stale"]},
        **unknown,
    )
    old = blob(layout, base.digest)
    old_config = blob(layout, old["config"]["digest"])
    made = append(layout, "new", f"{layout}:base", message="m", changes=("ENV B=b",))
    manifest, config = manifest_of(layout, "new"), config_of(layout, "new")
    assert manifest["layers"][:-1] == old["layers"]
    assert manifest["annotations"] == {
        "a": "kept",
        "org.opencontainers.image.base.digest": base.digest,
        "org.opencontainers.image.base.name": "base",
    }
    assert manifest["x-manifest"] == {"n": 1.5}
    assert "subject" not in manifest
    assert made.layers == 2
    expected = copy.deepcopy(old_config)
    del expected["container"], expected["container_config"]
    expected["created"] = config["created"]
    expected["config"]["Env"] = ["A=a", "B=b"]
    expected["rootfs"]["diff_ids"].append(digest_of(tar_of({"new": b"new"})))
    expected["history"].append({"created": config["created"], "created_by": "test", "comment": "m"})
    assert config == expected
    assert manifest_of(layout, "base") == old


def test_a_base_without_history_gets_entries(place: Path) -> None:
    layout = place / "l"
    make_image(layout, "base", [BASE_LAYER, tar_of({"b": b"2"})], history=None)
    append(layout, "new", f"{layout}:base", message="m")
    assert [each.get("comment") for each in config_of(layout, "new")["history"]] == [None, None, "m"]


_EMPTY = {"created_by": "env", "empty_layer": True}


@pytest.mark.parametrize(
    ("history", "whole"),
    [
        ([{"created_by": "1"}, _EMPTY], [{"created_by": "1"}, _EMPTY, {}]),
        ([_EMPTY], [_EMPTY, {}, {}]),
        (
            [{"created_by": "1"}, {"created_by": "2"}, {"created_by": "3"}],
            [{"created_by": "1"}, {"created_by": "2"}, {"created_by": "3", "empty_layer": True}],
        ),
    ],
    ids=["too short", "of no layer", "too long"],
)
def test_a_history_that_does_not_match_the_layers(
    place: Path, history: list[dict[str, Any]], whole: list[dict[str, Any]]
) -> None:
    """Who reads the image takes it, and says so where he shows it; who writes one completes it."""
    layout = place / "l"
    make_image(layout, "base", [BASE_LAYER, tar_of({"b": b"2"})], history=history)
    shown = json.loads(layerfs("history", "--json", f"{layout}:base"))[::-1]
    assert [each["created_by"] for each in shown] == [each.get("created_by", "") for each in whole]
    assert len([each for each in shown if each["size"]]) == 2
    for command in (["inspect"], ["history"], ["squash", "--layout", f"{layout}:one", "--last", "1"]):
        words = [sys.executable, "-m", "layerfs", *command, f"{layout}:base"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert f"of 2 layers the history of the image tells of {told(history)}" in done.stderr, command
    layerfs("export", f"{layout}:base", "-o", place / "flat.tar")
    assert len(LayerCache.default().layer_directories(open_image(f"{layout}:base"))) >= 2

    append(layout, "new", f"{layout}:base", message="m")
    assert config_of(layout, "new")["history"][:-1] == whole
    append(layout, "same", f"{layout}:base", lambda fd: None)
    assert config_of(layout, "same")["history"] == history, "the base as it is"
    for tag, layers in (("new", 3), ("one", 2)):
        assert told(config_of(layout, tag)["history"]) == layers
        done = subprocess.run(
            [sys.executable, "-m", "layerfs", "inspect", f"{layout}:{tag}"], capture_output=True, check=True
        )
        assert not done.stderr


def told(history: list[dict[str, Any]]) -> int:
    return sum(not entry.get("empty_layer") for entry in history)


@pytest.mark.parametrize("form", ["other layout", "docker manifest", "docker archive", "oci archive"])
def test_bases_of_every_kind(place: Path, form: str) -> None:
    source, layout = place / "source", place / "l"
    layers = [{"mediaType": DOCKER_LAYER, "digest": digest_of(BASE_LAYER), "size": len(BASE_LAYER)}]
    docker = {"mediaType": "application/vnd.docker.distribution.manifest.v2+json", "layers": layers}
    make_image(source, "base", [BASE_LAYER], manifest=docker if form == "docker manifest" else None)
    reference = f"{source}:base"
    if form == "docker manifest":
        index = json.loads((source / "index.json").read_text())
        index["manifests"][0]["mediaType"] = docker["mediaType"]
        (source / "index.json").write_text(json.dumps(index))
    elif form != "other layout":
        if not shutil.which("skopeo"):
            pytest.skip("needs skopeo")
        reference = f"{place}/a.tar"
        target = (
            f"docker-archive:{reference}:x/y:base"
            if form == "docker archive"
            else f"oci-archive:{reference}:base"
        )
        Tools(place).skopeo_copy(f"oci:{source}:base", target)
    append(layout, "new", reference)
    shutil.rmtree(source)
    manifest = manifest_of(layout, "new")
    # (skopeo compresses for an oci-archive)
    assert manifest["layers"][0]["mediaType"] == PLAIN + ("+gzip" if form == "oci archive" else "")
    if form != "oci archive":
        assert manifest["layers"][0]["digest"] == digest_of(BASE_LAYER)
    name = "docker.io/x/y:base" if form == "docker archive" else "base"
    assert manifest["annotations"]["org.opencontainers.image.base.name"] == name
    assert ("org.opencontainers.image.base.digest" in manifest["annotations"]) == (form != "docker archive")
    image = open_image(f"{layout}:new")
    assert [str(layer.diff_id) for layer in image.layers] == [
        digest_of(BASE_LAYER),
        digest_of(tar_of({"new": b"new"})),
    ]
    for layer in image.layers:
        with layer.open() as opened:
            opened.verify()


def test_nondistributable_layers_are_kept_as_they_are(place: Path) -> None:
    layout = place / "l"
    foreign = {
        "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "digest": digest_of(BASE_LAYER),
        "size": len(BASE_LAYER),
        "urls": ["http://127.0.0.1:1/nobody"],
    }
    make_image(layout, "base", [BASE_LAYER], manifest={"layers": [foreign]})
    append(layout, "new", f"{layout}:base")
    assert manifest_of(layout, "new")["layers"][0] == foreign


def test_nothing_changed(place: Path) -> None:
    layout = place / "l"
    base = make_image(layout, "base", [BASE_LAYER])
    same = append(layout, "same", f"{layout}:base", lambda fd: None)
    assert same.same and not same.added and same.manifest.digest == base.digest
    assert manifest_of(layout, "same") == manifest_of(layout, "base")
    copied = append(place / "other", "copied", f"{layout}:base", lambda fd: None)
    assert copied.same and copied.manifest.digest == base.digest
    told = append(layout, "told", f"{layout}:base", lambda fd: None, changes=("USER u",))
    assert not told.same and not told.added and told.layers == 1
    config = config_of(layout, "told")
    assert config["history"][-1]["empty_layer"] is True
    assert config["config"] == {"User": "u"}
    assert [str(layer.diff_id) for layer in open_image(f"{layout}:told").layers] == [digest_of(BASE_LAYER)]


def test_the_base_may_be_the_tag_itself(place: Path) -> None:
    layout = place / "l"
    for number in range(3):
        base = f"{layout}:t" if number else None
        assert append(layout, "t", base, write_layer({f"f{number}": b""})).layers == number + 1


def test_an_image_with_the_most_layers(place: Path) -> None:
    layout = place / "l"
    make_image(layout, "base", [BASE_LAYER] * MAX_LAYERS)
    with pytest.raises(ImageError, match="squash"):
        append(layout, "new", f"{layout}:base")
    make_image(layout, "base", [BASE_LAYER] * (MAX_LAYERS - 1))
    assert append(layout, "new", f"{layout}:base").layers == MAX_LAYERS


@pytest.mark.parametrize("tag", ["", "a b", "../x", "a/../b", "-a", "ü", "a" * 256, "a:", "a\n"])
def test_tags_that_are_none(place: Path, tag: str) -> None:
    with pytest.raises(UsageError):
        append(place / "l", tag)
    assert not (place / "l").exists()


# -- the command ----------------------------------------------------------------------------------------


def test_wrong_command_lines_make_nothing(place: Path) -> None:
    upper, lower = upper_and_lower(place)
    make_image(place / "l", "base", [BASE_LAYER])
    before = snapshot(place)
    common = ("commit", "--upper", upper, "--lower", lower)
    new = ("--layout", f"{place}/new:t")
    for arguments in (
        ("-m", "x"),
        ("--base", f"{place}/l:base"),
        (*new, "-o", f"{place}/x"),
        (*new, "--change", "FROM x"),
        (*new, "--compression", "none", "--level", "3"),
        ("--layout", f"{place}/new:a b"),
        ("--layout", f"{upper}/new:t"),
        ("--layout", f"{upper}:t"),
        ("--layout", f"{place}/l@{digest_of(b'')}"),
    ):
        layerfs(*common, *arguments, code=2)
        assert_equal(before, snapshot(place), labels=("before", str(arguments)))
    for base in ("nothing", f"{place}/l:other", f"{lower}", f"{lower}/changed"):
        layerfs(*common, *new, "--base", base, code=1)
        assert_equal(before, snapshot(place), labels=("before", base))


def test_layers_of_images_are_gzip_unless_said_otherwise(place: Path) -> None:
    upper, lower = upper_and_lower(place)
    layout, tar = place / "l", place / "layer.tar"
    commit = ("commit", "--upper", upper, "--lower", lower)
    layerfs(*commit, "-o", tar)
    assert tar.read_bytes()[257:262] == b"ustar"
    (place / "flat.tar").write_bytes(tar_of({"a": b"1"}))
    ways: tuple[tuple[str | Path, ...], ...] = (
        commit,
        ("squash", f"{layout}:base"),
        ("import", place / "flat.tar"),
    )
    make_image(layout, "base", [BASE_LAYER])
    for way in ways:
        for options, suffix in (((), "+gzip"), (("--compression", "none"), ""), (("--level", "6"), "+gzip")):
            layerfs(*way, "--layout", f"{layout}:t", *options)
            (layer,) = manifest_of(layout, "t")["layers"]
            assert layer["mediaType"] == PLAIN + suffix, (way, options)


def test_a_commit_leaves_the_right_images_alone(place: Path) -> None:
    """Of a mounted image it takes that image as the base, and no other."""
    upper, _ = upper_and_lower(place)
    layout = place / "l"
    make_image(layout, "one", [BASE_LAYER, tar_of({"one": b"1"}), BASE_LAYER])
    make_image(layout, "two", [BASE_LAYER, tar_of({"two": b"2"})])
    lowers = LayerCache.default().layer_directories(open_image(f"{layout}:one"))
    common: list[str | Path] = ["commit", "--upper", upper]
    for each in lowers:
        common += ["--lower", each]
    layerfs(*common, "--layout", f"{layout}:new", "--base", f"{layout}:one")
    said = layerfs(*common, "--layout", f"{layout}:no", "--base", f"{layout}:two", code=2)
    assert "is not the image that was changed" in said
    said = subprocess.run(
        [sys.executable, "-m", "layerfs", *common, "--layout", f"{layout}:alone"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "--base" in said
    assert json.loads(layerfs("inspect", "--json", f"{layout}:new"))["config"]["history"][-1]["created_by"]


def test_inspect_and_history(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = place / "l"
    make_image(
        layout, "base", [BASE_LAYER], config={"Env": ["A=\x1b[31mred\nline"], "Cmd": ["ü"]}, author="\x07bell"
    )
    append(layout, "t", f"{layout}:base", message="the message", author="me")
    append(layout, "t", f"{layout}:t", lambda fd: None, changes=("USER u",), message="empty")
    said = json.loads(layerfs("inspect", "--json", f"{layout}:t"))
    assert said["config"] == config_of(layout, "t")
    assert said["manifest"] == manifest_of(layout, "t")
    assert [layer["diff_id"] for layer in said["layers"]] == said["config"]["rootfs"]["diff_ids"]
    history = json.loads(layerfs("history", "--json", f"{layout}:t"))
    assert [(each["comment"], each["size"]) for each in history] == [
        ("empty", None),
        ("the message", len(tar_of({"new": b"new"}))),
        ("", len(BASE_LAYER)),
    ]
    for command in ("inspect", "history"):
        text = layerfs(command, f"{layout}:t")
        assert not any(ord(char) < 32 and char != "\n" for char in text)
    text = layerfs("inspect", f"{layout}:t")
    assert "A=\\x1b[31mred\\nline" in text
    assert '["ü"]' in text
    lines = layerfs("history", f"{layout}:t").splitlines()
    assert len(lines) == 4 and "the message" in lines[2] and " - " in lines[1]
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert '["\\xfc"]' in layerfs("inspect", f"{layout}:t")
    layerfs("inspect", f"{layout}:none", code=1)
    layerfs("history", f"{layout}:none", code=1)
