"""One layer, a directory inside a lower layer, and the whole stack. Descriptors only: a layer's path is used
once, to open it.

Everything is opened relative to the layer's root with openat2 and RESOLVE_INSIDE: no
name, link or redirect that a layer's author wrote leads outside, nor does a mount point that covers a layer
after it was opened.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from functools import partial

from layerfs.errors import LayerError
from layerfs.fdutil import (
    RESOLVE_INSIDE,
    FdPool,
    OwnedFd,
    clone_mount,
    fd_path,
    fs_uuid,
    openat2,
    protect_mount,
)
from layerfs.ids import LayerNumber
from layerfs.overlay import override
from layerfs.overlay.names import XattrNames

#: Bytes of a path that are handed to the kernel in one piece.
_LONG = 3500
_PATH_MAX = 4096
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


class Layer:
    """The root of one layer. `index` counts lowers from the top, 0 first; -1 is the upper. `number` is the
    one in inode numbers.
    """

    __slots__ = ("fd", "index", "number", "overrides", "path", "root")

    def __init__(self, path: str, index: int, number: LayerNumber) -> None:
        """Opens `path` (symbolic links in it are followed, as mount does). Raises LayerError."""
        try:
            self.fd = OwnedFd(_open_lower(path) if index >= 0 else _open_upper(path))
        except OSError as error:
            raise LayerError(f"{path}: {error.strerror}", error.errno) from error
        # Said to others (`layerfs.lower.N`): by the kernel, as `link/..` is not what the text says.
        self.path = os.path.realpath(path)
        self.index = index
        self.number = number
        #: xattrs in which its objects keep owner, mode and type (`overlay.override`), in the order to look;
        #: an upper's first one is written. Empty: the real ones count
        self.overrides: tuple[str, ...] = ()
        self.root = LowerDir(self, b"", None)
        self.root.note_device(os.fstat(self.fd.fd).st_dev)

    def uuid(self) -> bytes | None:
        """UUID of the layer's file system, as origin xattrs name it."""
        fd = OwnedFd(os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd.fd))
        return fs_uuid(fd.fd)

    def find_overrides(self, option: int) -> None:
        """Sets `overrides` by the mount's `xattr_permissions` and by what the layer's root carries.

        Without the option only a layer whose root is this user's own is believed: anybody may set `user.`
        xattrs on his own files, and they could say "root's, setuid" in somebody else's mount."""
        path = fd_path(self.fd.fd)
        try:
            present = os.listxattr(path)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # a squashfs made without any
                raise
            present = []
        found = override.carried_by(present)
        if self.index < 0 and option:
            self.overrides = override.names_of_upper(option, present)
        elif found and (option or os.fstat(self.fd.fd).st_uid == os.geteuid()):
            self.overrides = found

    def shown(self, st: os.stat_result, path: bytes, *, follow: bool) -> os.stat_result:
        """`st` of the layer's object at `path` as the layer means it."""
        if override.may_carry(st):
            for name in self.overrides:
                try:
                    return override.apply(st, os.getxattr(path, name, follow_symlinks=follow))
                except OSError:
                    continue  # ENODATA, mostly; what cannot be read says nothing
        return st

    def __repr__(self) -> str:
        return f"<Layer {self.index} {self.path!r}>"


