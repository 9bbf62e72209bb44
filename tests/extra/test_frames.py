"""Each request that pyfuse3 has no name for, as a frame: what it does, what comes back."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from layerfs.ids import ROOT
from layerfs.vfs.vfs import Caller, Change
from tests.posix.calls import FALLOC_COLLAPSE, FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO, statx
from tests.support.stack import Stack

from . import frames
from .conftest import BIG
from .frames import Kernel, kernel

pytestmark = pytest.mark.trio

GETFLAGS, SETFLAGS = 0x80086601, 0x40086602
FSGETXATTR, FSSETXATTR = 0x801C581F, 0x401C5820
NODUMP = 0x40
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
#: rw-, user 7: r--, group rw-, mask rw-, r--
ACL = struct.pack(
    "<I" + 5 * "HHI", 2, 1, 6, 2**32 - 1, 2, 4, 7, 4, 6, 2**32 - 1, 0x10, 6, 2**32 - 1, 0x20, 4, 2**32 - 1
)
RW = os.O_RDWR


async def error_of(call: Any) -> str:
    try:
        await call
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


#: Sizes in bytes that linux/fuse.h comes to.
SIZES = {
    frames.InHeader: 40,
    frames.SetxattrIn: 16,
    frames.IoctlIn: 32,
    frames.IoctlOut: 16,
    frames.FallocateIn: 32,
    frames.LseekIn: 24,
    frames.CopyFileRangeIn: 56,
    frames.CreateIn: 16,
    frames.EntryOut: 128,
    frames.OpenOut: 16,
    frames.StatxIn: 24,
    frames.StatxOut: 288,
}


@pytest.mark.parametrize("struct_", SIZES)
async def test_layouts(struct_: type[ctypes.Structure]) -> None:
    assert ctypes.sizeof(struct_) == SIZES[struct_]


async def test_setxattr(laid_out: Stack) -> None:
    create, replace = os.XATTR_CREATE, os.XATTR_REPLACE
    assert laid_out.upper is not None
    in_upper = (laid_out.upper / "f").exists()
    async with kernel(laid_out) as k:
        node = await k.find("f")
        for flags in (replace, create | replace):
            assert await error_of(k.setxattr(node, "user.new", b"1", flags)) == "ENODATA"
        assert (laid_out.upper / "f").exists() == in_upper  # what fails copies nothing up
        await k.setxattr(node, "user.new", b"a\0b", create)
        for flags in (create, create | replace):
            assert await error_of(k.setxattr(node, "user.new", b"2", flags)) == "EEXIST"
        assert await k.vfs.getxattr(node, b"user.new") == b"a\0b"
        await k.setxattr(node, "user.new", b"", replace)
        assert await k.vfs.getxattr(node, b"user.new") == b""
        await k.setxattr(node, "user.new", b"\0" * 1000)
        assert await k.vfs.getxattr(node, b"user.new") == b"\0" * 1000


@pytest.mark.parametrize("name", ["f", "d"])
async def test_the_kernel_says_whether_an_acl_takes_setgid(root: None, laid_out: Stack, name: str) -> None:
    """Whatever the caller's groups seem to be: it knows how the mount he came by maps them."""
    member, stranger = Caller(5, 77, 0), Caller(5, 5, 0)
    async with kernel(laid_out) as k:
        node = await k.find(name)
        for who in (member, stranger):
            for kill, left in ((1, 0o664), (0, 0o2664)):
                await k.vfs.setattr(node, Change(gid=77), k.caller)
                await k.vfs.setattr(node, Change(mode=0o2775), k.caller)
                k.caller = who
                await k.setxattr(node, DEFAULT, ACL, how=kill) if name == "d" else None
                assert stat.S_IMODE((await k.vfs.getattr(node)).st.st_mode) == 0o2775
                await k.setxattr(node, ACCESS, ACL, how=kill)
                assert stat.S_IMODE((await k.vfs.getattr(node)).st.st_mode) == left
                k.caller = Caller(0, 0, 0)


