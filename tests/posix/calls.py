"""System calls that Python's os module lacks, thin and raw; each raises OSError. No expectations in here."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EACCESS = 0x200
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
AT_STATX_FORCE_SYNC = 0x2000
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_COLLAPSE, FALLOC_ZERO, FALLOC_INSERT = 1, 2, 8, 16, 32
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
STATX_BASIC, STATX_BTIME, STATX_MNT_ID = 0x7FF, 0x800, 0x1000
IN_ACCESS, IN_MODIFY, IN_ATTRIB, IN_CLOSE_WRITE, IN_CLOSE_NOWRITE, IN_OPEN = 1, 2, 4, 8, 16, 32
IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 64, 128, 256, 512, 1024, 2048
F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
FS_IOC_GETFLAGS = 0x80086601

Path = str | bytes


def err(func: Callable[..., Any], *args: Any, **kw: Any) -> str:
    """ "" when the call succeeds, else the name of its errno ("EEXIST"). A returned descriptor is closed."""
    try:
        result = func(*args, **kw)
    except OSError as e:
        return errno.errorcode.get(e.errno or 0, str(e))
    if func is os.open:
        os.close(result)
    return ""


def _check(result: int) -> int:
    if result < 0:
        e = ctypes.get_errno()
        raise OSError(e, os.strerror(e))
    return result


def renameat2(old: Path, new: Path, flags: int) -> None:
    _check(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def linkat(olddir: int, old: Path, new: Path, flags: int) -> None:
    _check(_libc.linkat(olddir, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _check(_libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def sync_file_range(fd: int, offset: int, length: int, flags: int = 7) -> None:
    _check(_libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), flags))


def syncfs(fd: int) -> None:
    _check(_libc.syncfs(fd))


def faccessat2(path: Path, mode: int, flags: int) -> None:
    _check(_libc.syscall(439, AT_FDCWD, os.fsencode(path), mode, flags))


def utimensat(path: Path, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    """Times are (seconds, nanoseconds); UTIME_NOW and UTIME_OMIT stand in the nanoseconds."""
    times = struct.pack("qqqq", *atime, *mtime)
    _check(_libc.utimensat(AT_FDCWD, os.fsencode(path), times, flags))


@dataclass(frozen=True)
class Statx:
    mask: int
    nlink: int
    uid: int
    gid: int
    mode: int
    ino: int
    size: int
    atime_ns: int
    btime_ns: int
    ctime_ns: int
    mtime_ns: int


def statx(path: Path, flags: int = 0, mask: int = STATX_BASIC | STATX_BTIME, dirfd: int = AT_FDCWD) -> Statx:
    buf = ctypes.create_string_buffer(256)
    _check(_libc.statx(dirfd, os.fsencode(path), flags, mask, buf))
    got, _blksize, _attrs, nlink, uid, gid, mode, ino, size = struct.unpack_from("IIQIIIH2xQQ", buf.raw)
    times = [s * 10**9 + ns for s, ns in (struct.unpack_from("qI", buf.raw, 64 + 16 * i) for i in range(4))]
    return Statx(got, nlink, uid, gid, mode, ino, size, times[0], times[1], times[2], times[3])


@dataclass(frozen=True)
class Dirent:
    ino: int
    off: int
    kind: int
    name: bytes


def getdents(fd: int, size: int = 32768) -> list[Dirent]:
    """One getdents64 call; [] at the end of the directory."""
    buf = ctypes.create_string_buffer(size)
    n = _check(_libc.syscall(217, fd, buf, size))
    found, at = [], 0
    while at < n:
        ino, off, reclen, kind = struct.unpack_from("QqHB", buf.raw, at)
        name = buf.raw[at + 19 : at + reclen].split(b"\0", 1)[0]
        found.append(Dirent(ino, off, kind, name))
        at += reclen
    return found


def listing(path: Path, size: int = 32768) -> list[Dirent]:
    """Every entry of a directory, with `.` and `..`, as getdents64 gives them."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        whole: list[Dirent] = []
        while part := getdents(fd, size):
            whole += part
        return whole
    finally:
        os.close(fd)


class Inotify:
    """Watches one path; `events()` gives (mask, name) of what has happened so far, without waiting long."""

    def __init__(self, path: Path, mask: int) -> None:
        self.fd = _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        _check(_libc.inotify_add_watch(self.fd, os.fsencode(path), mask))

    def events(self) -> list[tuple[int, bytes]]:
        found, at = [], 0
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return []
        while at < len(data):
            _wd, mask, _cookie, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0")
            found.append((mask, name))
            at += 16 + length
        return found

    def __enter__(self) -> Inotify:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)
