"""The cache of layers: complete or absent, verified, shared, one process at a time; and what its directories
are worth to kernel overlayfs."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerfs.errors import ImageError, LayerError, TarError
from layerfs.oci import cache as cache_module
from layerfs.oci import store as store_module
from layerfs.oci import unpack as unpack_module
from layerfs.oci.cache import LayerCache, default_path
from layerfs.oci.image import Image
from layerfs.oci.ownership import ownership_form
from layerfs.oci.progress import Silent
from layerfs.oci.references import open_image
from layerfs.oci.tarreader import TarReader
from tests.oci import members as m
from tests.oci.images import make_image, scratch_place
from tests.oci.test_apply_evil import EVIL
from tests.oci.test_unpack import Layer, merged
from tests.support.tree import assert_equal, snapshot

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (owners, other users, mounts)")
NOBODY = 54321

BELOW: Layer = [
    m.directory(b"", mode=0o711, mtime_ns=10**9),
    m.directory(b"d", mode=0o700, mtime_ns=2 * 10**9),
    m.file(b"d/one", b"1"),
    m.file(b"gone", b"2"),
    m.directory(b"o"),
    m.file(b"o/below"),
]
MIDDLE: Layer = [
    m.directory(b"d", mode=0o750, mtime_ns=3 * 10**9),
    m.file(b"d/two", b"2"),
    m.file(b".wh.gone"),
    m.directory(b"o"),
    m.file(b"o/.wh..wh..opq"),
    m.file(b"o/own"),
]
LEANING: Layer = [m.file(b"d/three", b"3"), m.hardlink(b"linked", b"d/one")]


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch_place("cache") as path:
        os.chmod(path, 0o755)
        yield path


def image(place: Path, *layers: Layer, tag: str = "t") -> Image:
    make_image(place / "layout", tag, [m.tar_bytes(layer) for layer in layers])
    return open_image(f"{place}/layout:{tag}")


def evil_image(place: Path, raw: bytes) -> Image:
    make_image(place / "layout", "evil", [m.tar_bytes(BELOW), raw])
    return open_image(f"{place}/layout:evil")


def open_cache(place: Path) -> LayerCache:
    return LayerCache(str(place / "cache"))


def entries(place: Path) -> list[str]:
    """What the cache has in sight, and half-made."""
    form = place / "cache" / ownership_form()
    return sorted(
        f"{kind.name}/{entry.name}"
        for kind in form.iterdir()
        if kind.name != "locks"
        for entry in kind.iterdir()
    )


def test_layers_are_unpacked_once_and_shared(place: Path) -> None:
    first, second = image(place, BELOW, MIDDLE, tag="one"), image(place, BELOW, LEANING, tag="two")
    cache = open_cache(place)
    one = cache.layer_directories(first)
    assert [cache.diff_id_of(path) for path in one[-2:]] == [layer.diff_id for layer in first.layers[::-1]]
    before = snapshot(place / "cache")
    assert open_cache(place).layer_directories(first) == one
    two = cache.layer_directories(second)
    assert one[-1] == two[-1], "the same directory for the same layer"
    after = snapshot(place / "cache")
    assert_equal(before, {name: after[name] for name in before}, ignore=("mtime_ns",), strict=("ino",))
    assert set(merged(one)) == {b".", b"d", b"d/one", b"d/two", b"o", b"o/own"}
    assert set(merged(two)) == {b".", b"d", b"d/one", b"d/three", b"gone", b"linked", b"o", b"o/below"}
    assert not [name for name in entries(place) if name.startswith("tmp/")]


def test_a_leaning_layer_takes_from_each_image_what_is_there(place: Path) -> None:
    cache = open_cache(place)
    one = cache.layer_directories(image(place, BELOW, LEANING, tag="one"))
    two = cache.layer_directories(image(place, BELOW, MIDDLE, LEANING, tag="two"))
    assert one[1] == two[1] and one[0] != two[0], "one layer, two supplements"
    for directories, mode, seconds in ((one, 0o700, 2), (two, 0o750, 3)):
        tree = merged(directories)
        assert (tree[b"d"].mode, tree[b"d"].mtime_ns) == (mode, seconds * 10**9)
        assert tree[b"linked"].names == {b"linked", b"d/one"}
        assert (tree[b"."].mode, tree[b"."].mtime_ns) == (0o711, 10**9)
        assert cache.diff_id_of(directories[0]) is None


def test_the_root_is_that_of_the_first_layer_that_names_it(place: Path) -> None:
    plain: Layer = [m.file(b"f")]
    cache = open_cache(place)
    for layers, extra, mode in (
        ([BELOW, plain], 1, 0o711),
        ([plain, BELOW], 0, 0o711),
        ([plain, plain], -1, 0o755),  # the same layer twice
        ([BELOW, plain, [m.directory(b"", mode=0o700)]], 0, 0o700),
        ([], 1, 0o755),
    ):
        directories = cache.layer_directories(image(place, *layers))
        assert len(directories) == len(layers) + extra
        assert merged(directories)[b"."].mode == mode


def test_an_opaque_root_hides_all_below(place: Path) -> None:
    opaque: Layer = [m.file(b".wh..wh..opq"), m.file(b"f")]
    cache = open_cache(place)
    directories = cache.layer_directories(image(place, BELOW, opaque))
    assert set(merged(directories)) == {b".", b"f"}
    assert merged(directories)[b"."].mode == 0o711


@root
def test_kernel_overlayfs_reads_the_directories(place: Path, kernel_overlay: None) -> None:
    from tests.support.mounts import mount_overlay, umount

    opaque: Layer = [m.directory(b"d"), m.file(b".wh.d"), m.file(b"d/f", b"new", uid=7)]
    (place / "m").mkdir()
    for layers in (
        [BELOW, MIDDLE],
        [BELOW, MIDDLE, LEANING],
        [BELOW, MIDDLE, opaque],
        [MIDDLE, BELOW, MIDDLE],
    ):
        directories = open_cache(place).layer_directories(image(place, *layers))
        if len(directories) == 1:
            continue
        mount_overlay(place / "m", directories, None, None)
        try:
            seen = snapshot(place / "m", hide_xattr=lambda name: b"overlay." in name)
        finally:
            umount(place / "m")
        assert_equal(merged(directories), seen, ignore=("names", "nlink"), labels=("layerfs", "kernel"))


# --- what is refused ---


def spoiled(place: Path, what: str) -> Image:
    """An image whose second layer is not what it should be."""
    layers = [m.tar_bytes(BELOW), m.tar_bytes(MIDDLE)]
    if what == "DiffID":
        wrong = {"type": "layers", "diff_ids": ["sha256:" + "1" * 64, "sha256:" + "2" * 64]}
        make_image(place / "layout", "t", layers, rootfs=wrong)
    else:
        make_image(place / "layout", "t", layers)
    found = open_image(f"{place}/layout:t")
    descriptor = found.layers[1].descriptor
    assert descriptor is not None
    blob = place / "layout/blobs/sha256" / descriptor.digest.split(":")[1]
    if what == "one bit":
        data = bytearray(blob.read_bytes())
        data[data.index(b"own") + 2] ^= 1  # not noticed by tar: its checksum is changed, too
        data[data.index(b"own"[:2]) : data.index(b"own"[:2])] = b""
        blob.write_bytes(data)
    elif what == "size":
        blob.write_bytes(blob.read_bytes()[:-512])
    elif what == "data":
        blob.write_bytes(blob.read_bytes()[:-1] + b"x")  # behind the end of the archive
    elif what == "missing":
        blob.unlink()
    return found


@pytest.mark.parametrize("what", ["DiffID", "one bit", "size", "data", "missing"])
def test_a_layer_that_is_not_what_the_image_says(place: Path, what: str) -> None:
    found = spoiled(place, what)
    for _ in range(2):
        with pytest.raises((ImageError, TarError)) as caught:
            open_cache(place).layer_directories(found)
        assert "\n" not in str(caught.value)
        shown = [name for name in entries(place) if not name.startswith("layers/")]
        assert shown == [] and len(entries(place)) == (0 if what == "DiffID" else 1)


#: Means nothing: what the link joins is known only when there is nothing left to hide.
HARMLESS = "whiteout behind a hard link to a symlink"


@pytest.mark.parametrize("what", [what for what in EVIL if what != HARMLESS])
def test_evil_layers(place: Path, what: str) -> None:
    """Refused, with nothing of it in the cache and nothing outside changed. What is wrong only over what lies
    below is refused as well, but as a layer it is good: another image may have something else below."""
    good_as_a_layer = {
        "through a symlink below",
        "deep through a symlink below",
        "through a symlink to inside",
        "through a file below",
        "whiteout through a symlink below",
        "opaque through a symlink below",
        "hard link to a directory",
        "hard link to nothing",
        "hard link through a symlink below",
        "hard link to a path of this machine",
        "absolute through a symlink below",
        "absolute whiteout through a symlink below",
    }
    raw, says = EVIL[what]
    if what not in ("good, then cut", "without an end", "claims more than there is"):
        raw += bytes(1024)
    below = [m.directory(b"d"), m.file(b"d/file"), m.link(b"out", b"../outside"), m.link(b"in", b"d")]
    make_image(place / "layout", "t", [m.tar_bytes(below), raw])
    (place / "outside").mkdir()
    with pytest.raises(TarError, match=says) as caught:
        open_cache(place).layer_directories(open_image(f"{place}/layout:t"))
    assert "\n" not in str(caught.value)
    assert len(entries(place)) == 1 + (what in good_as_a_layer), entries(place)
    assert os.listdir(place / "outside") == []


def test_a_damaged_record_is_said(place: Path) -> None:
    found = image(place, BELOW)
    (directory,) = open_cache(place).layer_directories(found)
    record = Path(directory).with_name("record.json")
    for data in ("{", "[]", "{}"):
        record.write_text(data)
        with pytest.raises(LayerError, match="damaged"):
            open_cache(place).layer_directories(found)
    assert open_cache(place).diff_id_of(directory) is None


def test_a_layer_that_lost_names_is_said(place: Path) -> None:
    """What a broken-off `rm -r` leaves, as far as one listing of the root tells."""
    found = image(place, BELOW)
    (directory,) = open_cache(place).layer_directories(found)
    record = Path(directory).with_name("record.json")
    name = sorted(os.listdir(directory))[0]
    subprocess.run(["rm", "-r", os.path.join(directory, name)], check=True)
    with pytest.raises(LayerError, match="damaged: remove that directory"):
        open_cache(place).layer_directories(found)
    older = json.loads(record.read_text())
    del older["names"]  # as it was written once
    record.write_text(json.dumps(older))
    open_cache(place).layer_directories(found)


@root
def test_a_cache_of_somebody_else_is_refused(place: Path) -> None:
    (place / "cache").mkdir()
    os.chown(place / "cache", NOBODY, NOBODY)
    with pytest.raises(LayerError, match=f"belongs to user {NOBODY}"):
        open_cache(place)


def test_the_cache_is_closed_to_others(place: Path) -> None:
    open_cache(place)
    assert (place / "cache").stat().st_mode & 0o777 == 0o700
    assert (place / "cache" / ownership_form()).stat().st_mode & 0o777 == 0o700


@root
def test_what_is_there_is_not_made_right(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another user's $XDG_CACHE_HOME root would do to what that user likes what it does to its cache."""
    victim = place / "victim"
    victim.mkdir(mode=0o755)
    (place / "cache").symlink_to(victim)
    with pytest.raises(LayerError):
        open_cache(place)
    (place / "open").mkdir()
    os.chmod(place / "open", 0o777)
    with pytest.raises(LayerError, match="can be written to by others"):
        LayerCache(str(place / "open"))
    assert (victim.stat().st_mode & 0o7777, os.listdir(victim)) == (0o755, [])
    theirs = place / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(theirs / "cache"))
    with pytest.raises(LayerError, match=f"belongs to user {NOBODY}"):
        default_path()