def read_link(directory: OwnedFd, name: bytes) -> bytes:
    """Where the symbolic link `name` leads, also where its layer keeps it as a file with the target in it
    (`overlay.override`, containers/storage). Raises OSError."""
    try:
        return os.readlink(name, dir_fd=directory.fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # Looked at first: opening a fifo, which somebody may have put there from outside, would block.
    found = OwnedFd(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd))
    if not stat.S_ISREG(os.fstat(found.fd).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    file = OwnedFd(os.open(fd_path(found.fd), os.O_RDONLY | os.O_CLOEXEC))
    return os.pread(file.fd, _PATH_MAX, 0)


def _open_upper(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _open_lower(path: str) -> int:
    """As the kernel's clone_private_mount: what is mounted inside a layer is not part of it, and `umount MNT
    && umount LAYER` does not meet a daemon that is still ending. What the kernel opens in our place
    (passthrough) it opens through that mount: read-only, and without moving access times. (The upper must
    share its mount with the work directory: rename(2) refuses to cross mounts.)
    """
    os.close(_open_upper(path))  # a directory that we may read, or the reason why not
    clone = clone_mount(os.fsencode(path))
    if clone is None:
        return _open_upper(path)
    protect_mount(clone)
    return clone


class LowerDir:
    """A directory of a lower layer, by its fixed path there (lowers do not change). Descriptors are kept in
    the stack's pool.
    """

    __slots__ = ("_place", "layer", "parent", "path")

    def __init__(self, layer: Layer, path: bytes, parent: LowerDir | None) -> None:
        self.layer = layer
        self.path = path
        #: None for the layer's root
        self.parent = parent
        self._place: tuple[int, bytes] | None = None

    def child(self, name: bytes) -> LowerDir:
        return LowerDir(self.layer, self.path + b"/" + name if self.path else name, self)

    def note_device(self, device: int) -> None:
        """Called with the st_dev of the opened directory; its parents were opened before."""
        if self._place is None:
            above = self.parent._place if self.parent is not None else None
            same = self.parent is None or (above is not None and above[0] == device)
            self._place = (device, (above[1] if above is not None else b"") if same else self.path)

    @property
    def region(self) -> bytes:
        """Path of the file system's (or subvolume's) root within the layer; empty for the layer's own. Known
        once the directory was opened.
        """
        return self._place[1] if self._place is not None else b""

    def __repr__(self) -> str:
        return f"<LowerDir {self.layer.index}:{self.path!r}>"


class Stack:
    """The lowers, top first, and the upper if there is one, opened."""

    def __init__(
        self,
        lowers: Sequence[str],
        upper: str | None,
        names: XattrNames,
        pool_capacity: int = 128,
        *,
        xattr_permissions: int = 0,
    ) -> None:
        """Opens all layers. Raises LayerError naming the one that cannot be."""
        count = len(lowers)
        self.names = names
        self.lowers = tuple(
            Layer(path, index, LayerNumber(count - index)) for index, path in enumerate(lowers)
        )
        self.upper = Layer(upper, -1, LayerNumber(0)) if upper is not None else None
        self.pool = FdPool(pool_capacity)
        for layer in self.layers:
            layer.find_overrides(xattr_permissions)
        #: some layer keeps owners, modes and types in xattrs
        self.overrides = any(layer.overrides for layer in self.layers)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All of them, the upper first."""
        return self.lowers if self.upper is None else (self.upper, *self.lowers)

    def close(self) -> None:
        """Gives the descriptors back now. Layers and their directories refer to each other: dropped, they
        stay open until the cyclic collector comes by."""
        self.pool.clear()
        for layer in self.layers:
            layer.fd.close()

    def open(self, directory: LowerDir) -> OwnedFd:
        """An O_PATH descriptor of `directory`. Raises OSError, ENOENT or ENOTDIR when the lower was changed
        from outside.
        """
        if not directory.path:
            return directory.layer.fd
        pool = self.pool
        if len(directory.path) > _LONG and directory not in pool:
            self._open_above(directory)
        fd = pool.get(directory, lambda: self._open(directory))
        if directory._place is None:
            directory.note_device(os.fstat(fd.fd).st_dev)
        return fd

    def _open_above(self, directory: LowerDir) -> None:
        """Paths may be longer than PATH_MAX: from the nearest directory that is open, or short, step by
        step.
        """
        way: list[LowerDir] = []
        here = directory.parent
        while here is not None and len(here.path) > _LONG and here not in self.pool:
            way.append(here)
            here = here.parent
        fd = self.open(here) if here is not None else directory.layer.fd
        for step in reversed(way):
            fd = self.pool.get(step, partial(_open_step, fd, step))
            step.note_device(os.fstat(fd.fd).st_dev)

    def _open(self, directory: LowerDir) -> int:
        if directory.parent is not None and len(directory.path) > _LONG:
            return _open_step(self.open(directory.parent), directory)
        return openat2(directory.layer.fd.fd, directory.path, _DIRECTORY, resolve=RESOLVE_INSIDE)


def _open_step(parent: OwnedFd, directory: LowerDir) -> int:
    return openat2(parent.fd, directory.path.rpartition(b"/")[2], _DIRECTORY, resolve=RESOLVE_INSIDE)
