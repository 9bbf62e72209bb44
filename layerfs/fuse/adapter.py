"""Translates pyfuse3 calls to Vfs and errors to errno, and counts them. Decides nothing about layers.

Kernel caching: only layerfs changes the tree, and every change comes through the kernel that caches, which
invalidates what it changed itself (fs/fuse/dir.c). So entries, attributes and absent names are good for ever;
one thing only has to be told: see `attributes_moved`. (In passthrough a file may change unseen: `fleeting`.)
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from layerfs.fuse.counters import Counters
from layerfs.vfs.caller import sees_callers
from layerfs.vfs.vfs import Attributes, Caller, Change, New, Vfs

log = logging.getLogger("layerfs.fuse")

#: Seconds the kernel may keep what it was told.
FOR_EVER = 1e8
#: Node ids of names that can be listed but not looked up: no node has them, and a FORGET of them is passed
#: over.
_NOBODY = 3 << 62
#: Bit of a WRITE's file handle by which a gate says what pyfuse3 does not: the writer has CAP_FSETID
#: (FUSE_HANDLE_KILLPRIV_V2 is on and FUSE_WRITE_KILL_SUIDGID is not among the write_flags).
KEEPS_SETID = 1 << 62
#: An id that a request does not tell (FUSE_INVALID_UIDGID).
_UNTOLD = 2**32 - 1
#: Opcodes of methods that have another name.
_OPCODES = {"readdir": "readdirplus"}
#: Names of a listing that are answered before others get their turn.
_TURN = 16

_F = TypeVar("_F", bound=Callable[..., Awaitable[Any]])


def _errors(method: _F) -> _F:
    """OSError becomes the caller's errno; anything else is our bug: logged with its traceback, EIO for the
    caller. Either way the request is counted.
    """
    kind = _OPCODES.get(method.__name__, method.__name__)

    @wraps(method)
    async def guarded(self: Operations, *args: Any) -> Any:
        started = self.counters.begin()
        try:
            return await method(self, *args)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except FUSEError:
            raise
        except Exception:
            log.exception("%s failed", method.__name__)
            raise FUSEError(errno.EIO) from None
        finally:
            self.counters.answered(kind, started)

    return guarded  # type: ignore[return-value]


def _entry(attributes: Attributes) -> EntryAttributes:
    st = attributes.st
    entry = EntryAttributes()
    entry.st_ino = attributes.ino
    entry.entry_timeout = FOR_EVER
    entry.attr_timeout = 0 if attributes.fleeting else FOR_EVER
    entry.st_mode = st.st_mode
    entry.st_nlink = attributes.nlink
    entry.st_uid = attributes.uid
    entry.st_gid = attributes.gid
    entry.st_rdev = st.st_rdev
    entry.st_size = st.st_size
    entry.st_blksize = st.st_blksize
    entry.st_blocks = attributes.blocks
    entry.st_atime_ns = st.st_atime_ns
    entry.st_mtime_ns = st.st_mtime_ns
    entry.st_ctime_ns = attributes.ctime_ns
    return entry


def _absent() -> EntryAttributes:
    """A negative answer that the kernel may keep: inode 0 with a timeout (libfuse, fuse_reply_entry)."""
    entry = EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = FOR_EVER
    return entry


def caller_of(uid: int, gid: int, pid: int, umask: int = 0) -> Caller:
    """As a request names him."""
    visible = pid if sees_callers() else 0
    return Caller(None if uid == _UNTOLD else uid, None if gid == _UNTOLD else gid, visible, umask)


class Operations(pyfuse3.Operations):
    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, describe: Callable[[str], bytes | None], counters: Counters) -> None:
        """`describe` answers the virtual xattrs of the root (`layerfs.mount`, …); None for other names."""
        super().__init__()
        self.counters = counters
        #: the kernel leaves the umask to us (FUSE_DONT_MASK)
        self.masks = False
        self.vfs: Vfs = None  # type: ignore[assignment]  # set before the first request is read
        self._describe = describe
        self._owner = os.geteuid()
        self._absent = _absent()

    @staticmethod
    def attributes_moved(node: int) -> None:
        """Has the kernel ask for attributes again. Takes no lock of an inode (fs/fuse/inode.c
        fuse_reverse_inval_inode), so it may be sent while a request is carried out.
        """
        try:
            pyfuse3.invalidate_inode(node, attr_only=True)
        except FileNotFoundError:
            pass  # the kernel does not know it

    def _caller(self, ctx: RequestContext) -> Caller:
        return caller_of(ctx.uid, ctx.gid, ctx.pid, ctx.umask if self.masks else 0)

    # -- looking ----------------------------------------------------------------------------------

    @_errors
    async def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        found = await self.vfs.lookup(parent, name)
        return self._absent if found is None else _entry(found)

    def forget(  # type: ignore[override]  # pyfuse3 calls it as a plain function, whatever its stub says
        self, inode_list: Sequence[tuple[int, int]]
    ) -> None:
        started = self.counters.begin()
        try:
            for inode, count in inode_list:
                self.vfs.forget(inode, count)
        finally:
            self.counters.answered("forget", started)

    @_errors
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return _entry(await self.vfs.getattr(inode))

    @_errors
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self.vfs.readlink(inode)

    @_errors
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        found = await self.vfs.statfs()
        data = StatvfsData()
        for field in (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
        ):
            setattr(data, field, getattr(found, field))
        data.f_namemax = 255
        return data

    # -- listing ----------------------------------------------------------------------------------

    @_errors
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return await self.vfs.opendir(inode)

    @_errors
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        stale = not self.vfs.tree.gate.lists_now(fh)
        if start_id == 0 or stale:
            await self.vfs.rewind(fh)
        handle = self.vfs.listing(fh)
        names, offsets = handle.names, handle.offsets
        at = start_id if start_id < 2 else bisect_right(offsets, start_id) + 2
        answers = self.vfs.tree.gate.answers
        fitted: bool | None
        replied = 0  # an empty reply is the end of the listing
        while at < len(names) + 2:
            if at < 2:
                fitted = await self._reply_dot(handle.node.id, handle.node.parent, at, token)
            elif replied and not (start_id and stale) and answers(handle.node.id, names[at - 2]):
                return  # the next request is the gate's
            else:
                fitted = await self._reply_name(handle.node.id, names[at - 2], offsets[at - 2], token)
            if fitted is False:
                return
            replied += fitted is True
            at += 1
            if at % _TURN == 0:
                # A whole reply is some 200 names and several milliseconds, and the next request for names is
                # there at once: without this, short requests elsewhere would get one turn between two of
                # them.
                await trio.lowlevel.checkpoint()

    async def _reply_dot(self, id: int, parent: Any, offset: int, token: pyfuse3.ReaddirToken) -> bool:
        """`.` and `..`, for which the kernel counts no lookup (fs/fuse/readdir.c fuse_direntplus_link)."""
        entry = EntryAttributes()
        entry.st_ino = id if offset == 0 or parent is None else parent.id
        entry.st_mode = stat.S_IFDIR
        return pyfuse3.readdir_reply(token, b"." if offset == 0 else b"..", entry, offset + 1)

    async def _reply_name(
        self, directory: int, name: bytes, next_id: int, token: pyfuse3.ReaddirToken
    ) -> bool | None:
        """Whether there was room for it; None when the name has gone since the listing was begun."""
        try:
            found = await self.vfs.lookup(directory, name)
        except OSError:
            # A name that cannot be looked up (a nonsense redirect, say) is listed all the same, as by the
            # kernel; it expires at once, so that whoever uses it gets the error of the lookup.
            entry = EntryAttributes()
            entry.st_ino = _NOBODY | next_id
            entry.st_mode = stat.S_IFDIR if self.vfs.is_directory(directory, name) else stat.S_IFREG
            entry.entry_timeout = entry.attr_timeout = 0
            return pyfuse3.readdir_reply(token, name, entry, next_id)
        if found is None:
            return None
        if pyfuse3.readdir_reply(token, name, _entry(found), next_id):
            return True
        self.vfs.forget(found.ino, 1)
        return False

    @_errors
    async def releasedir(self, fh: int) -> None:
        self.vfs.files.release_directory(fh)

    @_errors
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.vfs.files.fsync_directory(fh)

    # -- names ------------------------------------------------------------------------------------

    @_errors
    async def mkdir(self, parent: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return _entry(await self.vfs.make(parent, name, New(mode | stat.S_IFDIR), self._caller(ctx)))

    @_errors
    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return _entry(await self.vfs.make(parent, name, New(mode, rdev=rdev), self._caller(ctx)))

    @_errors
    async def symlink(self, parent: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        return _entry(
            await self.vfs.make(parent, name, New(stat.S_IFLNK | 0o777, target=target), self._caller(ctx))
        )

    @_errors
    async def link(
        self, inode: int, new_parent: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return _entry(await self.vfs.link(inode, new_parent, new_name, self._caller(ctx)))

    @_errors
    async def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        await self.vfs.unlink(parent, name, self._caller(ctx))

    @_errors
    async def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        await self.vfs.rmdir(parent, name, self._caller(ctx))

    @_errors
    async def rename(
        self,
        parent_old: int,
        name_old: bytes,
        parent_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        await self.vfs.rename(parent_old, name_old, parent_new, name_new, flags, self._caller(ctx))

    # -- attributes -------------------------------------------------------------------------------

    @_errors
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        change = Change(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return _entry(await self.vfs.setattr(inode, change, self._caller(ctx)))

    @_errors
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        virtual = inode == pyfuse3.ROOT_INODE and name.startswith(b"layerfs.")
        if virtual and self._caller(ctx).is_one_of(0, self._owner):
            described = self._describe(os.fsdecode(name))
            if described is not None:
                return described
        return await self.vfs.getxattr(inode, name)

    @_errors
    async def listxattr(self, inode: int, ctx: RequestContext) -> list[bytes]:
        return await self.vfs.listxattr(inode, self._caller(ctx))

    @_errors
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self.vfs.setxattr(inode, name, value, self._caller(ctx))  # pyfuse3 has seen to the flags

    @_errors
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        await self.vfs.removexattr(inode, name, self._caller(ctx))

    # -- data -------------------------------------------------------------------------------------

    @_errors
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        handle = await self.vfs.open(inode, flags, self._caller(ctx))
        return FileInfo(fh=handle.id, keep_cache=handle.keeps_pages)

    @_errors
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        mode = stat.S_IMODE(mode) | stat.S_IFREG
        handle, attributes = await self.vfs.create(parent_inode, name, mode, flags, self._caller(ctx))
        # Where files are opened without asking, no other of its requests bears a handle either.
        fh = handle.id if self.vfs.unasked is None else 0
        return FileInfo(fh=fh, keep_cache=handle.keeps_pages), _entry(attributes)

    @_errors
    async def read(self, fh: int, off: int, size: int) -> bytes:
        return await self.vfs.files.read(fh, off, size)  # type: ignore[return-value]  # any buffer does

    @_errors
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self.vfs.write(fh & ~KEEPS_SETID, off, buf, keeps_setid=bool(fh & KEEPS_SETID))

    @_errors
    async def flush(self, fh: int) -> None:
        # Writes were carried out when they came. ENOSYS makes the kernel not ask again, for the whole mount:
        # it still writes dirty pages back at close and reports their errors (fs/fuse/file.c fuse_flush). One
        # request of eight a created file.
        raise FUSEError(errno.ENOSYS)

    @_errors
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.vfs.fsync(fh, datasync)

    @_errors
    async def release(self, fh: int) -> None:
        self.vfs.files.release(fh)