def test_many_leaning_layers_do_not_pile_up_descriptors(place: Path) -> None:
    layers = [[m.file(b"d/f%d" % number)] for number in range(40)]
    found = image(place, [m.directory(b"", mode=0o755), m.directory(b"d")], *layers)
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        assert len(open_cache(place).layer_directories(found)) == 81
        assert len(os.listdir("/proc/self/fd")) < before + 20
    finally:
        gc.enable()


@root
def test_full_disk(place: Path) -> None:
    from tests.support.mounts import mount, umount

    found = image(place, [m.file(b"big", os.urandom(2 << 20))])
    (place / "cache").mkdir()
    mount("none", place / "cache", "tmpfs", data="size=1m,mode=0700")
    try:
        with pytest.raises(LayerError, match="No space left") as caught:
            open_cache(place).layer_directories(found)
        assert "\n" not in str(caught.value)
        del caught
        assert entries(place) == []
        open_cache(place).layer_directories(image(place, BELOW, tag="small"))
    finally:
        import gc

        gc.collect()
        umount(place / "cache")


@pytest.mark.parametrize("where", ["reading", "syncing", "renaming"])
def test_input_output_error(place: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    found = image(place, BELOW)
    with monkeypatch.context() as patch:
        if where == "reading":
            patch.setattr(TarReader, "read", fail)
        elif where == "syncing":
            patch.setattr(store_module, "syncfs", fail)
        else:
            patch.setattr(os, "rename", fail)
        with pytest.raises(LayerError, match="Input/output error") as caught:
            open_cache(place).layer_directories(found)
        assert caught.value.errno == errno.EIO and "\n" not in str(caught.value)
    assert entries(place) == []
    assert len(open_cache(place).layer_directories(found)) == 1


# --- owners ---


def in_child(work: Callable[[], object], uid: int = 0) -> object:
    """What `work` returns (as JSON) in a forked process of that user."""
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if uid:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            said = json.dumps(work())
        except BaseException as error:
            said = json.dumps(f"failed: {error!r}")
        os.write(write_fd, said.encode())
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd) as pipe:
        found = json.load(pipe)
    os.waitpid(child, 0)
    return found


