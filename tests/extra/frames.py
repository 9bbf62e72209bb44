"""Requests and answers of linux/fuse.h 7.45 as the kernel lays them out, and a stand-in for the kernel that
sends them to `Extra`. Written from the header, not from `layerfs.fuse.extra`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ctypes import Structure, c_int32, c_int64, c_uint16, c_uint32, c_uint64
from typing import Any, TypeVar

import trio

from layerfs.fuse.counters import Counters
from layerfs.fuse.extra import Extra
from layerfs.ids import ROOT
from layerfs.overlay.names import TRUSTED, USER, XattrNames
from layerfs.stack import Stack as Layers
from layerfs.upper.upper import Upper
from layerfs.vfs.vfs import Caller, Vfs
from tests.support.stack import Stack

NAMES = XattrNames(TRUSTED if os.geteuid() == 0 else USER)
FSYNC, SETXATTR, IOCTL, FALLOCATE, LSEEK, COPY_FILE_RANGE, TMPFILE, STATX = 20, 21, 39, 43, 46, 47, 51, 52
COPY_FILE_RANGE_64 = 53


class InHeader(Structure):
    _fields_ = [
        ("len", c_uint32),
        ("opcode", c_uint32),
        ("unique", c_uint64),
        ("nodeid", c_uint64),
        ("uid", c_uint32),
        ("gid", c_uint32),
        ("pid", c_uint32),
        ("total_extlen", c_uint16),
        ("padding", c_uint16),
    ]


class SetxattrIn(Structure):
    _fields_ = [
        ("size", c_uint32),
        ("flags", c_uint32),
        ("setxattr_flags", c_uint32),
        ("padding", c_uint32),
    ]


class IoctlIn(Structure):
    _fields_ = [
        ("fh", c_uint64),
        ("flags", c_uint32),
        ("cmd", c_uint32),
        ("arg", c_uint64),
        ("in_size", c_uint32),
        ("out_size", c_uint32),
    ]


class IoctlOut(Structure):
    _fields_ = [("result", c_int32), ("flags", c_uint32), ("in_iovs", c_uint32), ("out_iovs", c_uint32)]


class FallocateIn(Structure):
    _fields_ = [
        ("fh", c_uint64),
        ("offset", c_uint64),
        ("length", c_uint64),
        ("mode", c_uint32),
        ("padding", c_uint32),
    ]


class LseekIn(Structure):
    _fields_ = [("fh", c_uint64), ("offset", c_uint64), ("whence", c_uint32), ("padding", c_uint32)]


class LseekOut(Structure):
    _fields_ = [("offset", c_uint64)]


class CopyFileRangeIn(Structure):
    _fields_ = [
        ("fh_in", c_uint64),
        ("off_in", c_uint64),
        ("nodeid_out", c_uint64),
        ("fh_out", c_uint64),
        ("off_out", c_uint64),
        ("len", c_uint64),
        ("flags", c_uint64),
    ]


class WriteOut(Structure):
    _fields_ = [("size", c_uint32), ("padding", c_uint32)]


class CopyFileRangeOut(Structure):
    _fields_ = [("bytes_copied", c_uint64)]


class FsyncIn(Structure):
    _fields_ = [("fh", c_uint64), ("fsync_flags", c_uint32), ("padding", c_uint32)]


class CreateIn(Structure):
    _fields_ = [("flags", c_uint32), ("mode", c_uint32), ("umask", c_uint32), ("open_flags", c_uint32)]


class Attr(Structure):
    _fields_ = [
        ("ino", c_uint64),
        ("size", c_uint64),
        ("blocks", c_uint64),
        ("atime", c_uint64),
        ("mtime", c_uint64),
        ("ctime", c_uint64),
        ("atimensec", c_uint32),
        ("mtimensec", c_uint32),
        ("ctimensec", c_uint32),
        ("mode", c_uint32),
        ("nlink", c_uint32),
        ("uid", c_uint32),
        ("gid", c_uint32),
        ("rdev", c_uint32),
        ("blksize", c_uint32),
        ("flags", c_uint32),
    ]


class EntryOut(Structure):
    _fields_ = [
        ("nodeid", c_uint64),
        ("generation", c_uint64),
        ("entry_valid", c_uint64),
        ("attr_valid", c_uint64),
        ("entry_valid_nsec", c_uint32),
        ("attr_valid_nsec", c_uint32),
        ("attr", Attr),
    ]


class OpenOut(Structure):
    _fields_ = [("fh", c_uint64), ("open_flags", c_uint32), ("backing_id", c_int32)]


class TmpfileOut(Structure):
    _fields_ = [("entry", EntryOut), ("open", OpenOut)]


class StatxIn(Structure):
    _fields_ = [
        ("getattr_flags", c_uint32),
        ("reserved", c_uint32),
        ("fh", c_uint64),
        ("sx_flags", c_uint32),
        ("sx_mask", c_uint32),
    ]


class SxTime(Structure):
    _fields_ = [("tv_sec", c_int64), ("tv_nsec", c_uint32), ("__reserved", c_int32)]


class Statx(Structure):
    _fields_ = [
        ("mask", c_uint32),
        ("blksize", c_uint32),
        ("attributes", c_uint64),
        ("nlink", c_uint32),
        ("uid", c_uint32),
        ("gid", c_uint32),
        ("mode", c_uint16),
        ("__spare0", c_uint16),
        ("ino", c_uint64),
        ("size", c_uint64),
        ("blocks", c_uint64),
        ("attributes_mask", c_uint64),
        ("atime", SxTime),
        ("btime", SxTime),
        ("ctime", SxTime),
        ("mtime", SxTime),
        ("rdev_major", c_uint32),
        ("rdev_minor", c_uint32),
        ("dev_major", c_uint32),
        ("dev_minor", c_uint32),
        ("__spare2", c_uint64 * 14),
    ]


class StatxOut(Structure):
    _fields_ = [
        ("attr_valid", c_uint64),
        ("attr_valid_nsec", c_uint32),
        ("flags", c_uint32),
        ("spare", c_uint64 * 2),
        ("stat", Statx),
    ]


_Out = TypeVar("_Out", bound=Structure)


class Kernel:
    """Sends frames and takes the answers, as one caller after another."""

    def __init__(self, vfs: Vfs) -> None:
        self.vfs = vfs
        self.caller = Caller(os.geteuid(), os.getegid(), os.getpid())
        self.counters = Counters()
        self.extra = Extra(vfs, self._reply, self.counters)
        self._unique = itertools.count(2, 2)
        self._answers: dict[int, tuple[int, bytes]] = {}

    def _reply(self, unique: int, error: int, payload: bytes) -> None:
        assert unique not in self._answers, "answered twice"
        self._answers[unique] = (error, payload)

    async def send(self, opcode: int, node: int, body: bytes) -> bytes:
        """The payload of the answer. Raises OSError."""
        who = self.caller
        unique = next(self._unique)
        size = ctypes.sizeof(InHeader) + len(body)
        uid, gid = (2**32 - 1 if each is None else each for each in (who.uid, who.gid))
        header = InHeader(size, opcode, unique, node, uid, gid, who.pid, 0, 0)
        await self.extra.handle(bytes(header) + body)
        error, payload = self._answers.pop(unique)
        if error:
            assert not payload
            raise OSError(error, os.strerror(error))
        return payload

    async def ask(self, opcode: int, node: int, request: Structure, answer: type[_Out]) -> _Out:
        """The same for an answer that is one struct and nothing else."""
        payload = await self.send(opcode, node, bytes(request))
        assert len(payload) == ctypes.sizeof(answer)
        return answer.from_buffer_copy(payload)

    async def find(self, path: str) -> int:
        """Node id of a path, looked up."""
        here = int(ROOT)
        for name in path.split("/"):
            found = await self.vfs.lookup(here, name.encode())
            assert found is not None, path
            here = found.ino
        return here

    async def open(self, path: str, flags: int) -> int:
        """File handle of a path."""
        return (await self.vfs.open(await self.find(path), flags, self.caller)).id

    async def setxattr(self, node: int, name: str, value: bytes, flags: int = 0, how: int = 0) -> None:
        request = bytes(SetxattrIn(len(value), flags, how, 0)) + name.encode() + b"\0" + value
        assert await self.send(SETXATTR, node, request) == b""

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        assert await self.send(FALLOCATE, 1, bytes(FallocateIn(fh, offset, length, mode))) == b""

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        answer = await self.ask(LSEEK, 1, LseekIn(fh, offset, whence), LseekOut)
        return int(answer.offset)

    async def copy(self, fh: int, offset: int, target: int, target_offset: int, length: int) -> int:
        request = CopyFileRangeIn(fh, offset, 0, target, target_offset, length, 0)
        answer = await self.ask(COPY_FILE_RANGE_64, 1, request, CopyFileRangeOut)
        return int(answer.bytes_copied)

    async def tmpfile(self, directory: int, flags: int, mode: int, umask: int = 0) -> TmpfileOut:
        request = bytes(CreateIn(flags | os.O_TMPFILE, mode, umask, 0)) + b"/\0"
        payload = await self.send(TMPFILE, directory, request)
        assert len(payload) == ctypes.sizeof(TmpfileOut)
        return TmpfileOut.from_buffer_copy(payload)

    async def statx(self, node: int) -> Any:
        return (await self.ask(STATX, node, StatxIn(sx_mask=0xFFF), StatxOut)).stat


@asynccontextmanager
async def kernel(stack: Stack) -> AsyncIterator[Kernel]:
    """Over the layers of a stack, which is not mounted."""
    layers = Layers([str(lower) for lower in stack.lowers], str(stack.upper) if stack.upper else None, NAMES)
    upper = None
    if layers.upper is not None:
        upper = Upper(layers.upper, str(stack.work), NAMES, volatile=False)
    mask = os.umask(0)
    try:
        async with trio.open_nursery() as nursery:
            vfs = Vfs(layers, upper, nursery)
            await vfs.start()
            yield Kernel(vfs)
            vfs.give_up()
            nursery.cancel_scope.cancel()
    finally:
        os.umask(mask)
        layers.pool.clear()
        owned = [each.fd for each in (*layers.lowers, layers.upper) if each is not None]
        if upper is not None:
            owned += [upper.work.fd, upper.work.base, upper.work.state, upper.work._lock]
        for fd in owned:
            fd.close()
