"""Names come and go: create, mkdir, mknod, symlink, link, unlink, rmdir. (`rename` moves them.)

Every operation: load what it looks at, copy up what must be in the upper (both may await), then *commit* in
one synchronous stretch that looks at the names again first; when they are not what was prepared, it starts
anew.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, replace

from layerfs.fdutil import OwnedFd, at_path, fd_path
from layerfs.ids import RealIno
from layerfs.inodes import numbers
from layerfs.overlay import acl, override
from layerfs.overlay.owners import OVERFLOW
from layerfs.stack import Entry, Merged
from layerfs.upper.steps import step
from layerfs.upper.work import Pin
from layerfs.vfs.caller import Caller
from layerfs.vfs.names import Names, merged_is
from layerfs.vfs.node import Directory, File, Node
from layerfs.vfs.tree import fail

#: A directory with more whiteouts than this is not looked at again before it is removed.
_LOOKED_AT = 1000
_CREATE = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class New:
    """An object to be made. `mode` has the type; the caller's umask is still to be applied, if it has one."""

    mode: int
    rdev: int = 0
    target: bytes = b""


class Namespace:
    def __init__(self, names: Names) -> None:
        self.names = names
        self.tree = names.tree
        self.upper = names.upper
        self.copyup = names.copyup
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
        self.names.check_name(name)
        merged = await self.tree.load(parent)
        self.names.check_parent(parent)
        if name in merged.names:
            fail(errno.EEXIST)
        parent_fd = self.copyup.directory(parent)
        hidden = merged.hides(name)
        is_dir = stat.S_ISDIR(new.mode)
        new = self._masked(parent, parent_fd, new, caller)
        owner = self._owner(caller)
        direct = not hidden and owner == (self._uid, self._gid) and not self.upper.overrides
        if direct:
            fd = self._make_object(parent_fd.fd, name, new, flags)
            step("create.placed")
        else:
            work = self.upper.work.fd
            temporary = self.upper.work.temporary()
            fd = self._make_object(work.fd, temporary, new, flags)
            try:
                if is_dir and hidden:
                    self.upper.set_opaque(work.fd, temporary)
                self._own(work.fd, temporary, parent, parent_fd, new, owner)
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

    async def make_unnamed(
        self, parent: Directory, mode: int, flags: int, caller: Caller
    ) -> tuple[File, OwnedFd]:
        """A regular file without a name, which `link` may give it (open(2) O_TMPFILE), opened with `flags`.
        Raises OSError: EOPNOTSUPP where the upper's file system has none.
        """
        self.names.check_parent(parent)
        parent_fd = self.copyup.directory(parent)
        new = self._masked(parent, parent_fd, New(mode), caller)
        owner = self._owner(caller)
        direct = owner == (self._uid, self._gid) and not self.upper.overrides
        permissions = stat.S_IMODE(new.mode)
        if self.upper.overrides:
            permissions = override.private_mode(permissions, is_dir=False)
        place = parent_fd if direct else self.upper.work.fd
        fd = OwnedFd(os.open(b".", flags | os.O_TMPFILE | os.O_CLOEXEC, permissions, dir_fd=place.fd))
        if not direct:
            self._own(None, fd_path(fd.fd), parent, parent_fd, new, owner)
        region = self.tree.upper_region(parent) if direct else b""
        node = self._new_node(File, b"", os.fstat(fd.fd).st_ino, region)
        assert isinstance(node, File)
        node.is_regular = True
        self.tree.pin(node, fd)
        return node, fd

    def _masked(self, parent: Directory, parent_fd: OwnedFd, new: New, caller: Caller) -> New:
        """Takes the caller's umask off the mode, unless the directory has a default ACL, which takes the
        umask's place (fs/posix_acl.c posix_acl_create)."""
        if not caller.umask or stat.S_ISLNK(new.mode):
            return new
        if parent.has_default_acl is None:
            parent.has_default_acl = self._default_acl(parent_fd) is not None
        return new if parent.has_default_acl else replace(new, mode=new.mode & ~caller.umask)

    def _default_acl(self, directory: OwnedFd) -> bytes | None:
        try:
            return os.getxattr(fd_path(directory.fd), acl.DEFAULT)
        except OSError:
            return None

    def _make_object(self, directory: int, name: bytes, new: New, flags: int | None) -> OwnedFd | None:
        kind = stat.S_IFMT(new.mode)
        permissions = stat.S_IMODE(new.mode)
        if self.upper.overrides:  # what it is to be is said by `_own`
            permissions = override.private_mode(permissions, is_dir=kind == stat.S_IFDIR)
            if flags is None and kind not in (stat.S_IFDIR, stat.S_IFLNK):
                os.close(os.open(name, os.O_WRONLY | _CREATE, permissions, dir_fd=directory))
                return None
        if flags is not None:
            return OwnedFd(os.open(name, flags | _CREATE, permissions, dir_fd=directory))
        if kind == stat.S_IFDIR:
            os.mkdir(name, permissions, dir_fd=directory)
        elif kind == stat.S_IFLNK:
            os.symlink(new.target, name, dir_fd=directory)
        else:
            os.mknod(name, new.mode, new.rdev, dir_fd=directory)
        return None

    def _owner(self, caller: Caller) -> tuple[int, int]:
        """What to store as the owner of something new. Callers that the map does not know become the
        overflow id, so that root of the host can make things in a container's tree, as with fuse-overlayfs.
        Raises OSError: EOVERFLOW for one who has no id in the idmapped mount that he came by, as the kernel
        says itself (fs/namei.c may_create): nothing is to become the daemon's own for want of an owner.
        """
        if caller.uid is None or caller.gid is None:
            fail(errno.EOVERFLOW)
        owners = self.tree.owners
        if owners is None:
            return caller.uid, caller.gid
        uid, gid = owners.uid.stored(caller.uid), owners.gid.stored(caller.gid)
        return OVERFLOW if uid is None else uid, OVERFLOW if gid is None else gid

    def _own(
        self,
        directory: int | None,
        name: bytes,
        parent: Directory,
        parent_fd: OwnedFd,
        new: New,
        owner: tuple[int, int],
    ) -> None:
        """Gives an object made in the work directory what the kernel gives one made in place
        (inode_init_owner, posix_acl_create). `directory` None: `name` is a path that leads to exactly it.
        """
        above = self.tree.stat_real(parent)
        (uid, gid), mode = owner, new.mode
        if above.st_mode & stat.S_ISGID:
            gid = above.st_gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        follow = directory is None
        made = os.stat(name, dir_fd=directory, follow_symlinks=follow)
        own = self.upper.overrides and override.may_carry(made)
        if not own and (uid, gid) != (made.st_uid, made.st_gid):
            self.upper.chown(directory, name, uid, gid)
        if stat.S_ISLNK(mode):
            return
        access = None
        default = self._default_acl(parent_fd)
        if default is not None:
            mode, access = acl.inherit(default, mode)
        path = name if directory is None else at_path(directory, name)
        if access is not None:
            os.setxattr(path, acl.ACCESS, access, follow_symlinks=follow)
        if default is not None and stat.S_ISDIR(mode):
            os.setxattr(path, acl.DEFAULT, default, follow_symlinks=False)
        if own:
            kind, rdev = stat.S_IFMT(mode), new.rdev
            kept = override.changed(made, mode=stat.S_IMODE(mode), uid=uid, gid=gid, kind=kind, rdev=rdev)
            self.upper.keep(path, kept, follow=follow)
            self.upper.set_real_mode(path, mode, is_dir=stat.S_ISDIR(mode))
            return
        os.chmod(path, stat.S_IMODE(mode))

    def _real(self, directory: OwnedFd, name: bytes) -> int:
        return os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_ino

    def _add(self, parent: Directory, name: bytes, real: int, is_dir: bool) -> Node:
        """Notes a new upper object under its name, with its node."""
        merged = self.names.merged(parent)
        entry = Entry(None, real, is_dir)
        entry.lower = merged.hides(name)
        self.names.set_entry(parent, name, entry)
        kind = Directory if is_dir else File
        node = self._new_node(kind, name, real, self.tree.upper_region(parent))
        entry.node = node
        self.tree.add_name(node, parent, name)
        return node

    def _new_node(self, kind: type[Directory | File], name: bytes, real: int, region: bytes) -> Node:
        number = numbers.compose(self.upper.layer.number, RealIno(real), region)
        node = kind(self.tree.claim(number), None, name)
        node.in_upper = True
        node.real, node.region = real, region
        if isinstance(node, Directory):
            node.merged = Merged()
            node.impure = False
            self.tree.gate.publish_directory(node.id, {}, {})
        else:
            node.metacopy = False
        self.tree.nodes[node.id] = node
        return node

    # -- link -------------------------------------------------------------------------------------

    async def link(self, node: File, parent: Directory, name: bytes, caller: Caller) -> None:
        """Raises OSError."""
        self.names.check_name(name)
        while True:
            merged = await self.tree.load(parent)
            self.names.check_parent(parent)
            if name in merged.names:
                fail(errno.EEXIST)
            if node.in_upper and not self.tree.is_metacopy(node) and node.job is None:
                break
            await self.copyup.data(node, caller)
        parent_fd = self.copyup.directory(parent)
        fd, source = self.tree.where(node)
        over_device = name in merged.devices
        if self.names.has_origin(node):
            self.copyup.mark_impure(parent)
            if source:
                # Where kernel overlayfs copied it up, its number was found by its path; several names need a
                # record.
                self.upper.record_ino(fd.fd, source, node.id)

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
        self.names.set_entry(parent, name, entry)
        self.tree.add_name(node, parent, name)
        self.tree.changed(node)
        self.tree.changed(parent)

    # -- unlink, rmdir ----------------------------------------------------------------------------

    async def unlink(self, parent: Directory, name: bytes, caller: Caller) -> None:
        """Raises OSError."""
        while True:
            entry = await self.names.present(parent, name)
            if entry.is_dir:
                fail(errno.EISDIR)
            node = self.tree.child(parent, name, entry)
            assert isinstance(node, File)
            if not await self.names.all_names_up(node, caller) and merged_is(parent, name, entry):
                break
        parent_fd = self.copyup.directory(parent)
        in_upper = entry.home is None
        pin = self.copyup.pin(node, parent_fd, name) if in_upper else None
        if entry.lower:
            self.upper.whiteout(parent_fd.fd, name, present=in_upper)
        else:
            self.upper.remove(parent_fd.fd, name)
        self.names.gone(parent, name, entry, node, pin, hidden=entry.lower)

    async def rmdir(self, parent: Directory, name: bytes) -> None:
        """Raises OSError."""
        while True:
            entry = await self.names.present(parent, name)
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
        pin: Pin | None = None
        whiteouts = len(node.merged.devices) + len(node.merged.marks)
        if entry.home is not None:
            self.upper.whiteout(parent_fd.fd, name, present=False)
        else:
            pin = self.copyup.pin(node, parent_fd, name)
            if not entry.lower and not whiteouts:
                self.upper.remove_directory(parent_fd.fd, name)
            else:
                if whiteouts <= _LOOKED_AT:
                    self.upper.shows_nothing(parent_fd.fd, name)
                self.copyup.sweep(self.upper.take_away(parent_fd.fd, name, hide=entry.lower), whiteouts)
                step("remove.done")
        node.merged = Merged()
        self.names.gone(parent, name, entry, node, pin, hidden=entry.lower)
