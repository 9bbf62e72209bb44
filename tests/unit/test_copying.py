"""copy_data on each kind of file system: the same bytes, the same holes, exactly as long; cut short,
cancelled, changed from outside.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layerfs.fdutil import Cancelled, copy_data, copying

KIB, MIB = 1 << 10, 1 << 20


@contextmanager
def files(directory: Path) -> Iterator[tuple[int, int]]:
    source = os.open(directory / "source", os.O_RDWR | os.O_CREAT)
    target = os.open(directory / "target", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        yield source, target
    finally:
        os.close(source)
        os.close(target)


def holes(fd: int) -> list[tuple[int, int]]:
    """(start, end) of every stretch of data."""
    found, offset, size = [], 0, os.fstat(fd).st_size
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            break
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, offset))
    return found


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


SHAPES = {
    "empty": (0, []),
    "one byte": (1, [(0, 1)]),
    "not whole blocks": (10_001, [(0, 10_001)]),
    "all hole": (1 * MIB, []),
    "hole at the end": (1 * MIB, [(0, 64 * KIB)]),
    "hole at the front": (1 * MIB, [(960 * KIB, 64 * KIB)]),
    "hole between": (1 * MIB, [(0, 64 * KIB), (512 * KIB, 64 * KIB)]),
    "many": (4 * MIB, [(n * 128 * KIB, 64 * KIB) for n in range(32)]),
    "odd": (3 * MIB + 7, [(64 * KIB, 3), (1 * MIB, 100 * KIB), (3 * MIB + 4, 3)]),
}


@pytest.mark.parametrize("in_kernel", [True, False], ids=["as it can", "read and write"])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_and_holes(on_each: Path, shape: str, in_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    size, pieces = SHAPES[shape]
    source_of = random.Random(shape)
    if not in_kernel:
        _refuse(monkeypatch, errno.EXDEV)
    with files(on_each) as (source, target):
        os.ftruncate(source, size)
        for offset, length in pieces:
            os.pwrite(source, source_of.randbytes(length), offset)
        os.fsync(source)
        copied = copy_data(source, target, size)
        assert content(target) == content(source)
        assert os.fstat(target).st_size == size
        assert in_kernel or not copied.cloned
        assert copied.bytes == (0 if copied.cloned else sum(end - start for start, end in holes(source)))
        os.fsync(target)
        assert holes(target) == holes(source)


def _refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Neither reflink nor copy_file_range."""

    def no(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", no)
    monkeypatch.setattr(copying.fcntl, "ioctl", no)


@pytest.mark.parametrize("size", [0, 1, 4096, 70_000, 1 * MIB])
def test_the_first_bytes_alone(on_each: Path, size: int) -> None:
    """For a caller who cuts the file there."""
    with files(on_each) as (source, target):
        os.pwrite(source, random.Random(1).randbytes(1 * MIB), 0)
        copy_data(source, target, size)
        assert content(target) == content(source)[:size]


def test_between_file_systems(on_each: Path, tmp_path: Path) -> None:
    with files(on_each) as (source, _), files(tmp_path) as (_, target):
        os.ftruncate(source, 2 * MIB)
        os.pwrite(source, b"x" * 100_000, 512 * KIB)
        copy_data(source, target, 2 * MIB)
        assert content(target) == content(source)
        assert sum(end - start for start, end in holes(target)) <= 256 * KIB


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ETXTBSY])
def test_without_help_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    _refuse(monkeypatch, number)
    with files(tmp_path) as (source, target):
        os.pwrite(source, random.Random(2).randbytes(3 * MIB + 5), 0)
        copy_data(source, target, 3 * MIB + 5)
        assert content(target) == content(source)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_real_faults_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    _refuse(monkeypatch, number)
    with files(tmp_path) as (source, target):
        os.pwrite(source, b"x" * 1000, 0)
        with pytest.raises(OSError) as caught:
            copy_data(source, target, 1000)
        assert caught.value.errno == number


def test_a_full_disk(ext4: Path) -> None:
    with files(ext4) as (source, target):
        room = os.statvfs(ext4)
        size = room.f_bavail * room.f_frsize // 3 * 2
        block = os.urandom(MIB)
        for offset in range(0, size, MIB):
            os.pwrite(source, block, offset)
        with pytest.raises(OSError) as caught:
            copy_data(source, target, os.fstat(source).st_size)
        assert caught.value.errno == errno.ENOSPC


def test_cancelled_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_CHUNK", 64 * KIB)
    looks = 0

    def cancelled() -> bool:
        nonlocal looks
        looks += 1
        return looks > 3

    with files(tmp_path) as (source, target):
        os.pwrite(source, b"x" * MIB, 0)
        monkeypatch.setattr(copying.fcntl, "ioctl", _no_reflink)
        with pytest.raises(Cancelled):
            copy_data(source, target, MIB, cancelled)
    assert looks == 4


def _no_reflink(*_: object) -> int:
    raise OSError(errno.EOPNOTSUPP, "no reflink")


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_source_that_is_cut_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool
) -> None:
    """Changed from outside: the content is undefined, but the copy ends, as long as was asked for."""
    monkeypatch.setattr(copying, "_CHUNK", 64 * KIB)
    if in_kernel:
        monkeypatch.setattr(copying.fcntl, "ioctl", _no_reflink)
    else:
        _refuse(monkeypatch, errno.EXDEV)
    with files(tmp_path) as (source, target):
        os.pwrite(source, b"x" * MIB, 0)
        looks = 0

        def cuts() -> bool:
            nonlocal looks
            looks += 1
            if looks == 3:
                os.ftruncate(source, 10)
            return False

        copy_data(source, target, MIB, cuts)
        assert os.fstat(target).st_size == MIB


def test_a_source_shorter_than_asked_for(on_each: Path) -> None:
    with files(on_each) as (source, target):
        os.pwrite(source, b"short", 0)
        copy_data(source, target, 100_000)
        assert os.fstat(target).st_size == 100_000
        assert os.pread(target, 5, 0) == b"short"
