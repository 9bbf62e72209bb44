"""Copies the data of one file into another, holes kept, cheapest way first. Runs in a worker thread;
blocks.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

_FICLONE = 0x40049409
_FICLONERANGE = 0x4020940D
#: struct file_clone_range (linux/fs.h): source descriptor, its offset, length, offset in the target
_CLONE_RANGE = struct.Struct("=qQQQ")
#: Bytes between two looks at `cancelled`: at 100 MB/s that is a third of a second.
_CHUNK = 32 << 20
_BUFFER = 1 << 20


class Copied(NamedTuple):
    """What a copy cost."""

    #: bytes that were moved; holes are none, nor is what was cloned
    bytes: int
    #: by reflink
    cloned: bool


class Cancelled(Exception):
    """The copy was given up because nobody waits for it any more."""


def copy_data(source: int, target: int, size: int, cancelled: Callable[[], bool] = lambda: False) -> Copied:
    """Copies the first `size` bytes of `source` over an empty `target`, which ends up exactly `size` long,
    with the same holes.

    Reflink when both are on one file system that can; else copy_file_range (in the kernel), else read and
    write. Raises OSError (ENOSPC, EIO, EDQUOT, …) with `target` in an undefined state; Cancelled when
    `cancelled()` turns true."""
    if size == os.fstat(source).st_size:
        try:
            fcntl.ioctl(target, _FICLONE, source)
            return Copied(0, True)
        except OSError:
            # EOPNOTSUPP, EXDEV, EINVAL, ENOTTY: no reflink here. A real fault (ENOSPC, EIO) comes back from
            # the copy below.
            pass
    os.ftruncate(target, size)
    offset = copied = 0
    in_kernel = True
    while offset < size:
        try:
            start = os.lseek(source, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # a hole up to the end
            start, end = offset, size  # EINVAL: a file system that knows no holes
        else:
            end = size if start >= size else min(size, os.lseek(source, start, os.SEEK_HOLE))
        position = start
        while position < end:
            if cancelled():
                raise Cancelled
            want = min(_CHUNK, end - position)
            moved = 0
            if in_kernel:
                try:
                    moved = os.copy_file_range(source, target, want, position, position)
                except OSError as error:
                    if error.errno not in (
                        errno.EXDEV,
                        errno.EOPNOTSUPP,
                        errno.EINVAL,
                        errno.ENOSYS,
                        errno.ETXTBSY,
                    ):
                        raise
                    in_kernel = False
                    continue
            if moved == 0:
                # Some file systems (procfs-like ones, and 5.x kernels on a few others) answer 0 before the
                # end: read(2) is the truth.
                moved = _read_write(source, target, position, min(want, _BUFFER))
                if moved == 0:
                    return Copied(copied, False)  # the source was cut meanwhile from outside
            position += moved
            copied += moved
        offset = max(end, offset + 1)
    return Copied(copied, False)


def copy_range(source: int, source_offset: int, target: int, target_offset: int, length: int) -> int:
    """copy_file_range(2) between two files: the number of bytes copied, 0 at the end of `source`.

    Shares blocks when the file system can do so for all of it at once (copy_file_range does that by itself
    for up to 2 GiB, and not under every file system); else it copies 64 MiB at most, as it blocks. Raises
    OSError: EXDEV between file systems."""
    length = min(length, os.fstat(source).st_size - source_offset)
    if length <= 0:
        return 0
    try:
        fcntl.ioctl(target, _FICLONERANGE, _CLONE_RANGE.pack(source, source_offset, length, target_offset))
        return length
    except OSError:
        # Not aligned to blocks, overlapping, no reflink here. A real fault comes back from the copy below.
        return os.copy_file_range(source, target, min(length, 2 * _CHUNK), source_offset, target_offset)


def _read_write(source: int, target: int, position: int, want: int) -> int:
    data = os.pread(source, want, position)
    view = memoryview(data)
    written = 0
    while written < len(data):
        written += os.pwrite(target, view[written:], position + written)
    return written
