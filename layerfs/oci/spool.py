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
from layerfs.fdutil import OwnedFd, temporary_place
from layerfs.oci.member import display
from layerfs.oci.packed import Place

_CHUNK = 256 << 10
_ZEROS = bytes(_CHUNK)
#: A file that begins so near behind the last one (a header or two) is read together with those behind it.
_NEAR = 4 << 10
#: Layers that stay open: an image may have 1,000, a process often no more than 1,024 descriptors.
_MAX_OPEN = 256


class Spool:
    """The data of layers, by `Place`: `begin_layer` for each of them, then `keep` for what must be copied;
    `finish`, and then `read`. A context manager."""

    def __init__(self) -> None:
        self._file: OwnedFd | None = None
        #: size of the file, with what is pending
        self._end = 0
        #: the file's last bytes, not written yet: most files are small
        self._pending = bytearray()
        #: of each layer: its own descriptor when its data stay where they are
        self._layers: list[OwnedFd | None] = []
        #: what was read last: from which file, from where on, and where the file that it was for ended
        self._window: tuple[OwnedFd | None, int, bytes] = (None, 0, b"")
        self._last = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self._file, *self._layers):
            if fd is not None:
                fd.close()

    # --- in ---

    @property
    def has_room(self) -> bool:
        """Whether one more layer may be left where it is."""
        return sum(fd is not None for fd in self._layers) < _MAX_OPEN

    def begin_layer(self, fd: OwnedFd | None) -> None:
        """`fd`: a file in which the offsets of this layer's places are; None: `keep` gives them."""
        self._layers.append(fd)

    def keep(self, read: Callable[[int], bytes]) -> int:
        """Copies what `read` gives up to its end; returns the offset for a place in this layer. Raises
        LayerError when there is no room."""
        if self._file is None:
            self._file = _temporary()
        start = self._end
        while data := read(_CHUNK):
            # Archives hold sparse files plainly, and bombs are mostly zeros.
            if data == _ZEROS:
                self._flush()
            else:
                self._pending += data
            self._end += len(data)
            if len(self._pending) >= _CHUNK:
                self._flush()
        return start

    def _flush(self) -> None:
        assert self._file is not None
        view, at = memoryview(self._pending), self._end - len(self._pending)
        try:
            while view:
                written = os.pwrite(self._file.fd, view, at)
                view, at = view[written:], at + written
        except OSError as error:
            raise _no_room(error) from error
        self._pending = bytearray()

    def finish(self) -> None:
        """All is there. Raises LayerError."""
        if self._pending:
            self._flush()
        if self._file is not None:
            os.ftruncate(self._file.fd, self._end)  # it may end in a hole

    # --- out ---

    def read(self, place: Place, size: int, name: bytes) -> Iterator[bytes]:
        """The `size` bytes at `place`. Raises LayerError when they are not there any more."""
        fd = self._layers[place.layer] or self._file
        assert fd is not None
        near = 0 <= place.offset - self._last <= _NEAR
        at, end = place.offset, place.offset + size
        self._last = end
        while at < end:
            data = self._read_at(fd, at, end, near, name)
            at += len(data)
            yield data

    def _read_at(self, fd: OwnedFd, at: int, end: int, near: bool, name: bytes) -> bytes:
        """Some of the bytes from `at` to `end`."""
        held, start, data = self._window
        if held is not fd or not start <= at < start + len(data):
            try:
                data = os.pread(fd.fd, _CHUNK if near else min(_CHUNK, end - at), at)
            except OSError as error:
                raise LayerError(f"{display(name)}: {error.strerror}", error.errno) from error
            if not data:
                raise LayerError(f"{display(name)}: its layer became shorter while it was read")
            start = at
            self._window = (fd, start, data)
        return data[at - start : end - start]


def _temporary() -> OwnedFd:
    directory = temporary_place()
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            return OwnedFd(os.dup(file.fileno()))
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> LayerError:
    where = display(os.fsencode(temporary_place()))
    hint = "the layers' files are kept there for a while: point TMPDIR to a directory with room for them"
    return LayerError(f"{where}: {error.strerror}; {hint}", error.errno)
