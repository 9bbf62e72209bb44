"""Makes single objects of a layer in an opened directory, with all their attributes. Knows neither the tree
around them nor whiteouts.

System calls are what unpacking many small files costs: a file is opened with its final mode where umask and
ACLs let it, and given an owner only when it is not born with the right one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from layerfs.errors import LayerError, TarError
from layerfs.fdutil import OwnedFd, at_path, fd_path
from layerfs.oci.beneath import DIRECTORY_PATH, in_the_way, open_beneath, subdirectory
from layerfs.oci.member import OF_THIS_MACHINE, Kind, Member, display, split
from layerfs.oci.tally import Tally
from layerfs.overlay import acl
from layerfs.overlay.names import MARKS

_CHUNK = 256 << 10
#: A run of zeros of this size becomes a hole: archives hold sparse files plainly.
_HOLE = 64 << 10
_ZEROS = bytes(_HOLE)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_ACLS = (acl.ACCESS, acl.DEFAULT)
#: xattrs that stay on a directory though the layer does not name them: overlay's marks are among them.
_KEPT = (*MARKS, *OF_THIS_MACHINE)


class LeftOut(Exception):
    """A device that cannot be made here."""


class Data(Protocol):
    """Where a file's bytes come from: `TarReader`."""

    def read(self, size: int) -> bytes: ...


@dataclass(slots=True)
class Births:
    """Whom new objects belong to in some directories, once one was seen: a setgid directory or the mount
    option grpid gives its own group; a server may know better altogether."""

    owner: tuple[int, int] | None = None


@dataclass(slots=True)
class Parent:
    """A directory that objects are made in."""

    path: bytes
    fd: OwnedFd
    #: new objects inherit an ACL here, which must come off again
    has_default_acl: bool
    births: Births = field(default_factory=Births)


