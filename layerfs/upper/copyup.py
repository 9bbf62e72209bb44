"""Copy-up: making an upper object out of a lower one, complete in the work directory before it is seen.

Order of what is set, and why: data first (writing clears privileges and moves mtime); owner before mode and
capabilities (chown clears setuid and drops security.capability); mode after all xattrs, because an ordinary
user needs write permission on a file to set user.* ones, and its group bits are those of the ACL's mask
anyway; times at the very end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass

from layerfs.fdutil import Copied, OwnedFd, at_path, copy_data, fd_path
from layerfs.overlay import override
from layerfs.stack import read_link
from layerfs.upper.steps import step
from layerfs.upper.upper import Upper
from layerfs.upper.work import remove_tree


@dataclass(frozen=True, slots=True)
class Source:
    """The object to be copied: where its attributes and xattrs are, and what they are."""

    directory: OwnedFd
    name: bytes
    st: os.stat_result
    #: shown inode number, kept on the copy
    ino: int
    #: value of the origin xattr
    origin: bytes = b""
    #: birth time shown, kept on the copy of anything but a directory (ns since 1970); None: not known
    born: int | None = None

    @property
    def path(self) -> bytes:
        """For calls without a descriptor. An empty name means the descriptor is the object (an unlinked
        one).
        """
        return at_path(self.directory.fd, self.name) if self.name else fd_path(self.directory.fd)

    @property
    def follow(self) -> bool:
        return not self.name


@dataclass(slots=True)
class Copy:
    """A finished copy in the work directory."""

    temporary: bytes
    #: the copy's own descriptor, read and write, for a regular file
    fd: OwnedFd | None
    st: os.stat_result
    #: of its data
    copied: Copied


def make(
    upper: Upper,
    source: Source,
    *,
    data: OwnedFd | None,
    size: int,
    metacopy: bool,
    sync: bool,
    cancelled: Callable[[], bool] = lambda: False,
) -> Copy:
    """Copies a non-directory into the work directory. Blocks when `data` is given; may run in a thread.

    `data`: descriptor to copy the first `size` bytes from, None for no data. `metacopy`: mark it as having
    attributes only. Raises OSError or Cancelled; nothing is left behind then."""
    work = upper.work.fd.fd
    temporary = upper.work.temporary()
    fd: OwnedFd | None = None
    copied = Copied(0, False)
    st = source.st
    try:
        if stat.S_ISREG(st.st_mode) or (upper.overrides and not stat.S_ISLNK(st.st_mode)):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = OwnedFd(os.open(temporary, flags, 0o600, dir_fd=work))
            step("copyup.created")
            if data is not None and size:
                copied = copy_data(data.fd, fd.fd, size, cancelled)
            elif stat.S_ISREG(st.st_mode):
                os.ftruncate(fd.fd, size)
            step("copyup.data")
        elif stat.S_ISLNK(st.st_mode):
            os.symlink(read_link(source.directory, source.name), temporary, dir_fd=work)
        else:
            os.mknod(temporary, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, dir_fd=work)
        _copy_attributes(upper, source, temporary, metacopy=metacopy)
        step("copyup.attributes")
        if sync and fd is not None:
            os.fsync(fd.fd)
            step("copyup.synced")
        result = os.stat(temporary, dir_fd=work, follow_symlinks=False)
    except BaseException:
        remove_tree(work, temporary)
        raise
    return Copy(temporary, fd, result, copied)


def fill(upper: Upper, target: OwnedFd, data: OwnedFd, size: int, cancelled: Callable[[], bool]) -> Copied:
    """Copies the data of a metadata-only upper file into itself: for one with several names, which a rename
    would part.

    Blocks. Only kernel overlayfs makes such files. A crash leaves the lower's data in force, but mtime may be
    that of the crash. Raises OSError or Cancelled, the file as before."""
    before = os.fstat(target.fd)
    try:
        copied = copy_data(data.fd, target.fd, size, cancelled)
        if not upper.volatile:
            os.fsync(target.fd)
    except BaseException:
        os.ftruncate(target.fd, 0)
        os.ftruncate(target.fd, before.st_size)
        os.utime(target.fd, ns=(before.st_atime_ns, before.st_mtime_ns))
        raise
    os.utime(target.fd, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.removexattr(target.fd, upper.names.metacopy)
    return copied


def make_directory(upper: Upper, source: Source) -> bytes:
    """An empty upper directory with the attributes of a lower one, in the work directory; its name there.
    Raises OSError.
    """
    work = upper.work.fd.fd
    temporary = upper.work.temporary()
    os.mkdir(temporary, 0o700, dir_fd=work)
    step("copyup.created")
    try:
        _copy_attributes(upper, source, temporary, metacopy=False)
    except BaseException:
        remove_tree(work, temporary)
        raise
    step("copyup.attributes")
    return temporary


def _copy_attributes(upper: Upper, source: Source, temporary: bytes, *, metacopy: bool) -> None:
    work = upper.work.fd.fd
    st = source.st
    path = at_path(work, temporary)
    made = os.stat(temporary, dir_fd=work, follow_symlinks=False)
    own = upper.overrides and override.may_carry(made)
    if not own and (st.st_uid, st.st_gid) != (made.st_uid, made.st_gid):
        upper.chown(work, temporary, st.st_uid, st.st_gid)
    _copy_xattrs(upper, source, path)
    names = upper.names
    if metacopy:
        os.setxattr(path, names.metacopy, b"", follow_symlinks=False)
    _set_origin(upper, source, temporary)
    if not stat.S_ISDIR(st.st_mode):
        upper.record_ino(work, temporary, source.ino)
        if st.st_nlink > 1:
            _optional(lambda: os.setxattr(path, names.nlink, b"U+0", follow_symlinks=False))
        if (born := source.born) is not None:
            _optional(lambda: os.setxattr(path, names.btime, b"%d" % born, follow_symlinks=False))
    if own:
        upper.keep(path, st, follow=False)
        upper.set_real_mode(path, st.st_mode, is_dir=stat.S_ISDIR(st.st_mode))
    elif not stat.S_ISLNK(st.st_mode):
        os.chmod(path, stat.S_IMODE(st.st_mode))
    os.utime(temporary, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=work, follow_symlinks=False)


def _set_origin(upper: Upper, source: Source, temporary: bytes) -> None:
    if source.origin:
        target = at_path(upper.work.fd.fd, temporary)
        _optional(lambda: os.setxattr(target, upper.names.origin, source.origin, follow_symlinks=False))


def _optional(call: Callable[[], None]) -> None:
    """Marks that only help (inode numbers, the kernel's index) and that some objects cannot carry."""
    try:
        call()
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EACCES):
            raise