@root
def test_as_an_ordinary_user(place: Path) -> None:
    layer: Layer = [
        m.directory(b"", mode=0o555, uid=NOBODY, gid=NOBODY),
        m.directory(b"ro", mode=0o555, uid=NOBODY, gid=NOBODY),
        m.file(b"ro/f", b"1", mode=0o444, uid=0),
        m.file(b"ro/.wh..wh..opq"),
        (m.Member(b"null", m.Kind.CHAR, rdev=(1, 3)), b""),
        m.file(b".wh.gone"),
    ]
    below: Layer = [m.file(b"gone", uid=NOBODY, gid=NOBODY), m.file(b"ro/x", uid=NOBODY, gid=NOBODY)]
    found = image(place, below, layer)
    os.chown(place, NOBODY, NOBODY)

    def work() -> object:
        cache = open_cache(place)
        directories = cache.layer_directories(found)
        return [directories, cache.notes, [cache.diff_id_of(path) for path in directories]]

    said = in_child(work, NOBODY)
    assert isinstance(said, list), said
    directories, notes, diff_ids = said
    assert "/user/" in directories[0]
    assert diff_ids == [each.diff_id for each in found.layers[::-1]]
    assert notes == [
        "layer 2 of 2: ro/f: belongs to somebody else, which only root can arrange: it is yours now",
        "layer 2 of 2: null: a device, which only real root can make: left out",
    ]
    tree = merged(directories)
    assert set(tree) == {b".", b"ro", b"ro/f"}
    assert {entry.uid for entry in tree.values()} == {NOBODY}
    assert (tree[b"."].mode, tree[b"ro"].mode, tree[b"ro/f"].mode) == (0o555, 0o555, 0o444)
    # root's are others
    os.chown(place / "cache", 0, 0)
    assert open_cache(place).layer_directories(found)[0].split("/")[-4] == ownership_form() != "user"


