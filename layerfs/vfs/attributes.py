"""Changing attributes and xattrs of one object."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from layerfs.fdutil import OwnedFd, fd_path
from layerfs.overlay import acl, override
from layerfs.overlay.names import XattrNames
from layerfs.overlay.owners import CAPABILITY
from layerfs.upper.upper import Upper
from layerfs.vfs import inode_flags, setid
from layerfs.vfs.caller import Caller
from layerfs.vfs.copyup import CopyUp
from layerfs.vfs.node import Directory, File, Node
from layerfs.vfs.reopen import open_upper
from layerfs.vfs.tree import Tree, fail


@dataclass(slots=True)
class Change:
    """What setattr is to set; None: leave it."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Attributes:
    def __init__(self, tree: Tree, upper: Upper, copyup: CopyUp) -> None:
        self.tree = tree
        self.upper = upper
        self.copyup = copyup

    async def _into_upper(self, node: Node, caller: Caller) -> None:
        if isinstance(node, Directory):
            self.copyup.directory(node)
        elif isinstance(node, File):
            await self.copyup.settle(node, caller)
            await self.copyup.attributes_only(node, caller)

    def _stored_owner(self, change: Change) -> tuple[int, int]:
        """uid and gid to store, -1 for what stays. Raises OSError: EINVAL for an id that the map does not
        know, as for one that a user namespace does not (chown(2))."""
        uid, gid, owners = change.uid, change.gid, self.tree.owners
        if owners is not None:
            uid = owners.uid.stored(uid) if uid is not None else -1
            gid = owners.gid.stored(gid) if gid is not None else -1
            if uid is None or gid is None:
                fail(errno.EINVAL)
        return -1 if uid is None else uid, -1 if gid is None else gid

    async def set(self, node: Node, change: Change, caller: Caller) -> None:
        """Raises OSError."""
        uid, gid = self._stored_owner(change)
        if change == Change() and not self._changes_owner_to_itself(node, caller):
            return
        drops_setgid = self._drops_setgid(node, change, caller)
        if change.size is not None:
            if not isinstance(node, File):
                fail(errno.EISDIR)
            await self.copyup.data(node, caller, size=change.size)
        elif isinstance(node, File) and _locks_out(change.mode):
            # Whoever has it open may write to it yet: its xattrs could not be copied then.
            await self.copyup.settle(node, caller)
            await self.copyup.data(node, caller)
        else:
            await self._into_upper(node, caller)
        self.tree.changed(node)
        fd, name = self.tree.where(node)
        target = self.tree.object_path(fd, name)
        path = fd_path(target.fd)
        if change.size is not None:
            self._cut(node, target, change.size, caller)
        if self.upper.overrides and override.may_carry(os.fstat(target.fd)) and change != Change():
            self._keep(node, path, uid, gid, change.mode)
        elif change.uid is not None or change.gid is not None or change == Change():
            # Nothing to set is chown(-1, -1), which sets ctime.
            if name:
                self.upper.chown(fd.fd, name, uid, gid)
            else:
                os.chown(path, uid, gid)
        if drops_setgid:
            self._drop_setgid(node, path, None)
        if change.mode is not None:
            if not self.upper.overrides:
                os.chmod(path, stat.S_IMODE(change.mode))
            if isinstance(node, File) and node.handles:
                node.privileged = bool(change.mode & (stat.S_ISUID | stat.S_ISGID))
                # Who writes past us takes them away.
                node.fleeting |= node.privileged and any(
                    each.backing and each.writable for each in node.handles
                )
                for handle in node.handles:
                    handle.lend(self.tree.gate, writes=False)
        if change.atime_ns is not None or change.mtime_ns is not None:
            st = os.fstat(target.fd)
            atime = change.atime_ns if change.atime_ns is not None else st.st_atime_ns
            mtime = change.mtime_ns if change.mtime_ns is not None else st.st_mtime_ns
            if name:
                os.utime(name, ns=(atime, mtime), dir_fd=fd.fd, follow_symlinks=False)
            else:
                os.utime(path, ns=(atime, mtime))

    def _changes_owner_to_itself(self, node: Node, caller: Caller) -> bool:
        """Whether a SETATTR of nothing is chown(-1, -1), which sets ctime and takes setuid away. It may also
        be a write to a file that has capabilities: then the WRITE that follows does what there is to be done.
        Who may is left to us: fs/fuse/dir.c fuse_setattr drops the mode, on which others check it. Raises
        OSError(EPERM)."""
        st = self.tree.stat_real(node)
        changes = caller.changes_owner()
        if changes is None:  # the owner may, whichever it is
            changes = caller.owns(self.tree.shown_uid(st))
        if not changes:
            return False
        if isinstance(node, File):
            takes_away = st.st_mode & stat.S_ISUID or _is_setgid_program(st.st_mode)
            if (takes_away or self._loses_setgid(st, caller)) and not caller.owns(self.tree.shown_uid(st)):
                fail(errno.EPERM)
        return True

    def _drops_setgid(self, node: Node, change: Change, caller: Caller) -> bool:
        """Whether a chown takes a setgid away that our own chown leaves, as we are privileged."""
        sets_owner = change.uid is not None or change.gid is not None or change == Change()
        sets_owner &= change.mode is None and change.size is None
        return sets_owner and isinstance(node, File) and self._loses_setgid(self.tree.stat_real(node), caller)

    def _loses_setgid(self, st: os.stat_result, caller: Caller) -> bool:
        """Setgid of what is no program of its group's goes when somebody changes the owner who is not in that
        group (fs/attr.c setattr_should_drop_sgid)."""
        if not st.st_mode & stat.S_ISGID or _is_setgid_program(st.st_mode) or not stat.S_ISREG(st.st_mode):
            return False
        return not caller.may_keep_setgid(self.tree.shown_gid(st))

    def _keep(self, node: Node, path: bytes, uid: int, gid: int, mode: int | None) -> None:
        """chown and chmod where the upper keeps their result in an xattr (-1 and None: as it is). What the
        kernel does to the real file besides is done here: chown(2) takes setuid and capabilities away."""
        if (uid, gid, mode) == (-1, -1, None):
            return
        st = self.tree.stat_real(node)
        new = stat.S_IMODE(st.st_mode if mode is None else mode)
        if (uid, gid) != (-1, -1) and not isinstance(node, Directory):
            new = _without_setid(new) if mode is None else new
            try:
                os.removexattr(path, CAPABILITY)
            except OSError:
                pass  # mostly it has none; what this process may not remove it could not have set
        owner = None if uid == -1 else uid, None if gid == -1 else gid
        self.upper.keep(path, override.changed(st, mode=new, uid=owner[0], gid=owner[1]), follow=True)
        if mode is not None:
            # The real bits too: they are what an ACL is read and written by.
            self.upper.set_real_mode(path, new, is_dir=isinstance(node, Directory))

    def _cut(self, node: Node, target: OwnedFd, size: int, caller: Caller) -> None:
        """truncate(2); takes setuid away as a write does."""
        if not stat.S_ISREG(os.fstat(target.fd).st_mode):
            fail(errno.EIO)  # replaced from outside; opening a fifo would block
        writer = self._open_for_writing(node, target)
        os.ftruncate(writer.fd, size)
        setid.clear(self.tree, self.upper, writer, caller, may_keep=True)

    def _open_for_writing(self, node: Node, target: OwnedFd) -> OwnedFd:
        """The caller may have the file open for writing though its mode (changed since) no longer lets this
        process open it.
        """
        try:
            return OwnedFd(os.open(fd_path(target.fd), os.O_WRONLY | os.O_CLOEXEC))
        except PermissionError:
            if not isinstance(node, File):
                raise
            for handle in node.handles or ():
                if handle.writable:
                    return handle.fd
            return open_upper(self.tree, node, os.O_WRONLY)

    async def set_flags(self, node: Node, command: int, value: bytes, caller: Caller) -> None:
        """Inode flags (`vfs.inode_flags`). A file is copied up with its data: what replaced it later would
        not have them. Raises OSError."""
        if isinstance(node, Directory):
            self.copyup.directory(node)
        elif isinstance(node, File):
            await self.copyup.settle(node, caller)
            await self.copyup.data(node, caller)
        self.tree.changed(node)
        inode_flags.set_flags(self.tree, node, command, value)
        for handle in (node.handles or ()) if isinstance(node, File) else ():
            handle.lend(self.tree.gate, writes=False)

    # -- xattrs -----------------------------------------------------------------------------------

    async def set_xattr(
        self, node: Node, name: bytes, value: bytes, caller: Caller, flags: int, drops_setgid: bool | None
    ) -> None:
        """`flags`: of setxattr(2). `drops_setgid`: whether an ACL that is set takes setgid away; None: it
        does where the caller seems not to be in the group. Raises OSError: EPERM for marks of overlays."""
        attribute = _stored(self.upper.names, name)
        if flags:
            self._check_presence(node, name, flags)  # what fails costs no copy-up
        if self.tree.owners is not None:
            stored = self.tree.owners.stored_xattr(attribute, value)
            if stored is None:
                fail(errno.EINVAL)
            value = stored
        await self._into_upper(node, caller)
        self.tree.changed(node)
        self.tree.gate.retract_capability(node.id)
        path, follow, _keep = self.tree.real_path(node)
        if isinstance(node, Directory):
            node.has_default_acl = None
        os.setxattr(path, attribute, value, flags, follow_symlinks=follow)
        if attribute == acl.ACCESS and self.upper.overrides:
            # The file system put the ACL's bits into the real mode (fs/posix_acl.c posix_acl_update_mode).
            real = stat.S_IMODE(os.stat(path, follow_symlinks=follow).st_mode)
            st = self.tree.stat_real(node)
            mode = stat.S_IMODE(st.st_mode) & ~0o777 | real & 0o777
            self.upper.keep(path, override.changed(st, mode=mode), follow=follow)
        if attribute == acl.ACCESS and drops_setgid is not False:
            self._drop_setgid(node, path, None if drops_setgid else caller)

    def _check_presence(self, node: Node, name: bytes, flags: int) -> None:
        try:
            get_xattr(self.tree, node, name)
        except OSError as error:
            if error.errno != errno.ENODATA or flags & os.XATTR_REPLACE:
                raise
        else:
            if flags & os.XATTR_CREATE:
                fail(errno.EEXIST)

    def _drop_setgid(self, node: Node, path: bytes, unless: Caller | None) -> None:
        """Who sets an ACL without being in the group takes setgid away, as by chmod (fs/posix_acl.c
        posix_acl_update_mode). For a chmod the kernel sees to it. `unless`: not where he may keep it."""
        st = self.tree.stat_real(node)
        if not st.st_mode & stat.S_ISGID:
            return
        if unless is not None and (unless.in_group(self.tree.shown_gid(st)) or unless.keeps_setid()):
            return
        mode = stat.S_IMODE(st.st_mode) & ~stat.S_ISGID
        if self.upper.overrides:
            self.upper.keep(path, override.changed(st, mode=mode), follow=True)
        else:
            os.chmod(path, mode)

    async def remove_xattr(self, node: Node, name: bytes, caller: Caller) -> None:
        """Raises OSError."""
        attribute = _stored(self.upper.names, name)
        path, follow, _keep = self.tree.real_path(node)
        try:
            os.getxattr(path, attribute, follow_symlinks=follow)
        except OSError as error:
            # What is not there costs no copy-up. Taking away an ACL that is not there succeeds
            # (fs/posix_acl.c set_posix_acl).
            if error.errno == errno.ENODATA and attribute in (acl.ACCESS, acl.DEFAULT):
                return
            raise
        await self._into_upper(node, caller)
        self.tree.changed(node)
        path, follow, _keep = self.tree.real_path(node)
        if isinstance(node, Directory):
            node.has_default_acl = None
        os.removexattr(path, attribute, follow_symlinks=follow)


