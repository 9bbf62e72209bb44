"""Reading and writing: every call that moves bytes, mappings, syncing, large offsets, descriptors across
copy-up."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.stack import File

from .calls import err, sync_file_range, syncfs
from .place import BIG, Place, compared, forked, only, tree

RW = os.O_RDWR


def test_read_calls(fs: Place) -> None:
    fd = fs.open("big", os.O_RDONLY)
    assert os.read(fd, 10) == BIG[:10]
    assert os.pread(fd, 10, 1000) == BIG[1000:1010]
    assert os.read(fd, 10) == BIG[10:20]
    a, b = bytearray(3), bytearray(5)
    assert os.readv(fd, [a, b]) == 8 and bytes(a + b) == BIG[20:28]
    assert os.preadv(fd, [a, b], 4090) == 8 and bytes(a + b) == BIG[4090:4098]
    assert os.lseek(fd, 0, os.SEEK_CUR) == 28
    assert os.lseek(fd, -5, os.SEEK_END) == len(BIG) - 5
    assert os.read(fd, 100) == BIG[-5:] and os.read(fd, 100) == b""
    assert os.pread(fd, 100, len(BIG) + 5) == b""


def test_write_calls(fs: Place) -> None:
    want = bytearray(BIG)
    fd = fs.open("big", RW)

    def put(at: int, data: bytes) -> None:
        want[at : at + len(data)] = data

    assert os.write(fd, b"AAAA") == 4
    put(0, b"AAAA")
    assert os.pwrite(fd, b"BBBB", 8190) == 4
    put(8190, b"BBBB")
    assert os.writev(fd, [b"CC", b"", b"DDD"]) == 5
    put(4, b"CCDDD")
    assert os.pwritev(fd, [b"EE", b"F"], len(BIG) + 10) == 3
    want += bytes(10) + b"EEF"
    os.lseek(fd, 20_000, os.SEEK_SET)
    os.write(fd, b"G" * 70_000)
    put(20_000, b"G" * 70_000)
    assert fs.read("big") == bytes(want) == os.pread(fd, 1 << 20, 0)
    assert fs.stat("big").st_size == len(want)


@pytest.mark.parametrize("name", ["f", "empty", "big", "sparse", "h1"])
@compared
def test_append_by_path(fs: Place, name: str) -> object:
    for part in (b"one", b"two" * 5000):
        fs.append(name, part)
    return fs.read(name), fs.stat(name).st_size, fs.stat(name).st_nlink


@only("big", "f", "empty")
@pytest.mark.parametrize("size", [0, 1, 100, 4095, 4096, 4097, 307_200, 307_201, 1 << 20, 1 << 32])
@pytest.mark.parametrize("name", ["big", "f", "empty"])
def test_truncate(fs: Place, name: str, size: int) -> None:
    before = fs.read(name)
    os.truncate(fs / name, size)
    assert fs.stat(name).st_size == size
    with open(fs / name, "rb") as f:
        assert f.read(1 << 20) == before[:size].ljust(min(size, 1 << 20), b"\0")
        if size > 1 << 20:
            f.seek(size - 10)
            assert f.read() == bytes(10)


def test_truncate_down_and_up_shows_zeros(fs: Place) -> None:
    fd = fs.open("big", RW)
    os.ftruncate(fd, 5000)
    os.ftruncate(fd, 20_000)
    assert fs.read("big") == BIG[:5000] + bytes(15_000)


@pytest.mark.parametrize(
    "name", ["d", "l", "ld", "lx", "loop", "fifo", "sock", "chr", "nothing", "f/x", "d/a/x"]
)
@compared
def test_truncate_errors(fs: Place, name: str) -> object:
    return err(os.truncate, fs / name, 3), err(os.truncate, fs / name, -1)


def test_write_beyond_the_end_leaves_zeros(fs: Place) -> None:
    fd = fs.open("f", RW)
    os.pwrite(fd, b"x", 10_000)
    assert fs.read("f") == b"hello world\n" + bytes(10_000 - 12) + b"x"


@pytest.mark.parametrize("offset", [2**31 - 2, 2**32 - 2, 2**40, 2**43])
def test_large_offsets(fs: Place, offset: int) -> None:
    fd = fs.open("f", RW)
    assert os.pwrite(fd, b"ends", offset) == 4
    assert fs.stat("f").st_size == offset + 4
    assert os.pread(fd, 10, offset) == b"ends" and os.pread(fd, 4, offset - 4) == bytes(4)
    assert os.lseek(fd, -2, os.SEEK_END) == offset + 2
    assert os.read(fd, 10) == b"ds"
    assert os.pread(fd, 5, 0) == b"hello"


def test_bad_offsets(fs: Place) -> None:
    fd = fs.open("f", RW)
    assert err(os.lseek, fd, -1, os.SEEK_SET) == "EINVAL"
    assert err(os.pread, fd, 1, -1) == "EINVAL"
    assert err(os.pwrite, fd, b"x", -1) == "EINVAL"
    assert err(os.ftruncate, fd, -1) == "EINVAL"
    assert err(os.pwrite, fd, b"x", 2**63 - 1) in ("EFBIG", "EINVAL")
    assert fs.read("f") == b"hello world\n"


def test_file_size_limit(fs: Place) -> None:
    def child() -> tuple[str, int, str]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        fd = os.open(fs / "f", RW)
        return err(os.ftruncate, fd, 101), os.pwrite(fd, b"x" * 50, 80), err(os.pwrite, fd, b"x", 100)

    assert forked(child) == ("EFBIG", 20, "EFBIG")
    assert fs.stat("f").st_size == 100


def test_big_writes_and_reads(fs: Place) -> None:
    data = random.Random(5).randbytes(3_000_001)
    fd = fs.open("n", RW | os.O_CREAT)
    assert os.write(fd, data) == len(data)
    assert os.pread(fd, len(data) + 10, 0) == data
    assert fs.read("n") == data


def test_random_writes_over_a_copied_up_file(fs: Place) -> None:
    rng, want = random.Random(7), bytearray(BIG)
    fd = fs.open("big", RW)
    for _ in range(200):
        at, data = rng.randrange(400_000), rng.randbytes(rng.randrange(1, 9000))
        os.pwrite(fd, data, at)
        if at + len(data) > len(want):
            want += bytes(at + len(data) - len(want))
        want[at : at + len(data)] = data
    assert os.pread(fd, 1 << 20, 0) == bytes(want)
    assert fs.read("big") == bytes(want)
    if fs.mounted:
        fs.close(fd)
        fs.mounted.remount()
        assert fs.read("big") == bytes(want)


# --- calls that move data inside the kernel ---


def test_copy_file_range(fs: Place) -> None:
    src, dst = fs.open("big", os.O_RDONLY), fs.open("n", RW | os.O_CREAT)
    done = 0
    while done < len(BIG):
        n = os.copy_file_range(src, dst, len(BIG) - done)
        assert n > 0
        done += n
    assert fs.read("n") == BIG
    assert os.copy_file_range(src, dst, 100, 0, 5000) == 100
    assert fs.read("n")[5000:5100] == BIG[:100]
    assert os.copy_file_range(src, dst, 100) == 0
    assert err(os.copy_file_range, dst, src, 10, 0, 0) == "EBADF"
    assert err(os.copy_file_range, dst, dst, 1000, 0, 10) == "EINVAL"


def test_copy_file_range_onto_a_lower_file(fs: Place) -> None:
    src, dst = fs.open("big", os.O_RDONLY), fs.open("f", RW)
    assert os.copy_file_range(src, dst, 5, 100, 6) == 5
    assert fs.read("f") == b"hello " + BIG[100:105] + b"\n"


def test_sendfile_and_splice(fs: Place) -> None:
    src, dst = fs.open("big", os.O_RDONLY), fs.open("n", RW | os.O_CREAT)
    done = 0
    while done < len(BIG):
        done += os.sendfile(dst, src, done, len(BIG) - done)
    assert fs.read("n") == BIG
    r, w = os.pipe()
    try:
        assert os.splice(src, w, 4096, offset_src=8192) == 4096
        assert os.splice(r, dst, 4096, offset_dst=100) == 4096
    finally:
        os.close(r)
        os.close(w)
    assert fs.read("n")[100:4196] == BIG[8192:12288]


def test_reflink_copy_falls_back(fs: Place) -> None:
    import shutil

    shutil.copyfile(fs / "big", fs / "n")
    assert fs.read("n") == BIG


# --- mappings ---


@pytest.mark.parametrize("name", ["big", "h1", "x"])
def test_shared_mapping_reads_and_writes(fs: Place, name: str) -> None:
    before = fs.read(name)
    fd = fs.open(name, RW)
    with mmap.mmap(fd, 0) as m:
        assert m[:] == before
        m[2:5] = b"MAP"
        assert os.pread(fd, 5, 0) == before[:2] + b"MAP"
        os.pwrite(fd, b"WRITE", 0)
        assert m[:5] == b"WRITE"
        m[0:1] = b"w"
        m.flush()
    assert fs.read(name)[:5] == b"wRITE"


def test_store_is_seen_after_munmap_and_remount(fs: Place) -> None:
    fd = fs.open("big", RW)
    with mmap.mmap(fd, 0) as m:
        m[200_000:200_003] = b"far"
    fs.close(fd)
    assert fs.read("big")[200_000:200_003] == b"far"
    if fs.mounted:
        fs.mounted.remount()
        assert fs.read("big")[200_000:200_003] == b"far"


def test_private_mapping_never_reaches_the_file(fs: Place) -> None:
    fd = fs.open("big", os.O_RDONLY)
    with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m:
        m[0:5] = b"MINE!"
        assert m[:5] == b"MINE!"
    assert fs.read("big") == BIG


def test_mapping_survives_close_and_unlink(fs: Place) -> None:
    fd = fs.open("big", RW)
    m = mmap.mmap(fd, 0)
    fs.close(fd)
    os.unlink(fs / "big")
    assert m[100_000:100_010] == BIG[100_000:100_010]
    m[0:2] = b"ok"
    assert m[0:2] == b"ok"
    m.flush()
    m.close()


def test_two_mappings_of_one_file_agree(fs: Place) -> None:
    a, b = fs.open("big", RW), fs.open("big", RW)
    with mmap.mmap(a, 8192) as m, mmap.mmap(b, 8192) as n:
        m[4096:4100] = b"same"
        assert n[4096:4100] == b"same"


def test_mapping_read_only_lower_file_sees_a_later_write(fs: Place) -> None:
    """The mapping was there before the copy-up."""
    r = fs.open("big", os.O_RDONLY)
    with mmap.mmap(r, 0, mmap.MAP_SHARED, mmap.PROT_READ) as m:
        assert m[:4] == BIG[:4]
        w = fs.open("big", RW)
        os.pwrite(w, b"NEW!", 0)
        assert os.pread(r, 4, 0) == b"NEW!"
        assert m[:4] == b"NEW!"


def test_permission_for_a_writable_mapping(fs: Place) -> None:
    fd = fs.open("f", os.O_RDONLY)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 4, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def test_access_beyond_the_end_of_a_mapping_is_sigbus(fs: Place) -> None:
    def child() -> None:
        fd = os.open(fs / "f", RW)
        m = mmap.mmap(fd, 12)
        os.ftruncate(fd, 0)
        _ = m[0]

    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            child()
        finally:
            os._exit(3)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGBUS


# --- syncing ---

SYNCS: dict[str, Callable[[int], Any]] = {
    "fsync": os.fsync,
    "fdatasync": os.fdatasync,
    "sync_file_range": lambda fd: sync_file_range(fd, 0, 0),
    "syncfs": syncfs,
}


@pytest.mark.parametrize("call", SYNCS)
def test_sync(fs: Place, call: str) -> None:
    fd = fs.open("f", RW)
    SYNCS[call](fd)
    os.write(fd, b"HELLO")
    SYNCS[call](fd)
    new = fs.open("n", RW | os.O_CREAT)
    os.write(new, b"x")
    SYNCS[call](new)
    ro = fs.open("f2", os.O_RDONLY)
    SYNCS[call](ro)
    assert fs.read("f") == b"HELLO world\n" and fs.read("n") == b"x"


@pytest.mark.parametrize("name", ["d", "e", "."])
def test_sync_of_a_directory(fs: Place, name: str) -> None:
    fd = fs.open(name, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    fs.write(f"{name}/n", b"x")
    os.fsync(fd)
    os.fdatasync(fd)
    os.unlink(fs / f"{name}/n")
    os.fsync(fd)


@compared
def test_sync_of_what_cannot_be_synced(fs: Place) -> object:
    fifo = fs.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    path = fs.open("f", os.O_PATH)
    return err(os.fsync, fifo), err(os.fsync, path), err(os.fdatasync, path)


def test_sync_of_an_unlinked_file(fs: Place) -> None:
    fd = fs.open("f", RW)
    os.unlink(fs / "f")
    os.write(fd, b"gone")
    os.fsync(fd)
    assert os.pread(fd, 4, 0) == b"gone"


def test_o_sync_writes(fs: Place) -> None:
    for flag in (os.O_SYNC, os.O_DSYNC):
        fd = fs.open("f", RW | flag)
        assert os.write(fd, b"durable") == 7
        assert fs.read("f")[:7] == b"durable"


# --- flags of descriptors ---


def test_fcntl_status_flags(fs: Place) -> None:
    import fcntl

    fd = fs.open("f", RW)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
    os.write(fd, b"tail")
    assert fs.read("f") == b"hello world\ntail"
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    os.pwrite(fd, b"J", 0)
    assert fs.read("f") == b"Jello world\ntail"


def test_duplicated_descriptors_share_the_offset(fs: Place) -> None:
    fd = fs.open("f", RW)
    other = os.dup(fd)
    try:
        os.write(fd, b"12")
        os.write(other, b"34")
        assert fs.read("f") == b"1234o world\n"
    finally:
        os.close(other)


def test_descriptor_inherited_by_a_child(fs: Place) -> None:
    fd = fs.open("f", RW)
    forked(lambda: os.write(fd, b"child"))
    os.write(fd, b"parent!")
    assert fs.read("f") == b"childparent!"


@tree({f"f{i}": File(data=b"%d" % i) for i in range(300)})
def test_many_open_files(fs: Place) -> None:
    readers = [fs.open(f"f{i}", os.O_RDONLY) for i in range(300)]
    writers = [fs.open(f"f{i}", RW) for i in range(0, 300, 3)]
    for i, fd in enumerate(writers):
        os.pwrite(fd, b"w", 10)
        assert os.pread(readers[3 * i], 20, 0)[-1:] == b"w"
    assert [os.pread(fd, 3, 0).rstrip(b"\0") for fd in readers] == [b"%d" % i for i in range(300)]


def test_ioctl_on_a_file_is_refused_as_not_a_terminal(fs: Place) -> None:
    """isatty() of every Python program that opens a file."""
    import termios

    fd = fs.open("f", os.O_RDONLY)
    assert not os.isatty(fd)
    with pytest.raises(termios.error) as e:
        termios.tcgetattr(fd)
    assert e.value.args[0] == errno.ENOTTY
