"""Carries the requests that pyfuse3 cannot: takes a whole FUSE frame, calls Vfs, answers with a payload. As
`adapter` it decides nothing about layers.

A frame is what the kernel wrote: struct fuse_in_header and the request's own struct (linux/fuse.h 7.45, whose
names the layouts below bear; all are padded by hand, so `=` fits every 64-bit machine).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import struct
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, Protocol

from layerfs.fuse.adapter import FOR_EVER, caller_of
from layerfs.fuse.counters import Counters
from layerfs.vfs.vfs import Attributes, Caller, Vfs

log = logging.getLogger("layerfs.fuse")

READ: Final = 15
WRITE: Final = 16
FSYNC: Final = 20
SETXATTR: Final = 21
IOCTL: Final = 39
READDIRPLUS: Final = 44
FALLOCATE: Final = 43
LSEEK: Final = 46
COPY_FILE_RANGE: Final = 47
TMPFILE: Final = 51
STATX: Final = 52
COPY_FILE_RANGE_64: Final = 53

#: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
_IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
#: fh, offset, size, read_flags, lock_owner, flags, padding
_READ_IN: Final = struct.Struct("=QQIIQII")
#: fh, offset, size, write_flags, lock_owner, flags, padding; size bytes follow
_WRITE_IN: Final = struct.Struct("=QQIIQII")
#: size, flags, setxattr_flags, padding (FUSE_SETXATTR_EXT); the name follows, zero and size bytes
_SETXATTR_IN: Final = struct.Struct("=IIII")
#: fh, flags, cmd, arg, in_size, out_size; in_size bytes follow
_IOCTL_IN: Final = struct.Struct("=QIIQII")
#: fh, offset, length, mode, padding
_FALLOCATE_IN: Final = struct.Struct("=QqqII")
#: fh, offset, whence, padding
_LSEEK_IN: Final = struct.Struct("=QqII")
#: fh_in, off_in, nodeid_out, fh_out, off_out, len, flags
_COPY_FILE_RANGE_IN: Final = struct.Struct("=QqQQqQQ")
#: fh, fsync_flags, padding
_FSYNC_IN: Final = struct.Struct("=QII")
#: flags, mode, umask, open_flags; a name follows, which means nothing for TMPFILE
_CREATE_IN: Final = struct.Struct("=IIII")

#: result, flags, in_iovs, out_iovs; the command's result follows
_IOCTL_OUT: Final = struct.Struct("=iIII")
#: offset
_LSEEK_OUT: Final = struct.Struct("=q")
#: size, padding
_WRITE_OUT: Final = struct.Struct("=II")
#: bytes_copied
_COPY_FILE_RANGE_OUT: Final = struct.Struct("=Q")
#: nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec; a fuse_attr follows
_ENTRY_OUT: Final = struct.Struct("=QQQQII")
#: ino, size, blocks, seconds of atime, mtime, ctime; their nanoseconds; mode, nlink, uid, gid, rdev, blksize,
#: flags
_ATTR: Final = struct.Struct("=QQQqqqIIIIIIIIII")
#: fh, open_flags, backing_id
_OPEN_OUT: Final = struct.Struct("=QIi")
#: ino, off, namelen, type; the name follows, and zeros up to a multiple of 8 bytes
_DIRENT: Final = struct.Struct("=QQII")
#: attr_valid, attr_valid_nsec, flags, spare; a fuse_statx follows
_STATX_OUT: Final = struct.Struct("=QII16x")
#: mask, blksize, attributes, nlink, uid, gid, mode, spare, ino, size, blocks, attributes_mask; a fuse_sx_time
#: each for atime, btime, ctime, mtime; rdev_major, rdev_minor, dev_major, dev_minor, spare
_STATX: Final = struct.Struct("=IIQIIIHHQQQQ" + 4 * "qIi" + "IIII112x")

#: Bit of handles of files that the gate opened itself, for reading: only the node id says which.
_NATIVE_HANDLE: Final = 1 << 63
#: The largest answer that fuse_write_out has room for, in whole pages.
_MOST_COPIED: Final = 0xFFFFF000
_FOPEN_KEEP_CACHE: Final = 1 << 1
_FOPEN_PASSTHROUGH: Final = 1 << 7
_FSYNC_FDATASYNC: Final = 1 << 0
_WRITE_CACHE: Final = 1 << 0
_WRITE_KILL_SUIDGID: Final = 1 << 2
_SETXATTR_ACL_KILL_SGID: Final = 1 << 0
_STATX_BASIC_STATS: Final = 0x7FF
_STATX_BTIME: Final = 0x800
_SECOND: Final = 1_000_000_000

Payload = bytes | memoryview
#: Answers a request: unique, errno or 0, payload. Exactly once for each frame.
Reply = Callable[[int, int, Payload], None]


class _Carrier(Protocol):
    """A method named as its opcode: node id, caller and what follows the header; the answer's payload."""

    __name__: str

    def __call__(self, node: int, caller: Caller, body: bytes, /) -> Awaitable[Payload]: ...


