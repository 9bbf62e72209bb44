"""Open files and directories, and the bytes of files."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import partial

import trio

from layerfs.fdutil import OwnedFd, copy_range, fallocate
from layerfs.gate import Gate
from layerfs.ids import HandleId, NodeId
from layerfs.stack import Merged
from layerfs.upper.upper import Upper
from layerfs.vfs import inode_flags, setid
from layerfs.vfs.caller import Caller
from layerfs.vfs.copyup import CopyUp
from layerfs.vfs.node import Directory, File
from layerfs.vfs.passthrough import Passthrough
from layerfs.vfs.tally import Tally
from layerfs.vfs.tree import Tree, fail

#: Flags of open(2) that the backing descriptor gets as well. O_APPEND must not be among them: pwrite(2) would
#: ignore its offset; the kernel has computed it already. O_DIRECT would demand aligned memory; the kernel
#: side is direct all the same.
_SYNC = os.O_SYNC | os.O_DSYNC
_KEPT = os.O_ACCMODE | _SYNC
#: The same for one write. (O_SYNC has the bit of O_DSYNC in it.)
_RWF = {0: 0, os.O_DSYNC: os.RWF_DSYNC, os.O_SYNC: os.RWF_SYNC}
#: Writes up to this size (bytes) are done on the event loop: a copy into the page cache is faster than waking
#: a thread.
_INLINE_WRITE = 64 << 10


class Handle:
    """An open file, or what is kept of one that the kernel opened without asking (`vfs.unasked`). `fd` is
    replaced when the file is copied up."""

    __slots__ = (
        "_lent",
        "backing",
        "busy",
        "closed",
        "fd",
        "id",
        "keeps_pages",
        "node",
        "opener",
        "sync",
        "writable",
    )

    def __init__(self, id: HandleId, node: File, fd: OwnedFd, flags: int, opener: Caller) -> None:
        self.id = id
        self.node = node
        self.fd = fd
        self.opener = opener
        self.writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.sync = bool(flags & _SYNC)
        #: requests that use it: until then it is not closed
        self.busy = 0
        self.closed = False
        #: what the gate has: the descriptor, and whether it writes
        self._lent: tuple[OwnedFd, bool] | None = None
        #: id of the file that the kernel reads and writes in our place; 0: it asks us
        self.backing = 0
        #: the kernel may use pages that it has of the file
        self.keeps_pages = True

    def lend(self, gate: Gate, *, writes: bool) -> None:
        """Lets the gate read the file, and write it or no longer. Costs nothing when that is so already, or
        the kernel asks nobody."""
        if self.closed or self.backing:
            return
        if self._lent is None or self._lent[0] is not self.fd or self._lent[1] is not writes:
            self._lent = self.fd, writes
            gate.lend(self.id, self.fd.fd, writes)


class DirectoryHandle:
    """An open directory: its names as they were at the first read or the last rewind, so that offsets stay
    what they are.

    `offsets` are those behind each of them, and grow; 1 and 2 are behind `.` and `..`. Names that went
    meanwhile are passed over, so nothing is listed twice or missed."""

    __slots__ = ("id", "names", "node", "offsets")

    def __init__(self, id: HandleId, node: Directory) -> None:
        self.id = id
        self.node = node
        self.names: list[bytes] = []
        self.offsets: Sequence[int] = ()


class Files:
    def __init__(
        self,
        tree: Tree,
        upper: Upper | None,
        copyup: CopyUp | None,
        tally: Tally,
        passthrough: Passthrough | None = None,
    ) -> None:
        self.tree = tree
        #: None: the kernel asks for everything that it does not keep
        self.passthrough = passthrough
        self.tally = tally
        self.upper = upper
        self.copyup = copyup
        self._handles: dict[int, Handle] = {}
        self._directories: dict[int, DirectoryHandle] = {}
        self._next = 1
        #: a volatile mount syncs nothing, O_SYNC included (kernel: ovl_should_sync)
        self._kept = _KEPT & ~_SYNC if upper is not None and upper.volatile else _KEPT
        # Separate limits, so that syncs that take seconds never keep reads waiting.
        self._io = trio.CapacityLimiter(16)
        self._syncs = trio.CapacityLimiter(8)

    # -- opening ----------------------------------------------------------------------------------

    def _number(self) -> HandleId:
        self._next += 1
        return HandleId(self._next)

    def backing_flags(self, flags: int) -> int:
        """Those of open(2)'s flags that the backing descriptor gets."""
        return flags & self._kept

    async def open(self, node: File, flags: int, caller: Caller) -> Handle:
        """Opens with the flags of open(2). Copies the file up when they write. Raises OSError."""
        writes = flags & os.O_ACCMODE != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if not writes:
            fd = self.open_kindly(*self.tree.data_location(node), self.backing_flags(flags))
            return self.adopt(node, fd, flags, caller)
        if self.copyup is None:
            fail(errno.EROFS)
        await self.copyup.data(node, caller, size=0 if flags & os.O_TRUNC else None)
        fd = self.tree.open_real(*self.tree.where(node), self.backing_flags(flags))
        if flags & os.O_TRUNC:
            writer = fd
            if flags & os.O_ACCMODE == os.O_RDONLY:
                writer = self.tree.open_real(*self.tree.where(node), os.O_WRONLY)
            self._clear_setid(node, writer, caller, may_keep=True)
            os.ftruncate(writer.fd, 0)
            self.tree.changed(node)
        return self.adopt(node, fd, flags, caller)

    def open_kindly(self, fd: OwnedFd, name: bytes, flags: int) -> OwnedFd:
        """Opens for reading without moving the lower file's atime, where this process may say so (owner or
        CAP_FOWNER).
        """
        try:
            return self.tree.open_real(fd, name, flags | os.O_NOATIME)
        except PermissionError:
            return self.tree.open_real(fd, name, flags)

    def adopt(self, node: File, fd: OwnedFd, flags: int, opener: Caller) -> Handle:
        """A handle for an opened descriptor."""
        handle = Handle(self._number(), node, fd, flags, opener)
        node.users += 1
        self.keep(handle, flags)
        return handle

    def keep(self, handle: Handle, flags: int) -> None:
        """Lets requests use it; `flags`: those of open(2)."""
        node = handle.node
        self._handles[handle.id] = handle
        if node.handles is None:
            node.handles = set()
        node.handles.add(handle)
        if handle.writable:
            self.begin_writing(handle)
        if self.passthrough is not None:
            self.passthrough.open(handle, flags)
        self.lend(handle)

    def begin_writing(self, handle: Handle) -> None:
        """The descriptor of a handle is one for writing."""
        assert self.upper is not None
        handle.writable = True
        handle.node.privileged = bool(self.upper.stat(handle.fd).st_mode & setid.SETID)

    def lend(self, handle: Handle) -> None:
        """Lets the gate read and write an open file, or no longer write, as things are now.

        Not write: what a WRITE changes beside the data is done here (setuid; a ctime that was kept from
        before the copy-up), and O_SYNC takes a disk's time."""
        node = handle.node
        writes = handle.writable and not (handle.sync or node.privileged or node.guarded)
        handle.lend(self.tree.gate, writes=writes and node.real not in self.tree.shown_ctimes)

    def release(self, id: int) -> None:
        handle = self._handles.get(id)
        if handle is not None:
            self.close(handle)
            handle.node.users -= 1
            self.tree.release(handle.node)

    def close(self, handle: Handle) -> None:
        """No request uses it any more."""
        self.tree.gate.take_back(handle.id)
        if self.passthrough is not None:
            self.passthrough.close(handle)
        handle.closed = True
        del self._handles[handle.id]
        if handle.node.handles is not None:
            handle.node.handles.discard(handle)

    def handle(self, id: int) -> Handle:
        handle = self._handles.get(id)
        if handle is None:
            fail(errno.EBADF)
        return handle

    def open_for_writing(self) -> set[File]:
        """The files of the upper that somebody can write to."""
        return {each.node for each in self._handles.values() if each.writable and each.node.in_upper}

    def written_past_us(self) -> set[File]:
        """Those of them that the kernel writes itself."""
        return {each.node for each in self._handles.values() if each.writable and each.backing}

    # -- data -------------------------------------------------------------------------------------

    async def read(self, id: int, offset: int, size: int) -> bytes | memoryview:
        """`size` bytes, fewer only at the end of the file. Raises OSError."""
        fd = self.handle(id).fd
        buffer = bytearray(size)
        try:
            count = os.preadv(fd.fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            count = 0
        if count < size and offset + count < os.fstat(fd.fd).st_size:
            # Not all of it is in the page cache: the rest may take the disk's time.
            view = memoryview(buffer)[count:]
            rest = partial(_read_all, fd.fd, view, offset + count)
            count += await trio.to_thread.run_sync(rest, limiter=self._io)
        self.tally.read += count
        return memoryview(buffer)[:count]

    async def write(
        self,
        id: int,
        offset: int,
        data: bytes | memoryview,
        *,
        keeps_setid: bool = False,
        flags: int | None = None,
    ) -> int:
        """Bytes written: fewer only where an error stopped it after some were. `keeps_setid`: the writer is
        known to have CAP_FSETID. `flags`: those of open(2), where the handle stands for all that have the
        file open. Raises OSError."""
        handle = self.handle(id)
        node, fd = handle.node, handle.fd
        if flags is not None:
            _check_guards(node, flags)
        if node.job is not None:
            fd = await self._settled(handle, Caller(0, 0, 0))
        if node.privileged and not keeps_setid:
            self._clear_setid(node, fd, handle.opener, may_keep=False)
        self.tree.changed(node)
        self.lend(handle)
        how = _RWF[(flags or 0) & self._kept & _SYNC]
        write = partial(_write_all, fd.fd, data, offset, how)
        if len(data) <= _INLINE_WRITE and not (handle.sync or how):
            written, failure = write()
        else:
            written, failure = await trio.to_thread.run_sync(write, limiter=self._io)
        if failure is not None:
            if not written:
                fail(failure)
            # A short count is the right answer to write(2), but the kernel does not look at it when it writes
            # back a mapping (fs/fuse/file.c fuse_writepage_end): the next fsync or msync tells.
            node.failure = failure
        self.tally.written += written
        return written

    async def _settled(self, handle: Handle, caller: Caller) -> OwnedFd:
        """The descriptor of a handle once no copy-up of its file is under way. Raises OSError(EINTR)."""
        if self.copyup is not None:
            await self.copyup.settle(handle.node, caller)
        return handle.fd

    def _clear_setid(self, node: File, fd: OwnedFd, writer: Caller, *, may_keep: bool) -> None:
        assert self.upper is not None
        node.privileged = setid.clear(self.tree, self.upper, fd, writer, may_keep=may_keep)

    async def _to_change(self, id: int, caller: Caller) -> OwnedFd:
        """The descriptor of a handle whose file `caller` is about to change otherwise than by a WRITE. Raises
        OSError: EBADF when it is not open for writing."""
        handle = self.handle(id)
        if not handle.writable:
            fail(errno.EBADF)
        fd = await self._settled(handle, caller)
        if handle.node.privileged:
            self._clear_setid(handle.node, fd, caller, may_keep=True)
        self.tree.changed(handle.node)
        self.lend(handle)
        return fd

    async def allocate(self, id: int, mode: int, offset: int, length: int, caller: Caller) -> None:
        """fallocate(2) with all modes that the upper's file system takes. Raises OSError."""
        fd = await self._to_change(id, caller)
        work = partial(fallocate, fd.fd, mode, offset, length)
        await trio.to_thread.run_sync(work, limiter=self._io)
        del fd

    async def copy(
        self, source: OwnedFd, offset: int, target: int, target_offset: int, length: int, caller: Caller
    ) -> int:
        """copy_file_range(2) to the handle `target`: the number of bytes copied, which may be fewer than
        asked for. Raises OSError: EXDEV when the two files lie on different file systems."""
        fd = await self._to_change(target, caller)
        work = partial(copy_range, source.fd, offset, fd.fd, target_offset, length)
        copied: int = await trio.to_thread.run_sync(work, limiter=self._io)
        del source, fd
        return copied

    def seek(self, id: int, offset: int, whence: int) -> int:
        """lseek(2) with SEEK_DATA or SEEK_HOLE. Raises OSError."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            fail(errno.EINVAL)
        # Moves the descriptor's own position, which nothing else looks at.
        return os.lseek(self.handle(id).fd.fd, offset, whence)

    async def fsync(self, id: int, data_only: bool) -> None:
        """Raises OSError: also errors of earlier write-back."""
        handle = self.handle(id)
        node, fd = handle.node, handle.fd
        if node.failure is not None:
            failure, node.failure = node.failure, None
            fail(failure)
        if not node.in_upper or self.upper is None or self.upper.volatile:
            return
        if self.tree.is_metacopy(node):
            # The handle has the lower's data; what changed is here.
            fd = self.tree.open_real(*self.tree.where(node), os.O_RDONLY)
        call = os.fdatasync if data_only else os.fsync
        await trio.to_thread.run_sync(call, fd.fd, limiter=self._syncs)
        del fd

    # -- directories ------------------------------------------------------------------------------

    async def open_directory(self, node: Directory) -> DirectoryHandle:
        """Raises OSError."""
        return self._open_directory(node, await self.tree.load(node))

    def open_loaded(self, id: int) -> int:
        """The handle of `open_directory` for the node `id`; 0 where that would have to wait, or fails."""
        node = self.tree.nodes.get(NodeId(id))
        if not isinstance(node, Directory) or node.merged is None:
            return 0
        return self._open_directory(node, node.merged).id

    def _open_directory(self, node: Directory, merged: Merged) -> DirectoryHandle:
        handle = DirectoryHandle(self._number(), node)
        self._list(handle, merged, fresh=True)
        self._directories[handle.id] = handle
        node.users += 1
        return handle

    def directory(self, id: int) -> DirectoryHandle:
        handle = self._directories.get(id)
        if handle is None:
            fail(errno.EBADF)
        return handle

    async def rewind(self, handle: DirectoryHandle) -> None:
        await self.look(handle, fresh=False)

    async def look(self, handle: DirectoryHandle, *, fresh: bool) -> None:
        """Lists what is there now. Raises OSError."""
        self._list(handle, await self.tree.load(handle.node), fresh=fresh)

    def _list(self, handle: DirectoryHandle, merged: Merged, *, fresh: bool) -> None:
        node = handle.node
        above = node.parent if node.parent is not None else node
        listed = self.tree.gate.list_names(handle.id, node.id, above.id, merged.names, fresh)
        handle.names, handle.offsets = listed

    def release_directory(self, id: int) -> None:
        handle = self._directories.pop(id, None)
        if handle is not None:
            handle.node.users -= 1
            self.tree.release(handle.node)

    async def fsync_directory(self, id: int) -> None:
        """Raises OSError."""
        node = self.directory(id).node
        if not node.in_upper or node.unlinked or self.upper is None or self.upper.volatile:
            return
        above = self.tree.upper_fd(node)
        fd = OwnedFd(os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above.fd))
        await trio.to_thread.run_sync(os.fsync, fd.fd, limiter=self._syncs)
        del fd


def _check_guards(node: File, flags: int) -> None:
    """The upper's file system would refuse an open with `flags`, which nobody made. Raises OSError."""
    if node.guarded & inode_flags.IMMUTABLE or (
        node.guarded & inode_flags.APPEND and not flags & os.O_APPEND
    ):
        fail(errno.EPERM)


def _read_all(fd: int, view: memoryview, offset: int) -> int:
    """Fills `view` or reads to the end. A short answer means "end of file" to the kernel, which cuts the size
    it knows: an error after some bytes is raised.
    """
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def _write_all(fd: int, data: bytes | memoryview, offset: int, how: int) -> tuple[int, int | None]:
    """Writes until all is written or an error stops it: (bytes written, errno). `how`: flags of
    pwritev2(2)."""
    view = memoryview(data)
    written = 0
    while written < len(data):
        try:
            written += os.pwritev(fd, [view[written:]], offset + written, how)
        except OSError as error:
            return written, error.errno or errno.EIO
    return written, None
