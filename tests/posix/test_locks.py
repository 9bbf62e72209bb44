"""flock, POSIX record locks and open-file-description locks, between descriptors from before and after a
copy-up."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from collections.abc import Callable
from typing import Any

import pytest

from .calls import F_OFD_GETLK, F_OFD_SETLK, err
from .place import Place, forked, only

RO, RW = os.O_RDONLY, os.O_RDWR


def flock_struct(kind: int, start: int = 0, length: int = 0) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)


def try_flock(path: str, how: int = fcntl.LOCK_EX) -> str:
    fd = os.open(path, RO)
    try:
        return err(fcntl.flock, fd, how | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def try_posix(path: str, start: int = 0, length: int = 0) -> str:
    """As another process: a process never conflicts with itself."""

    def child() -> str:
        fd = os.open(path, RW)
        return err(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)

    result: str = forked(child)
    return result


def try_ofd(path: str) -> str:
    fd = os.open(path, RW)
    try:
        return err(fcntl.fcntl, fd, F_OFD_SETLK, flock_struct(fcntl.F_WRLCK))
    finally:
        os.close(fd)


@only("f", "h1", "h2", "big")
@pytest.mark.parametrize("name", ["f", "h1", "big"])
@pytest.mark.parametrize("change", ["nothing", "write", "chmod", "other opens", "rename", "truncate"])
def test_flock_across_copy_up(fs: Place, name: str, change: str) -> None:
    old = fs.open(name, RO)
    fcntl.flock(old, fcntl.LOCK_EX)
    assert try_flock(fs / name) == "EAGAIN"
    path = make(fs, name, change)
    assert try_flock(path) == "EAGAIN"
    new = fs.open(os.path.relpath(path, fs.path), RW)
    assert err(fcntl.flock, new, fcntl.LOCK_SH | fcntl.LOCK_NB) == "EAGAIN"
    fcntl.flock(old, fcntl.LOCK_UN)
    assert err(fcntl.flock, new, fcntl.LOCK_EX | fcntl.LOCK_NB) == ""
    assert err(fcntl.flock, old, fcntl.LOCK_EX | fcntl.LOCK_NB) == "EAGAIN"


def make(fs: Place, name: str, change: str) -> str:
    changes: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "write": lambda: fs.append(name, b"x"),
        "chmod": lambda: os.chmod(fs / name, 0o600),
        "other opens": lambda: fs.open(name, RW),
        "rename": lambda: os.rename(fs / name, fs / "renamed"),
        "truncate": lambda: os.truncate(fs / name, 2),
    }
    changes[change]()
    return fs / ("renamed" if change == "rename" else name)


@pytest.mark.parametrize("change", ["nothing", "write", "chmod", "rename"])
def test_shared_flocks(fs: Place, change: str) -> None:
    old = fs.open("f", RO)
    fcntl.flock(old, fcntl.LOCK_SH)
    path = make(fs, "f", change)
    assert try_flock(path, fcntl.LOCK_SH) == "" and try_flock(path, fcntl.LOCK_EX) == "EAGAIN"


@pytest.mark.parametrize("change", ["nothing", "write", "chmod", "other opens", "rename", "truncate"])
def test_record_locks_across_copy_up(fs: Place, change: str) -> None:
    fd = fs.open("big", RO)
    fcntl.lockf(fd, fcntl.LOCK_SH, 100, 50)
    # POSIX: closing any descriptor of the file drops the process's locks, so the change is made by another
    # process.
    forked(lambda: make(fs, "big", change))
    path = fs / ("renamed" if change == "rename" else "big")
    assert try_posix(path, 0, 50) == "" and try_posix(path, 150, 0) == ""
    assert try_posix(path, 0, 51) == try_posix(path, 149, 1) == "EAGAIN"
    fcntl.lockf(fd, fcntl.LOCK_UN, 50, 50)
    assert try_posix(path, 50, 50) == "" and try_posix(path, 100, 1) == "EAGAIN"


def test_record_lock_is_dropped_by_any_close(fs: Place) -> None:
    fd = fs.open("f", RW)
    fcntl.lockf(fd, fcntl.LOCK_EX)
    assert try_posix(fs / "f") == "EAGAIN"
    os.close(os.open(fs / "f", RO))
    assert try_posix(fs / "f") == ""


def test_record_lock_owner_is_reported(fs: Place) -> None:
    fd = fs.open("f", RW)
    fcntl.lockf(fd, fcntl.LOCK_EX, 5, 10)

    def child() -> tuple[int, int, int, int]:
        other = os.open(fs / "f", RW)
        got = fcntl.fcntl(other, fcntl.F_GETLK, flock_struct(fcntl.F_WRLCK))
        kind, _, start, length, pid = struct.unpack("hhqqi4x", got)
        return kind, start, length, pid

    assert forked(child) == (fcntl.F_WRLCK, 10, 5, os.getpid())


@pytest.mark.parametrize("change", ["nothing", "write", "chmod", "rename"])
def test_ofd_locks_across_copy_up(fs: Place, change: str) -> None:
    old = fs.open("f", RO)
    fcntl.fcntl(old, F_OFD_SETLK, flock_struct(fcntl.F_RDLCK))
    path = make(fs, "f", change)
    assert try_ofd(path) == "EAGAIN"
    fd = fs.open(os.path.relpath(path, fs.path), RW)
    got = struct.unpack("hhqqi4x", fcntl.fcntl(fd, F_OFD_GETLK, flock_struct(fcntl.F_WRLCK)))
    assert got[0] == fcntl.F_RDLCK
    fcntl.fcntl(old, F_OFD_SETLK, flock_struct(fcntl.F_UNLCK))
    assert try_ofd(path) == ""


def test_lock_needs_the_right_descriptor(fs: Place) -> None:
    assert err(fcntl.lockf, fs.open("f", RO), fcntl.LOCK_EX | fcntl.LOCK_NB) == "EBADF"
    assert err(fcntl.lockf, fs.open("f", os.O_WRONLY), fcntl.LOCK_SH | fcntl.LOCK_NB) == "EBADF"


def test_locks_of_two_names_are_one(fs: Place) -> None:
    fd = fs.open("h1", RO)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert try_flock(fs / "h2") == "EAGAIN"
    fs.append("h2", b"x")
    assert try_flock(fs / "h2") == try_flock(fs / "h1") == "EAGAIN"


def test_locks_end_with_their_process(fs: Place) -> None:
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            fd = os.open(fs / "f", RW)
            fcntl.flock(fd, fcntl.LOCK_EX)
            fcntl.lockf(fd, fcntl.LOCK_EX)
            os.write(w, b"x")
            signal.pause()
        finally:
            os._exit(0)
    os.read(r, 1)
    assert try_flock(fs / "f") == "EAGAIN" and try_posix(fs / "f") == "EAGAIN"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(r)
    os.close(w)
    assert try_flock(fs / "f") == "" and try_posix(fs / "f") == ""


def test_waiting_for_a_lock_can_be_interrupted(fs: Place) -> None:
    fd = fs.open("f", RW)
    fcntl.flock(fd, fcntl.LOCK_EX)
    fcntl.lockf(fd, fcntl.LOCK_EX)

    def child(posix: bool) -> str:
        class Stop(Exception):
            pass

        def stop(*_: object) -> None:
            raise Stop

        signal.signal(signal.SIGALRM, stop)
        other = os.open(fs / "f", RW)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            if posix:
                fcntl.lockf(other, fcntl.LOCK_EX)
            else:
                fcntl.flock(other, fcntl.LOCK_EX)
        except Stop:
            return "interrupted"
        return "granted"

    assert forked(lambda: child(False)) == forked(lambda: child(True)) == "interrupted"


def test_waiter_gets_the_lock(fs: Place) -> None:
    r, w = os.pipe()
    fd = fs.open("f", RW)
    fcntl.flock(fd, fcntl.LOCK_EX)
    pid = os.fork()
    if pid == 0:
        try:
            other = os.open(fs / "f", RW)
            os.write(w, b"1")
            fcntl.flock(other, fcntl.LOCK_EX)
            os.write(w, b"2")
        finally:
            os._exit(0)
    assert os.read(r, 1) == b"1"
    fcntl.flock(fd, fcntl.LOCK_UN)
    assert os.read(r, 1) == b"2"
    os.waitpid(pid, 0)
    os.close(r)
    os.close(w)


def test_leases(fs: Place) -> None:
    """Whatever the answer, it must be one: a lease, or an errno."""
    fd = fs.open("n", RW | os.O_CREAT)
    assert err(fcntl.fcntl, fd, fcntl.F_SETLEASE, fcntl.F_WRLCK) in ("", "EAGAIN", "EINVAL", "EOPNOTSUPP")
    err(fcntl.fcntl, fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