class Extra:
    """One mount's. Frames may be handled at the same time."""

    def __init__(
        self, vfs: Vfs, reply: Reply, counters: Counters, again: Callable[[bytes], bool] = lambda frame: False
    ) -> None:
        """`again`: whether the gate answers a frame now."""
        self.vfs = vfs
        self._again = again
        self._reply = reply
        self._counters = counters
        self._carriers: dict[int, _Carrier] = {
            READ: self._read,
            WRITE: self._write,
            FSYNC: self._fsync,
            SETXATTR: self._setxattr,
            IOCTL: self._ioctl,
            READDIRPLUS: self._readdirplus,
            FALLOCATE: self._fallocate,
            LSEEK: self._lseek,
            COPY_FILE_RANGE: self._copy_file_range,
            TMPFILE: self._tmpfile,
            STATX: self._statx,
            COPY_FILE_RANGE_64: self._copy_file_range_64,
        }

    async def handle(self, frame: bytes) -> None:
        """Answers one request. File handles in it are those that Vfs gave out, or 0 where it gives out none,
        but for the source of a copy and the file of an FSYNC. OSError becomes the caller's errno; anything
        else is our bug: logged with its traceback, EIO for the caller.
        """
        _, opcode, unique, node, uid, gid, pid, _, _ = _IN_HEADER.unpack_from(frame)
        carrier = self._carriers.get(opcode)
        if carrier is None:
            self._reply(unique, errno.ENOSYS, b"")
            return
        payload: Payload = b""
        error, started = 0, self._counters.begin()
        try:
            if opcode == READDIRPLUS:
                await self.vfs.list_unasked(node)
                if self._again(frame):
                    return
            payload = await carrier(node, caller_of(uid, gid, pid), frame[_IN_HEADER.size :])
        except OSError as failure:
            error = failure.errno or errno.EIO
        except Exception:
            log.exception("%s failed", carrier.__name__)
            error = errno.EIO
        finally:
            self._counters.answered(carrier.__name__.removeprefix("_"), started)
        self._reply(unique, error, payload)

    # -- one method an opcode --------------------------------------------------------------------------

    async def _setxattr(self, node: int, caller: Caller, body: bytes) -> bytes:
        size, flags, how, _ = _SETXATTR_IN.unpack_from(body)
        name, _, rest = body[_SETXATTR_IN.size :].partition(b"\0")
        # Groups and capabilities are compared by the kernel, which knows through which mount the caller came.
        drops = bool(how & _SETXATTR_ACL_KILL_SGID)
        await self.vfs.setxattr(node, name, rest[:size], caller, flags=flags, drops_setgid=drops)
        return b""

    async def _ioctl(self, node: int, caller: Caller, body: bytes) -> bytes:
        # The file handle is passed over: with zero-message opens there is none.
        _, _, command, arg, in_size, _ = _IOCTL_IN.unpack_from(body)
        if arg:
            # A user's own pointer: not one of the commands that the kernel carries out itself, by requests
            # of its own, after it looked whether the caller may (fs/fuse/ioctl.c fuse_priv_ioctl, 5.13).
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        argument = body[_IOCTL_IN.size : _IOCTL_IN.size + in_size]
        return _IOCTL_OUT.pack(0, 0, 0, 0) + await self.vfs.ioctl(node, command, argument, caller)

    async def _read(self, node: int, caller: Caller, body: bytes) -> Payload:
        handle, offset, size, *_ = _READ_IN.unpack_from(body)
        async with self._file(node, handle, caller) as handle:
            return await self.vfs.files.read(handle, offset, size)

    async def _write(self, node: int, caller: Caller, body: bytes) -> bytes:
        handle, offset, size, how, _, flags, _ = _WRITE_IN.unpack_from(body)
        data = memoryview(body)[_WRITE_IN.size : _WRITE_IN.size + size]
        # Write-back is on nobody's behalf, whoever dirtied the page last.
        known = not how & _WRITE_CACHE
        waiter = Caller(caller.uid, caller.gid, caller.pid if known else 0, patient=True)
        async with self._file(node, handle, waiter, writes=True) as handle:
            written = await self.vfs.write(
                handle,
                offset,
                data,
                keeps_setid=not how & _WRITE_KILL_SUIDGID,
                flags=flags,
                writer=caller if known else None,
            )
        return _WRITE_OUT.pack(written, 0)

    async def _readdirplus(self, node: int, caller: Caller, body: bytes) -> bytes:
        _, offset, size, *_ = _READ_IN.unpack_from(body)
        listing = await self.vfs.list_unasked(node)
        payload = b""
        dots = ((b".", listing.node.id), (b"..", (listing.node.parent or listing.node).id))
        for name, ino in dots[offset:]:
            payload += _listed(name, ino, len(name), stat.S_IFDIR)
        for at in range(bisect_right(listing.offsets, offset), len(listing.names)):
            name, behind = listing.names[at], listing.offsets[at]
            if len(payload) + len(_listed(name, 0, 0, 0)) > size:
                break
            try:
                found = await self.vfs.lookup(node, name)
            except OSError:
                # It can be listed, but not looked up: whoever uses it gets the error.
                kind = stat.S_IFDIR if self.vfs.is_directory(node, name) else stat.S_IFREG
                payload += _listed(name, behind, behind, kind)
                continue
            if found is not None:
                payload += _listed(name, found.ino, behind, found.st.st_mode, _entry_out(found))
        return payload

    async def _fallocate(self, node: int, caller: Caller, body: bytes) -> bytes:
        handle, offset, length, mode, _ = _FALLOCATE_IN.unpack_from(body)
        async with self._file(node, handle, caller, writes=True) as handle:
            await self.vfs.allocate(handle, mode, offset, length, caller)
        return b""

    async def _lseek(self, node: int, caller: Caller, body: bytes) -> bytes:
        handle, offset, whence, _ = _LSEEK_IN.unpack_from(body)
        async with self._file(node, handle, caller) as handle:
            return _LSEEK_OUT.pack(await self.vfs.seek(handle, offset, whence))

    async def _copy_file_range(self, node: int, caller: Caller, body: bytes) -> bytes:
        return _WRITE_OUT.pack(await self._copy(node, caller, body, _MOST_COPIED), 0)

    async def _copy_file_range_64(self, node: int, caller: Caller, body: bytes) -> bytes:
        return _COPY_FILE_RANGE_OUT.pack(await self._copy(node, caller, body, 1 << 63))

    async def _copy(self, node: int, caller: Caller, body: bytes, most: int) -> int:
        source, offset, into, target, target_offset, length, flags = _COPY_FILE_RANGE_IN.unpack_from(body)
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        async with (
            self._file(into, target, caller, writes=True) as target,
            self._file(node, source, caller) as source,
        ):
            return await self.vfs.copy(source, offset, target, target_offset, min(length, most), caller)

    async def _fsync(self, node: int, caller: Caller, body: bytes) -> bytes:
        handle, flags, _ = _FSYNC_IN.unpack_from(body)
        async with self._file(node, handle, caller) as handle:
            await self.vfs.fsync(handle, bool(flags & _FSYNC_FDATASYNC))
        return b""

    @asynccontextmanager
    async def _file(
        self, node: int, handle: int, caller: Caller, *, writes: bool = False
    ) -> AsyncIterator[int]:
        """A handle of Vfs for the file that a request means. One that the gate opened is for reading."""
        if self.vfs.unasked is not None and not handle:
            with self.vfs.unasked.using(await self.vfs.attend(node, caller, writes=writes)) as id:
                yield id
            return
        if not handle & _NATIVE_HANDLE:
            yield handle
            return
        opened = await self.vfs.open(node, os.O_RDONLY, caller)
        try:
            yield opened.id
        finally:
            self.vfs.files.release(opened.id)

    async def _tmpfile(self, node: int, caller: Caller, body: bytes) -> bytes:
        flags, mode, umask, _ = _CREATE_IN.unpack_from(body)
        caller = Caller(caller.uid, caller.gid, caller.pid, umask)
        mode = stat.S_IMODE(mode) | stat.S_IFREG
        handle, attributes = await self.vfs.tmpfile(node, mode, flags, caller)
        id = handle.id if self.vfs.unasked is None else 0
        flags = _FOPEN_PASSTHROUGH if handle.backing else _FOPEN_KEEP_CACHE
        return _entry_out(attributes) + _OPEN_OUT.pack(id, flags, handle.backing)

    async def _statx(self, node: int, caller: Caller, body: bytes) -> bytes:
        attributes = await self.vfs.getattr(node)
        return _STATX_OUT.pack(_valid(attributes), 0, 0) + _statx(attributes, await self.vfs.birth_time(node))


