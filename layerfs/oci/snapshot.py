"""One file of a live mount's upper, as of one moment: its attributes and its bytes together, while others
write. Knows nothing of tar nor of layers.

What is promised: the copy is what the file held at one moment at which nobody was inside a write(2),
truncate(2) or the like on it. (Stores through a mapping are as of the last time that the kernel wrote them
back; README, "Keep the changes".)

The facts that this stands on:

1. A write stamps mtime and ctime under the inode's lock before it copies the first byte (file_modified() in
   ext4_write_checks, xfs_file_write_checks, btrfs_write_check, shmem_file_write_iter). So when size, mtime
   and ctime are the same before and after a copy, no write began in between.
2. One may have been under way already, its stamps made. lseek(SEEK_HOLE) takes the lock of the inode on ext4,
   tmpfs and btrfs, and so does read(2) on xfs: it waits for the end of that write.
3. Two writes within one tick of the clock used to get one ctime. Since Linux 6.13 these file systems give a
   new one to the first change after somebody looked (FS_MGTIME); before, a fresh stamp is waited out, as
   git does with its index.
4. A write(2) through the mount of more than the kernel puts into one request (128 KiB in old kernels) comes
   as several writes of the daemon's, which 1 and 2 cannot tell from several write(2). But it takes an open
   descriptor: a file that nobody has open for writing has no write(2) under way. The daemon knows
   (`Writers.writing`). And fsync(2) takes the lock under which the kernel sends those requests (fuse_fsync()
   in fs/fuse/file.c): a daemon at work on an fsync knows that there is none half done (`Writers.held`).
5. With data=passthrough a write(2) comes as one (`Writers.undivided`), so 1 and 2 do for it.

Held to it by tests/oci/test_moment.py, on ext4, xfs, btrfs and tmpfs.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from layerfs.errors import LayerError
from layerfs.fdutil import OwnedFd, copy_data, fd_path, fs_magic
from layerfs.oci.member import display

#: Files up to this size (bytes) cannot be in the middle of a write(2) that came as several requests: even old
#: kernels send twice as much in one.
_ONE_REQUEST = 64 << 10
#: Copies up to this size (bytes) are kept in memory.
_IN_MEMORY = 4 << 20
_TRIES = 3
#: Longer than any tick of the kernel's clock (CONFIG_HZ=100: 10 ms).
_TICK_NS = 20_000_000
#: File systems of which facts 1 to 3 were read and tried: ext2/3/4, xfs, btrfs, tmpfs.
_KNOWN: Final = frozenset((0xEF53, 0x58465342, 0x9123683E, 0x01021994))


class Writers(Protocol):
    """Who writes to a live mount. Files are named by the upper's inode number."""

    def writing(self, inode: int) -> bool:
        """Whether somebody has the file open for writing."""

    def undivided(self, inode: int) -> bool:
        """Whether each write(2) of those comes to the upper's file system as one."""

    def held(self, inode: int, path: bytes) -> AbstractContextManager[bool]:
        """While entered nobody changes the file, which is `path` in the mount, and no write(2) on it is half
        done. Gives False when the file is not found any more. Raises LayerfsError."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What belongs to the same moment as the bytes. `has_data`: whether there are any here to be copied."""

    stored: list[str]
    xattrs: dict[str, bytes]
    has_data: bool


_Taken = tuple[Moment, os.stat_result, "bytes | OwnedFd | None"]


class Snapshots:
    def __init__(self, upper: int, scratch: str, writers: Writers) -> None:
        """`upper`: a descriptor in the upper's file system. `scratch`: a directory, best of the same file
        system, for copies that are too big for memory; they have no name there."""
        self._scratch = scratch
        self._writers = writers
        self._known = fs_magic(fd_path(upper)) in _KNOWN
        self._fine = self._known and _kernel() >= (6, 13)

    def take(self, fd: OwnedFd, path: bytes, look: Callable[[], Moment]) -> _Taken:
        """The open file `fd`, which is `path` in the mount: what `look` says of it, its attributes, and a
        copy of its bytes, of one moment. The file system that holds it must not change.

        Raises OSError, ESTALE when `path` is another file by now; LayerError when it cannot be had."""
        for _ in range(_TRIES):
            before = self._settled(fd)
            divided = before.st_size > _ONE_REQUEST and not self._writers.undivided(before.st_ino)
            if (divided or not self._known) and self._writers.writing(before.st_ino):
                break
            if self._known:
                _wait_for_writer(fd)
            moment = look()
            copy = self._copy(fd, before.st_size, path) if moment.has_data else None
            after = os.fstat(fd.fd)
            if stamps(before) == stamps(after):
                return moment, after, copy
        return self._take_held(fd, path, look)

    def _take_held(self, fd: OwnedFd, path: bytes, look: Callable[[], Moment]) -> _Taken:
        st = os.fstat(fd.fd)
        with self._writers.held(st.st_ino, path) as found:
            if not found:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            moment = look()
            st = os.fstat(fd.fd)
            return moment, st, self._copy(fd, st.st_size, path) if moment.has_data else None

    def _settled(self, fd: OwnedFd) -> os.stat_result:
        """fstat(2) with stamps that the next change will not repeat."""
        st = os.fstat(fd.fd)
        if self._fine:
            return st
        # A stamp of the future (the clock was set back) would be repeated at one moment only.
        if 0 <= (age := time.time_ns() - st.st_ctime_ns) < _TICK_NS:
            time.sleep((_TICK_NS - age) / 1e9)
            st = os.fstat(fd.fd)
        return st

    def _copy(self, fd: OwnedFd, size: int, path: bytes) -> bytes | OwnedFd:
        if size <= _IN_MEMORY:
            return _read(fd, size)
        target = self._temporary()
        try:
            copy_data(fd.fd, target.fd, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise LayerError(
                f"{display(path)}: no room for a copy of it in {self._scratch} ({error.strerror});"
                " commit with --pause needs none",
                error.errno,
            ) from None
        return target

    def _temporary(self) -> OwnedFd:
        try:
            return OwnedFd(os.open(self._scratch, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600))
        except OSError:
            # Not every file system can, and the work directory need not be ours to write to.
            with tempfile.TemporaryFile(buffering=0) as file:
                return OwnedFd(os.dup(file.fileno()))


def stamps(st: os.stat_result) -> tuple[int, int, int]:
    """What is the same twice when a file was not changed in between."""
    return st.st_size, st.st_mtime_ns, st.st_ctime_ns


def _wait_for_writer(fd: OwnedFd) -> None:
    try:
        os.lseek(fd.fd, 0, os.SEEK_HOLE)
    except OSError:
        pass  # ENXIO: the file is empty


def _read(fd: OwnedFd, size: int) -> bytes:
    """The first `size` bytes, fewer where it has become shorter."""
    data = os.pread(fd.fd, size, 0) if size else b""
    while len(data) < size and (more := os.pread(fd.fd, size - len(data), len(data))):
        data += more
    return data


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
