"""Applying layers: what a good layer does to a directory. Hostile ones are in test_apply_evil.py."""

from __future__ import annotations

import gc
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerfs.errors import LayerError
from layerfs.oci import apply as apply_module
from layerfs.oci import making, tarreader
from layerfs.oci.apply import Applied, apply_layer
from layerfs.oci.member import Kind, Member
from tests.oci import members as m
from tests.support.stack import scratch_root
from tests.support.tree import assert_equal, snapshot

_T = 1_500_000_000_123_456_789
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (owners, devices)")
NOBODY = 54321


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on a real file system, which keeps xattrs and nanoseconds."""
    import shutil
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="apply-", dir=scratch_root()))
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


def apply(place: Path, *layers: list[tuple[Member, bytes]]) -> Applied:
    """Applies layers to place/t, the lowest first; the result of the last."""
    (place / "t").mkdir(exist_ok=True)
    result = Applied()
    for number, entries in enumerate(layers):
        fd = os.open(m.layer_file(place / f"{number}.tar", entries), os.O_RDONLY)
        try:
            result = apply_layer(fd, str(place / "t"))
        finally:
            os.close(fd)
    return result


def names(place: Path) -> set[str]:
    return {os.fsdecode(name) for name in snapshot(place / "t")} - {"."}


@root
def test_every_attribute_arrives(place: Path) -> None:
    acl = bytes.fromhex(
        "0200000001000600ffffffff0200040039300000040004 00ffffffff1000040 0ffffffff20000400ffffffff".replace(
            " ", ""
        )
    )
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    entries = [
        (Member(b"", Kind.DIR, 0o751, 7, 8, _T), b""),
        (Member(b"d", Kind.DIR, 0o2775, 1, 2, _T + 1, xattrs={"user.d": b"1"}), b""),
        (
            Member(
                b"d/file",
                Kind.FILE,
                0o4644,
                1000,
                1001,
                _T + 2,
                5,
                xattrs={"user.k": b"\0\xff", "system.posix_acl_access": acl},
            ),
            b"hello",
        ),
        (Member(b"d/hard", Kind.HARDLINK, target=b"d/file"), b""),
        (Member(b"caps", Kind.FILE, 0o755, 5, 5, _T, 1, xattrs={"security.capability": capability}), b"x"),
        (Member(b"link", Kind.SYMLINK, 0o777, 3, 4, _T + 3, target=b"/nowhere/at all"), b""),
        (Member(b"fifo", Kind.FIFO, 0o600, 1, 1, _T + 4), b""),
        (Member(b"null", Kind.CHAR, 0o666, 0, 0, -(10**9), rdev=(1, 3)), b""),
        (Member(b"\xff\n", Kind.BLOCK, 0o660, 0, 6, 1, rdev=(7, 200)), b""),
    ]
    result = apply(place, entries)
    assert (result.notes, result.members, result.removed) == ([], 9, 0)
    tree = snapshot(place / "t")
    assert set(tree) == {b".", b"d", b"d/file", b"d/hard", b"caps", b"link", b"fifo", b"null", b"\xff\n"}
    for member, _ in entries:
        found = tree[member.name or b"."]
        if member.kind is Kind.HARDLINK:
            assert found.names == {b"d/file", b"d/hard"}
            continue
        assert (found.uid, found.gid, found.mtime_ns) == (member.uid, member.gid, member.mtime_ns), member
        assert found.mode == member.mode & ~(0o4000 if member.kind is Kind.DIR else 0), member
        assert dict(found.xattrs) == {os.fsencode(key): value for key, value in member.xattrs.items()}, member
        assert found.target == (member.target or None)
        assert found.rdev == os.makedev(*member.rdev)
    assert (place / "t/d/file").read_bytes() == b"hello"


def test_whiteouts_hide_the_layers_below_only(place: Path) -> None:
    below = [
        m.directory(b"d"),
        m.file(b"d/a"),
        m.file(b"d/b"),
        m.directory(b"d/s"),
        m.file(b"d/s/x"),
        m.file(b"keep"),
    ]
    layer = [
        m.directory(b"d"),
        m.file(b"d/b", b"new"),
        m.file(b"d/s/new"),
        m.file(b"d/.wh.a"),
        m.file(b"d/.wh.b"),  # stands after its name: the new one stays
        m.file(b"d/.wh.s"),  # the directory was implied above: only what lay below goes
        m.file(b".wh.absent"),
        m.file(b"no/.wh.thing"),
    ]
    result = apply(place, below, layer)
    assert names(place) == {"d", "d/b", "d/s", "d/s/new", "keep"}
    assert (place / "t/d/b").read_bytes() == b"new"
    assert result.removed == 2


@pytest.mark.parametrize("position", [0, 1, 2, 3, 4])
def test_opaque_counts_wherever_it_stands(place: Path, position: int) -> None:
    below = [m.file(b"d/a"), m.file(b"d/s/deep/x"), m.file(b"d/s/deep/y"), m.file(b"d/f/x"), m.file(b"other")]
    layer = [m.directory(b"d"), m.file(b"d/n"), m.file(b"d/s/deep/y", b"2"), m.file(b"d/f")]
    layer.insert(position, m.file(b"d/.wh..wh..opq"))
    apply(place, below, layer)
    assert names(place) == {"d", "d/n", "d/s", "d/s/deep", "d/s/deep/y", "d/f", "other"}
    assert (place / "t/d/f").is_file()


@pytest.mark.parametrize("mark", [b".wh..wh..opq", b"d/.wh..wh..opq", b"d/.wh.s", b".wh.d"])
@pytest.mark.parametrize("position", [0, 1])
def test_what_is_hidden_gives_no_attributes(place: Path, mark: bytes, position: int) -> None:
    below = [m.directory(b"d"), m.directory(b"d/s", mode=0o700, xattrs={"user.old": b"1"}), m.file(b"d/s/x")]
    layer = [m.file(b"d/s/new")]
    layer.insert(position, m.file(mark))
    apply(place, below, layer)
    assert names(place) == {"d", "d/s", "d/s/new"}
    found = snapshot(place / "t")[b"d/s"]
    assert (found.mode, found.xattrs) == (0o755, ())


def test_opaque_root(place: Path) -> None:
    apply(place, [m.file(b"a"), m.file(b"d/x")], [m.file(b"d/y"), m.file(b".wh..wh..opq")])
    assert names(place) == {"d", "d/y"}


def test_directory_over_directory_replaces_attributes(place: Path) -> None:
    below = [m.directory(b"d", mode=0o700, mtime_ns=1, xattrs={"user.old": b"1"}), m.file(b"d/kept")]
    apply(place, below, [m.directory(b"d", mode=0o755, mtime_ns=_T, xattrs={"user.new": b"2"})])
    found = snapshot(place / "t")[b"d"]
    assert (found.mode, found.mtime_ns, found.xattrs) == (0o755, _T, ((b"user.new", b"2"),))
    assert names(place) == {"d", "d/kept"}


@pytest.mark.parametrize("old", ["file", "link", "dir", "dangling"])
@pytest.mark.parametrize("new", ["file", "link", "dir", "fifo", "hard"])
def test_anything_else_replaces(place: Path, old: str, new: str) -> None:
    before = {
        "file": [m.file(b"x", b"old")],
        "link": [m.link(b"x", b"target")],
        "dir": [m.directory(b"x"), m.file(b"x/inside/deep")],
        "dangling": [m.link(b"x", b"/nowhere")],
    }
    after = {
        "file": m.file(b"x", b"new"),
        "link": m.link(b"x", b"elsewhere"),
        "dir": m.directory(b"x"),
        "fifo": (Member(b"x", Kind.FIFO), b""),
        "hard": m.hardlink(b"x", b"target"),
    }
    apply(place, [m.file(b"target", b"t"), *before[old]], [after[new]])
    path = place / "t/x"
    mode = path.lstat().st_mode
    kinds = {
        "file": stat.S_ISREG,
        "link": stat.S_ISLNK,
        "dir": stat.S_ISDIR,
        "fifo": stat.S_ISFIFO,
        "hard": stat.S_ISREG,
    }
    assert kinds[new](mode)
    assert (place / "t/target").read_bytes() == b"t"
    assert names(place) == {"x", "target"} | (
        {"x/inside", "x/inside/deep"} if (old, new) == ("dir", "dir") else set()
    )


def test_duplicates_the_last_one_wins_with_a_note(place: Path) -> None:
    result = apply(
        place,
        [
            m.file(b"a", b"1"),
            m.directory(b"a"),
            m.file(b"a/x"),
            m.file(b"a", b"3"),
            m.file(b"b", b"1"),
            m.file(b"b", b"2"),
        ],
    )
    assert names(place) == {"a", "b"}
    assert ((place / "t/a").read_bytes(), (place / "t/b").read_bytes()) == (b"3", b"2")
    assert result.notes == ["a: is in the layer more than once: the last one counts (and 2 more)"]


def test_a_link_renamed_over_itself_leaves_nothing(place: Path) -> None:
    layer = [m.file(b"a", b"1"), m.hardlink(b"b", b"a")]
    apply(place, layer, [m.hardlink(b"b", b"a"), m.hardlink(b"b", b"a")])
    assert names(place) == {"a", "b"}


def test_times_of_directories(place: Path) -> None:
    below = [
        m.directory(b"", mtime_ns=1),
        m.directory(b"d", mtime_ns=2),
        m.directory(b"d/e", mtime_ns=3),
        m.file(b"d/e/f"),
        m.file(b"d/g"),
    ]
    apply(place, below)
    assert [snapshot(place / "t")[name].mtime_ns for name in (b".", b"d", b"d/e")] == [1, 2, 3]
    # Named directories get their new time, the others keep theirs though names in them came and went.
    apply(place, [m.file(b"d/e/new"), m.file(b"d/.wh.g"), m.directory(b"x", mtime_ns=7), m.file(b"x/y")])
    assert [snapshot(place / "t")[name].mtime_ns for name in (b".", b"d", b"d/e", b"x")] == [1, 2, 3, 7]


def test_implied_directories(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1234567890")
    old = os.umask(0o077)
    try:
        apply(place, [m.file(b"p/q/" + b"r/" * 1500 + b"f", b"1")])
    finally:
        os.umask(old)
    st = (place / "t/p/q").stat()
    assert (stat.S_IMODE(st.st_mode), st.st_mtime) == (0o755, 1234567890)
    apply(place, [m.file(b".wh.p")])
    assert names(place) == set()


def test_default_acls_are_not_inherited(place: Path) -> None:
    (place / "t").mkdir()
    default = bytes.fromhex(
        "0200000001000700ffffffff02000700393000000400050 0ffffffff10000700ffffffff20000500ffffffff".replace(
            " ", ""
        )
    )
    os.setxattr(place / "t", "system.posix_acl_default", default)
    apply(place, [m.file(b"f"), m.directory(b"d"), m.file(b"d/g"), m.file(b"i/j")])
    tree = snapshot(place / "t")
    assert {name for name, entry in tree.items() if entry.xattrs} == {b"."}


def test_zeros_become_holes(place: Path) -> None:
    data = b"a" + bytes(1 << 20) + b"b" * (128 << 10) + bytes(256 << 10)
    apply(place, [m.file(b"f", data), m.file(b"z", bytes(1 << 20))])
    assert (place / "t/f").read_bytes() == data
    assert (place / "t/z").read_bytes() == bytes(1 << 20)
    assert (place / "t/f").stat().st_blocks * 512 < 400 << 10
    assert (place / "t/z").stat().st_blocks == 0


def test_steering_marks_are_dropped_with_notes(place: Path) -> None:
    marks = {
        "trusted.overlay.opaque": b"y",
        "user.overlay.whiteout": b"",
        "user.fuseoverlayfs.opaque": b"y",
        "user.containers.override_stat": b"0:0:0755",
        "user.mine": b"1",
    }
    result = apply(
        place,
        [
            m.directory(b"d", xattrs=marks),
            m.file(b"w", xattrs=marks),
            (Member(b"gone", Kind.CHAR, rdev=(0, 0)), b""),
            m.file(b".wh..wh.plnk"),
            m.file(b"d/.wh..wh.orph", b"data"),
            m.directory(b".wh..wh.plnk"),
            m.file(b".wh..wh.plnk/1.2", b"data"),
        ],
    )
    tree = snapshot(place / "t")
    assert set(tree) == {b".", b"d", b"w"}
    assert tree[b"d"].xattrs == tree[b"w"].xattrs == ((b"user.mine", b"1"),)
    assert sorted(result.notes) == sorted(
        [
            *(
                f"w: xattr {name} would steer a merge: dropped (and 1 more)"
                for name in marks
                if name != "user.mine"
            ),
            "gone: a character device 0/0, which would be a whiteout: dropped",
            ".wh..wh.plnk: book-keeping of AUFS: ignored (and 3 more)",
        ]
    )


def test_marks_of_a_directory_that_is_a_layer_stay(place: Path) -> None:
    (place / "t").mkdir()
    os.setxattr(place / "t", "user.overlay.impure", b"y")
    apply(place, [m.directory(b"", mode=0o755)])
    assert os.getxattr(place / "t", "user.overlay.impure") == b"y"


@root
def test_full_disk_leaves_no_half_file(place: Path) -> None:
    from tests.support.mounts import mount, umount

    (place / "t").mkdir()
    mount("none", place / "t", "tmpfs", data="size=1m")
    try:
        with pytest.raises(LayerError) as caught:
            apply(place, [m.file(b"small", b"1"), m.file(b"big", os.urandom(2 << 20))])
        assert "No space left" in str(caught.value) and "part of the layer" in str(caught.value)
        assert names(place) == {"small"}
        del caught
        gc.collect()  # the exception's frames hold descriptors
    finally:
        umount(place / "t")


@root
@pytest.mark.parametrize(
    "layer",
    [
        [m.file(b".wh.home")],
        [m.file(b".wh.d")],
        [m.file(b".wh..wh..opq")],
        [m.file(b"home/evil")],
        [m.directory(b"home/d")],
        [m.directory(b"home", mode=0o777)],
        [m.file(b"home")],
        [m.file(b"home/.wh.kept")],
        [m.hardlink(b"h", b"home/kept")],
        [m.file(b"d/inner/x")],
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_what_is_mounted_inside_the_target_is_not_touched(
    place: Path, layer: list[tuple[Member, bytes]], piped: bool
) -> None:
    from tests.support.mounts import bind, umount

    outside = place / "outside"
    for path in (outside, place / "t/home", place / "t/d/inner"):
        path.mkdir(parents=True)
    (outside / "kept").write_text("1")
    before = snapshot(outside)
    raw = m.tar_bytes(layer)
    points = [place / "t/home", place / "t/d/inner"]
    for point in points:
        bind(outside, point)
    try:
        command = [
            sys.executable,
            "-m",
            "layerfs",
            "apply",
            "-" if piped else str(place / "l.tar"),
            str(place / "t"),
        ]
        (place / "l.tar").write_bytes(raw)
        done = subprocess.run(command, input=raw if piped else b"", capture_output=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done
        assert_equal(before, snapshot(outside), strict=("ino", "ctime_ns"))
    finally:
        for point in points:
            umount(point)


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_progress_is_told_to_the_last_byte(place: Path, compression: str) -> None:
    class Seen:
        size: int | None = None
        done = 0

        def total(self, size: int | None) -> None:
            self.size = size

        def advance(self, size: int) -> None:
            self.done += size

        def describe(self, text: str) -> None:
            pass

    (place / "t").mkdir()
    entries = [m.file(b"f%d" % number, os.urandom(200_000)) for number in range(10)]
    layer = m.layer_file(place / "l.tar", entries, compression)
    fd = os.open(layer, os.O_RDONLY)
    seen = Seen()
    apply_layer(fd, str(place / "t"), seen)
    os.close(fd)
    assert seen.done == seen.size == 2 * os.stat(layer).st_size


_MIXED = [
    (Member(b"", Kind.DIR, 0o750, mtime_ns=_T), b""),
    (Member(b"d", Kind.DIR, 0o700, mtime_ns=_T), b""),
    m.file(b"d/small", b"s" * 700),
    (Member(b"d/empty", Kind.FILE), b""),
    m.file(b"d/large", bytes(range(256)) * 2000),
    (Member(b"d/link", Kind.HARDLINK, target=b"d/small"), b""),
    m.file(b".wh.gone", b"what no whiteout has"),
    m.file(b"d/small", b"once more"),
    (Member(b"soft", Kind.SYMLINK, target=b"d/large"), b""),
    m.file(b"last", b"l" * 90_000),
]


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("kept", [0, 1500, tarreader.MAX_KEPT])
def test_members_are_kept_or_read_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, compression: str, kept: int
) -> None:
    """However much may be kept of a layer between its check and its second reading, the tree is the same."""
    monkeypatch.setattr(tarreader, "MAX_KEPT", kept)
    for way in ("t", "piped"):
        (place / way).mkdir()
        (place / way / "gone").touch()
    layer = m.layer_file(place / "l.tar", _MIXED, compression)
    with open(layer, "rb") as file:
        applied = apply_layer(file.fileno(), str(place / "t"))
    with subprocess.Popen(["cat", layer], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        assert apply_layer(cat.stdout.fileno(), str(place / "piped")) == applied
    assert_equal(snapshot(place / "t"), snapshot(place / "piped"))
    assert applied.removed == 1 and not (place / "t/gone").exists()


@pytest.mark.parametrize("noticed", [True, False])
@pytest.mark.parametrize("left", [0, 1000, 3000, 600_000])
def test_a_layer_that_is_cut_after_its_check(
    place: Path, monkeypatch: pytest.MonkeyPatch, left: int, noticed: bool
) -> None:
    """`noticed`: before anything is applied; else a moment later."""
    (place / "t").mkdir()
    layer = m.layer_file(place / "l.tar", _MIXED)
    check = apply_module.check_layer

    def cutting(*arguments: Any) -> tarreader.Contents:
        contents = check(*arguments)
        os.truncate(layer, left)
        return contents

    monkeypatch.setattr(apply_module, "check_layer", cutting)
    if not noticed:
        monkeypatch.setattr(apply_module, "stamps", lambda st: (0, 0, 0))
    expected = "nothing was applied" if noticed else "holds a part of the layer now"
    with open(layer, "rb") as file, pytest.raises(LayerError, match=expected):
        apply_layer(file.fileno(), str(place / "t"))
    assert not noticed or os.listdir(place / "t") == []


def test_from_a_pipe(place: Path) -> None:
    raw = m.tar_bytes([m.file(b"f", b"x" * 100_000)], "gzip")
    (place / "t").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "layerfs", "apply", "-", str(place / "t")], input=raw, capture_output=True
    )
    assert (done.returncode, done.stderr) == (
        0,
        b"layerfs apply: standard input: 1 entries applied, 0 removed\n",
    )
    assert (place / "t/f").read_bytes() == b"x" * 100_000


@pytest.mark.parametrize("again", [False, True])
def test_killed_and_applied_again(place: Path, again: bool) -> None:
    """In the middle of a file, that is new or replaces one: applying once more makes all of it whole."""
    entries = [
        m.directory(b"d", mode=0o750, mtime_ns=_T),
        m.file(b"d/a", b"1" * 200_000),
        m.file(b"d/b", b"2"),
    ]
    (place / "t").mkdir()
    if again:
        apply(place, [m.file(b"d/a", b"old"), m.file(b"d/b", b"old")])
    layer = m.layer_file(place / "l.tar", entries)
    child = os.fork()
    if child == 0:

        def die(fd: int, data: bytes) -> None:
            os.write(fd, data[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            making._write_all = die
            apply_layer(os.open(layer, os.O_RDONLY), str(place / "t"))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if again:
        assert (place / "t/d/a").read_bytes() == b"old", "the old one stays until the new one is whole"
    apply(place, entries)
    tree = snapshot(place / "t")
    assert again or set(tree) == {b".", b"d", b"d/a", b"d/b"}, "nothing is left"
    assert (tree[b"d/a"].size, tree[b"d"].mode, tree[b"d"].mtime_ns) == (200_000, 0o750, _T)
    assert (place / "t/d/b").read_bytes() == b"2"


def as_user(uid: int, layer: str, target: Path) -> list[str]:
    """The notes of applying `layer` in a process of that user (the interpreter itself may be out of his
    reach)."""
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            fd = os.open(layer, os.O_RDONLY)
            said = json.dumps(apply_layer(fd, str(target)).notes)
        except BaseException as error:
            said = json.dumps([f"failed: {error!r}"])
        os.write(write_fd, said.encode())
        os._exit(0)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as pipe:
        notes: list[str] = json.loads(pipe.read())
    os.waitpid(child, 0)
    return notes


@root
def test_as_an_ordinary_user(place: Path) -> None:
    """Twice over read-only directories, with devices and owners that cannot be had: what can be done is done,
    and the rest is said."""
    layer = [
        m.directory(b"ro", mode=0o555, uid=NOBODY, gid=NOBODY, mtime_ns=_T),
        m.file(
            b"ro/f",
            b"1",
            mode=0o444,
            uid=NOBODY,
            gid=NOBODY,
            xattrs={"user.k": b"v", "security.capability": b"x" * 20},
        ),
        m.directory(b"shut", mode=0, uid=NOBODY, gid=NOBODY, mtime_ns=_T),
        m.file(b"shut/g", uid=NOBODY, gid=NOBODY),
        m.file(b"rooted", uid=0, gid=0),
        (Member(b"null", Kind.CHAR, rdev=(1, 3)), b""),
        m.hardlink(b"null2", b"null"),
    ]
    second = [
        m.file(b"ro/f2", uid=NOBODY, gid=NOBODY),
        m.file(b"ro/.wh.f", uid=NOBODY, gid=NOBODY),
        m.file(b"shut/h", uid=NOBODY, gid=NOBODY),
    ]
    (place / "t").mkdir()
    os.chown(place / "t", NOBODY, NOBODY)
    one, two = m.layer_file(place / "1.tar", layer), m.layer_file(place / "2.tar", second)

    assert as_user(NOBODY, one, place / "t") == [
        "ro/f: xattr security.capability cannot be set here: dropped",
        "rooted: belongs to somebody else, which only root can arrange: it is yours now",
        "null: a device, which only real root can make: left out",
        "null2: a link to a device that was left out",
    ]
    tree = snapshot(place / "t")
    assert tree[b"ro/f"].xattrs == ((b"user.k", b"v"),)
    assert (tree[b"ro"].mode, tree[b"shut"].mode, tree[b"ro/f"].mode) == (0o555, 0, 0o444)
    assert as_user(NOBODY, two, place / "t") == []
    tree = snapshot(place / "t")
    assert set(tree) == {b".", b"ro", b"ro/f2", b"shut", b"shut/g", b"shut/h", b"rooted"}
    assert (tree[b"ro"].mode, tree[b"shut"].mode, tree[b"ro"].mtime_ns, tree[b"shut"].mtime_ns) == (
        0o555,
        0,
        _T,
        _T,
    )
    assert {entry.uid for entry in tree.values()} == {NOBODY}


def test_the_same_layer_twice_changes_nothing(place: Path) -> None:
    layer = [
        m.directory(b"d", mtime_ns=1),
        m.file(b"d/a", b"1", mtime_ns=2),
        m.hardlink(b"d/b", b"d/a"),
        m.link(b"l", b"d"),
    ]
    apply(place, layer)
    before = snapshot(place / "t")
    apply(place, layer)
    assert_equal(before, snapshot(place / "t"))
