"""The work directory: lock, volatile marker, temporary names, and putting things right at mount.

WORK/                     the directory the user names
  layerfs.lock            flock'ed while mounted (so is the upper directory itself)
  work/                   temporary objects, as the kernel has them; emptied at mount
    incompat/volatile/    the kernel's marker of a volatile mount
  layerfs/inodes          numbers of objects that cannot carry an xattr (see `inode_log`)
  layerfs/links.N         journal of a hard-link copy-up (see `journal`)
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat

from layerfs.errors import BusyError, MountError
from layerfs.fdutil import OwnedFd, at_path
from layerfs.overlay import acl

#: Lock file in the work directory, held with flock(2) by a live mount; so is the upper directory itself.
LOCK_NAME = "layerfs.lock"
#: The kernel's mark (fs/overlayfs/super.c `ovl_create_volatile_dirs`): seen from the work directory. Who
#: mounts looks for it first (`vfs.checks`).
VOLATILE_MARK = "work/incompat/volatile"
#: Prefix of directories that are being removed; read as a whiteout of an impossible name if a crash leaves
#: one.
_ASIDE = b".wh..wh.removed-"
_aside = itertools.count()
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class WorkDir:
    """The opened work directory. `fd` is WORK/work, where temporary objects are made; `state` is
    WORK/layerfs.
    """

    def __init__(self, path: str, upper: OwnedFd, upper_path: str) -> None:
        """Opens and locks. Raises BusyError when a live mount has the upper or the work directory, MountError
        otherwise.

        Cleans nothing yet: that is `empty`, after the journals were read."""
        self.path = path
        try:
            self.base = OwnedFd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            self._lock = OwnedFd(
                os.open(
                    LOCK_NAME,
                    os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                    0o600,
                    dir_fd=self.base.fd,
                )
            )
        except OSError as error:
            raise MountError(f"work directory {path}: {error.strerror}", error.errno) from error
        for fd, what in ((self._lock, path), (upper, upper_path)):
            try:
                fcntl.flock(fd.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"{what} is in use by another layerfs mount") from None
        self.fd = self._subdirectory(b"work", 0o700)
        self.state = self._subdirectory(b"layerfs", 0o700)
        self._counter = itertools.count()

    def _subdirectory(self, name: bytes, mode: int) -> OwnedFd:
        try:
            os.mkdir(name, mode, dir_fd=self.base.fd)
        except FileExistsError:
            pass
        except OSError as error:
            raise MountError(f"work directory {self.path}: {error.strerror}", error.errno) from error
        directory = OwnedFd(os.open(name, _DIRECTORY, dir_fd=self.base.fd))
        try:
            _inherit_nothing(directory, mode)
        except OSError as error:
            raise MountError(f"work directory {self.path}: {error.strerror}", error.errno) from error
        return directory

    def empty(self) -> None:
        """Removes what a crash left. Raises OSError."""
        for name in os.listdir(self.fd.fd):
            remove_tree(self.fd.fd, os.fsencode(name))

    def drop_parked(self) -> None:
        """The mount has ended: nobody has such an object any more (see `Parked`)."""
        for name in os.listdir(self.fd.fd):
            try:
                os.unlink(name, dir_fd=self.fd.fd)
            except OSError:
                pass  # the next mount removes it

    def mark_volatile(self) -> None:
        """Raises OSError."""
        os.makedirs(at_path(self.fd.fd, b"incompat/volatile"), 0o700)

    def clear_volatile(self) -> None:
        """The mount ended cleanly and everything was written: the upper may be trusted again.

        Makes nothing, not even for a moment: umount has returned, and buildah may be removing the work
        directory. Raises OSError."""
        for name in (b"incompat/volatile", b"incompat"):
            try:
                os.rmdir(name, dir_fd=self.fd.fd)
            except FileNotFoundError:
                pass

    def temporary(self) -> bytes:
        """A name in `fd` that is not in use. The kernel's form: `#` and a number."""
        return b"#%x" % next(self._counter)


class Parked:
    """A name in the work directory of an object that has lost its last one elsewhere; gone with this."""

    __slots__ = ("directory", "name")

    def __init__(self, work: WorkDir, parent: int, name: bytes) -> None:
        """Gives it to the object `name` in `parent`. Raises OSError."""
        self.directory = work.fd
        self.name = work.temporary()
        os.link(name, self.name, src_dir_fd=parent, dst_dir_fd=work.fd.fd, follow_symlinks=False)

    def __del__(self) -> None:
        try:
            os.unlink(self.name, dir_fd=self.directory.fd)
        except OSError:
            pass  # the next mount removes it


#: What keeps an object of the upper reachable that has no name: a descriptor (O_PATH), or a name in the work
#: directory.
Pin = OwnedFd | Parked


def _inherit_nothing(directory: OwnedFd, mode: int) -> None:
    """What is made in the work directory must inherit nothing but from where it goes: neither a default ACL
    nor the group of a setgid directory (fs/overlayfs/super.c ovl_workdir_create). Raises OSError.
    """
    for attribute in (acl.DEFAULT, acl.ACCESS):
        try:
            os.removexattr(directory.fd, attribute)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    st = os.fstat(directory.fd)
    if st.st_gid != os.getegid():
        os.fchown(directory.fd, -1, os.getegid())
    if stat.S_IMODE(st.st_mode) != mode:
        os.fchmod(directory.fd, mode)


def remove_tree(parent: int, name: bytes) -> None:
    """Removes `name` in `parent` with all below it; never follows a link, never leaves the tree. Missing is
    fine.

    Trees may be deeper than Python's stack or PATH_MAX: directories are first moved up beside `name`, under
    names that no view shows. Raises OSError."""
    todo = [name]
    while todo:
        here = todo.pop()
        try:
            st = os.stat(here, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(st.st_mode):
            os.unlink(here, dir_fd=parent)
            continue
        directory = _open_to_empty(parent, here)
        for item in os.listdir(directory.fd):
            child = os.fsencode(item)
            try:
                os.unlink(child, dir_fd=directory.fd)
            except IsADirectoryError:
                aside = _ASIDE + b"%d" % next(_aside)
                os.rename(child, aside, src_dir_fd=directory.fd, dst_dir_fd=parent)
                todo.append(aside)
        os.rmdir(here, dir_fd=parent)


def _open_to_empty(parent: int, name: bytes) -> OwnedFd:
    try:
        return OwnedFd(os.open(name, _DIRECTORY, dir_fd=parent))
    except PermissionError:
        # Only when need be: somebody may have it open and look at its mode.
        os.chmod(at_path(parent, name), 0o700)
        return OwnedFd(os.open(name, _DIRECTORY, dir_fd=parent))
