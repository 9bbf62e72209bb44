"""Which operation changes mtime and ctime of what. The oracle is a plain directory: what changes there,
changes here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.stack import Dir, File, Symlink

from .calls import RENAME_EXCHANGE, fallocate, listing, renameat2
from .place import Place, compared, tree

TREE = {
    "f": File(data=b"data"),
    "g": File(data=b"other"),
    "big": File(data=b"0123456789" * 10_000),
    "d": Dir(),
    "d/a": File(data=b"a"),
    "d/e": Dir(),
    "o": Dir(),
    "o/k": File(data=b"k"),
    "l": Symlink(target="f"),
    "x": File(data=b"x", xattrs={"user.a": b"1"}),
}


def _fd(flags: int, action: Callable[[int], Any]) -> Callable[[Place], None]:
    def run(fs: Place) -> None:
        fd = os.open(fs / "f", flags)
        try:
            action(fd)
        finally:
            os.close(fd)

    return run


def _mmap(fs: Place) -> None:
    import mmap

    fd = os.open(fs / "f", os.O_RDWR)
    with mmap.mmap(fd, 4) as m:
        m[0] = 88
        m.flush()
    os.close(fd)


OPS: dict[str, Callable[[Place], Any]] = {
    "nothing": lambda fs: None,
    "read": lambda fs: fs.read("f"),
    "read big": lambda fs: fs.read("big"),
    "list": lambda fs: listing(fs / "d"),
    "stat": lambda fs: fs.stat("d/a"),
    "readlink": lambda fs: os.readlink(fs / "l"),
    "open rw": _fd(os.O_RDWR, lambda fd: None),
    "open append": _fd(os.O_WRONLY | os.O_APPEND, lambda fd: None),
    "write": _fd(os.O_WRONLY, lambda fd: os.write(fd, b"new")),
    "write nothing": _fd(os.O_WRONLY, lambda fd: os.write(fd, b"")),
    "write and fsync": _fd(os.O_WRONLY, lambda fd: (os.write(fd, b"new"), os.fsync(fd))),
    "ftruncate": _fd(os.O_WRONLY, lambda fd: os.ftruncate(fd, 2)),
    "ftruncate same": _fd(os.O_WRONLY, lambda fd: os.ftruncate(fd, 4)),
    "truncate": lambda fs: os.truncate(fs / "f", 1),
    "truncate same": lambda fs: os.truncate(fs / "f", 4),
    "O_TRUNC": lambda fs: os.close(os.open(fs / "f", os.O_WRONLY | os.O_TRUNC)),
    "mmap store": _mmap,
    "fsync": _fd(os.O_RDWR, os.fsync),
    "create": lambda fs: fs.write("d/n", b""),
    "create and write": lambda fs: fs.write("d/n", b"x"),
    "open O_CREAT existing": lambda fs: os.close(os.open(fs / "d/a", os.O_CREAT | os.O_WRONLY)),
    "mkdir": lambda fs: os.mkdir(fs / "d/n"),
    "mkfifo": lambda fs: os.mkfifo(fs / "d/n"),
    "symlink": lambda fs: os.symlink("x", fs / "d/n"),
    "link": lambda fs: os.link(fs / "f", fs / "d/n"),
    "unlink": lambda fs: os.unlink(fs / "d/a"),
    "rmdir": lambda fs: os.rmdir(fs / "d/e"),
    "rename file": lambda fs: os.rename(fs / "d/a", fs / "d/n"),
    "rename across": lambda fs: os.rename(fs / "d/a", fs / "o/n"),
    "rename over": lambda fs: os.rename(fs / "d/a", fs / "o/k"),
    "rename dir": lambda fs: os.rename(fs / "d/e", fs / "d/m"),
    "rename dir across": lambda fs: os.rename(fs / "d", fs / "o/n"),
    "exchange": lambda fs: renameat2(fs / "d/a", fs / "o/k", RENAME_EXCHANGE),
    "exchange dirs": lambda fs: renameat2(fs / "d", fs / "o", RENAME_EXCHANGE),
    "chmod": lambda fs: os.chmod(fs / "f", 0o600),
    "chmod same": lambda fs: os.chmod(fs / "f", 0o644),
    "chmod dir": lambda fs: os.chmod(fs / "d", 0o700),
    "chmod below": lambda fs: os.chmod(fs / "d/a", 0o600),
    "chown": lambda fs: os.chown(fs / "f", 1, 1),
    "chown nothing": lambda fs: os.chown(fs / "f", -1, -1),
    "lchown": lambda fs: os.lchown(fs / "l", 1, 1),
    "setxattr": lambda fs: os.setxattr(fs / "f", "user.n", b"1"),
    "setxattr dir": lambda fs: os.setxattr(fs / "d", "user.n", b"1"),
    "removexattr": lambda fs: os.removexattr(fs / "x", "user.a"),
    "utime": lambda fs: os.utime(fs / "f", ns=(5, 5)),
    "write below": lambda fs: fs.append("d/a", b"x"),
    "fallocate": _fd(os.O_WRONLY, lambda fd: fallocate(fd, 0, 0, 100)),
    "fallocate same": _fd(os.O_WRONLY, lambda fd: fallocate(fd, 0, 0, 4)),
    "failed create": lambda fs: _fails(os.open, fs / "d/a", os.O_CREAT | os.O_EXCL),
    "failed unlink": lambda fs: _fails(os.unlink, fs / "d/nothing"),
    "failed rmdir": lambda fs: _fails(os.rmdir, fs / "d"),
    "failed rename": lambda fs: _fails(os.rename, fs / "d/a", fs / "o"),
}


def _fails(call: Callable[..., Any], *args: Any) -> None:
    try:
        call(*args)
    except OSError:
        return
    raise AssertionError("should have failed")


def _times(fs: Place) -> dict[int, tuple[str, int, int, int]]:
    found = {}
    for at, dirs, files in os.walk(fs.path):
        for path in [at, *(f"{at}/{n}" for n in dirs + files)]:
            st = os.lstat(path)
            found[st.st_ino] = (
                os.path.relpath(path, fs.path),
                st.st_mtime_ns,
                st.st_ctime_ns,
                st.st_atime_ns,
            )
    return found


def _changes(fs: Place, op: str, field: int) -> object:
    """Paths of objects whose time changed. They are told apart by st_ino, which therefore must not change
    either."""
    before = _times(fs)
    time.sleep(0.012)  # coarser than the kernel's clock tick
    OPS[op](fs)
    after = _times(fs)
    assert not any(times[1] > time.time_ns() for times in after.values())
    found = {}
    for ino, times in after.items():
        if ino not in before:
            found[times[0]] = "new"
        elif before[ino][field] != times[field]:
            found[times[0]] = "changed"
    return found


@pytest.mark.parametrize("op", OPS)
@tree(TREE)
@compared
def test_mtime(fs: Place, op: str) -> object:
    return _changes(fs, op, 1)


@pytest.mark.parametrize("op", OPS)
@tree(TREE)
@compared
def test_ctime(fs: Place, op: str) -> object:
    return _changes(fs, op, 2)


@pytest.mark.parametrize(
    "ops",
    [
        ["write", "chmod", "mkdir", "unlink", "rmdir", "link below"],
        ["truncate", "setxattr", "create", "rename over", "rename dir", "lchown"],
    ],
    ids=["one", "two"],
)
@tree(TREE)
@compared
def test_times_are_the_same_after_remount(fs: Place, ops: list[str]) -> object:
    for op in ops:
        OPS[op](fs) if op in OPS else os.link(fs / "g", fs / "o/link")
    before = {path: mtime for path, mtime, _, _ in _times(fs).values()}
    if fs.mounted:
        fs.mounted.remount()
    after = {path: mtime for path, mtime, _, _ in _times(fs).values()}
    assert after == before
    return sorted(after)


@tree(TREE)
def test_times_advance_and_are_now(fs: Place) -> None:
    for _ in range(3):
        old = fs.stat("f").st_mtime_ns
        time.sleep(0.012)
        start = time.time_ns() - 10**8
        fs.append("f", b"x")
        st = fs.stat("f")
        assert st.st_mtime_ns > old and start < st.st_mtime_ns <= time.time_ns()
        assert st.st_ctime_ns >= st.st_mtime_ns


@tree(TREE)
def test_new_entries_carry_the_present_time(fs: Place) -> None:
    start = time.time_ns() - 10**8
    fs.write("n", b"x")
    os.mkdir(fs / "nd")
    os.symlink("x", fs / "nl")
    for name in ("n", "nd", "nl"):
        st = fs.stat(name)
        assert start < st.st_mtime_ns <= time.time_ns() and start < st.st_atime_ns, name
    assert start < os.stat(fs.path).st_mtime_ns


@tree(TREE)
def test_descriptor_and_path_agree_on_times(fs: Place) -> None:
    fd = fs.open("f", os.O_RDWR)
    for _ in range(3):
        time.sleep(0.012)
        os.write(fd, b"abc")
        a, b = os.fstat(fd), fs.stat("f")
        assert (a.st_mtime_ns, a.st_ctime_ns, a.st_size) == (b.st_mtime_ns, b.st_ctime_ns, b.st_size)
