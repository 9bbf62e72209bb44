"""rename(2) and its flags: files and directories, lower, merged or upper, never EXDEV.

As every change of names: prepare (may await), look again, commit without an await. Order of what is written:
`overlay/FORMAT.md`.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from layerfs.fdutil import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, OwnedFd, renameat2
from layerfs.stack import Entry, Merged
from layerfs.upper.steps import step
from layerfs.upper.work import Pin
from layerfs.vfs.caller import Caller
from layerfs.vfs.names import Names, merged_is
from layerfs.vfs.node import Directory, File, Node
from layerfs.vfs.tree import fail


@dataclass(slots=True)
class _Place:
    """One end of a rename: an object and where it stands."""

    parent: Directory
    name: bytes
    entry: Entry
    node: Node


class Rename:
    def __init__(self, names: Names, *, redirect_dir: bool) -> None:
        self.names = names
        self.tree = names.tree
        self.upper = names.upper
        self.copyup = names.copyup
        self.redirect_dir = redirect_dir

    async def rename(
        self,
        parent: Directory,
        name: bytes,
        new_parent: Directory,
        new_name: bytes,
        flags: int,
        caller: Caller,
    ) -> None:
        """renameat2(2). Raises OSError; never EXDEV."""
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            fail(errno.EINVAL)
        self.names.check_name(new_name)
        while True:
            prepared = await self._prepare_rename(parent, name, new_parent, new_name, flags, caller)
            if prepared is not None:
                break
        source, target = prepared
        if target is not None and source.node is target.node:
            return  # two names of one file: rename(2) does nothing
        if flags & RENAME_EXCHANGE:
            assert target is not None
            self._exchange(source, target)
        else:
            self._replace(source, target, new_parent, new_name)

    async def _prepare_rename(
        self,
        parent: Directory,
        name: bytes,
        new_parent: Directory,
        new_name: bytes,
        flags: int,
        caller: Caller,
    ) -> tuple[_Place, _Place | None] | None:
        """Checks everything and copies up what must be; None when something was awaited, so that it must all
        be checked again.
        """
        entry = await self.names.present(parent, name)
        moves = self.tree.moves
        merged = await self.tree.load(new_parent)
        self.names.check_parent(new_parent)
        if self.names.merged(parent).names.get(name) is not entry or self.tree.moves != moves:
            return None
        target_entry = merged.names.get(new_name)
        node = self.tree.child(parent, name, entry)
        source = _Place(parent, name, entry, node)
        if isinstance(node, Directory) and self._is_inside(new_parent, node):
            fail(errno.EINVAL)
        if target_entry is None:
            if flags & RENAME_EXCHANGE:
                fail(errno.ENOENT)
            return (source, None) if await self._movable(source, caller) else None
        if flags & RENAME_NOREPLACE:
            fail(errno.EEXIST)
        target_node = self.tree.child(new_parent, new_name, target_entry)
        target = _Place(new_parent, new_name, target_entry, target_node)
        if flags & RENAME_EXCHANGE:
            if isinstance(target_node, Directory) and self._is_inside(parent, target_node):
                fail(errno.EINVAL)
            ready = await self._movable(source, caller) and await self._movable(target, caller)
            return (source, target) if ready else None
        if isinstance(target_node, Directory):
            if not isinstance(node, Directory):
                fail(errno.EISDIR)
            if target_node.merged is None:
                await self.tree.load(target_node)
                return None
            if target_node.merged.names:
                fail(errno.ENOTEMPTY)
        else:
            assert isinstance(target_node, File)
            if isinstance(node, Directory):
                fail(errno.ENOTDIR)
            if target_node is not node and await self.names.all_names_up(target_node, caller):
                return None
            same = merged_is(parent, name, entry) and merged_is(new_parent, new_name, target_entry)
            if not same or self.tree.moves != moves:
                return None  # counting names awaits too
        return (source, target) if await self._movable(source, caller) else None

    @staticmethod
    def _is_inside(directory: Directory, ancestor: Directory) -> bool:
        here: Directory | None = directory
        while here is not None:
            if here is ancestor:
                return True
            here = here.parent
        return False

    async def _movable(self, place: _Place, caller: Caller) -> bool:
        """Makes sure the object can be renamed in the upper. Returns whether it could already; False: check
        everything again.
        """
        node = place.node
        if isinstance(node, File):
            if node.job is not None:
                await self.copyup.settle(node, caller)
                return False
            if not node.in_upper:
                await self.copyup.attributes_only(node, caller)
                return False
            return True
        assert isinstance(node, Directory)
        if not node.lowers or self.redirect_dir:
            return True
        await self.whole(node, caller)
        return False

    async def whole(self, top: Directory, caller: Caller) -> None:
        """Without redirects a directory can only move when all of it is in the upper: copies what is not,
        then cuts it off its lowers (`top.lowers` is empty then). When somebody changes things meanwhile it
        may leave it undone; the caller tries again. A crash in between leaves copies, no change to be seen.
        """
        parents_first: list[Directory] = []
        todo = [top]
        top.users += 1
        try:
            while todo:
                directory = todo.pop()
                parents_first.append(directory)
                merged = await self.tree.load(directory)
                for name, entry in list(merged.names.items()):
                    if merged_is(directory, name, entry):
                        await self._copy_child(self.tree.child(directory, name, entry), todo, caller)
            for directory in reversed(parents_first):
                merged = self.names.merged(directory)
                whole = all(self._is_whole(directory, name, entry) for name, entry in merged.names.items())
                if directory.parent is not None and whole:
                    self._cut_off(directory, directory.parent)
        finally:
            for directory in (*todo, *reversed(parents_first)):
                directory.users -= 1
                self.tree.release(directory)

    async def _copy_child(self, child: Node, todo: list[Directory], caller: Caller) -> None:
        """Copies a file; puts off a directory that merges, held by its `users`."""
        child.users += 1
        if isinstance(child, Directory) and child.lowers:
            todo.append(child)
            return
        try:
            if isinstance(child, Directory):
                self.copyup.directory(child)
            elif isinstance(child, File) and (not child.in_upper or self.tree.is_metacopy(child)):
                await self.copyup.data(child, caller)
        finally:
            child.users -= 1
            self.tree.release(child)

    def _is_whole(self, directory: Directory, name: bytes, entry: Entry) -> bool:
        if entry.home is not None:
            return False
        child = self.tree.child(directory, name, entry)
        whole = isinstance(child, File) or (isinstance(child, Directory) and not child.lowers)
        self.tree.release(child)
        return whole

    def _cut_off(self, directory: Directory, parent: Directory) -> None:
        """A directory that is wholly in the upper stops merging. Synchronous."""
        merged = self.names.merged(directory)
        fd = self.copyup.directory(directory)
        parent_fd = self.copyup.directory(parent)
        # The number was made from the lower that it no longer has.
        self.upper.record_ino(parent_fd.fd, directory.name, directory.id)
        self.copyup.mark_impure(parent)
        self.upper.set_opaque(parent_fd.fd, directory.name)
        step("whole.opaque")
        self.upper.drop_redirect(parent_fd.fd, directory.name)
        step("whole.redirect")
        self.upper.drop_whiteouts(fd, merged)
        step("whole.whiteouts")
        directory.lowers = ()
        directory.lower_path = None
        self.tree.gate.retract_attributes(directory.id)  # what merges has a link count of 1
        self.names.merged(parent).names[directory.name].lowers = ()
        for entry in merged.names.values():
            entry.lower = False
            entry.lowers = ()

    # -- commits of rename: no await below --------------------------------------------------------

    def _replace(self, source: _Place, target: _Place | None, new_parent: Directory, new_name: bytes) -> None:
        upper = self.upper
        old_parent_path = self.tree.path(source.parent)
        old_fd = self.copyup.directory(source.parent)
        new_fd = self.copyup.directory(new_parent)
        if isinstance(source.node, Directory):
            self.copyup.directory(source.node)
        target_merged = self.names.merged(new_parent)
        over_device = new_name in target_merged.devices
        lower_at_target = target_merged.hides(new_name) or (target is not None and target.entry.lower)
        self._mark_moving(source, old_fd, lower_at_target)
        self._mark_parent(source, new_parent, old_fd)
        pin: Pin | None = None
        target_in_upper = target is not None and target.entry.home is None
        if target is not None and target_in_upper:
            pin = self.copyup.pin(target.node, new_fd, new_name)
            if target.entry.is_dir:
                upper.clear(new_fd.fd, new_name)
                step("rename.cleared")
                if isinstance(target.node, Directory):
                    # It is opaque now, even if the rename fails.
                    target.node.lowers, target.node.lower_path, target.node.merged = (), None, Merged()
                    self.tree.gate.retract_attributes(target.node.id)
        device = upper.ability.whiteouts == "device"
        leaves_whiteout = source.entry.lower
        if over_device and source.entry.is_dir:
            # A directory cannot be renamed over a whiteout device, so they change places; the whiteout is
            # right at the old name if the lowers show something there, and harmless (and removed) if not.
            renameat2(old_fd.fd, source.name, new_fd.fd, new_name, RENAME_EXCHANGE)
            step("rename.renamed")
            if not leaves_whiteout:
                os.unlink(source.name, dir_fd=old_fd.fd)
            elif not device:
                upper.hide(old_fd.fd, source.name)
                os.unlink(source.name, dir_fd=old_fd.fd)
        elif device:
            renameat2(old_fd.fd, source.name, new_fd.fd, new_name, RENAME_WHITEOUT if leaves_whiteout else 0)
            step("rename.renamed")
        else:
            if leaves_whiteout:
                upper.hide(old_fd.fd, source.name)
                step("rename.whiteout")
            os.rename(source.name, new_name, src_dir_fd=old_fd.fd, dst_dir_fd=new_fd.fd)
            step("rename.renamed")
        if target is not None:
            if isinstance(target.node, Directory):
                target.node.merged = Merged()
            self.names.gone(new_parent, new_name, target.entry, target.node, pin, hidden=False)
        self.names.drop_entry(source.parent, source.name, hidden=source.entry.lower)
        self._arrive(source, new_parent, new_name, lower_at_target)
        if isinstance(source.node, Directory):
            self.copyup.links.moved(_path(old_parent_path, source.name), self.tree.path(source.node))

    def _exchange(self, one: _Place, two: _Place) -> None:
        one_fd = self.copyup.directory(one.parent)
        two_fd = self.copyup.directory(two.parent)
        for place in (one, two):
            if isinstance(place.node, Directory):
                self.copyup.directory(place.node)
        one_lower, two_lower = one.entry.lower, two.entry.lower
        self._mark_moving(one, one_fd, two_lower)
        self._mark_moving(two, two_fd, one_lower)
        self._mark_parent(one, two.parent, one_fd)
        self._mark_parent(two, one.parent, two_fd)
        if self.upper.ability.whiteouts == "file":
            # Files beside a `.wh.` of their own name hide their lowers, whatever lies there after the
            # exchange.
            for fd, place in ((one_fd, one), (two_fd, two)):
                if place.entry.lower:
                    self.upper.hide(fd.fd, place.name)
                    self.names.merged(place.parent).marks.add(place.name)
        renameat2(one_fd.fd, one.name, two_fd.fd, two.name, RENAME_EXCHANGE)
        step("rename.renamed")
        one_parent, one_name = one.parent, one.name
        self.names.drop_entry(one.parent, one.name, hidden=False)
        self.names.drop_entry(two.parent, two.name, hidden=False)
        self._arrive(one, two.parent, two.name, two_lower)
        self._arrive(two, one_parent, one_name, one_lower)

    def _mark_moving(self, place: _Place, directory: OwnedFd, lower_at_target: bool) -> None:
        """Before an object moves: says where its lower content lies, or that it has none, so that it is the
        same at its new name.
        """
        node = place.node
        if isinstance(node, Directory):
            if node.lowers:
                assert node.lower_path is not None
                self.upper.set_redirect(directory.fd, place.name, node.lower_path)
                step("rename.marked")
            elif lower_at_target:
                self.upper.set_opaque(directory.fd, place.name)
                step("rename.marked")
        elif isinstance(node, File) and self.tree.is_metacopy(node):
            fd, name = self.tree.data_location(node)
            del fd
            self.upper.set_redirect(directory.fd, place.name, self._data_path(node, name))
            step("rename.marked")

    def _mark_parent(self, place: _Place, parent: Directory, fd: OwnedFd) -> None:
        """Before something moves, as this may find no room; one mark too many does no harm."""
        if self.names.has_origin(place.node):
            self.copyup.mark_impure(parent)
            if isinstance(place.node, File):
                # Where kernel overlayfs copied it up it has none yet: its number was found by its old path.
                self.upper.record_ino(fd.fd, place.name, place.node.id)

    def _data_path(self, node: File, name: bytes) -> bytes:
        """Path, in the tree of the lowers, of the file whose data a metadata-only file shows."""
        kept = self.tree.redirect_of(node)
        if kept is not None and kept.startswith(b"/"):
            return kept[1:]
        for home in node.lookup_dirs:
            return home.path + b"/" + (kept or node.home_name) if home.path else (kept or node.home_name)
        return name

    def _arrive(self, place: _Place, parent: Directory, name: bytes, lower: bool) -> None:
        """Notes that what `place` names now stands at `name` in `parent`."""
        node, entry = place.node, place.entry
        moved = Entry(None, node.real, entry.is_dir)
        moved.lower = lower
        moved.node = node
        self.names.set_entry(parent, name, moved)
        self.tree.drop_name(node, place.parent, place.name)
        self.tree.add_name(node, parent, name)
        if isinstance(node, Directory):
            self.tree.moves += 1
        for changed in (node, place.parent, parent):
            self.tree.changed(changed)


def _path(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name if directory else name
