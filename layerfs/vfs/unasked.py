"""Files of a mount whose kernel opens and closes them without asking (zero-message opens: a gate answered
OPEN by ENOSYS).

There is no handle then: a READ, a WRITE, and whatever else means an open file names its node, and nothing
tells when the last one is closed. So for each node that is used a descriptor is kept, in the place of a
handle, until the kernel forgets the node, or as long as there is room. A file is copied up by its first
WRITE, not by an open that could write.

A descriptor that was closed for want of room is opened again; see `vfs.reopen` for what that takes.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from layerfs.fdutil import OwnedFd
from layerfs.ids import HandleId
from layerfs.vfs.caller import Caller
from layerfs.vfs.copyup import CopyUp
from layerfs.vfs.files import DirectoryHandle, Files, Handle
from layerfs.vfs.node import Directory, File, Node
from layerfs.vfs.reopen import open_upper
from layerfs.vfs.tree import Tree, fail

#: Directories whose order is remembered, for the sake of names that the gate has to ask for.
_LISTINGS = 16


class Unasked:
    """Handles that nobody opened, each under the id of its node."""

    def __init__(self, tree: Tree, files: Files, copyup: CopyUp | None, room: int) -> None:
        """`room`: how many descriptors may be kept."""
        self.tree = tree
        self.files = files
        self.copyup = copyup
        self._room = room
        #: those that Python was asked for longest ago come first
        self._kept: OrderedDict[int, Handle] = OrderedDict()
        self._listings: OrderedDict[int, DirectoryHandle] = OrderedDict()
        tree.let_go_of_files = self._forget
        tree.unloaded = self._unlist

    def writable(self, node: File) -> bool:
        """Whether `node` has been written to, as far as is remembered: it counts as open for writing."""
        handle = self._kept.get(node.id)
        return handle is not None and handle.writable

    async def reading(self, node: File, caller: Caller) -> Handle:
        """Raises OSError."""
        handle = self._kept.get(node.id)
        if handle is None:
            handle = self.add(node, self._open(node), os.O_RDONLY, caller)
        return handle

    def _open(self, node: File) -> OwnedFd:
        try:
            return self.files.open_kindly(*self.tree.data_location(node), os.O_RDONLY)
        except PermissionError:
            if self.tree.upper is None or not node.in_upper or self.tree.is_metacopy(node):
                raise
            return open_upper(self.tree, node, os.O_RDONLY)

    async def writing(self, node: File, caller: Caller) -> Handle:
        """Copies the file up. Raises OSError."""
        handle = self._kept.get(node.id)
        if handle is not None and handle.writable:
            handle.opener = caller
            return handle
        if self.copyup is None:
            fail(errno.EROFS)  # remounted: the kernel asks nobody
        await self.copyup.data(node, caller)
        handle = self._kept.get(node.id)  # somebody may have been faster
        if handle is None:
            return self.add(node, open_upper(self.tree, node, os.O_RDWR), os.O_RDWR, caller)
        if not handle.writable:
            handle.fd = open_upper(self.tree, node, os.O_RDWR)
            self.files.begin_writing(handle)
            self.files.lend(handle)
        handle.opener = caller
        return handle

    def add(self, node: File, fd: OwnedFd, flags: int, caller: Caller) -> Handle:
        """Keeps an opened descriptor for `node`, which has none yet."""
        self._make_room()
        handle = Handle(HandleId(node.id), node, fd, flags, caller)
        self._kept[node.id] = handle
        self.files.keep(handle, flags)
        return handle

    async def listing(self, node: Directory) -> DirectoryHandle:
        """What an open directory of a read-only mount lists. Raises OSError."""
        known = self._listings.get(node.id)
        if known is not None and known.node is node:
            return known
        with self.tree.in_use(node):
            listing = DirectoryHandle(HandleId(node.id), node)
            await self.files.look(listing, fresh=True)
        while len(self._listings) >= _LISTINGS:
            self._listings.popitem(last=False)
        self._listings[node.id] = listing
        return listing

    @contextmanager
    def using(self, handle: Handle) -> Iterator[int]:
        """The id of a handle, which is not closed meanwhile."""
        handle.busy += 1
        self._kept.move_to_end(handle.id)
        try:
            yield handle.id
        finally:
            handle.busy -= 1

    def _make_room(self) -> None:
        """Closes what was not used for longest."""
        for _ in range(2 * len(self._kept)):
            if len(self._kept) < self._room:
                return
            handle = next(iter(self._kept.values()))
            if handle.busy or self.tree.gate.was_used(handle.id):
                self._kept.move_to_end(handle.id)
            else:
                self._drop(handle)

    def _drop(self, handle: Handle) -> None:
        del self._kept[handle.id]
        self.files.close(handle)

    def _unlist(self, directory: Directory) -> None:
        self._listings.pop(directory.id, None)

    def _forget(self, node: Node) -> None:
        handle = self._kept.get(node.id)
        if handle is not None:
            self._drop(handle)
