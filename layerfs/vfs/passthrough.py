"""Which open files the kernel reads and writes itself (FUSE passthrough). Nothing of that is seen here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from layerfs.fdutil import OwnedFd, fd_path
from layerfs.upper.upper import Upper
from layerfs.vfs import setid
from layerfs.vfs.tree import Tree

if TYPE_CHECKING:
    from layerfs.vfs.files import Handle


class Passthrough:
    """Never a lower file of a writable mount: it would be read, or written, after its copy-up."""

    def __init__(self, tree: Tree, upper: Upper | None) -> None:
        self._tree = tree
        self._upper = upper

    def open(self, handle: Handle, flags: int) -> None:
        """Before the kernel gets `handle`. Sets its `backing` and `keeps_pages`."""
        node, tree = handle.node, self._tree
        allowed = self._allowed(handle, flags)
        handle.backing = tree.gate.open_backing(handle.id, node.id, handle.fd.fd, allowed)
        # Pages that the kernel kept from before, or between, do not know what was written past it.
        handle.keeps_pages = not handle.backing and not node.bypassed
        node.bypassed = bool(handle.backing)
        if handle.backing and flags & os.O_ACCMODE == os.O_RDWR and not node.fleeting:
            # A store through a mapping moves mtime and tells nobody; what else does tells the kernel
            # (fs/fuse/passthrough.c fuse_passthrough_end_write). The mapping may outlive the handle.
            node.fleeting = True
            if node.lookups:
                tree.attributes_moved(node.id)

    def close(self, handle: Handle) -> None:
        """After its RELEASE."""
        self._tree.gate.close_backing(handle.id, handle.node.id)

    def _allowed(self, handle: Handle, flags: int) -> bool:
        node, upper = handle.node, self._upper
        if flags & os.O_DIRECT and not _takes_direct(handle.fd):
            return False
        if upper is None:
            return True
        if not node.in_upper or self._tree.is_metacopy(node):
            return False
        if upper.volatile and flags & (os.O_SYNC | os.O_DSYNC):
            return False  # the upper's file system would sync
        # The bits go when it is written to; by a writer who may keep them they do not (`setid`).
        return not upper.stat(handle.fd).st_mode & setid.SETID


def _takes_direct(fd: OwnedFd) -> bool:
    """Whether the file system knows O_DIRECT. The kernel opens the file so."""
    try:
        os.close(os.open(fd_path(fd.fd), os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True
