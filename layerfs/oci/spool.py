"""Where the data of layers can be read in any order: an uncompressed layer is read where it lies, what comes
compressed or through a pipe is kept in a temporary file without a name. Knows nothing of trees.

The temporary file lies in $TMPDIR, or in /var/tmp: it may be as large as all the layers, and /tmp is often
memory. It has no name, so nothing is left of it, however we end.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from types import TracebackType

from layerfs.errors import LayerError
from layerfs.fdutil import OwnedFd
from layerfs.oci.member import display
from layerfs.oci.packed import Place

_CHUNK = 256 << 10
_ZEROS = bytes(_CHUNK)


class Spool:
    """The data of layers, by `Place`: `begin_layer` for each of them, then `keep` for what must be copied. A
    context manager."""

    def __init__(self) -> None:
        self._file: OwnedFd | None = None
        self._end = 0
        #: of each layer: its own descriptor when its data stay where they are
        self._layers: list[OwnedFd | None] = []

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self._file, *self._layers):
            if fd is not None:
                fd.close()

    def begin_layer(self, fd: OwnedFd | None) -> None:
        """`fd`: a file in which the offsets of this layer's places are; None: `keep` gives them."""
        self._layers.append(fd)

    def keep(self, read: Callable[[int], bytes]) -> int:
        """Copies what `read` gives up to its end; returns the offset for a place in this layer. Raises
        LayerError when there is no room."""
        start = self._end
        if self._file is None:
            self._file = _temporary()
        while data := read(_CHUNK):
            # Archives hold sparse files plainly, and bombs are mostly zeros.
            if data != _ZEROS[: len(data)]:
                self._write(self._file.fd, data)
            self._end += len(data)
        return start

    def _write(self, fd: int, data: bytes) -> None:
        view, at = memoryview(data), self._end
        try:
            while view:
                written = os.pwrite(fd, view, at)
                view, at = view[written:], at + written
        except OSError as error:
            raise _no_room(error) from error

    def read(self, place: Place, size: int, name: bytes) -> Iterator[bytes]:
        """The `size` bytes at `place`. Raises LayerError when they are not there any more."""
        fd = self._layers[place.layer] or self._file
        assert fd is not None
        at, end = place.offset, place.offset + size
        while at < end:
            try:
                data = os.pread(fd.fd, min(_CHUNK, end - at), at)
            except OSError as error:
                raise LayerError(f"{display(name)}: {error.strerror}", error.errno) from error
            if not data:
                if fd is not self._file:
                    raise LayerError(f"{display(name)}: its layer became shorter while it was read")
                data = _ZEROS[: end - at]  # the spool may end in a hole
            at += len(data)
            yield data


def _directory() -> str:
    return os.environ.get("TMPDIR") or "/var/tmp"


def _temporary() -> OwnedFd:
    directory = _directory()
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            return OwnedFd(os.dup(file.fileno()))
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> LayerError:
    where = display(os.fsencode(_directory()))
    hint = "the layers' files are kept there for a while: point TMPDIR to a directory with room for them"
    return LayerError(f"{where}: {error.strerror}; {hint}", error.errno)
