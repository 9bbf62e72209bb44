"""Allocation and holes: fallocate in its modes, punch hole, SEEK_HOLE and SEEK_DATA, sparse files across
copy-up."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import pytest

from tests.support.stack import File

from .calls import (
    FALLOC_COLLAPSE,
    FALLOC_INSERT,
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO,
    FS_IOC_GETFLAGS,
    err,
    fallocate,
)
from .place import BIG, Place, compared, tree

MB = 1 << 20
_UNIT = 128 << 10
REFUSED = errno.errorcode[errno.EOPNOTSUPP]


def holes(fs: Place, name: str) -> list[tuple[str, int]]:
    """Where data and holes begin."""
    found: list[tuple[str, int]] = []
    fd = os.open(fs / name, os.O_RDONLY)
    try:
        end, at = os.fstat(fd).st_size, 0
        while at < end:
            try:
                data = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                found.append(("hole to the end", at))
                break
            if data > at:
                found.append(("hole", at))
            found.append(("data", data))
            at = os.lseek(fd, data, os.SEEK_HOLE)
        return found
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["f", "big", "empty", "n"])
def test_fallocate_grows(fs: Place, name: str) -> None:
    fd = fs.open(name, os.O_RDWR | os.O_CREAT)
    before = fs.read(name)
    fallocate(fd, 0, 0, MB)
    assert fs.stat(name).st_size == MB and fs.stat(name).st_blocks * 512 >= MB
    assert fs.read(name) == before.ljust(MB, b"\0")
    fallocate(fd, 0, 10, 10)
    assert fs.stat(name).st_size == MB


def test_posix_fallocate(fs: Place) -> None:
    fd = fs.open("f", os.O_RDWR)
    os.posix_fallocate(fd, 5000, 100)
    assert fs.stat("f").st_size == 5100 and fs.read("f") == b"hello world\n".ljust(5100, b"\0")


def test_keep_size(fs: Place) -> None:
    fd = fs.open("f", os.O_RDWR)
    fallocate(fd, FALLOC_KEEP_SIZE, 0, MB)
    assert fs.stat("f").st_size == 12 and fs.read("f") == b"hello world\n"
    assert fs.stat("f").st_blocks * 512 >= MB


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 4096), (4096, 8192), (100, 200), (5000, 50_000), (300_000, MB)]
)
def test_punch_hole(fs: Place, offset: int, length: int) -> None:
    fd = fs.open("big", os.O_RDWR)
    fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)
    want = bytearray(BIG)
    want[offset : offset + length] = bytes(min(length, max(0, len(BIG) - offset)))
    assert fs.read("big") == bytes(want) and fs.stat("big").st_size == len(BIG)


def test_zero_range(fs: Place) -> None:
    fd = fs.open("big", os.O_RDWR)
    fallocate(fd, FALLOC_ZERO, 1000, 10_000)
    assert fs.read("big") == BIG[:1000] + bytes(10_000) + BIG[11_000:]


def test_collapse_and_insert(fs: Place) -> None:
    """What the file system below can do, or EOPNOTSUPP (so Linux itself for any FUSE); never wrong data."""
    fd = fs.open("big", os.O_RDWR)
    done = err(fallocate, fd, FALLOC_COLLAPSE, 4096, 8192)
    assert done in ("", REFUSED)
    want = BIG if done else BIG[:4096] + BIG[12_288:]
    assert fs.read("big") == want
    done = err(fallocate, fd, FALLOC_INSERT, 4096, 4096)
    assert done in ("", REFUSED)
    assert fs.read("big") == (want if done else want[:4096] + bytes(4096) + want[4096:])


@compared
def test_fallocate_errors(fs: Place) -> object:
    ro, rw, d = fs.open("f", os.O_RDONLY), fs.open("f", os.O_RDWR), fs.open("d", os.O_RDONLY)
    fifo = fs.open("fifo", os.O_RDWR)
    return [
        err(fallocate, ro, 0, 0, 10),
        err(fallocate, d, 0, 0, 10),
        err(fallocate, fifo, 0, 0, 10),
        err(fallocate, rw, 0, 0, 0),
        err(fallocate, rw, 0, -1, 10),
        err(fallocate, rw, 0, 0, -1),
        err(fallocate, rw, 0, 2**62, 2**62),
        err(fallocate, rw, FALLOC_PUNCH_HOLE, 0, 10),
        err(fallocate, rw, 1 << 20, 0, 10),
        fs.read("f"),
    ]


SPARSE = {
    "front": File(data=b"x" * 4096, offset=MB, size=MB + 4096),
    "end": File(data=b"x" * 4096, size=3 * MB),
    "middle": File(data=b"x" * 4096, offset=MB, size=3 * MB),
    "all": File(size=2 * MB),
    "none": File(data=b"x" * 10_000),
    "empty": File(),
}


@tree(SPARSE)
@pytest.mark.parametrize("name", list(SPARSE))
@compared
def test_seek_hole_and_data(fs: Place, name: str) -> object:
    return holes(fs, name)


@tree(SPARSE)
@pytest.mark.parametrize("name", list(SPARSE))
@compared
def test_holes_after_copy_up(fs: Place, name: str) -> object:
    before = fs.read(name)
    fd = fs.open(name, os.O_WRONLY)
    os.pwrite(fd, b"y" * 4096, 2 * MB)
    fs.close(fd)
    want = before[: 2 * MB].ljust(2 * MB, b"\0") + b"y" * 4096 + before[2 * MB + 4096 :]
    assert fs.read(name) == want
    # What was cloned and is then written to xfs allocates in units of 128 KiB, which count as data.
    return [(what, -(-at // _UNIT) * _UNIT) for what, at in holes(fs, name)]


@tree(SPARSE)
@pytest.mark.parametrize("name", list(SPARSE))
def test_copy_up_does_not_fill_holes(fs: Place, name: str) -> None:
    before = fs.stat(name).st_blocks
    fs.close(fs.open(name, os.O_RDWR))
    fd = fs.open(name, os.O_WRONLY)
    os.fsync(fd)
    assert fs.stat(name).st_blocks <= before + 16
    assert fs.stat(name).st_size == (SPARSE[name].size or len(SPARSE[name].data))


@tree(SPARSE)
@compared
def test_seek_errors(fs: Place) -> object:
    found: list[object] = []
    for name in SPARSE:
        fd = fs.open(name, os.O_RDONLY)
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            for at in (0, os.fstat(fd).st_size, os.fstat(fd).st_size + 1, -1):
                found.append(err(os.lseek, fd, at, whence))
    return found


@tree(SPARSE)
def test_seek_data_sees_fresh_writes(fs: Place) -> None:
    fd = fs.open("all", os.O_RDWR)
    os.pwrite(fd, b"z" * 4096, MB)
    assert os.lseek(fd, 0, os.SEEK_DATA) <= MB
    assert os.pread(fd, 4096, MB) == b"z" * 4096
    assert os.lseek(fd, MB, os.SEEK_DATA) == MB


@tree(SPARSE)
def test_truncate_up_makes_a_hole(fs: Place) -> None:
    os.truncate(fs / "none", 100 * MB)
    assert fs.stat("none").st_blocks * 512 < MB


def test_inode_flags_can_be_asked_for(fs: Place) -> None:
    """lsattr, cp and chattr ask; directories too."""
    for name in ("f", "d"):
        fd = fs.open(name, os.O_RDONLY)
        buf = fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))
        assert struct.unpack("q", buf)[0] & 0x30 == 0, "neither immutable nor append-only"