async def test_fallocate(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        fh = await k.open("big", RW)
        await k.fallocate(fh, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 4096, 8192)
        await k.fallocate(fh, 0, len(BIG), 1000)
        want = BIG[:4096] + bytes(8192) + BIG[12288:] + bytes(1000)
        assert bytes(await k.vfs.files.read(fh, 0, 1 << 20)) == want
        if await error_of(k.fallocate(fh, FALLOC_COLLAPSE, 4096, 8192)) == "":
            want = want[:4096] + want[12288:]
        assert bytes(await k.vfs.files.read(fh, 0, 1 << 20)) == want
        assert (await k.vfs.getattr(await k.find("big"))).st.st_size == len(want)


async def test_fallocate_errors(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        reader, writer = await k.open("f", os.O_RDONLY), await k.open("f", RW)
        assert await error_of(k.fallocate(reader, 0, 0, 10)) == "EBADF"
        assert await error_of(k.fallocate(12345, 0, 0, 10)) == "EBADF"
        assert await error_of(k.fallocate(writer, 0, 0, 0)) == "EINVAL"
        assert await error_of(k.fallocate(writer, 1 << 20, 0, 10)) == "ENOTSUP"
        assert await error_of(k.fallocate(writer, FALLOC_ZERO, 2**62, 2**62)) == "EFBIG"
        assert bytes(await k.vfs.files.read(reader, 0, 100)) == b"hello world\n"


async def test_fallocate_is_a_change(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        node, fh = await k.find("f"), await k.open("f", RW)
        before = await k.vfs.getattr(node)
        await k.fallocate(fh, 0, 0, 4096)
        after = await k.vfs.getattr(node)
        assert after.ctime_ns > before.ctime_ns and after.st.st_mtime_ns > before.st.st_mtime_ns


async def test_lseek(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        plain = os.open(laid_out.mnt / "sparse", os.O_RDONLY)
        for flags in (os.O_RDONLY, RW):
            fh = await k.open("sparse", flags)
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                for at in (0, 1 << 20, (1 << 20) + 5000, 3 << 20):
                    try:
                        want: object = os.lseek(plain, at, whence)
                    except OSError as error:
                        want = errno.errorcode[error.errno or 0]
                    try:
                        got: object = await k.lseek(fh, at, whence)
                    except OSError as error:
                        got = errno.errorcode[error.errno or 0]
                    assert got == want, (flags, whence, at)
            assert await error_of(k.lseek(fh, 0, os.SEEK_END)) == "EINVAL"
        os.close(plain)


@pytest.mark.parametrize("opcode", [frames.COPY_FILE_RANGE, frames.COPY_FILE_RANGE_64])
async def test_copy_file_range(laid_out: Stack, opcode: int) -> None:
    async with kernel(laid_out) as k:
        source, target = await k.open("big", os.O_RDONLY), await k.open("f", RW)
        answer: Any = frames.WriteOut if opcode == frames.COPY_FILE_RANGE else frames.CopyFileRangeOut

        async def copy(offset: int, target_offset: int, length: int, flags: int = 0) -> int:
            request = frames.CopyFileRangeIn(source, offset, 0, target, target_offset, length, flags)
            done = await k.ask(opcode, 1, request, answer)
            return int(done.size if opcode == frames.COPY_FILE_RANGE else done.bytes_copied)

        assert await copy(100, 6, 5) == 5
        assert bytes(await k.vfs.files.read(target, 0, 100)) == b"hello " + BIG[100:105] + b"\n"
        assert await copy(0, 0, 2**63) == len(BIG)
        assert bytes(await k.vfs.files.read(target, 0, 1 << 20)) == BIG
        assert await copy(len(BIG), 0, 10) == 0 == await copy(len(BIG) + 5, 0, 10)
        assert await error_of(copy(0, 0, 10, flags=1)) == "EINVAL"
        request = frames.CopyFileRangeIn(target, 0, 0, source, 0, 5, 0)
        assert await error_of(k.ask(opcode, 1, request, answer)) == "EBADF"


async def test_copy_of_what_is_open_twice(laid_out: Stack) -> None:
    """The source is copied up between; its old descriptor shows the new data."""
    async with kernel(laid_out) as k:
        old = await k.open("f", os.O_RDONLY)
        await k.vfs.write(await k.open("f", RW), 0, b"HELLO")
        target = await k.open("d/k", RW)
        assert await k.copy(old, 0, target, 0, 100) == 12
        assert bytes(await k.vfs.files.read(target, 0, 100)) == b"HELLO world\n"


# -- ioctl -----------------------------------------------------------------------------------------


async def ioctl(k: Kernel, node: int, command: int, value: bytes = b"", size: int = 0, arg: int = 0) -> bytes:
    request = frames.IoctlIn(0, 0, command, arg, len(value), size)
    payload = await k.send(frames.IOCTL, node, bytes(request) + value)
    out = frames.IoctlOut.from_buffer_copy(payload)
    assert (out.result, out.flags, out.in_iovs, out.out_iovs) == (0, 0, 0, 0)
    data = payload[ctypes.sizeof(out) :]
    assert len(data) == size
    return data


def flags_of(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        return int(struct.unpack("=I4x", fcntl.ioctl(fd, GETFLAGS, bytes(8)))[0])
    finally:
        os.close(fd)


@pytest.mark.parametrize("name", ["f", "d"])
async def test_inode_flags(laid_out: Stack, name: str) -> None:
    async with kernel(laid_out) as k:
        node = await k.find(name)
        flags = struct.unpack("=I", await ioctl(k, node, GETFLAGS, size=4))[0]
        assert flags & ~0x1000 == flags_of(laid_out.mnt / name) & ~0x1000  # but for "has an index"
        await ioctl(k, node, SETFLAGS, struct.pack("=I", flags | NODUMP))
        assert struct.unpack("=I", await ioctl(k, node, GETFLAGS, size=4))[0] == flags | NODUMP
        assert laid_out.upper is not None
        assert flags_of(laid_out.upper / name) == flags | NODUMP
        if name == "f":
            assert (laid_out.upper / name).read_bytes() == b"hello world\n"


async def test_extended_inode_flags(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        node = await k.find("f")
        value = await ioctl(k, node, FSGETXATTR, size=28)
        await ioctl(k, node, FSSETXATTR, struct.pack("=I", 0x80) + value[4:])  # FS_XFLAG_NODUMP
        assert struct.unpack_from("=I", await ioctl(k, node, FSGETXATTR, size=28))[0] & 0x80
        assert struct.unpack("=I", await ioctl(k, node, GETFLAGS, size=4))[0] & NODUMP
        assert await error_of(ioctl(k, node, FSSETXATTR, b"short")) == "EINVAL"


async def test_an_immutable_file_is_left_alone(root: None, laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        node = await k.find("f")
        flags = struct.unpack("=I", await ioctl(k, node, GETFLAGS, size=4))[0]
        await ioctl(k, node, SETFLAGS, struct.pack("=I", flags | 0x10))
        try:
            assert await error_of(k.vfs.open(node, RW, k.caller)) == "EPERM"
            assert await error_of(k.vfs.unlink(ROOT, b"f", k.caller)) == "EPERM"
        finally:
            await ioctl(k, node, SETFLAGS, struct.pack("=I", flags))
        await k.vfs.unlink(ROOT, b"f", k.caller)


@pytest.mark.parametrize("command", [0x5401, 0x40049409, 0, 0xFFFFFFFF])
async def test_other_ioctls(laid_out: Stack, command: int) -> None:
    """isatty() of every Python program; FICLONE, which the kernel keeps to itself."""
    async with kernel(laid_out) as k:
        for name in ("f", "d"):
            assert await error_of(ioctl(k, await k.find(name), command)) == "ENOTTY"


async def test_flags_that_the_kernel_has_not_looked_at(laid_out: Stack) -> None:
    """Before 5.13 it handed these commands on as they came, whoever asked."""
    async with kernel(laid_out) as k:
        node = await k.find("f")
        assert await error_of(ioctl(k, node, FSGETXATTR, size=28, arg=0x7FFF0000)) == "ENOTTY"
        assert await error_of(ioctl(k, node, FSSETXATTR, bytes(28), arg=0x7FFF0000)) == "ENOTTY"


# -- statx -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f", "big", "d", "h1", "l", "d/k"])
async def test_statx(laid_out: Stack, name: str) -> None:
    async with kernel(laid_out) as k:
        node = await k.find(name)
        got, attributes = await k.statx(node), await k.vfs.getattr(node)
        st = attributes.st
        assert got.mask == 0xFFF
        assert (got.mode, got.nlink, got.uid, got.gid) == (
            st.st_mode,
            attributes.nlink,
            attributes.uid,
            attributes.gid,
        )
        assert (got.ino, got.size, got.blocks, got.blksize) == (
            node,
            st.st_size,
            attributes.blocks,
            st.st_blksize,
        )
        for time, ns in (
            (got.atime, st.st_atime_ns),
            (got.mtime, st.st_mtime_ns),
            (got.ctime, attributes.ctime_ns),
        ):
            assert (time.tv_sec, time.tv_nsec) == divmod(ns, 10**9)
        layers = [laid_out.upper, *laid_out.lowers]
        real = [top / name for top in layers if top and os.path.lexists(top / name)]
        merged = name == "d" and len(real) > 1  # then it is the top lower's
        born = statx(real[merged], 0x100).btime_ns
        assert (got.btime.tv_sec, got.btime.tv_nsec) == divmod(born, 10**9)


async def test_statx_of_a_time_before_1970(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        node = await k.find("f")
        from layerfs.vfs.vfs import Change

        await k.vfs.setattr(node, Change(mtime_ns=-1_500_000_000), k.caller)
        got = await k.statx(node)
        assert (got.mtime.tv_sec, got.mtime.tv_nsec) == (-2, 500_000_000)


@pytest.mark.parametrize("name", ["f", "big", "d", "h1", "l"])
async def test_birth_time_stays(laid_out: Stack, name: str) -> None:
    """As on a plain directory: neither a change that copies up nor a new mount makes a file younger."""
    from layerfs.vfs.vfs import Change

    def born(found: Any) -> tuple[int, int]:
        return found.btime.tv_sec, found.btime.tv_nsec

    async with kernel(laid_out) as k:
        node = await k.find(name)
        first = born(await k.statx(node))
        await k.vfs.setattr(node, Change(uid=os.geteuid()), k.caller)
        assert born(await k.statx(node)) == first
        if name in ("f", "big"):
            await k.open(name, RW)
            assert born(await k.statx(node)) == first
    async with kernel(laid_out) as k:
        if name == "l" and os.geteuid() != 0:
            return  # a link carries no user xattr: the copy's own time shows
        assert born(await k.statx(await k.find(name))) == first


# -- answers ---------------------------------------------------------------------------------------


async def test_unknown_opcode(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        assert await error_of(k.send(4711, 1, b"")) == "ENOSYS"


async def test_our_bug_is_loud(
    laid_out: Stack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with kernel(laid_out) as k:
        monkeypatch.setattr(k.vfs, "seek", None)
        with caplog.at_level(logging.ERROR, "layerfs.fuse"):
            assert await error_of(k.lseek(1, 0, os.SEEK_DATA)) == "EIO"
        assert "_lseek failed" in caplog.text and "Traceback" in caplog.text


async def test_requests_are_counted(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        await k.statx(await k.find("f"))
        assert await error_of(k.lseek(1, 0, os.SEEK_DATA)) == "EBADF"
        found = {kind: sum(times) for kind, times in k.counters.histograms().items()}
        assert found == {"statx": 1, "lseek": 1}


# -- files that the gate opened itself: the node alone says which -----------------------------------

NATIVE = 1 << 63 | 5


async def test_copy_from_a_file_of_the_gate(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        node, target = await k.find("big"), await k.open("f", RW)
        request = frames.CopyFileRangeIn(NATIVE, 100, 0, target, 0, 12, 0)
        done = await k.ask(frames.COPY_FILE_RANGE_64, node, request, frames.CopyFileRangeOut)
        assert done.bytes_copied == 12
        assert bytes(await k.vfs.files.read(target, 0, 100)) == BIG[100:112]
        assert list(k.vfs.files._handles) == [target]


async def test_fsync_of_a_file_of_the_gate(laid_out: Stack) -> None:
    """It closes the file to changes for those who expect it, as any fsync (`vfs.hold`)."""
    async with kernel(laid_out) as k:
        node = await k.find("f")
        session = k.vfs.hold.session()
        session.expect(node)
        body = bytes(frames.FsyncIn(NATIVE, 1, 0))
        assert await k.send(frames.FSYNC, node, body) == b""
        assert node in session.closed and not k.vfs.files._handles
        session.end()


async def test_unknown_node(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        for opcode, body in (
            (frames.STATX, bytes(frames.StatxIn())),
            (frames.IOCTL, bytes(frames.IoctlIn(cmd=GETFLAGS))),
            (frames.TMPFILE, bytes(frames.CreateIn()) + b"/\0"),
        ):
            assert await error_of(k.send(opcode, 99999, body)) == "ESTALE"


async def test_read_only(laid_out: Stack) -> None:
    laid_out.upper = laid_out.work = None
    if not os.path.lexists(laid_out.lowers[0] / "f"):
        pytest.skip("all of it lies in the upper")
    async with kernel(laid_out) as k:
        node = await k.find("f")
        assert await error_of(ioctl(k, node, SETFLAGS, bytes(4))) == "EROFS"
        assert await error_of(k.tmpfile(ROOT, RW, 0o600)) == "EROFS"
        assert stat.S_ISREG((await k.statx(node)).mode)