@root
def test_owners_of_user_namespaces_are_kept_apart() -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def form_in_namespace(maps: str) -> object:
        """Of a process whose uids and gids are mapped so."""
        unshared, mapped = os.pipe(), os.pipe()

        def question() -> str:
            if libc.unshare(0x10000000) != 0:  # CLONE_NEWUSER
                return "no user namespace here"
            os.write(unshared[1], str(os.getpid()).encode())
            os.read(mapped[0], 1)
            return ownership_form()

        def write_maps() -> None:
            pid = os.read(unshared[0], 20).decode()
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{name}").write_text(maps)
            os.write(mapped[1], b"x")

        writer = threading.Thread(target=write_maps, daemon=True)
        writer.start()
        try:
            return in_child(question)
        finally:
            os.write(unshared[1], b"")
            for fd in (*unshared, *mapped):
                if not writer.is_alive():
                    os.close(fd)

    found = [form_in_namespace(maps) for maps in ("0 0 1000", "0 0 1000", "0 0 2000", "5 0 10")]
    if "no user namespace here" in found:
        pytest.skip("no user namespace here")
    assert found[0] == found[1] != found[2] and all(str(each).startswith("ns-") for each in found[:3]), found
    assert found[3] == "user"
    assert in_child(ownership_form, NOBODY) == "user"
    assert ownership_form() == "root"


def test_default_path(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    assert default_path() == f"{place}/layerfs"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(place))
    assert default_path() == f"{place}/.cache/layerfs"
    if os.geteuid() == 0:
        os.chown(place, NOBODY, NOBODY)
        assert default_path() == os.path.expanduser("~root/.cache/layerfs")


# --- crashes and company ---


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


