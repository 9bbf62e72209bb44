"""One object of a layer as a member: its attributes, extended attributes, link target, and where its bytes
are. Reads only; what is compared, and what goes into a layer, is `changes`' business.

A name that came from a listing is a single component, so plain openat(2) with O_NOFOLLOW in the opened
directory leads nowhere else. Only what lstat(2), or where nobody writes a listing, calls a regular file is
ever opened: opening a device does something.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from layerfs.errors import LayerError
from layerfs.fdutil import OwnedFd, at_path
from layerfs.oci.member import OF_THIS_MACHINE, Member, display, member_of
from layerfs.oci.snapshot import Moment, Snapshots
from layerfs.overlay.names import has_marks, shown
from layerfs.stack import LowerDir, Stack, data_source, read_marks

_COMPARE = 1 << 20
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: How often a name is looked at again that was one thing for lstat(2) and another for open(2), or another
#: file by the time that its writers were to be held. Somebody who renames a new file over it all the time
#: wins each round with some probability, a high one on a busy machine; nobody wins so many.
_TRIES = 100
#: What open(2) and `Snapshots` say of a name that has become something else.
_CHANGED = (errno.ELOOP, errno.ENXIO, errno.ESTALE)


class Data:
    """The bytes of a file: in memory, behind a descriptor, or not opened yet."""

    __slots__ = ("_fd", "_held", "_opener", "path", "place")

    def __init__(
        self,
        path: bytes,
        place: tuple[int, bytes, bytes] | None,
        fd: OwnedFd | None = None,
        held: bytes | None = None,
        opener: Callable[[], OwnedFd] | None = None,
    ) -> None:
        #: in the merged tree
        self.path = path
        #: (layer, directory, name): equal places hold equal bytes. None for a copy.
        self.place = place
        self._fd = fd
        self._held = held
        self._opener = opener

    def _opened(self) -> OwnedFd:
        if self._fd is None:
            assert self._opener is not None
            self._fd = self._opener()
        return self._fd

    def read(self, offset: int, size: int) -> bytes:
        """Raises OSError."""
        if self._held is not None:
            return self._held[offset : offset + size]
        return os.pread(self._opened().fd, size, offset)

    def read_into(self, target: memoryview, offset: int) -> int:
        """Puts bytes from `offset` on into `target`: their number, 0 only at the end. Raises LayerError."""
        if self._held is not None:
            held = self._held[offset : offset + len(target)]
            target[: len(held)] = held
            return len(held)
        try:
            return os.preadv((self._fd or self._opened()).fd, (target,), offset)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def equals(self, other: Data, size: int) -> bool:
        """Whether the first `size` bytes are the same. Raises OSError.

        Read side by side, up to the first difference: both are on this machine, so a hash of each would
        read no byte less and could only say "equal" after all of them (and then not for certain)."""
        if self.place is not None and self.place == other.place:
            return True
        offset = 0
        while offset < size:
            ours = self.read(offset, _COMPARE)
            if not ours or ours != other.read(offset, _COMPARE):
                return False
            offset += len(ours)
        return True


@dataclass(slots=True)
class Found:
    """One object of a merged tree, described as a member under its path; `stat` is its own, `data` set for
    files."""

    member: Member
    stat: os.stat_result
    data: Data | None


class Objects:
    def __init__(self, stack: Stack, snapshots: Snapshots | None = None) -> None:
        """`snapshots`: takes the files of the upper, which is being written to meanwhile."""
        self._stack = stack
        self._snapshots = snapshots
        #: the directory that was looked into last
        self._home: LowerDir | None = None
        self._directory: OwnedFd | None = None

    def describe(
        self,
        home: LowerDir,
        name: bytes,
        path: bytes,
        lowers: Sequence[LowerDir],
        wanted: Callable[[os.stat_result], bool] | None = None,
        *,
        regular: bool = False,
    ) -> Found | None:
        """The object `name` in the directory `home`, to be shown as `path`; None for a socket. `lowers` are
        the lower directories of the one that shows it.

        Files for which `wanted` is true are opened, and all that is said of them is of one moment; the others
        are opened when somebody reads them. `regular`: a listing called it a regular file; where nobody
        writes that is as good as lstat(2). Raises OSError, ENOENT when it vanished."""
        directory = self._open(home)
        if regular and wanted is not None and not self._is_live(home):
            try:
                return self._opened_file(home, directory, name, path, lowers)
            except OSError as error:
                if error.errno not in _CHANGED:
                    raise
        tries = _TRIES
        while True:
            st = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
            if stat.S_ISREG(st.st_mode):
                if wanted is None or not wanted(st):
                    return self._closed_file(home, directory, name, path, lowers, st)
                try:
                    return self._opened_file(home, directory, name, path, lowers)
                except OSError as error:
                    if error.errno not in _CHANGED:
                        raise
                    if not tries:
                        raise LayerError(
                            f"{display(path)}: is replaced faster than it can be read;"
                            " try again, or commit with --pause",
                            error.errno,
                        ) from error
                tries -= 1
                continue
            if stat.S_ISSOCK(st.st_mode):
                return None
            target = os.readlink(name, dir_fd=directory.fd) if stat.S_ISLNK(st.st_mode) else b""
            _, xattrs = _xattrs(at_path(directory.fd, name))
            return Found(member_of(path, st, xattrs, target), st, None)

    def _open(self, home: LowerDir) -> OwnedFd:
        """The directory `home`; names come from one after the other."""
        if home is not self._home:
            self._directory = self._stack.open(home)
            self._home = home
        assert self._directory is not None
        return self._directory

    def _is_live(self, home: LowerDir) -> bool:
        """Whether it may be written to meanwhile."""
        return self._snapshots is not None and home.layer.index < 0

    def describe_root(self, root: LowerDir) -> Member:
        fd = self._stack.open(root).fd
        _, xattrs = _xattrs(at_path(fd, b"."))
        return member_of(b"", os.stat(fd), xattrs)

    def _opened_file(
        self,
        home: LowerDir,
        directory: OwnedFd,
        name: bytes,
        path: bytes,
        lowers: Sequence[LowerDir],
    ) -> Found:
        fd = _open_file(directory.fd, name)
        st = os.fstat(fd.fd)
        if not stat.S_ISREG(st.st_mode):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if self._snapshots is not None and home.layer.index < 0:

            def look() -> Moment:
                names, xattrs = _xattrs(fd.fd)
                return Moment(names, xattrs, has_data=not self._is_metacopy(names))

            moment, st, copy = self._snapshots.take(fd, path, look)
            stored, xattrs = moment.stored, moment.xattrs
            data = Data(path, None, held=copy) if isinstance(copy, bytes) else Data(path, None, copy)
        else:
            stored, xattrs = _xattrs(fd.fd)
            data = Data(path, (home.layer.index, home.path, name), fd)
        if stored and self._is_metacopy(stored):
            data = self._data_below(home, directory, name, path, lowers)
        return Found(member_of(path, st, xattrs), st, data)

    def _closed_file(
        self,
        home: LowerDir,
        directory: OwnedFd,
        name: bytes,
        path: bytes,
        lowers: Sequence[LowerDir],
        st: os.stat_result,
    ) -> Found:
        stored, xattrs = _xattrs(at_path(directory.fd, name))
        if self._is_metacopy(stored):
            data = self._data_below(home, directory, name, path, lowers)
        else:
            data = self._data_in(home, name, path)
        return Found(member_of(path, st, xattrs), st, data)

    def _is_metacopy(self, stored: Sequence[str]) -> bool:
        return has_marks(stored) and self._stack.names.metacopy in stored

    def _data_below(
        self, home: LowerDir, directory: OwnedFd, name: bytes, path: bytes, lowers: Sequence[LowerDir]
    ) -> Data:
        """The data of a file that is metadata only."""
        below = home.layer.index
        marks = read_marks(directory.fd, name, self._stack.names, lower=below >= 0)
        return self._data_in(*data_source(self._stack, lowers, name, marks.redirect, below), path)

    def _data_in(self, home: LowerDir, name: bytes, path: bytes) -> Data:
        def opener() -> OwnedFd:
            return _open_regular(self._stack.open(home).fd, name)

        return Data(path, (home.layer.index, home.path, name), opener=opener)


def _open_file(directory: int, name: bytes) -> OwnedFd:
    """A readable descriptor of `name`, which was a regular file a moment ago, access time left alone where we
    may. Raises OSError, one of `_CHANGED` where it is something else by now; a fifo and a device are left to
    the caller."""
    try:
        return OwnedFd(os.open(name, _FILE | os.O_NOATIME, dir_fd=directory))
    except PermissionError:
        return OwnedFd(os.open(name, _FILE, dir_fd=directory))


def _open_regular(directory: int, name: bytes) -> OwnedFd:
    """`_open_file`, a fifo and a device among `_CHANGED`."""
    fd = _open_file(directory, name)
    if not stat.S_ISREG(os.fstat(fd.fd).st_mode):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return fd


def _xattrs(where: int | bytes) -> tuple[list[str], dict[str, bytes]]:
    """(names as stored, xattrs as a user of the mount sees them): overlay's own left out, one level of escape
    taken off. `where`: a descriptor, or a path that is not followed. Raises OSError."""
    follow = isinstance(where, int)
    found: dict[str, bytes] = {}
    try:
        names = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        names = []
    for stored in names:
        attribute = shown(stored)
        if attribute is None or attribute in OF_THIS_MACHINE:
            continue
        try:
            found[attribute] = os.getxattr(where, stored, follow_symlinks=follow)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENODATA):
                raise
    return names, found


def unreadable(path: bytes, error: OSError) -> LayerError:
    if error.errno == errno.ENOENT:
        return LayerError(f"{display(path)}: vanished while it was read; try again when nobody changes it")
    return LayerError(f"{display(path)}: {error.strerror}", error.errno)
