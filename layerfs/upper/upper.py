"""The upper layer's writer: what it can do here, and making, marking and removing objects in it.

All methods are synchronous and short (a few system calls); the ones that copy data are in `copyup` and say
that they block.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from layerfs.errors import MountError
from layerfs.fdutil import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    RENAME_WHITEOUT,
    OwnedFd,
    at_path,
    birth_time,
    fd_path,
    fs_uuid,
    lgetxattr,
    lsetxattr,
    name_to_handle,
    renameat2,
)
from layerfs.overlay import acl, origin, override, redirect, whiteout
from layerfs.overlay.names import USER, USER_UPPER, XattrNames
from layerfs.stack import Layer, Merged
from layerfs.upper import journal
from layerfs.upper.inode_log import InodeLog
from layerfs.upper.steps import step
from layerfs.upper.work import WorkDir, remove_tree

WhiteoutForm = Literal["device", "file"]
_NO_XATTR = (errno.ENODATA, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class Ability:
    """What the upper's file system lets this process do, tried at start."""

    xattrs: bool
    whiteouts: WhiteoutForm


class Upper:
    """The writable layer with its work directory, locked."""

    def __init__(self, layer: Layer, work_path: str, names: XattrNames, *, volatile: bool) -> None:
        """Locks, finishes what a crash left, probes. Raises MountError (BusyError when somebody has it)."""
        self.layer = layer
        self.root = layer.fd
        self.names = names
        self.volatile = volatile
        self.work = WorkDir(work_path, layer.fd, layer.path)
        try:
            journal.recover(self.work, self.root, names)
            self.work.empty()
            self.inode_log = InodeLog(self.work.state)
            self.ability = self._probe()
            self._say_prefix()
            if volatile:
                self.work.mark_volatile()
        except OSError as error:
            raise MountError(f"work directory {work_path}: {error.strerror}", error.errno) from error
        if not self.ability.xattrs:
            raise MountError(
                f"upper {layer.path}: its file system does not take {names.prefix}* xattrs", errno.EOPNOTSUPP
            )
        self._whiteout: bytes | None = None
        self._uuids: dict[int, bytes | None] = {}

    def _say_prefix(self) -> None:
        """So that whoever may set both kinds of marks goes on with this one. Helps only: not where the root
        is somebody else's, or takes none (which is said by the probe).
        """
        if self.names.prefix == USER:
            try:
                if USER_UPPER not in os.listxattr(fd_path(self.root.fd)):
                    os.setxattr(fd_path(self.root.fd), USER_UPPER, b"y")
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP):
                    raise

    # -- probing ----------------------------------------------------------------------------------

    def _probe(self) -> Ability:
        work = self.work.fd.fd
        probe = self.work.temporary()
        os.mkdir(probe, 0o700, dir_fd=work)
        try:
            try:
                lsetxattr(work, probe, self.names.opaque, whiteout.OPAQUE)
                xattrs = True
            except OSError:
                xattrs = False
            form: WhiteoutForm = "device" if self._can_whiteout_device() else "file"
            if form == "file":
                self.hide(work, probe)  # a layerfs mount as upper takes neither form
                os.unlink(whiteout.PREFIX + probe, dir_fd=work)
            return Ability(xattrs, form)
        finally:
            os.rmdir(probe, dir_fd=work)

    def _can_whiteout_device(self) -> bool:
        """mknod of 0/0 (allowed in user namespaces since 5.8) and the rename flags that make it atomic."""
        work = self.work.fd.fd
        one, two = self.work.temporary(), self.work.temporary()
        try:
            os.mknod(one, stat.S_IFCHR | 0o600, 0, dir_fd=work)
            renameat2(work, one, work, two, RENAME_WHITEOUT)
            renameat2(work, one, work, two, RENAME_EXCHANGE)
            return True
        except OSError:
            return False
        finally:
            remove_tree(work, one)
            remove_tree(work, two)

    # -- attributes -------------------------------------------------------------------------------

    @property
    def overrides(self) -> bool:
        """Whether owner, mode and type are kept in an xattr, and real ones are this process's own."""
        return bool(self.layer.overrides)

    def stat(self, fd: OwnedFd) -> os.stat_result:
        """Of an object of the upper that is open, as the upper means it."""
        return self.layer.shown(os.fstat(fd.fd), fd_path(fd.fd), follow=True)

    def keep(self, path: bytes, st: os.stat_result, *, follow: bool) -> None:
        """Has the regular file or directory at `path` shown as `st` says. Raises OSError."""
        written, *others = self.layer.overrides
        value = override.encode(override.of(st))
        os.setxattr(path, written, value, follow_symlinks=follow)
        for other in others:  # which would be read by somebody who looks for that one first
            try:
                os.removexattr(path, other, follow_symlinks=follow)
            except OSError as error:
                if error.errno not in _NO_XATTR:
                    raise

    def set_real_mode(self, path: bytes, mode: int, *, is_dir: bool) -> None:
        """The real mode of something that is kept as `mode`: private, but with an ACL, which the real bits
        are a part of, as it says. Raises OSError.
        """
        try:
            os.getxattr(path, acl.ACCESS)
        except OSError:
            mode = override.private_mode(mode, is_dir=is_dir)
        os.chmod(path, mode & 0o777)

    def chown(self, directory: int | None, name: bytes, uid: int, gid: int) -> None:
        """Of an object that keeps its owner itself: anything, or only links where others have it in an xattr;
        there it is given where it can be. `directory` None: `name` is a path that leads to exactly the
        object. Raises OSError.
        """
        try:
            os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=directory is None)
        except PermissionError:
            if not self.overrides:
                raise

    def set_mode(self, fd: OwnedFd, mode: int) -> None:
        """Of an open object. Raises OSError."""
        st = self.stat(fd)
        if mode == st.st_mode:
            return
        if self.overrides:
            self.keep(fd_path(fd.fd), override.changed(st, mode=stat.S_IMODE(mode)), follow=True)
        else:
            os.fchmod(fd.fd, stat.S_IMODE(mode))

    # -- marks ------------------------------------------------------------------------------------

    def set_opaque(self, parent: int, name: bytes) -> None:
        lsetxattr(parent, name, self.names.opaque, whiteout.OPAQUE)

    def set_redirect(self, parent: int, name: bytes, path: bytes) -> None:
        """`path`: where the content lies in the lowers, from the overlay's root, without a leading slash."""
        lsetxattr(parent, name, self.names.redirect, redirect.encode(path))

    def drop_redirect(self, parent: int, name: bytes) -> None:
        try:
            os.removexattr(at_path(parent, name), self.names.redirect, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_XATTR:
                raise

    def set_impure(self, directory: OwnedFd) -> None:
        """Marks a directory that holds objects with an origin: the kernel, and we, then look for their
        numbers when listing.
        """
        for mark in (self.names.numbers, self.names.impure):
            try:
                os.setxattr(fd_path(directory.fd), mark, b"y")
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EACCES):
                    raise

    def impurity(self, directory: OwnedFd) -> tuple[bool, bool]:
        """Whether numbers must be looked for in a directory, and whether it carries our own mark for that."""
        try:
            present = os.listxattr(fd_path(directory.fd))
        except OSError:
            return False, False
        own = self.names.numbers in present
        return own or self.names.impure in present, own

    def record_ino(self, parent: int, name: bytes, ino: int) -> None:
        """Keeps the number that the object `name` in `parent` shows. Raises OSError (ENOSPC)."""
        try:
            lsetxattr(parent, name, self.names.ino, b"%d" % ino)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EACCES):
                raise
            real = os.stat(name, dir_fd=parent, follow_symlinks=False).st_ino
            if self.inode_log.get(parent, name, real) != ino:
                self.inode_log.put(parent, name, real, ino)

    def recorded_ino(self, parent: int, name: bytes, real: int) -> int | None:
        try:
            value = lgetxattr(parent, name, self.names.ino)
        except OSError:
            return self.inode_log.get(parent, name, real) if self.inode_log else None
        return int(value) if value.isdigit() and len(value) < 20 else None

    def birth_time(self, directory: int, name: bytes) -> int | None:
        """When the object `name` in `directory`, or `directory` itself when `name` is empty, was made, as it
        is to be shown: a copy says when its original was. In ns; None when it is not known. Raises OSError.
        """
        path = at_path(directory, name) if name else fd_path(directory)
        try:
            value = os.getxattr(path, self.names.btime, follow_symlinks=not name)
        except OSError:
            value = b""
        if len(value) < 21 and value.removeprefix(b"-").isdigit():
            return int(value)
        return birth_time(directory, name)

    def hidden_links(self, directory: OwnedFd, name: bytes) -> int:
        """What to add to the link count of an upper inode: the kernel with index=on keeps a link to it in its
        work directory and says so in `overlay.nlink` (`U-1`; fs/overlayfs/util.c ovl_get_nlink).
        """
        path = at_path(directory.fd, name) if name else fd_path(directory.fd)
        try:
            value = os.getxattr(path, self.names.nlink, follow_symlinks=not name)
        except OSError:
            return 0
        digits = value[2:]
        if value[:2] not in (b"U+", b"U-") or not digits.isdigit() or len(digits) > 6:
            return 0
        return int(value[1:])

    def origin_of(self, parent: int, name: bytes) -> origin.Origin | None:
        """The origin that a kernel (or we) wrote on an object, for its inode number only."""
        try:
            return origin.decode(lgetxattr(parent, name, self.names.origin))
        except OSError:
            return None

    def make_origin(self, directory: int, name: bytes) -> bytes:
        """The origin value for the lower object `name` in `directory`; empty, the kernel's "unknown", where
        the file system has no handles.
        """
        handle = name_to_handle(directory, name)
        if handle is None:
            return b""
        device = (
            os.stat(name, dir_fd=directory, follow_symlinks=False).st_dev
            if name
            else os.fstat(directory).st_dev
        )
        if device not in self._uuids:
            fd = OwnedFd(os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory))
            self._uuids[device] = fs_uuid(fd.fd)
        uuid = self._uuids[device]
        if uuid is None:
            return b""
        return origin.encode(origin.Origin(uuid, *handle)) or b""

    # -- whiteouts --------------------------------------------------------------------------------

    def _device_whiteout(self) -> bytes:
        """Name in the work directory of a fresh link to the shared whiteout (the kernel shares one inode too:
        fewer inodes, faster).
        """
        work = self.work.fd.fd
        fresh = self.work.temporary()
        if self._whiteout is not None:
            try:
                os.link(self._whiteout, fresh, src_dir_fd=work, dst_dir_fd=work, follow_symlinks=False)
                return fresh
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.ENOENT):
                    raise
                remove_tree(work, self._whiteout)
                self._whiteout = None
        shared = self.work.temporary()
        os.mknod(shared, stat.S_IFCHR, 0, dir_fd=work)
        self._whiteout = shared
        os.link(shared, fresh, src_dir_fd=work, dst_dir_fd=work, follow_symlinks=False)
        return fresh

    def whiteout(self, parent: int, name: bytes, *, present: bool) -> None:
        """Hides a name of the layers below; what the upper has there (`present`, no directory) goes. Atomic.

        Raises OSError, nothing changed."""
        if self.ability.whiteouts == "file":
            self.hide(parent, name)
            if present:
                self._behind(parent, name, lambda: os.unlink(name, dir_fd=parent))
            return
        work = self.work.fd.fd
        fresh = self._device_whiteout()
        step("whiteout.made")
        try:
            if present:
                os.rename(fresh, name, src_dir_fd=work, dst_dir_fd=parent)
            else:
                renameat2(work, fresh, parent, name, RENAME_NOREPLACE)
        except OSError:
            remove_tree(work, fresh)
            raise
        step("whiteout.placed")

    def take_away(self, parent: int, name: bytes, *, hide: bool) -> bytes:
        """Moves an upper directory that shows nothing into the work directory, whiteouts and all, where
        nobody sees it and the caller may take its time; leaves a whiteout when `hide`. One rename. Returns
        its name there.

        Raises OSError, nothing changed."""
        work = self.work.fd.fd
        if hide and self.ability.whiteouts == "device":
            fresh = self._device_whiteout()
            step("whiteout.made")
            try:
                renameat2(work, fresh, parent, name, RENAME_EXCHANGE)
            except OSError:
                remove_tree(work, fresh)
                raise
            step("whiteout.placed")
            return fresh
        fresh = self.work.temporary()
        if hide:
            self.hide(parent, name)

        def away() -> None:
            os.rename(name, fresh, src_dir_fd=parent, dst_dir_fd=work)

        self._behind(parent, name if hide else None, away)
        return fresh

    def hide(self, parent: int, name: bytes) -> None:
        mark = whiteout.PREFIX + name
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        OwnedFd(os.open(mark, flags, 0o600, dir_fd=parent)).close()
        step("whiteout.placed")

    @staticmethod
    def _behind(parent: int, hidden: bytes | None, remove: Callable[[], None]) -> None:
        """Removes what a `.wh.` file hides already; when it cannot be, the mark goes again, so that nothing
        changed.
        """
        try:
            remove()
        except OSError:
            if hidden is not None:
                os.unlink(whiteout.PREFIX + hidden, dir_fd=parent)
            raise
        step("whiteout.removed")

    def shows_nothing(self, parent: int, name: bytes) -> None:
        """Raises OSError(ENOTEMPTY) when an upper directory holds more than whiteouts: somebody else put it
        there.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        directory = OwnedFd(os.open(name, flags, dir_fd=parent))
        for item in os.listdir(directory.fd):
            child = os.fsencode(item)
            if not child.startswith(whiteout.PREFIX) and not whiteout.is_whiteout_device(
                os.stat(child, dir_fd=directory.fd, follow_symlinks=False)
            ):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    def clear(self, parent: int, name: bytes) -> None:
        """Makes the upper directory `name`, which shows nothing, really empty: opaque first, then its
        whiteouts go, so that every crash between shows the same. Raises OSError(ENOTEMPTY) when it holds
        anything else: somebody else put it there.
        """
        directory = OwnedFd(
            os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        )
        marks: list[bytes] = []
        for item in os.listdir(directory.fd):
            child = os.fsencode(item)
            st = os.stat(child, dir_fd=directory.fd, follow_symlinks=False)
            if not whiteout.is_whiteout_device(st) and not child.startswith(whiteout.PREFIX):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            marks.append(child)
        if not marks:
            return
        os.setxattr(directory.fd, self.names.opaque, whiteout.OPAQUE)
        for child in marks:
            remove_tree(directory.fd, child)
        step("remove.cleared")

    def drop_whiteouts(self, directory: OwnedFd, merged: Merged) -> None:
        """Removes the whiteouts in a directory that has just become opaque: none stand inside an opaque
        one. Not a change of what it shows, so its times stay.
        """
        if not merged.devices and not merged.marks:
            return
        before = os.fstat(directory.fd)
        for name in merged.devices:
            remove_tree(directory.fd, name)
        for name in merged.marks:
            remove_tree(directory.fd, whiteout.PREFIX + name)
        os.utime(fd_path(directory.fd), ns=(before.st_atime_ns, before.st_mtime_ns))
        merged.devices.clear()
        merged.marks.clear()

    def remove(self, parent: int, name: bytes) -> None:
        """Removes a non-directory that has nothing below it."""
        os.unlink(name, dir_fd=parent)
        step("remove.done")

    def remove_directory(self, parent: int, name: bytes) -> None:
        """Removes a really empty directory that has nothing below it."""
        os.rmdir(name, dir_fd=parent)
        step("remove.done")

    # -- placing ----------------------------------------------------------------------------------

    def place(self, temporary: bytes, parent: int, name: bytes, *, over_device: bool, is_dir: bool) -> None:
        """Puts a finished object from the work directory at `name`, over the whiteout device there if there
        is one. Atomic.

        Raises OSError; the temporary is then removed."""
        work = self.work.fd.fd
        step("create.made")
        try:
            if (
                over_device and is_dir
            ):  # rename(2) refuses to put a directory over a device, so they change places
                renameat2(work, temporary, parent, name, RENAME_EXCHANGE)
                step("create.placed")
                remove_tree(work, temporary)
                step("create.removed")
            elif over_device:
                os.rename(temporary, name, src_dir_fd=work, dst_dir_fd=parent)
                step("create.placed")
            else:
                renameat2(work, temporary, parent, name, RENAME_NOREPLACE)
                step("create.placed")
        except OSError:
            remove_tree(work, temporary)
            raise

    def place_copy(self, temporary: bytes, parent: int, name: bytes) -> None:
        """Puts a copy at a name the upper does not have. Raises OSError(EEXIST) when it does after all; the
        caller cleans up.
        """
        renameat2(self.work.fd.fd, temporary, parent, name, RENAME_NOREPLACE)

    def discard(self, temporary: bytes) -> None:
        remove_tree(self.work.fd.fd, temporary)

    def open_path(self, parent: int, name: bytes) -> OwnedFd:
        return OwnedFd(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent))