#: Where unpacking is killed, by the call that it makes next.
STEPS = {
    "first member": (unpack_module._Unpacker, "_add", 1),
    "fourth member": (unpack_module._Unpacker, "_add", 4),
    "second layer": (unpack_module._Unpacker, "_add", 9),
    "marks": (unpack_module._Unpacker, "_write_marks", 2),
    "record": (store_module, "_write", 2),
    "syncing": (store_module, "syncfs", 1),
    "supplement": (cache_module, "make_supplement", 1),
}


@pytest.mark.parametrize("step", [*STEPS, "renaming", "renamed"])
def test_killed_and_mounted_again(place: Path, step: str) -> None:
    found = image(place, BELOW, MIDDLE, LEANING)
    expected = merged(LayerCache(str(place / "other")).layer_directories(found))
    child = os.fork()
    if child == 0:
        counts = {"n": 0}
        if step in STEPS:
            home, name, number = STEPS[step]
            real = getattr(home, name)

            def dying(*arguments: object) -> object:
                counts["n"] += 1
                if counts["n"] == number:
                    _die()
                return real(*arguments)

            setattr(home, name, dying)
        else:
            rename = os.rename

            def dying_rename(*arguments: object, **more: object) -> None:
                if step == "renamed":
                    rename(*arguments, **more)  # type: ignore[arg-type]
                _die()

            os.rename = dying_rename  # type: ignore[assignment]
        try:
            open_cache(place).layer_directories(found)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the step was never reached"
    half = [name for name in entries(place) if name.startswith("tmp/")]
    assert bool(half) == (step != "renamed")
    # Somebody else's image comes first: what was left goes all the same.
    open_cache(place).layer_directories(image(place, [m.file(b"other")], tag="other"))
    assert not [name for name in entries(place) if name.startswith("tmp/")]
    assert_equal(expected, merged(open_cache(place).layer_directories(found)))


def test_interrupted_leaves_nothing(place: Path) -> None:
    class Interrupting(Silent):
        def advance(self, size: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_cache(place).layer_directories(image(place, BELOW), Interrupting())
    assert entries(place) == []


def start(place: Path, found: Image, log: Path, delay: float) -> int:
    """A process that unpacks `found` slowly and says so in `log`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:

            class Telling(Silent):
                def describe(self, text: str) -> None:
                    with log.open("a") as file:
                        file.write(text + "\n")
                    if text.startswith("unpacking"):
                        time.sleep(delay)

            open_cache(place).layer_directories(found, Telling())
            code = 0
        finally:
            os._exit(code)
    return child


def wait_for(line: str, log: Path) -> None:
    deadline = time.monotonic() + 20
    while not log.exists() or line not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_processes_at_once(place: Path) -> None:
    found = image(place, BELOW, MIDDLE)
    logs = [place / "first", place / "second"]
    open_cache(place)
    first = start(place, found, logs[0], 0.5)
    wait_for("unpacking layer 1", logs[0])
    second = start(place, found, logs[1], 0)
    assert [os.waitpid(child, 0)[1] for child in (first, second)] == [0, 0]
    said = [log.read_text().splitlines() if log.exists() else [] for log in logs]
    assert said[0][0] == "unpacking layer 1 of 2"
    assert said[1][0] == "waiting for another process that unpacks layer 1 of 2"
    assert sorted(line for line in said[0] + said[1] if line.startswith("unpacking")) == [
        "unpacking layer 1 of 2",
        "unpacking layer 2 of 2",
    ]


def test_the_one_that_waits_takes_over_when_the_other_is_killed(place: Path) -> None:
    found = image(place, BELOW)
    logs = [place / "first", place / "second"]
    open_cache(place)
    first = start(place, found, logs[0], 60)
    wait_for("unpacking", logs[0])
    second = start(place, found, logs[1], 0)
    wait_for("waiting", logs[1])
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert os.waitpid(second, 0)[1] == 0
    assert len(entries(place)) == 1


def test_what_a_living_process_makes_is_left_alone(place: Path) -> None:
    log = place / "log"
    slow, quick = image(place, BELOW, tag="slow"), image(place, MIDDLE, tag="quick")
    open_cache(place)
    child = start(place, slow, log, 0.5)
    wait_for("unpacking", log)
    open_cache(place).layer_directories(quick)
    assert len([name for name in entries(place) if name.startswith("tmp/")]) == 1
    assert os.waitpid(child, 0)[1] == 0
    assert len(entries(place)) == 2