def _valid(attributes: Attributes) -> int:
    """Seconds that the kernel may keep them."""
    return 0 if attributes.fleeting else int(FOR_EVER)


def _listed(name: bytes, ino: int, behind: int, mode: int, entry: bytes = b"") -> bytes:
    """struct fuse_direntplus; without `entry` a name and a type alone. `behind`: the offset behind it."""
    item = (entry or bytes(_ENTRY_OUT.size + _ATTR.size)) + _DIRENT.pack(ino, behind, len(name), mode >> 12)
    return item + name + bytes(-len(name) % 8)


def _entry_out(attributes: Attributes) -> bytes:
    """struct fuse_entry_out."""
    st = attributes.st
    times = [divmod(ns, _SECOND) for ns in (st.st_atime_ns, st.st_mtime_ns, attributes.ctime_ns)]
    valid = _valid(attributes)
    return _ENTRY_OUT.pack(attributes.ino, 0, int(FOR_EVER), valid, 0, 0) + _ATTR.pack(
        attributes.ino,
        st.st_size,
        attributes.blocks,
        *(seconds for seconds, _ in times),
        *(nanoseconds for _, nanoseconds in times),
        st.st_mode,
        attributes.nlink,
        attributes.uid,
        attributes.gid,
        st.st_rdev & 0xFFFFFFFF,
        st.st_blksize,
        0,
    )


def _statx(attributes: Attributes, born: int | None) -> bytes:
    """struct fuse_statx."""
    st = attributes.st
    times = (st.st_atime_ns, born or 0, attributes.ctime_ns, st.st_mtime_ns)
    return _STATX.pack(
        _STATX_BASIC_STATS | (_STATX_BTIME if born is not None else 0),
        st.st_blksize,
        0,
        attributes.nlink,
        attributes.uid,
        attributes.gid,
        st.st_mode,
        0,
        attributes.ino,
        st.st_size,
        attributes.blocks,
        0,
        *(field for ns in times for field in (*divmod(ns, _SECOND), 0)),
        os.major(st.st_rdev),
        os.minor(st.st_rdev),
        0,
        0,
    )
