"""`layerfs export`: the same tree gives the same tar, from a mount and an image, and others unpack it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.oci.member import Kind, Member
from layerfs.oci.references import open_image
from tests.oci import members as m
from tests.oci.images import Tools, scratch_place
from tests.oci.images import run as tool
from tests.oci.test_commit import Worker, apply, check_layout, populate
from tests.oci.test_flatten import Layer
from tests.oci.test_interop import rich_tree
from tests.oci.test_live import run
from tests.oci.test_squash import make_image
from tests.support.mounts import Layerfs, layerfs_command, why_no_layerfs
from tests.support.stack import Stack as Dirs
from tests.support.tree import assert_equal, lowers_guard, snapshot

live = pytest.mark.skipif(bool(why_no_layerfs()), reason=str(why_no_layerfs()))
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (owners, devices)")
_TAR = ["tar", "--numeric-owner", "--xattrs", "--xattrs-include=*"]


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch_place("export") as path:
        path.chmod(0o755)
        yield path


@live
@root
@pytest.mark.parametrize("seed", range(4))
def test_a_mount_and_the_image_of_it(place: Path, seed: int) -> None:
    """Base image and commit, exported flat, are what the live mount is exported as; GNU tar unpacks what the
    mount shows."""
    dirs = Dirs(place, 3)
    for number, lower in enumerate(dirs.lowers):
        populate(lower, seed * 3 + number)
    with lowers_guard(dirs.lowers), Layerfs(dirs):
        run("export", dirs.mnt, "-o", place / "base.tar")
        run("import", place / "base.tar", "--layout", f"{place}/l:base", "--compression", "zstd")
        worker = Worker(dirs.mnt, seed)
        for _ in range(25):
            worker.step()
        run("commit", dirs.mnt, "--layout", f"{place}/l:new", "--base", f"{place}/l:base")
        run("export", dirs.mnt, "-o", place / "mount.tar")
        shown = snapshot(dirs.mnt)
    run("export", f"{place}/l:new", "-o", place / "image.tar")
    run("squash", f"{place}/l:new", "--layout", f"{place}/l:one")
    check_layout(place / "mount.tar")
    assert (place / "image.tar").read_bytes() == (place / "mount.tar").read_bytes()
    (layer,) = open_image(f"{place}/l:one").layers
    assert layer.diff_id == "sha256:" + hashlib.sha256((place / "mount.tar").read_bytes()).hexdigest()
    for name, unpack in (("tar", None), ("applied", apply)):
        target = place / name
        target.mkdir()
        if unpack is None:
            tool(*_TAR, "-xpf", place / "mount.tar", "-C", target)
        else:
            unpack(place / "mount.tar", target)
        assert_equal(shown, snapshot(target), labels=("mount", name))


_LAYERS: list[Layer] = [
    [
        m.directory(b"etc", mode=0o750, uid=3),
        m.file(b"etc/a", b"a" * 1000, uid=7, gid=8, mtime_ns=10**18 + 1),
        m.hardlink(b"etc/b", b"etc/a"),
        m.file(b"implied/deep/f", b"1"),
        m.file(b"gone", b"2"),
        m.directory(b"full"),
        m.file(b"full/x"),
        (Member(b"null", Kind.CHAR, 0o666, rdev=(1, 3)), b""),
        m.link(b"l", b"etc/a"),
    ],
    [
        m.file(b"etc/.wh.a"),
        m.file(b".wh.gone"),
        m.file(b"implied/deep/g", b"3"),
        m.file(b"full/.wh..wh..opq"),
    ],
    [
        m.file(b"full/y", b"4", xattrs={"user.k": b"v"}),
        m.directory(b"gone", mode=0o1777),
        m.hardlink(b"c", b"etc/b"),
    ],
]


@live
@root
@pytest.mark.parametrize("named", [False, True], ids=["no root", "root"])
@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_an_image_and_the_mount_of_it(place: Path, named: bool, compression: str) -> None:
    layers = [[m.directory(b"", mode=0o711, uid=9, mtime_ns=5)], *_LAYERS] if named else _LAYERS
    make_image(place / "l", "t", layers, compression=compression)
    run("export", f"{place}/l:t", "-o", place / "image.tar")
    (place / "mnt").mkdir()
    env = {**os.environ, "XDG_CACHE_HOME": str(place / "cache")}
    subprocess.run([*layerfs_command(), "mount", f"{place}/l:t", place / "mnt"], check=True, env=env)
    try:
        run("export", place / "mnt", "-o", place / "mount.tar")
        shown = snapshot(place / "mnt")
    finally:
        run("umount", place / "mnt")
    assert m.read_bytes((place / "mount.tar").read_bytes()) == m.read_bytes(
        (place / "image.tar").read_bytes()
    )
    assert (place / "mount.tar").read_bytes() == (place / "image.tar").read_bytes()
    target = place / "t"
    target.mkdir()
    tool(*_TAR, "-xpf", place / "image.tar", "-C", target)
    assert_equal(shown, snapshot(target), labels=("mount", "GNU tar"))


@root
def test_an_image_is_unpacked_as_umoci_does(place: Path) -> None:
    empty, tree = place / "empty", place / "tree"
    empty.mkdir()
    rich_tree(tree)
    run("commit", "--upper", tree, "--lower", empty, "--layout", f"{place}/l:t", "--compression", "gzip")
    tool("umoci", "raw", "unpack", "--image", f"{place}/l:t", place / "umoci")
    with subprocess.Popen([*layerfs_command(), "export", f"{place}/l:t"], stdout=subprocess.PIPE) as export:
        (place / "t").mkdir()
        subprocess.run([*_TAR, "-xpf", "-", "-C", place / "t"], stdin=export.stdout, check=True)
    assert export.returncode == 0
    assert_equal(snapshot(place / "umoci"), snapshot(place / "t"), labels=("umoci", "export"))


def test_a_docker_archive(place: Path) -> None:
    make_image(place / "l", "t", _LAYERS, compression="gzip")
    Tools(place).skopeo_copy(f"oci:{place}/l:t", f"docker-archive:{place}/d.tar:x:t")
    run("export", f"{place}/l:t", "-o", place / "1.tar")
    run("export", f"{place}/d.tar", "-o", place / "2.tar")
    run("export", f"{place}/d.tar:x:t", "-o", place / "3.tar.gz", "--compression", "gzip")
    assert (place / "1.tar").read_bytes() == (place / "2.tar").read_bytes()
    assert m.read_bytes((place / "3.tar.gz").read_bytes()) == m.read_bytes((place / "1.tar").read_bytes())


def test_the_summary(place: Path) -> None:
    make_image(place / "l", "t", _LAYERS)
    done = subprocess.run([*layerfs_command(), "export", f"{place}/l:t", "--json"], capture_output=True)
    told = json.loads(done.stderr)
    assert told["diff_id"] == told["digest"] == "sha256:" + hashlib.sha256(done.stdout).hexdigest()
    assert (told["size"], told["members"]) == (len(done.stdout), len(m.read_bytes(done.stdout)))
    done_ = run("export", f"{place}/l:t", "-o", place / "x.tar", "--json")
    assert json.loads(done_.stdout) == told and done_.stderr == ""


def test_a_damaged_image_leaves_no_file(place: Path) -> None:
    image = make_image(place / "l", "t", [[m.file(b"f", os.urandom(3000))], [m.file(b"g")]])
    descriptor = image.layers[0].descriptor
    assert descriptor is not None
    blob = place / "l/blobs" / descriptor.digest.replace(":", "/")
    raw = bytearray(blob.read_bytes())
    raw[1000] ^= 1  # in the data of a file: nothing but the digest tells
    blob.write_bytes(raw)
    (place / "old.tar").write_text("old")
    done = run("export", f"{place}/l:t", "-o", place / "old.tar", code=1)
    assert f"layer 1 of 2: blob {descriptor.digest} is damaged" in done.stderr
    assert (place / "old.tar").read_text() == "old"
    assert sorted(os.listdir(place)) == ["l", "old.tar"]
    # nothing of it gets into a pipe either
    done_ = subprocess.run([*layerfs_command(), "export", f"{place}/l:t"], capture_output=True)
    assert (done_.returncode, done_.stdout) == (1, b"")


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["PLACE"], "is not the root of a layerfs mount", 1),
        (["PLACE/absent"], "no such image", 1),
        (["PLACE/l:absent"], "there is no image 'absent'", 1),
        (["PLACE/l:t", "-o", "/absent/x"], "cannot be written", 2),
        (["PLACE/l:t", "--level", "3"], "has no levels", 2),
        (["PLACE/l:t", "--pause"], "only a mount can be paused", 2),
    ],
)
def test_wrong_usage(place: Path, words: list[str], message: str, code: int) -> None:
    make_image(place / "l", "t", _LAYERS)
    done = run("export", *(word.replace("PLACE", str(place)) for word in words), code=code)
    assert message in done.stderr and done.stdout == ""


@live
def test_not_into_the_upper(place: Path) -> None:
    dirs = Dirs(place, 1)
    with Layerfs(dirs):
        assert dirs.upper is not None
        done = run("export", dirs.mnt, "-o", dirs.upper / "x.tar", code=2)
        assert "lies in the upper directory" in done.stderr
        done = run("export", dirs.mnt, "-o", dirs.mnt / "x.tar", code=2)
        assert "lies in the mount that is being read" in done.stderr
        assert os.listdir(dirs.upper) == []


@live
@pytest.mark.parametrize("pause", [[], ["--pause"]])
def test_a_file_that_is_written_to(place: Path, pause: list[str]) -> None:
    """Two halves of a file are the same at every moment: so they are in the tar."""
    dirs = Dirs(place, 1)
    with Layerfs(dirs):
        file = dirs.mnt / "f"
        size = 300_000
        file.write_bytes(bytes(2 * size))
        stop = threading.Event()
        rounds = 0

        def write() -> None:
            nonlocal rounds
            with open(file, "r+b", buffering=0) as out:
                while not stop.is_set():
                    rounds += 1
                    out.seek(0)
                    half = bytes((rounds % 256,)) * size
                    assert out.write(half + half) == 2 * size

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(5):
                run("export", dirs.mnt, "-o", place / "x.tar", *pause)
                (data,) = [data for member, data in m.read_bytes((place / "x.tar").read_bytes()) if data]
                assert len(data) == 2 * size and len(set(data)) == 1
        finally:
            stop.set()
            writer.join()
        assert rounds > 5
