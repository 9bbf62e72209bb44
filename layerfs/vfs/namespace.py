"""Names come and go: create, mkdir, mknod, symlink, link, unlink, rmdir, rename.

Every operation: load what it looks at, copy up what must be in the upper (both may await), then *commit* in
one synchronous stretch that looks at the names again first; when they are not what was prepared, it starts
anew.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from layerfs.fdutil import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    OwnedFd,
    at_path,
    fd_path,
    renameat2,
)
from layerfs.ids import NodeId, RealIno
from layerfs.inodes import numbers
from layerfs.overlay import acl, whiteout
from layerfs.stack import Entry, Merged
from layerfs.upper.steps import step
from layerfs.upper.upper import Upper
from layerfs.vfs.caller import Caller
from layerfs.vfs.copyup import CopyUp
from layerfs.vfs.node import Directory, File, Node
from layerfs.vfs.tree import NAME_MAX, Tree, fail

_CREATE = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class New:
    """An object to be made. `mode` has the type; the caller's umask is already applied by the kernel."""

    mode: int
    rdev: int = 0
    target: bytes = b""


class Namespace:
    def __init__(self, tree: Tree, upper: Upper, copyup: CopyUp, *, redirect_dir: bool) -> None:
        self.tree = tree
        self.upper = upper
        self.copyup = copyup
        self.redirect_dir = redirect_dir
        self._uid = os.geteuid()
        self._gid = os.getegid()

    # -- making -----------------------------------------------------------------------------------

    async def make(self, parent: Directory, name: bytes, new: New, caller: Caller) -> Node:
        """mkdir, mknod, symlink. Raises OSError."""
        if stat.S_ISCHR(new.mode) and new.rdev == 0:
            fail(errno.EPERM)  # a whiteout; the kernel's ovl_mknod refuses it too
        return (await self._make(parent, name, new, caller, None))[0]

    async def create(
        self, parent: Directory, name: bytes, new: New, flags: int, caller: Caller
    ) -> tuple[File, OwnedFd]:
        """Makes a regular file and opens it with `flags` (access mode and O_SYNC ones). Raises OSError."""
        node, fd = await self._make(parent, name, new, caller, flags)
        assert isinstance(node, File) and fd is not None
        return node, fd

    async def _make(
        self, parent: Directory, name: bytes, new: New, caller: Caller, flags: int | None
    ) -> tuple[Node, OwnedFd | None]:
        self._check_name(name)
        merged = await self.tree.load(parent)
        self._check_parent(parent)
        if name in merged.names:
            fail(errno.EEXIST)
        parent_fd = self.copyup.directory(parent)
        hidden = merged.hides(name)
        is_dir = stat.S_ISDIR(new.mode)
        direct = not hidden and caller.uid == self._uid and caller.gid == self._gid
        if direct:
            fd = self._make_object(parent_fd.fd, name, new, flags)
            step("create.placed")
        else:
            work = self.upper.work.fd
            temporary = self.upper.work.temporary()
            fd = self._make_object(work.fd, temporary, new, flags)
            try:
                self._own(work.fd, temporary, parent_fd, new, caller)
                if is_dir and hidden:
                    self.upper.set_opaque(work.fd, temporary)
            except OSError:
                self.upper.discard(temporary)
                raise
            self.upper.place(temporary, parent_fd.fd, name, over_device=name in merged.devices, is_dir=is_dir)
        real = os.fstat(fd.fd).st_ino if fd is not None else self._real(parent_fd, name)
        node = self._add(parent, name, real, is_dir)
        self.tree.changed(parent)
        if isinstance(node, File):
            node.is_regular = stat.S_ISREG(new.mode)
        return node, fd

    def _default_acl(self, directory: OwnedFd) -> bytes | None:
        try:
            return os.getxattr(fd_path(directory.fd), acl.DEFAULT)
        except OSError:
            return None

    def _make_object(self, directory: int, name: bytes, new: New, flags: int | None) -> OwnedFd | None:
        kind = stat.S_IFMT(new.mode)
        permissions = stat.S_IMODE(new.mode)
        if flags is not None:
            return OwnedFd(os.open(name, flags | _CREATE, permissions, dir_fd=directory))
        if kind == stat.S_IFDIR:
            os.mkdir(name, permissions, dir_fd=directory)
        elif kind == stat.S_IFLNK:
            os.symlink(new.target, name, dir_fd=directory)
        else:
            os.mknod(name, new.mode, new.rdev, dir_fd=directory)
        return None

    def _own(self, work: int, temporary: bytes, parent: OwnedFd, new: New, caller: Caller) -> None:
        """Gives an object made in the work directory what the kernel gives one made in place
        (inode_init_owner, posix_acl_create).
        """
        above = os.fstat(parent.fd)
        uid, gid, mode = caller.uid, caller.gid, new.mode
        if above.st_mode & stat.S_ISGID:
            gid = above.st_gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        if (uid, gid) != (self._uid, self._gid):
            os.chown(temporary, uid, gid, dir_fd=work, follow_symlinks=False)
        if stat.S_ISLNK(mode):
            return
        access = None
        default = self._default_acl(parent)
        if default is not None:
            mode, access = acl.inherit(default, mode)
        path = at_path(work, temporary)
        if access is not None:
            os.setxattr(path, acl.ACCESS, access, follow_symlinks=False)
        if default is not None and stat.S_ISDIR(mode):
            os.setxattr(path, acl.DEFAULT, default, follow_symlinks=False)
        os.chmod(path, stat.S_IMODE(mode))

    def _real(self, directory: OwnedFd, name: bytes) -> int:
        return os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_ino

    def _add(self, parent: Directory, name: bytes, real: int, is_dir: bool) -> Node:
        """Notes a new upper object under its name, with its node."""
        merged = self._merged(parent)
        entry = Entry(None, real, is_dir)
        entry.lower = merged.hides(name)
        self._set_entry(parent, name, entry)
        number = numbers.compose(self.upper.layer.number, RealIno(real), self.tree.upper_region(parent))
        kind = Directory if is_dir else File
        node = kind(self.tree.claim(number), None, name)
        node.in_upper = True
        node.real, node.region = real, self.tree.upper_region(parent)
        if isinstance(node, Directory):
            node.merged = Merged()
            node.impure = False
        else:
            node.metacopy = False
        self.tree.nodes[node.id] = node
        entry.node = node
        self.tree.add_name(node, parent, name)
        return node

    # -- small checks -----------------------------------------------------------------------------

    @staticmethod
    def _check_name(name: bytes) -> None:
        if len(name) > NAME_MAX:
            fail(errno.ENAMETOOLONG)
        if name.startswith(whiteout.PREFIX):
            # In every layer these names mean whiteouts, in image layers by the OCI specification: an object
            # could not be told from one.
            fail(errno.EINVAL)

    @staticmethod
    def _check_parent(parent: Directory) -> None:
        if parent.unlinked:
            fail(errno.ENOENT)

    @staticmethod
    def _merged(directory: Directory) -> Merged:
        assert directory.merged is not None, "loaded by prepare"
        return directory.merged

    def _set_entry(self, parent: Directory, name: bytes, entry: Entry) -> None:
        merged = self._merged(parent)
        parent.generation += 1
        self.tree.gate.retract_name(parent.id, name)
        merged.names[name] = entry
        merged.devices.discard(name)

    def _drop_entry(self, parent: Directory, name: bytes, *, hidden: bool) -> None:
        merged = self._merged(parent)
        parent.generation += 1
        self.tree.gate.retract_name(parent.id, name)
        del merged.names[name]
        if hidden:
            (merged.devices if self.upper.ability.whiteouts == "device" else merged.marks).add(name)

    def _has_origin(self, node: Node) -> bool:
        """Whether an upper object shows another number than its own, so that its directory must be marked
        impure.
        """
        return node.id != NodeId(numbers.compose(self.upper.layer.number, RealIno(node.real), node.region))

    # -- link -------------------------------------------------------------------------------------

    async def link(self, node: File, parent: Directory, name: bytes, caller: Caller) -> None:
        """Raises OSError."""
        self._check_name(name)
        while True:
            merged = await self.tree.load(parent)
            self._check_parent(parent)
            if name in merged.names:
                fail(errno.EEXIST)
            if node.in_upper and not self.tree.is_metacopy(node) and node.job is None:
                break
            await self.copyup.data(node, caller)
        parent_fd = self.copyup.directory(parent)
        fd, source = self.tree.where(node)
        over_device = name in merged.devices
        if self._has_origin(node):
            self.upper.set_impure(parent_fd)
            parent.impure = True

        def link_to(directory: int, target: bytes) -> None:
            if source:
                os.link(source, target, src_dir_fd=fd.fd, dst_dir_fd=directory, follow_symlinks=False)
            else:
                os.link(fd_path(fd.fd), target, dst_dir_fd=directory, follow_symlinks=True)

        if over_device:
            temporary = self.upper.work.temporary()
            link_to(self.upper.work.fd.fd, temporary)
            self.upper.place(temporary, parent_fd.fd, name, over_device=True, is_dir=False)
        else:
            link_to(parent_fd.fd, name)
            step("create.placed")
        entry = Entry(None, node.real, False)
        entry.lower = merged.hides(name)
        entry.node = node
        self._set_entry(parent, name, entry)
        self.tree.add_name(node, parent, name)
        self.tree.changed(node)
        self.tree.changed(parent)

    # -- unlink, rmdir ----------------------------------------------------------------------------

    async def unlink(self, parent: Directory, name: bytes, caller: Caller) -> None:
        """Raises OSError."""
        while True:
            entry = await self._present(parent, name)
            if entry.is_dir:
                fail(errno.EISDIR)
            node = self.tree.child(parent, name, entry)
            assert isinstance(node, File)
            if not await self._all_names_up(node, caller) and merged_is(parent, name, entry):
                break
        parent_fd = self.copyup.directory(parent)
        in_upper = entry.home is None
        pin = self._pin(node, parent_fd, name) if in_upper else None
        if entry.lower:
            self.upper.whiteout(parent_fd.fd, name, present=in_upper, is_dir=False)
        else:
            self.upper.remove(parent_fd.fd, name, is_dir=False)
        self._gone(parent, name, entry, node, pin, hidden=entry.lower)

    async def _present(self, parent: Directory, name: bytes) -> Entry:
        merged = await self.tree.load(parent)
        self._check_parent(parent)
        entry = merged.names.get(name)
        if entry is None:
            fail(errno.ENOENT)
        return entry

    async def _all_names_up(self, node: File, caller: Caller) -> bool:
        """Before a name of a hard-linked lower file goes, the file moves up with all its names, so that its
        link count stays right.

        Returns whether anything was awaited."""
        if node.in_upper or self.tree.stat_real(node).st_nlink == 1:
            return False
        if not await self.copyup.links.has_several(node):
            return node.in_upper  # other links of it are outside the tree
        await self.copyup.attributes_only(node, caller)
        return True

    def _pin(self, node: Node, parent: OwnedFd, name: bytes) -> OwnedFd | None:
        """What keeps an object reachable that is about to lose its last known name."""
        if node.names:
            return None
        try:
            return self.upper.open_path(parent.fd, name)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        # Out of descriptors: an open handle keeps it as well; without one it can only be seen by those who
        # hold it by O_PATH, and a new object that gets its inode number shows a temporary one (`Tree.claim`).
        handles = node.handles if isinstance(node, File) else None
        return next(iter(handles)).fd if handles else None

    def _gone(
        self, parent: Directory, name: bytes, entry: Entry, node: Node, pin: OwnedFd | None, *, hidden: bool
    ) -> None:
        """Notes that an object lost a name; `hidden`: a whiteout stands there now."""
        entry.node = None
        self._drop_entry(parent, name, hidden=hidden)
        self.tree.drop_name(node, parent, name)
        if node.parent is None:
            node.pin = pin
            self.tree.stack.pool.drop(node)
        self.tree.changed(node)
        self.tree.changed(parent)
        self.tree.release(node)

    async def rmdir(self, parent: Directory, name: bytes) -> None:
        """Raises OSError."""
        while True:
            entry = await self._present(parent, name)
            if not entry.is_dir:
                fail(errno.ENOTDIR)
            node = self.tree.child(parent, name, entry)
            assert isinstance(node, Directory)
            if node.merged is None:
                await self.tree.load(node)
                continue
            break
        if node.merged.names:
            fail(errno.ENOTEMPTY)
        parent_fd = self.copyup.directory(parent)
        pin = None
        if entry.home is None:
            pin = self._pin(node, parent_fd, name)
            self.upper.clear(parent_fd.fd, name)
        if entry.lower:
            self.upper.whiteout(parent_fd.fd, name, present=entry.home is None, is_dir=True)
        else:
            self.upper.remove(parent_fd.fd, name, is_dir=True)
        node.merged = Merged()
        self._gone(parent, name, entry, node, pin, hidden=entry.lower)

    # -- rename -----------------------------------------------------------------------------------

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
        self._check_name(new_name)
        while True:
            prepared = await self._prepare_rename(parent, name, new_parent, new_name, flags, caller)
            if prepared is not None:
                break
        source, target = prepared
        if source.node is target.node if target else False:
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
        entry = await self._present(parent, name)
        moves = self.tree.moves
        merged = await self.tree.load(new_parent)
        self._check_parent(new_parent)
        if self._merged(parent).names.get(name) is not entry or self.tree.moves != moves:
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
            if target_node is not node and await self._all_names_up(target_node, caller):
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
        await self._whole(node, caller)
        return False

    async def _whole(self, directory: Directory, caller: Caller) -> None:
        """Without redirects a directory can only move when all of it is in the upper: copies what is not,
        then cuts it off its lowers (`directory.lowers` is empty then). When somebody changes things meanwhile
        it may leave it undone; the caller tries again. A crash in between leaves copies, no change to be
        seen.
        """
        directory.users += 1
        try:
            merged = await self.tree.load(directory)
            for name, entry in list(merged.names.items()):
                if not merged_is(directory, name, entry):
                    return
                child = self.tree.child(directory, name, entry)
                child.users += 1
                try:
                    if isinstance(child, Directory):
                        if child.lowers:
                            await self._whole(child, caller)
                        else:
                            self.copyup.directory(child)
                    elif isinstance(child, File) and (not child.in_upper or self.tree.is_metacopy(child)):
                        await self.copyup.data(child, caller)
                finally:
                    child.users -= 1
                    self.tree.release(child)
            if directory.parent is not None and all(
                self._is_whole(directory, name, entry) for name, entry in merged.names.items()
            ):
                self._cut_off(directory, directory.parent)
        finally:
            directory.users -= 1
            self.tree.release(directory)

    def _is_whole(self, directory: Directory, name: bytes, entry: Entry) -> bool:
        if entry.home is not None:
            return False
        child = self.tree.child(directory, name, entry)
        whole = isinstance(child, File) or (isinstance(child, Directory) and not child.lowers)
        self.tree.release(child)
        return whole

    def _cut_off(self, directory: Directory, parent: Directory) -> None:
        """A directory that is wholly in the upper stops merging. Synchronous."""
        merged = self._merged(directory)
        fd = self.copyup.directory(directory)
        parent_fd = self.copyup.directory(parent)
        # The number was made from the lower that it no longer has.
        self.upper.record_ino(parent_fd.fd, directory.name, directory.id)
        self.upper.set_impure(parent_fd)
        parent.impure = True
        self.upper.set_opaque(parent_fd.fd, directory.name)
        self.upper.drop_redirect(parent_fd.fd, directory.name)
        self.upper.drop_whiteouts(fd, merged)
        directory.lowers = ()
        directory.lower_path = None
        self._merged(parent).names[directory.name].lowers = ()
        for entry in merged.names.values():
            entry.lower = False
            entry.lowers = ()

    # -- commits of rename: no await below --------------------------------------------------------

    def _replace(self, source: _Place, target: _Place | None, new_parent: Directory, new_name: bytes) -> None:
        upper = self.upper
        old_fd = self.copyup.directory(source.parent)
        new_fd = self.copyup.directory(new_parent)
        if isinstance(source.node, Directory):
            self.copyup.directory(source.node)
        target_merged = self._merged(new_parent)
        over_device = new_name in target_merged.devices
        lower_at_target = target_merged.hides(new_name) or (target is not None and target.entry.lower)
        self._mark_moving(source, old_fd, lower_at_target)
        pin: OwnedFd | None = None
        target_in_upper = target is not None and target.entry.home is None
        if target is not None and target_in_upper:
            pin = self._pin(target.node, new_fd, new_name)
            if target.entry.is_dir:
                upper.clear(new_fd.fd, new_name)
                step("rename.cleared")
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
                upper.hide(old_fd.fd, source.name)  # the whiteout device that is there now hides it as well
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
            self._gone(new_parent, new_name, target.entry, target.node, pin, hidden=False)
        self._drop_entry(source.parent, source.name, hidden=source.entry.lower)
        self._arrive(source, new_parent, new_name, lower_at_target)

    def _exchange(self, one: _Place, two: _Place) -> None:
        one_fd = self.copyup.directory(one.parent)
        two_fd = self.copyup.directory(two.parent)
        for place in (one, two):
            if isinstance(place.node, Directory):
                self.copyup.directory(place.node)
        one_lower, two_lower = one.entry.lower, two.entry.lower
        self._mark_moving(one, one_fd, two_lower)
        self._mark_moving(two, two_fd, one_lower)
        if self.upper.ability.whiteouts == "file":
            # Files beside a `.wh.` of their own name hide their lowers, whatever lies there after the
            # exchange.
            for fd, place in ((one_fd, one), (two_fd, two)):
                if place.entry.lower:
                    self.upper.hide(fd.fd, place.name)
                    self._merged(place.parent).marks.add(place.name)
        renameat2(one_fd.fd, one.name, two_fd.fd, two.name, RENAME_EXCHANGE)
        step("rename.renamed")
        one_parent, one_name = one.parent, one.name
        self._drop_entry(one.parent, one.name, hidden=False)
        self._drop_entry(two.parent, two.name, hidden=False)
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

    def _data_path(self, node: File, name: bytes) -> bytes:
        """Path, in the tree of the lowers, of the file whose data a metadata-only file shows."""
        kept = self.upper.get_redirect(*self._directory_and_name(node))
        if kept is not None and kept.startswith(b"/"):
            return kept[1:]
        for home in node.lookup_dirs:
            return home.path + b"/" + (kept or node.home_name) if home.path else (kept or node.home_name)
        return name

    def _directory_and_name(self, node: File) -> tuple[int, bytes]:
        fd, name = self.tree.where(node)
        return fd.fd, name

    def _arrive(self, place: _Place, parent: Directory, name: bytes, lower: bool) -> None:
        """Notes that what `place` names now stands at `name` in `parent`."""
        node, entry = place.node, place.entry
        moved = Entry(None, node.real, entry.is_dir)
        moved.lower = lower
        moved.node = node
        self._set_entry(parent, name, moved)
        self.tree.drop_name(node, place.parent, place.name)
        self.tree.add_name(node, parent, name)
        if isinstance(node, Directory):
            self.tree.moves += 1
        if self._has_origin(node):
            self.upper.set_impure(self.tree.upper_fd(parent))
            parent.impure = True
        for changed in (node, place.parent, parent):
            self.tree.changed(changed)


@dataclass(slots=True)
class _Place:
    """One end of a rename: an object and where it stands."""

    parent: Directory
    name: bytes
    entry: Entry
    node: Node


def merged_is(directory: Directory, name: bytes, entry: Entry) -> bool:
    """Whether a name still means what it meant before something was awaited."""
    return directory.merged is not None and directory.merged.names.get(name) is entry
