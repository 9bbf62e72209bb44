"""Makes an upper plain: no redirects, no metadata-only copies, whiteouts as devices and opaque marks as
xattrs where this machine allows. What a mount shows stays the same, at every moment: whoever stops it
anywhere has an upper that mounts to the same tree, and may begin again. (As after a copy-up, a directory may
show the time of the crash as its mtime.)

Walks what is in the upper, through the tree that a mount would show; copying and cutting off are those of
copy-up and of a rename without redirects. For an upper that is not mounted.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from layerfs.fdutil import OwnedFd, at_path, fd_path
from layerfs.overlay import whiteout
from layerfs.stack import own_redirect
from layerfs.upper.copyup import restore_times
from layerfs.upper.steps import step
from layerfs.upper.upper import Upper
from layerfs.vfs.caller import Caller
from layerfs.vfs.copyup import CopyUp
from layerfs.vfs.node import Directory, File
from layerfs.vfs.rename import Rename
from layerfs.vfs.tree import Tree

#: Nobody waits for it but the command, which is ended by its signals.
_NOBODY = Caller(0, 0, 0)


@dataclass
class Flattened:
    """How many of each were made plain."""

    directories: int = 0
    files: int = 0
    whiteouts: int = 0


class Flatten:
    def __init__(self, tree: Tree, upper: Upper, copyup: CopyUp, rename: Rename) -> None:
        self.tree = tree
        self.upper = upper
        self.copyup = copyup
        self.rename = rename
        self.done = Flattened()

    async def run(self) -> Flattened:
        """Raises OSError, naming the path it stopped at."""
        todo = [self.tree.root]
        self.tree.root.users += 1
        while todo:
            directory = todo.pop()
            try:
                await self._entries(directory, todo)
                self._whiteouts(directory)
            except OSError as error:
                if error.filename is None or not isinstance(error.filename, str):
                    error.filename = os.fsdecode(b"/" + self.tree.path(directory))
                raise
            finally:
                directory.users -= 1
                self.tree.release(directory)
        return self.done

    async def _entries(self, directory: Directory, todo: list[Directory]) -> None:
        """Everything in the upper's part of a directory; directories are put off, held by their `users`."""
        merged = await self.tree.load(directory)
        for name, entry in list(merged.names.items()):
            if entry.home is not None:
                continue  # nothing of it is in the upper
            child = self.tree.child(directory, name, entry)
            child.users += 1
            if isinstance(child, Directory):
                todo.append(child)
                await self._directory(directory, child)
                continue
            assert isinstance(child, File)
            try:
                await self._file(child)
            finally:
                child.users -= 1
                self.tree.release(child)

    async def _directory(self, parent: Directory, directory: Directory) -> None:
        fd = self.tree.upper_fd(parent)
        path = at_path(fd.fd, directory.name)
        if own_redirect(path, self.upper.names, follow=False) is None:
            return
        while directory.lowers:
            await self.rename.whole(directory, _NOBODY)
        # Without lowers it had a redirect to nothing: what it hides must stay hidden.
        self.upper.set_opaque(fd.fd, directory.name)
        step("whole.opaque")
        self.upper.drop_redirect(fd.fd, directory.name)
        step("whole.redirect")
        self.done.directories += 1

    async def _file(self, file: File) -> None:
        if self.tree.is_metacopy(file):
            await self.copyup.data(file, _NOBODY)
            self.done.files += 1
        if not stat.S_ISREG(self.tree.stat_real(file).st_mode):
            return
        fd, name = self.tree.where(file)
        # Of a file that was filled in place, or that somebody else filled: it means nothing any more, but the
        # kernel refuses it under userxattr.
        self.upper.drop_redirect(fd.fd, name)

    def _whiteouts(self, directory: Directory) -> None:
        if not directory.in_upper:
            return
        fd = self.tree.upper_fd(directory)
        before = os.fstat(fd.fd)
        try:
            self._plain_whiteouts(directory, fd)
        finally:
            restore_times(fd, before)

    def _plain_whiteouts(self, directory: Directory, fd: OwnedFd) -> None:
        merged = directory.merged
        assert merged is not None
        if directory.parent is not None:
            self._opaque_file(directory, directory.parent, fd)
            if not directory.lowers:
                self.upper.drop_whiteouts(fd, merged)
                step("whole.whiteouts")
                return
        if self.upper.ability.whiteouts != "device":
            return
        for name in list(merged.marks):
            entry = merged.names.get(name)
            if entry is None and name not in merged.devices:
                self.upper.whiteout(fd.fd, name, present=False)
                merged.devices.add(name)
            elif entry is not None and entry.is_dir:
                self.upper.set_opaque(fd.fd, name)  # the file beside it is what has hidden the lowers
                step("whole.opaque")
            os.unlink(whiteout.PREFIX + name, dir_fd=fd.fd)
            step("whole.whiteouts")
            merged.marks.discard(name)
            self.done.whiteouts += 1

    def _opaque_file(self, directory: Directory, parent: Directory, fd: OwnedFd) -> None:
        """The OCI mark of an opaque directory becomes the xattr."""
        try:
            os.stat(whiteout.OPAQUE_NAME, dir_fd=fd.fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        os.setxattr(fd_path(fd.fd), self.upper.names.opaque, whiteout.OPAQUE)
        step("whole.opaque")
        os.unlink(whiteout.OPAQUE_NAME, dir_fd=fd.fd)
        step("whole.whiteouts")
        self.done.whiteouts += 1