def _copy_xattrs(upper: Upper, source: Source, target: bytes) -> None:
    """Copies what a user sees, in its stored form; overlay marks stay behind.

    As the kernel's ovl_copy_xattr: an ACL that cannot be copied is an error; `security.` and `trusted.` ones
    that this process may not set or the file system does not take are passed over."""
    path, follow = source.path, source.follow
    try:
        present = os.listxattr(path, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return
        raise
    for name in present:
        if upper.names.shown(name) is None:
            continue
        try:
            os.setxattr(target, name, os.getxattr(path, name, follow_symlinks=follow), follow_symlinks=False)
        except OSError as error:
            passable = error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENODATA)
            if not passable or not name.startswith(("security.", "trusted.")):
                raise


def publish(upper: Upper, temporary: bytes, parent: OwnedFd, name: bytes, *, replace: bool) -> None:
    """Shows a finished copy: one rename. The parent, which the caller has marked impure, keeps its times.

    `replace`: the upper has the object already, without its data. Raises OSError; the temporary is then
    removed."""
    work = upper.work.fd.fd
    before = os.fstat(parent.fd)
    try:
        if replace:
            os.rename(temporary, name, src_dir_fd=work, dst_dir_fd=parent.fd)
        else:
            upper.place_copy(temporary, parent.fd, name)
    except OSError:
        remove_tree(work, temporary)
        raise
    step("copyup.published")
    restore_times(parent, before)


def restore_times(directory: OwnedFd, before: os.stat_result) -> None:
    """A copy-up is not a change of the directory (kernel: ovl_set_timestamps on the parent). Best effort, as
    there.
    """
    try:
        os.utime(fd_path(directory.fd), ns=(before.st_atime_ns, before.st_mtime_ns))
    except OSError:
        pass
    step("copyup.parent")
