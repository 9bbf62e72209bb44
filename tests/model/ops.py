"""Random operations for the model tests: what there is, how they are drawn, and how one is carried out.

An `Op` is data, so that a failing sequence can be printed, shortened and kept as a regression. `Runner`
carries operations out in one directory and returns what a program would have seen; running the same ones
in two directories and comparing is `machine`'s business.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import layers

_libc = ctypes.CDLL(None, use_errno=True)
NOREPLACE, EXCHANGE = 1, 2
SLOTS = 3
# What `su` makes of us: root, an owner of some of the objects, and a stranger.
USERS = ((0, 0), (1000, 1000), (1001, 1001))

OPEN_FLAGS = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_WRONLY,
    "c": os.O_RDWR | os.O_CREAT,
    "x": os.O_RDWR | os.O_CREAT | os.O_EXCL,
    "t": os.O_RDWR | os.O_TRUNC,
    "ct": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "a": os.O_WRONLY | os.O_APPEND,
    "ca": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "d": os.O_RDONLY | os.O_DIRECTORY,
    "n": os.O_RDONLY | os.O_NOFOLLOW,
    "C": os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW,
    "p": os.O_PATH | os.O_NOFOLLOW,
    "s": os.O_WRONLY | os.O_SYNC,
}
MODES = (0o644, 0o600, 0o755, 0o777, 0o000, 0o2775, 0o1777)
IDS = (-1, 0, 1000, 1001)
SIZES = (0, 1, 10, 4096, 5000, 70_000)
OFFSETS = (0, 3, 4095, 4096, 10_000, 100_000)
TIMES = tuple(layers.OLD_NS + n * 1_000_000_007 for n in (-5, 9, 10_000_000))
XATTRS = ("user.a", "user.b", "user.c", "trusted.t", "security.s", layers.ACL_ACCESS, layers.ACL_DEFAULT)
VALUES = (b"", b"1", b"\0\xff", b"v" * 300)


@dataclass(frozen=True, repr=False)
class Op:
    kind: str
    args: tuple[Any, ...]

    def __repr__(self) -> str:
        return f"Op({self.kind!r}, {self.args!r})"


# How often each kind is drawn. The first group works by descriptors opened earlier.
WEIGHTS = {
    "open": 14,
    "opendir": 3,
    "close": 1,
    "read": 4,
    "write": 6,
    "ftruncate": 2,
    "fstat": 3,
    "fsync": 1,
    "fchmod": 2,
    "fchown": 1,
    "futimens": 2,
    "fsetxattr": 1,
    "fgetxattr": 1,
    "flistxattr": 1,
    "map_read": 1,
    "map_write": 2,
    "reopen": 1,
    "create_at": 1,
    "mkdir_at": 1,
    "stat_at": 1,
    "listdir_at": 2,
    # by path
    "read_file": 3,
    "write_file": 4,
    "truncate": 2,
    "mkdir": 5,
    "rmdir": 5,
    "unlink": 7,
    "rmtree": 1,
    "rename": 12,
    "link": 5,
    "symlink": 2,
    "mknod": 2,
    "chmod": 4,
    "chown": 3,
    "utimens": 3,
    "touch": 1,
    "setxattr": 3,
    "removexattr": 2,
    "getxattr": 1,
    "listxattr": 2,
    "listdir": 4,
    "stat": 2,
    "lstat": 4,
    "readlink": 1,
    "access": 1,
    "su": 2,
}


class Runner:
    """Carries operations out below `root`. Everything opened stays open until `close`.

    `since_ns`: times at or after it are told as "now", for they differ from run to run.
    """

    def __init__(self, root: str, since_ns: int) -> None:
        self.root = root
        self.since_ns = since_ns
        self.slots: list[int | None] = [None] * SLOTS
        self.modes: list[str] = [""] * SLOTS

    def run(self, op: Op) -> Any:
        """What the operation returned, or the name of its errno."""
        method: Callable[..., Any] = getattr(self, f"_{op.kind}")
        try:
            return method(*op.args)
        except OSError as exc:
            return errno.errorcode.get(exc.errno or 0, str(exc.errno))

    def holds_orphan(self, op: Op) -> bool:
        """Is this an operation on something without a name, by a descriptor?"""
        by_slot = op.args[1] if op.kind == "reopen" else op.args[0]
        if op.kind in ("open", "opendir", "close") or not isinstance(by_slot, int) or op.kind == "su":
            return False
        fd = self.slots[by_slot]
        return fd is not None and os.fstat(fd).st_nlink == 0

    def close(self) -> None:
        self._su(0)
        for slot in range(SLOTS):
            self._drop(slot)

    # helpers

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _drop(self, slot: int) -> None:
        fd, self.slots[slot] = self.slots[slot], None
        if fd is not None:
            os.close(fd)

    def _fd(self, slot: int) -> int:
        fd = self.slots[slot]
        if fd is None:
            raise OSError(errno.EBADF, "nothing open here")
        return fd

    def _told(self, st_: os.stat_result) -> tuple[Any, ...]:
        kind = stat.S_IFMT(st_.st_mode)
        when = "now" if st_.st_mtime_ns >= self.since_ns else st_.st_mtime_ns
        is_dir = kind == stat.S_IFDIR
        size, nlink = (None, None) if is_dir else (st_.st_size, st_.st_nlink)
        rdev = st_.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        return oct(st_.st_mode), st_.st_uid, st_.st_gid, rdev, size, nlink, when

    # by descriptor

    def _open(self, slot: int, path: str, flags: str, mode: int) -> str:
        self._drop(slot)
        # O_NONBLOCK: of fifos nobody else has open
        opened = os.open(self._at(path), OPEN_FLAGS[flags] | os.O_NONBLOCK | os.O_CLOEXEC, mode & 0o777)
        self.slots[slot], self.modes[slot] = opened, flags
        return "opened"

    def _opendir(self, slot: int, path: str) -> str:
        return self._open(slot, path, "d", 0)

    def _reopen(self, slot: int, old: int, flags: str) -> str:
        fd = os.open(f"/proc/self/fd/{self._fd(old)}", OPEN_FLAGS[flags] | os.O_NONBLOCK | os.O_CLOEXEC)
        self._drop(slot)
        self.slots[slot], self.modes[slot] = fd, flags
        return "opened"

    def _close(self, slot: int) -> None:
        self._fd(slot)
        self._drop(slot)

    def _read(self, slot: int, offset: int, size: int) -> bytes:
        return os.pread(self._fd(slot), size, offset)

    def _write(self, slot: int, offset: int | None, size: int, seed: int) -> int | str:
        fd, data = self._fd(slot), layers.pattern(size, seed)
        if _special(fd):
            return "special"
        return os.write(fd, data) if offset is None else os.pwrite(fd, data, offset)

    def _ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self._fd(slot), size)

    def _fstat(self, slot: int) -> tuple[Any, ...]:
        return self._told(os.fstat(self._fd(slot)))

    def _fsync(self, slot: int) -> None:
        os.fsync(self._fd(slot))

    def _fchmod(self, slot: int, mode: int) -> None:
        fd = self._fd(slot)
        os.fchmod(fd, mode if stat.S_ISDIR(os.fstat(fd).st_mode) else mode & 0o777)

    def _fchown(self, slot: int, uid: int, gid: int) -> None:
        os.fchown(self._fd(slot), uid, gid)

    def _futimens(self, slot: int, when: int) -> None:
        os.utime(self._fd(slot), ns=(when, when))

    def _fsetxattr(self, slot: int, name: str, value: int) -> None:
        os.setxattr(self._fd(slot), name, self._value(name, value))

    def _fgetxattr(self, slot: int, name: str) -> bytes:
        return os.getxattr(self._fd(slot), name)

    def _flistxattr(self, slot: int) -> list[str]:
        return sorted(os.listxattr(self._fd(slot)))

    def _map_read(self, slot: int, offset: int) -> bytes:
        fd = self._fd(slot)
        size = os.fstat(fd).st_size
        if offset >= size or not stat.S_ISREG(os.fstat(fd).st_mode):
            return b"beyond"
        with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
            return mapped[offset : offset + 100]

    def _map_write(self, slot: int, offset: int, seed: int) -> str:
        fd = self._fd(slot)
        size = os.fstat(fd).st_size
        if offset >= size or not stat.S_ISREG(os.fstat(fd).st_mode):
            return "beyond"
        with mmap.mmap(fd, size) as mapped:
            data = layers.pattern(min(50, size - offset), seed)
            mapped[offset : offset + len(data)] = data
            mapped.flush()
        return "stored"

    def _create_at(self, slot: int, name: str) -> None:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640, dir_fd=self._fd(slot)))

    def _mkdir_at(self, slot: int, name: str) -> None:
        os.mkdir(name, dir_fd=self._fd(slot))

    def _stat_at(self, slot: int, name: str) -> tuple[Any, ...]:
        return self._told(os.stat(name, dir_fd=self._fd(slot), follow_symlinks=False))

    def _listdir_at(self, slot: int) -> list[str]:
        return sorted(os.listdir(self._fd(slot)))

    # by path

    def _read_file(self, path: str) -> bytes:
        fd = os.open(self._at(path), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(fd, 200_000)
        finally:
            os.close(fd)

    def _write_file(self, path: str, flags: str, size: int, seed: int) -> int | str:
        fd = os.open(self._at(path), OPEN_FLAGS[flags] | os.O_NONBLOCK, 0o644)
        try:
            return "special" if _special(fd) else os.write(fd, layers.pattern(size, seed))
        finally:
            os.close(fd)

    def _truncate(self, path: str, size: int) -> None:
        os.truncate(self._at(path), size)

    def _mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._at(path), mode)

    def _rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def _unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    def _rmtree(self, path: str) -> None:
        _rmtree(self._at(path))

    def _rename(self, old: str, new: str, flags: int) -> None:
        result = _libc.renameat2(-100, os.fsencode(self._at(old)), -100, os.fsencode(self._at(new)), flags)
        if result:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def _link(self, old: str, new: str) -> None:
        os.link(self._at(old), self._at(new), follow_symlinks=False)

    def _symlink(self, target: str, path: str) -> None:
        os.symlink(target, self._at(path))

    def _mknod(self, path: str, kind: str, mode: int) -> None:
        types = {
            "fifo": (stat.S_IFIFO, 0),
            "char": (stat.S_IFCHR, os.makedev(1, 3)),
            "block": (stat.S_IFBLK, os.makedev(240, 7)),
            "socket": (stat.S_IFSOCK, 0),
            "file": (stat.S_IFREG, 0),
        }
        os.mknod(self._at(path), types[kind][0] | mode & 0o777, types[kind][1])

    def _chmod(self, path: str, mode: int) -> None:
        full = self._at(path)
        # setuid and setgid of files are left to the conformance tests
        os.chmod(full, mode if stat.S_ISDIR(os.stat(full).st_mode) else mode & 0o777)

    def _chown(self, path: str, uid: int, gid: int, follow: bool) -> None:
        os.chown(self._at(path), uid, gid, follow_symlinks=follow)

    def _utimens(self, path: str, when: int, follow: bool) -> None:
        os.utime(self._at(path), ns=(when, when), follow_symlinks=follow)

    def _touch(self, path: str) -> None:
        os.utime(self._at(path))

    def _value(self, name: str, value: int) -> bytes:
        if name.startswith("system."):
            return layers.ACLS[value % len(layers.ACLS)]
        return VALUES[value]

    def _setxattr(self, path: str, name: str, value: int, follow: bool) -> None:
        os.setxattr(self._at(path), name, self._value(name, value), follow_symlinks=follow)

    def _removexattr(self, path: str, name: str, follow: bool) -> None:
        os.removexattr(self._at(path), name, follow_symlinks=follow)

    def _getxattr(self, path: str, name: str, follow: bool) -> bytes:
        return os.getxattr(self._at(path), name, follow_symlinks=follow)

    def _listxattr(self, path: str, follow: bool) -> list[str]:
        return sorted(os.listxattr(self._at(path), follow_symlinks=follow))

    def _listdir(self, path: str) -> list[tuple[str, str]]:
        with os.scandir(self._at(path)) as found:
            return sorted((entry.name, _type_of(entry)) for entry in found)

    def _stat(self, path: str) -> tuple[Any, ...]:
        return self._told(os.stat(self._at(path)))

    def _lstat(self, path: str) -> tuple[Any, ...]:
        return self._told(os.lstat(self._at(path)))

    def _readlink(self, path: str) -> str:
        return os.readlink(self._at(path))

    def _access(self, path: str, how: int) -> bool:
        return os.access(self._at(path), how, effective_ids=True)

    def _su(self, user: int) -> None:
        """Become another user, without any supplementary groups, in file system questions."""
        uid, gid = USERS[user]
        os.seteuid(0)
        os.setgroups([])
        os.setegid(gid)
        os.seteuid(uid)


def _rmtree(path: str) -> None:
    """In the order of names, for what is left when it fails half way; and shutil's would open fifos."""
    for name in sorted(os.listdir(path)):
        child = f"{path}/{name}"
        if stat.S_ISDIR(os.lstat(child).st_mode):
            _rmtree(child)
        else:
            os.unlink(child)
    os.rmdir(path)


def _special(fd: int) -> bool:
    """Writing to fifos and devices tells nothing of the file system, except that mtimes need not move."""
    mode = os.fstat(fd).st_mode
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _type_of(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return "symlink"
    if entry.is_dir(follow_symlinks=False):
        return "dir"
    return "file" if entry.is_file(follow_symlinks=False) else "special"