class ObjectMaker:
    """`tally` gathers what this user may not do and what no layer may have."""

    def __init__(self, tally: Tally) -> None:
        self.privileged = os.geteuid() == 0
        self._self = (os.geteuid(), os.getegid())
        self._masked = _umask()
        self._tally = tally

    def file(self, parent: Parent, name: bytes, member: Member, data: Data) -> None:
        """Raises OSError (EEXIST when the name is taken); then nothing is left."""
        mode = member.mode
        owner = (member.uid, member.gid)
        # A mode without w would keep an ordinary user from setting xattrs; 0600 until it belongs to whom it
        # should.
        born_right = (
            not mode & (0o7000 | self._masked)
            and not member.xattrs
            and not parent.has_default_acl
            and (owner == parent.births.owner or not self.privileged)
        )
        fd = os.open(name, _CREATE, mode if born_right else 0o600, dir_fd=parent.fd.fd)
        try:
            _write(fd, member.size, data)
            if born_right:
                if owner != self._self and not self.privileged:
                    self._note_owner(member)
                os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
            else:
                if parent.births.owner is None:
                    parent.births.owner = owner_of(fd)
                self.set_attributes(
                    fd_path(fd), member, follow=True, clean=parent.has_default_acl, owner=parent.births.owner
                )
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=parent.fd.fd)
            with contextlib.suppress(OSError):
                os.close(fd)
            raise
        os.close(fd)  # a network file system may only now say that the disk is full

    def special(self, parent: Parent, name: bytes, member: Member) -> None:
        """A symbolic link, fifo or device. Raises LeftOut, OSError (EEXIST when the name is taken); then
        nothing is left."""
        fd = parent.fd.fd
        if member.kind is Kind.SYMLINK:
            os.symlink(member.target, name, dir_fd=fd)
        else:
            kind = {Kind.FIFO: stat.S_IFIFO, Kind.CHAR: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK}[member.kind]
            try:
                os.mknod(name, kind | 0o600, os.makedev(*member.rdev), dir_fd=fd)
            except OSError as error:
                # Root of a user namespace is refused as well. EACCES would be about the directory.
                if error.errno == errno.EPERM and member.kind is not Kind.FIFO:
                    raise LeftOut from None
                raise
        try:
            self.set_attributes(
                at_path(fd, name),
                member,
                follow=False,
                clean=parent.has_default_acl and member.kind is not Kind.SYMLINK,
                owner=parent.births.owner,
            )
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=fd)
            raise

    def hard_link(self, root: OwnedFd, parent: Parent, name: bytes, member: Member) -> None:
        """Raises TarError where the partner is not there below `root`, or is a directory."""
        directory, last = split(member.target)
        wanted = f"hard link {display(member.name)} to {display(member.target)}"
        source = parent.fd
        try:
            if directory != parent.path:
                source = open_beneath(root.fd, directory or b".", DIRECTORY_PATH)
            os.link(last, name, src_dir_fd=source.fd, dst_dir_fd=parent.fd.fd, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise TarError(f"{wanted}: that is not there") from None
            if error.errno == errno.EPERM and subdirectory(source, last) is not None:
                raise TarError(f"{wanted}: that is a directory") from None
            raise in_the_way(root, directory, wanted, error) from None

    def set_attributes(
        self,
        where: bytes,
        member: Member,
        *,
        follow: bool,
        clean: bool,
        owner: tuple[int, int] | None = None,
    ) -> None:
        """Owner, xattrs, mode, time, in this order: chown clears setuid and capabilities, an ACL sets mode
        bits, and a mode may forbid an ordinary user to set xattrs.

        `clean`: xattrs that the member does not have come off (a directory's old ones, an inherited ACL).
        `owner`: whom it belongs to already, if known. Raises OSError, LayerError."""
        if self.privileged:
            if (member.uid, member.gid) != owner:
                self._chown(where, member, follow)
        elif (member.uid, member.gid) != self._self:
            self._note_owner(member)
        xattrs = self._wanted_xattrs(member) if member.xattrs else member.xattrs
        if clean:
            _clean_xattrs(where, xattrs, follow)
        for attribute, value in xattrs.items():
            try:
                os.setxattr(where, attribute, value, follow_symlinks=follow)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._tally.add(
                    f"xattr {display(os.fsencode(attribute))} cannot be set here: dropped", member.name
                )
        if follow:
            os.chmod(where, member.mode)
        elif member.kind is not Kind.SYMLINK:
            _chmod_nofollow(where, member.mode)
        os.utime(where, ns=(member.mtime_ns, member.mtime_ns), follow_symlinks=follow)

    def _chown(self, where: bytes, member: Member, follow: bool) -> None:
        try:
            os.chown(where, member.uid, member.gid, follow_symlinks=follow)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            owner = f"{display(member.name)}: belongs to {member.uid}:{member.gid}"
            hint = "which this user namespace does not map: map more ids or run as root"
            raise LayerError(f"{owner}, {hint}", error.errno) from None

    def _note_owner(self, member: Member) -> None:
        self._tally.add("belongs to somebody else, which only root can arrange: it is yours now", member.name)

    def _wanted_xattrs(self, member: Member) -> Mapping[str, bytes]:
        wanted = {}
        for attribute, value in member.xattrs.items():
            if attribute.startswith(MARKS):
                self._tally.add(
                    f"xattr {display(os.fsencode(attribute))} would steer a merge: dropped", member.name
                )
            else:
                wanted[attribute] = value
        return wanted


def _write(fd: int, size: int, data: Data) -> None:
    """Writes the `size` bytes that `data` has; runs of zeros become holes."""
    if size < _HOLE:
        if size:
            _write_all(fd, data.read(size))
        return
    at = 0
    hole = False
    while chunk := data.read(_CHUNK):
        begin = 0  # of what is not written yet
        for start in range(0, len(chunk), _HOLE):
            hole = chunk.startswith(_ZEROS, start)
            if hole:
                _write_all(fd, chunk[begin:start])
                os.lseek(fd, _HOLE, os.SEEK_CUR)
                begin = start + _HOLE
        _write_all(fd, chunk[begin:])
        at += len(chunk)
    if hole:
        os.ftruncate(fd, at)


def _write_all(fd: int, data: bytes) -> None:
    written = os.write(fd, data) if data else 0
    while written < len(data):
        written += os.write(fd, memoryview(data)[written:])


def _clean_xattrs(where: bytes, wanted: Mapping[str, bytes], follow: bool) -> None:
    try:
        present = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return
        raise
    for attribute in present:
        if attribute not in wanted and not attribute.startswith(_KEPT):
            with contextlib.suppress(PermissionError):
                os.removexattr(where, attribute, follow_symlinks=follow)


def clean_acls(where: bytes) -> None:
    """Takes off what a new directory inherited."""
    for attribute in _ACLS:
        with contextlib.suppress(OSError):
            os.removexattr(where, attribute, follow_symlinks=False)


def owner_of(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_uid, st.st_gid


def has_default_acl(fd: int) -> bool:
    try:
        os.getxattr(fd, acl.DEFAULT)
    except OSError:
        return False
    return True


def _umask() -> int:
    """This process's, without changing it: other threads make files too."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o777


def _chmod_nofollow(where: bytes, mode: int) -> None:
    """chmod(2) follows links, and whoever owns the directory may have put one there. Raises OSError."""
    fd = OwnedFd(os.open(where, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
    if stat.S_ISLNK(os.fstat(fd.fd).st_mode):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    os.chmod(fd_path(fd.fd), mode)
