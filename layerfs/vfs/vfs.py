"""The file system's operations, one method each, for whoever carries the requests. Nothing of FUSE, no
decision about layers either: it puts the parts together, keeps lookup counts, and says EROFS where there is
no upper.

All methods raise OSError with the errno for the caller.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from layerfs.fdutil import OwnedFd, fd_path
from layerfs.gate import Gate
from layerfs.ids import NodeId
from layerfs.overlay import override
from layerfs.overlay.owners import CAPABILITY, Owners
from layerfs.stack import Stack, read_link
from layerfs.upper.upper import Upper
from layerfs.vfs import inode_flags, kernel_index
from layerfs.vfs.attributes import Attributes as AttributeChanges
from layerfs.vfs.attributes import Change, get_xattr, list_xattrs
from layerfs.vfs.caller import Caller
from layerfs.vfs.copyup import CopyUp
from layerfs.vfs.files import DirectoryHandle, Files, Handle
from layerfs.vfs.hold import Hold
from layerfs.vfs.links import LinkIndex
from layerfs.vfs.names import Names
from layerfs.vfs.namespace import Namespace, New
from layerfs.vfs.node import Directory, File, Node
from layerfs.vfs.passthrough import Passthrough
from layerfs.vfs.rename import Rename
from layerfs.vfs.tally import Tally
from layerfs.vfs.tree import Attributes, Tree, fail
from layerfs.vfs.unasked import Unasked

if TYPE_CHECKING:
    from layerfs.vfs.flatten import Flattened

_CAPABILITY = os.fsencode(CAPABILITY)
_F = TypeVar("_F", bound=Callable[..., Coroutine[Any, Any, Any]])

__all__ = ["Attributes", "Caller", "Change", "DirectoryHandle", "Handle", "New", "Vfs"]


@dataclass(slots=True)
class _Writing:
    """The parts that only a writable mount has."""

    upper: Upper
    copyup: CopyUp
    names: Namespace
    rename: Rename
    attributes: AttributeChanges


def _changes(*, opens: bool = False) -> Callable[[_F], _F]:
    """Marks what changes the tree (WRITE apart): it may be held. First comes the node, last the caller; then
    what has a name."""

    def mark(method: _F) -> _F:
        @wraps(method)
        async def held(self: Vfs, node: int, *args: Any, **named: Any) -> Any:
            await self.hold.begin(node, args[-1], opens=opens)
            try:
                return await method(self, node, *args, **named)
            finally:
                self.tree.tell_changed()
                self.hold.end(node, opens=opens)

        return held  # type: ignore[return-value]

    return mark


async def _nothing() -> None:
    pass


class Vfs:
    def __init__(
        self,
        stack: Stack,
        upper: Upper | None,
        nursery: trio.Nursery,
        *,
        redirect_dir: bool = True,
        metacopy: bool = True,
        owners: Owners | None = None,
        xattrs: bool = True,
        gate: Gate | None = None,
        unasked: int = 0,
        passthrough: bool = False,
    ) -> None:
        """`nursery` runs copy-ups; it must outlive all requests. `upper` None: read-only. `xattrs` False:
        users neither see nor set any. `unasked`: files are opened and closed without asking, and for so many
        of them descriptors may be kept; 0: they are not. `passthrough`: `gate` has the kernel read and write
        files itself.
        """
        self.stack = stack
        self._xattrs = xattrs
        self.upper = upper
        self.tree = Tree(stack, upper, owners, gate, most_pins=unasked or None)
        links = LinkIndex(self.tree, upper_was_empty=_is_empty(stack))
        self.tree.links = links
        self.tally = Tally()
        self._writing: _Writing | None = None
        copyup = None
        if upper is not None:
            copyup = CopyUp(self.tree, upper, links, nursery, self.tally, metacopy=metacopy and redirect_dir)
            names = Names(self.tree, upper, copyup)
            self._writing = _Writing(
                upper,
                copyup,
                Namespace(names),
                Rename(names, redirect_dir=redirect_dir),
                AttributeChanges(self.tree, upper, copyup),
            )
        past = Passthrough(self.tree, upper) if passthrough else None
        self.files = Files(self.tree, upper, copyup, self.tally, past)
        self.unasked = Unasked(self.tree, self.files, copyup, unasked) if unasked else None
        self.hold = Hold(copyup.quiet if copyup is not None else _nothing, gate)

    def _write(self) -> _Writing:
        if self._writing is None:
            fail(errno.EROFS)
        return self._writing

    async def start(self) -> None:
        """Before the first request. Raises OSError."""
        if self._writing is not None:
            writing = self._writing
            self._keep_root(writing.upper)
            await kernel_index.adopt(self.tree, writing.upper, writing.copyup, writing.copyup.links)

    def _keep_root(self, upper: Upper) -> None:
        """The root of a fresh upper that keeps attributes in xattrs says by its own that it does: as the
        topmost lower's root that has one, else as it is."""
        if not upper.overrides or override.carried_by(os.listxattr(fd_path(upper.root.fd))):
            return
        st = os.fstat(upper.root.fd)
        for layer in self.stack.lowers:
            if layer.overrides:
                st = layer.shown(os.fstat(layer.fd.fd), fd_path(layer.fd.fd), follow=True)
                break
        upper.keep(fd_path(upper.root.fd), st, follow=True)

    async def flatten(self) -> Flattened:
        """In place of a mount's life: see `vfs.flatten`. Raises OSError."""
        from layerfs.vfs.flatten import Flatten

        parts = self._write()
        return await Flatten(self.tree, parts.upper, parts.copyup, parts.rename).run()

    def give_up(self) -> None:
        """The mount is going: nothing that takes long is waited for."""
        self.hold.give_up()
        if self._writing is not None:
            self._writing.copyup.give_up()

    # -- looking ----------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes) -> Attributes | None:
        """The object, its lookup count raised; None when the name is absent (which may be remembered)."""
        directory = self.tree.directory(parent)
        while True:
            entry = await self.tree.find(directory, name)
            if entry is None:
                return None
            node = self.tree.child(directory, name, entry)
            node.users += 1
            try:
                attributes = await self.tree.attributes(node)
            except BaseException:
                node.users -= 1
                self.tree.release(node)
                raise
            node.users -= 1
            # Counting links may have awaited: the name must still mean this node, or the kernel would be told
            # something stale.
            if (
                entry.node is node
                and directory.merged is not None
                and directory.merged.names.get(name) is entry
            ):
                node.lookups += 1
                if attributes.st.st_nlink == 1:
                    self.tree.entrust(node, directory, name)
                return attributes
            self.tree.release(node)

    def forget(self, id: int, count: int) -> None:
        self.tree.forget(id, count)

    async def getattr(self, id: int) -> Attributes:
        node = self.tree.node(id)
        attributes = await self.tree.attributes(node)
        if isinstance(node, Directory):
            self.tree.gate.tell_attributes(node.id, attributes)
        return attributes

    async def readlink(self, id: int) -> bytes:
        node = self.tree.node(id)
        fd, name = self.tree.where(node)
        if self.stack.overrides and not node.in_upper:
            return read_link(fd, name)
        return os.readlink(name, dir_fd=fd.fd)

    async def statfs(self) -> os.statvfs_result:
        layer = self.stack.upper or self.stack.lowers[0]
        return os.fstatvfs(layer.fd.fd)

    async def opendir(self, id: int) -> int:
        return (await self.files.open_directory(self.tree.directory(id))).id

    async def rewind(self, handle: int) -> None:
        await self.files.rewind(self.files.directory(handle))

    def listing(self, handle: int) -> DirectoryHandle:
        return self.files.directory(handle)

    async def list_unasked(self, id: int) -> DirectoryHandle:
        """The names of a directory that was opened without asking, where names never change."""
        assert self.unasked is not None
        return await self.unasked.listing(self.tree.directory(id))

    def is_directory(self, parent: int, name: bytes) -> bool:
        """What a listing says of a name, whether it can be looked up or not."""
        merged = self.tree.directory(parent).merged
        entry = merged.names.get(name) if merged is not None else None
        return entry is not None and entry.is_dir

    # -- names ------------------------------------------------------------------------------------

    @_changes()
    async def make(self, parent: int, name: bytes, new: New, caller: Caller) -> Attributes:
        """mkdir, mknod, symlink; the lookup count is raised."""
        node = await self._write().names.make(self.tree.directory(parent), name, new, caller)
        return await self._born(node)

    @_changes(opens=True)
    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Handle, Attributes]:
        kept = self._flags_of_new(flags)
        node, fd = await self._write().names.create(
            self.tree.directory(parent), name, New(mode), kept, caller
        )
        handle = self._opened_new(node, fd, flags, caller)
        return handle, await self._born(node)

    def _flags_of_new(self, flags: int) -> int:
        """Of the descriptor of a file that is made with open(2)."""
        return self.files.backing_flags(flags) if self.unasked is None else os.O_RDWR

    def _opened_new(self, node: File, fd: OwnedFd, flags: int, caller: Caller) -> Handle:
        self.tree.gate.tell_no_capability(node.id)
        if self.unasked is not None:
            return self.unasked.add(node, fd, os.O_RDWR, caller)
        return self.files.adopt(node, fd, flags, caller)

    @_changes(opens=True)
    async def tmpfile(self, parent: int, mode: int, flags: int, caller: Caller) -> tuple[Handle, Attributes]:
        """open(2) with O_TMPFILE; the lookup count is raised."""
        kept = self._flags_of_new(flags)
        directory = self.tree.directory(parent)
        node, fd = await self._write().names.make_unnamed(directory, mode, kept, caller)
        handle = self._opened_new(node, fd, flags, caller)
        return handle, await self._born(node)

    async def _born(self, node: Node) -> Attributes:
        node.lookups += 1
        return await self.tree.attributes(node)

    @_changes()
    async def link(self, id: int, parent: int, name: bytes, caller: Caller) -> Attributes:
        node = self.tree.file(id)
        with self.tree.in_use(node):
            await self._write().names.link(node, self.tree.directory(parent), name, caller)
            return await self._born(node)

    @_changes()
    async def unlink(self, parent: int, name: bytes, caller: Caller) -> None:
        await self._write().names.unlink(self.tree.directory(parent), name, caller)

    @_changes()
    async def rmdir(self, parent: int, name: bytes, caller: Caller) -> None:
        await self._write().names.rmdir(self.tree.directory(parent), name)

    @_changes()
    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, caller: Caller
    ) -> None:
        await self._write().rename.rename(
            self.tree.directory(parent), name, self.tree.directory(new_parent), new_name, flags, caller
        )

    # -- attributes -------------------------------------------------------------------------------

    @_changes()
    async def setattr(self, id: int, change: Change, caller: Caller) -> Attributes:
        node = self.tree.node(id)
        with self.tree.in_use(node):
            await self._write().attributes.set(node, change, caller)
            return await self.tree.attributes(node)

    async def birth_time(self, id: int) -> int | None:
        """In ns since 1970; None where the object's layer does not say."""
        return self.tree.birth_time(self.tree.node(id))

    async def ioctl(self, id: int, command: int, argument: bytes, caller: Caller) -> bytes:
        """What an ioctl(2) on a file or directory gives back: for inode flags; ENOTTY for all others."""
        if command in inode_flags.SETS:
            await self._set_flags(id, command, argument, caller)
            return b""
        if command not in inode_flags.ASKS:
            fail(errno.ENOTTY)
        return inode_flags.get_flags(self.tree, self.tree.node(id), command)

    @_changes()
    async def _set_flags(self, id: int, command: int, value: bytes, caller: Caller) -> None:
        node = self.tree.node(id)
        with self.tree.in_use(node):
            await self._write().attributes.set_flags(node, command, value, caller)

    def _check_xattrs(self) -> None:
        if not self._xattrs:
            fail(errno.EOPNOTSUPP)

    async def getxattr(self, id: int, name: bytes) -> bytes:
        self._check_xattrs()
        try:
            return get_xattr(self.tree, self.tree.node(id), name)
        except OSError as error:
            if error.errno == errno.ENODATA and name == _CAPABILITY:
                self.tree.gate.tell_no_capability(NodeId(id))
            raise

    async def listxattr(self, id: int, caller: Caller) -> list[bytes]:
        self._check_xattrs()
        return list_xattrs(self.tree, self.tree.node(id), caller)

    @_changes()
    async def setxattr(
        self,
        id: int,
        name: bytes,
        value: bytes,
        caller: Caller,
        *,
        flags: int = 0,
        drops_setgid: bool | None = None,
    ) -> None:
        """As `AttributeChanges.set_xattr`."""
        self._check_xattrs()
        node = self.tree.node(id)
        with self.tree.in_use(node):
            await self._write().attributes.set_xattr(node, name, value, caller, flags, drops_setgid)

    @_changes()
    async def removexattr(self, id: int, name: bytes, caller: Caller) -> None:
        self._check_xattrs()
        node = self.tree.node(id)
        with self.tree.in_use(node):
            await self._write().attributes.remove_xattr(node, name, caller)

    # -- data -------------------------------------------------------------------------------------

    async def open(self, id: int, flags: int, caller: Caller) -> Handle:
        if flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC:
            return await self._open(id, flags, caller)
        return await self._open_for_writing(id, flags, caller)

    async def _open(self, id: int, flags: int, caller: Caller) -> Handle:
        node = self.tree.file(id)
        with self.tree.in_use(node):
            return await self.files.open(node, flags, caller)

    _open_for_writing = _changes(opens=True)(_open)

    async def attend(self, id: int, caller: Caller, *, writes: bool) -> Handle:
        """What is kept of a file that was opened without asking, to be used by `Unasked.using`."""
        assert self.unasked is not None
        node = self.tree.file(id)
        if writes and not self.unasked.writable(node):
            # As an open for writing: whoever holds changes may not have to wait for this file. But not where
            # the kernel writes back: it sends so many of these at a time only.
            if caller.pid:
                return await self._attend_first_write(id, caller)
            return await self._attend_write_back(id, caller)
        with self.tree.in_use(node):
            return await (self.unasked.writing if writes else self.unasked.reading)(node, caller)

    async def _attend(self, id: int, caller: Caller) -> Handle:
        assert self.unasked is not None
        node = self.tree.file(id)
        with self.tree.in_use(node):
            return await self.unasked.writing(node, caller)

    _attend_first_write = _changes(opens=True)(_attend)
    _attend_write_back = _changes()(_attend)

    async def write(
        self,
        handle: int,
        offset: int,
        data: bytes | memoryview,
        *,
        keeps_setid: bool = False,
        flags: int | None = None,
        writer: Caller | None = None,
    ) -> int:
        """`writer`: who writes, where that is known; else who opened the file is asked whether he was
        interrupted. The rest as `Files.write`."""
        opened = self.files.handle(handle)
        node = opened.node.id
        await self.hold.begin_write(node, writer or opened.opener, known=writer is not None)
        try:
            return await self.files.write(handle, offset, data, keeps_setid=keeps_setid, flags=flags)
        finally:
            self.hold.end_write(node)

    async def allocate(self, handle: int, mode: int, offset: int, length: int, caller: Caller) -> None:
        node = self.files.handle(handle).node.id
        await self.hold.begin_write(node, caller, known=True)
        try:
            await self.files.allocate(handle, mode, offset, length, caller)
        finally:
            self.hold.end_write(node)

    async def copy(
        self, handle: int, offset: int, target: int, target_offset: int, length: int, caller: Caller
    ) -> int:
        node = self.files.handle(target).node.id
        source = self.files.handle(handle).fd
        await self.hold.begin_write(node, caller, known=True)
        try:
            return await self.files.copy(source, offset, target, target_offset, length, caller)
        finally:
            self.hold.end_write(node)

    async def seek(self, handle: int, offset: int, whence: int) -> int:
        return self.files.seek(handle, offset, whence)

    async def fsync(self, handle: int, data_only: bool) -> None:
        node = self.files.handle(handle).node
        self.hold.reached(node.id)
        await self.files.fsync(handle, data_only)
        if any(each.writable and each.backing for each in node.handles or ()):
            await self.hold.until_free(node.id)


def _is_empty(stack: Stack) -> bool:
    if stack.upper is None:
        return True
    with os.scandir(stack.upper.fd.fd) as entries:
        return next(iter(entries), None) is None