def _without_setid(mode: int) -> int:
    """The mode after a chown: setuid goes, and setgid of an executable (chown(2))."""
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode


def _stored(names: XattrNames, name: bytes) -> str:
    attribute = names.stored(os.fsdecode(name))
    if attribute is None:
        fail(errno.EPERM)
    return attribute


def get_xattr(tree: Tree, node: Node, name: bytes) -> bytes:
    """Raises OSError: ENODATA when it is not set or hidden."""
    attribute = tree.stack.names.stored(os.fsdecode(name))
    if attribute is None:
        fail(errno.ENODATA)
    path, follow, _keep = tree.real_path(node)
    try:
        value = os.getxattr(path, attribute, follow_symlinks=follow)
    except OSError as error:
        # A lower's file system may know no ACLs (squashfs) or no xattrs at all, where the upper's does. The
        # kernel asks for the ACL of whatever it opens: any other errno would be the open's.
        if error.errno == errno.EOPNOTSUPP and (not node.in_upper or attribute in (acl.ACCESS, acl.DEFAULT)):
            fail(errno.ENODATA)
        raise
    return value if tree.owners is None else tree.owners.shown_xattr(attribute, value)


def list_xattrs(tree: Tree, node: Node, caller: Caller) -> list[bytes]:
    """Names as a user sees them: `trusted.` ones are the administrator's (xattr(7)). Raises OSError."""
    path, follow, _keep = tree.real_path(node)
    try:
        present = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return []
        raise
    names = [name for name in map(tree.stack.names.shown, present) if name is not None]
    if any(map(_is_trusted, names)) and not caller.is_shown_trusted():
        names = [name for name in names if not _is_trusted(name)]
    return [os.fsencode(name) for name in names]


def _is_setgid_program(mode: int) -> bool:
    return mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID | stat.S_IXGRP


def _is_trusted(name: str) -> bool:
    return name.startswith("trusted.")


def _locks_out(mode: int | None) -> bool:
    """Whether a file of that mode is one that its owner, this process, cannot read and write any more."""
    return mode is not None and os.geteuid() != 0 and mode & 0o600 != 0o600
