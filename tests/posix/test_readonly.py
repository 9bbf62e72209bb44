"""A read-only mount (no upper): everything that would write gives EROFS, everything else works."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import mounts
from tests.support.stack import Stack
from tests.support.tree import snapshot

from .calls import RENAME_EXCHANGE, RENAME_NOREPLACE, err, fallocate, listing, renameat2, utimensat
from .place import BIG, PEOPLE, USER, Place, as_user

# "ro" is a writable stack mounted with that option.
SYSTEMS = ["plain", "kernel-merged", "kernel-ro", "layerfs-merged", "layerfs-deep30", "layerfs-ro"]


@pytest.fixture(scope="module", params=SYSTEMS)
def ro(request: pytest.FixtureRequest) -> Iterator[Place]:
    system, _, arrangement = request.param.partition("-")
    if reason := mounts.why_not_root():
        pytest.skip(reason)
    m: mounts.Mounted
    if system == "plain":
        stack = Stack()
        stack.write(stack.mnt, PEOPLE, "t")
        m = mounts.PlainDir(stack)
        mounts.bind(stack.mnt, stack.mnt, read_only=True)
    else:
        stack = Stack(n_lowers=30 if arrangement == "deep30" else 3, name="ro", writable=arrangement == "ro")
        # Without an upper, "deep30" spreads over however many lowers there are.
        stack.populate(PEOPLE, "deep30", "t", salt=3)
        options = ["ro"] if arrangement == "ro" else []
        m = mounts.KernelOverlay(stack, options) if system == "kernel" else mounts.Layerfs(stack, options)
    with m:
        yield Place(str(m.mnt / "t"), system, arrangement, m, PEOPLE)
        if system == "plain":
            mounts.umount(stack.mnt)
    stack.remove()


WRITERS: dict[str, Callable[[Place], Any]] = {
    "open for writing": lambda fs: os.open(fs / "f", os.O_WRONLY),
    "open read-write": lambda fs: os.open(fs / "f", os.O_RDWR),
    "O_TRUNC": lambda fs: os.open(fs / "f", os.O_RDONLY | os.O_TRUNC),
    "create": lambda fs: os.open(fs / "n", os.O_CREAT | os.O_WRONLY),
    "create for reading": lambda fs: os.open(fs / "n", os.O_CREAT | os.O_RDONLY),
    "O_TMPFILE": lambda fs: os.open(fs / "d", os.O_TMPFILE | os.O_RDWR),
    "mkdir": lambda fs: os.mkdir(fs / "n"),
    "rmdir": lambda fs: os.rmdir(fs / "e"),
    "rmdir full": lambda fs: os.rmdir(fs / "d"),
    "unlink": lambda fs: os.unlink(fs / "f"),
    "symlink": lambda fs: os.symlink("x", fs / "n"),
    "link": lambda fs: os.link(fs / "f", fs / "n"),
    "mkfifo": lambda fs: os.mkfifo(fs / "n"),
    "mknod": lambda fs: os.mknod(fs / "n", stat.S_IFCHR, os.makedev(1, 3)),
    "rename": lambda fs: os.rename(fs / "f", fs / "n"),
    "rename dir": lambda fs: os.rename(fs / "d", fs / "e"),
    "rename noreplace": lambda fs: renameat2(fs / "f", fs / "n", RENAME_NOREPLACE),
    "exchange": lambda fs: renameat2(fs / "f", fs / "d", RENAME_EXCHANGE),
    "chmod": lambda fs: os.chmod(fs / "f", 0o600),
    "chmod same": lambda fs: os.chmod(fs / "f", 0o644),
    "chown": lambda fs: os.chown(fs / "f", 1, 1),
    "lchown": lambda fs: os.lchown(fs / "l", 1, 1),
    "utime": lambda fs: os.utime(fs / "f"),
    "utime dir": lambda fs: utimensat(fs / "d", (1, 1), (2, 2)),
    "truncate": lambda fs: os.truncate(fs / "f", 0),
    "setxattr": lambda fs: os.setxattr(fs / "f", "user.n", b"1"),
    "setxattr trusted": lambda fs: os.setxattr(fs / "d", "trusted.n", b"1"),
    "removexattr": lambda fs: os.removexattr(fs / "x", "user.one"),
    "access": lambda fs: os.access(fs / "f", os.W_OK) or _raise_erofs(),
}


def _raise_erofs() -> None:
    raise OSError(30, "access says no")


@pytest.mark.parametrize("call", WRITERS)
def test_erofs(ro: Place, call: str) -> None:
    assert err(WRITERS[call], ro) == "EROFS"
    assert "n" not in ro.names()


def test_errors_that_come_first(ro: Place) -> None:
    assert err(os.open, ro / "nothing", os.O_WRONLY) == "ENOENT"
    assert err(os.unlink, ro / "nothing") == err(os.rmdir, ro / "nothing") == "EROFS"
    assert err(os.mkdir, ro / "d") == "EEXIST"
    assert err(os.open, ro / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY) == "EEXIST"
    assert err(os.open, ro / "d", os.O_WRONLY) == "EISDIR"


def test_opening_existing_with_o_creat(ro: Place) -> None:
    os.close(os.open(ro / "f", os.O_CREAT | os.O_RDONLY))


def test_users_get_erofs_too(ro: Place) -> None:
    got = as_user(lambda: [err(os.open, ro / n, os.O_WRONLY) for n in ("open/f", "open/mine")])
    assert got == ["EROFS", "EROFS"]
    assert as_user(lambda: err(os.mkdir, ro / "open/n"), USER) == "EROFS"
    assert as_user(lambda: err(os.open, ro / "open/theirs", os.O_RDONLY)) == "EACCES"


def test_reading_works(ro: Place) -> None:
    assert ro.read("big") == BIG and ro.read("l") == b"hello world\n" and os.readlink(ro / "lx") == "nowhere"
    fd = os.open(ro / "big", os.O_RDONLY)
    try:
        with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as m:
            assert m[1000:1100] == BIG[1000:1100]
        with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m:
            m[0:3] = b"own"
        assert err(fallocate, fd, 0, 0, 10) == "EBADF"
        os.fsync(fd)
    finally:
        os.close(fd)
    assert os.getxattr(ro / "x", "user.one") == b"1"
    names = sorted(d.name for d in listing(ro.path) if d.name not in (b".", b".."))
    assert names == sorted(os.fsencode(n) for n in PEOPLE if "/" not in str(n))
    assert os.statvfs(ro.path).f_flag & os.ST_RDONLY


def test_devices_fifos_and_sockets_may_be_written(ro: Place) -> None:
    """EROFS is about the file system, not about what a node leads to."""
    r = os.open(ro / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    w = os.open(ro / "fifo", os.O_WRONLY)
    os.write(w, b"x")
    assert os.read(r, 5) == b"x"
    os.close(r)
    os.close(w)


def test_layers_are_as_they_were(ro: Place) -> None:
    if ro.system == "plain":
        return
    assert ro.mounted is not None
    before = [snapshot(p) for p in ro.mounted.stack.lowers]
    for call in WRITERS.values():
        err(call, ro)
    for e in os.walk(ro.path):
        del e
    assert [snapshot(p) for p in ro.mounted.stack.lowers] == before
    if ro.mounted.stack.upper:
        assert os.listdir(ro.mounted.stack.upper) == []


def test_remount_shows_the_same(ro: Place) -> None:
    if ro.system == "plain":
        return
    assert ro.mounted is not None
    before = {n: (ro.stat(str(n)).st_ino, ro.stat(str(n)).st_mtime_ns) for n in PEOPLE}
    ro.mounted.remount()
    assert {n: (ro.stat(str(n)).st_ino, ro.stat(str(n)).st_mtime_ns) for n in PEOPLE} == before
