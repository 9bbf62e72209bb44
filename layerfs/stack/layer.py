"""One layer, a directory inside a lower layer, and the whole stack. Descriptors only: a layer's path is used
once, to open it.

Everything is opened relative to the layer's root with openat2 and RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS: no
name, link or redirect that a layer's author wrote leads outside, nor does a mount point that covers a layer
after it was opened.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from layerfs.errors import LayerError
from layerfs.fdutil import (
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    FdPool,
    OwnedFd,
    clone_mount,
    fs_uuid,
    openat2,
)
from layerfs.ids import LayerNumber
from layerfs.overlay.names import XattrNames

INSIDE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS


class Layer:
    """The root of one layer. `index` counts lowers from the top, 0 first; -1 is the upper. `number` is the
    one in inode numbers.
    """

    __slots__ = ("fd", "index", "number", "path", "root")

    def __init__(self, path: str, index: int, number: LayerNumber) -> None:
        """Opens `path` (symbolic links in it are followed, as mount does). Raises LayerError."""
        try:
            self.fd = OwnedFd(_open_lower(path) if index >= 0 else _open_upper(path))
        except OSError as error:
            raise LayerError(f"{path}: {error.strerror}", error.errno) from error
        self.path = os.path.abspath(path)
        self.index = index
        self.number = number
        self.root = LowerDir(self, b"")

    def uuid(self) -> bytes | None:
        """UUID of the layer's file system, as origin xattrs name it."""
        fd = OwnedFd(os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd.fd))
        return fs_uuid(fd.fd)

    def __repr__(self) -> str:
        return f"<Layer {self.index} {self.path!r}>"


def _open_upper(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _open_lower(path: str) -> int:
    """As the kernel's clone_private_mount: what is mounted inside a layer is not part of it, and `umount MNT
    && umount LAYER` does not meet a daemon that is still ending. (The upper must share its mount with the
    work directory: rename(2) refuses to cross mounts.)
    """
    os.close(_open_upper(path))  # a directory that we may read, or the reason why not
    clone = clone_mount(os.fsencode(path))
    return clone if clone is not None else _open_upper(path)


class LowerDir:
    """A directory of a lower layer, by its fixed path there (lowers do not change). Descriptors are kept in
    the stack's pool.
    """

    __slots__ = ("layer", "path")

    def __init__(self, layer: Layer, path: bytes) -> None:
        self.layer = layer
        self.path = path

    def child(self, name: bytes) -> LowerDir:
        return LowerDir(self.layer, self.path + b"/" + name if self.path else name)

    def __repr__(self) -> str:
        return f"<LowerDir {self.layer.index}:{self.path!r}>"


class Stack:
    """The lowers, top first, and the upper if there is one, opened."""

    def __init__(
        self, lowers: Sequence[str], upper: str | None, names: XattrNames, pool_capacity: int = 128
    ) -> None:
        """Opens all layers. Raises LayerError naming the one that cannot be."""
        count = len(lowers)
        self.names = names
        self.lowers = tuple(
            Layer(path, index, LayerNumber(count - index)) for index, path in enumerate(lowers)
        )
        self.upper = Layer(upper, -1, LayerNumber(0)) if upper is not None else None
        self.pool = FdPool(pool_capacity)

    def open(self, directory: LowerDir) -> OwnedFd:
        """An O_PATH descriptor of `directory`. Raises OSError, ENOENT or ENOTDIR when the lower was changed
        from outside.
        """
        if not directory.path:
            return directory.layer.fd
        return self.pool.get(directory, lambda: self._open(directory))

    @staticmethod
    def _open(directory: LowerDir) -> int:
        return openat2(
            directory.layer.fd.fd, directory.path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=INSIDE
        )
