"""Byte streams of layers: compressing and hashing on the way out, decompressing on the way in. Knows nothing
of tar.

Compressed output is deterministic: the gzip header carries no time, no name and no system. Memory stays flat
in both directions.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from layerfs.errors import TarError
from layerfs.ids import DiffId, Digest

#: What `--compression` takes, with the media type that an image manifest gives such a layer (image-spec
#: media-types.md).
MEDIA_TYPES = {
    "none": "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
}
_CHUNK = 256 << 10
#: ID1 ID2 CM=deflate FLG=0 MTIME=0 XFL=0 OS=255 (unknown): RFC 1952, 2.3.
_GZIP_HEADER = bytes((0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255))
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_OTHER_MAGIC = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}


class Compressor(Protocol):
    """Takes bytes, gives bytes; `finish` gives the last ones."""

    def compress(self, data: bytes) -> bytes: ...

    def finish(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes) -> bytes:
        return data

    def finish(self) -> bytes:
        return b""


class _Gzip:
    def __init__(self, level: int) -> None:
        self._deflate = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._crc = 0
        self._size = 0
        self._header = _GZIP_HEADER

    def compress(self, data: bytes) -> bytes:
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        header, self._header = self._header, b""
        return header + self._deflate.compress(data)

    def finish(self) -> bytes:
        trailer = struct.pack("<LL", self._crc, self._size & 0xFFFFFFFF)
        return self._header + self._deflate.flush() + trailer


_COMPRESSORS: dict[str, Callable[[], Compressor]] = {"none": _Plain, "gzip": lambda: _Gzip(6)}


@dataclass(frozen=True, slots=True)
class Written:
    """A finished layer: digests and sizes in bytes, before (`diff_id`, `tar_size`) and after compression
    (`digest`, `size`)."""

    diff_id: DiffId
    digest: Digest
    tar_size: int
    size: int
    media_type: str


class LayerSink:
    """Where a layer's tar goes: hashed, compressed, hashed again and written to a descriptor, in one pass."""

    def __init__(self, fd: int, compression: str = "none") -> None:
        self._fd = fd
        self._compression = compression
        self._compressor = _COMPRESSORS[compression]()
        self._tar_hash = hashlib.sha256()
        self._blob_hash = hashlib.sha256()
        self._tar_size = 0
        self._size = 0
        # Headers are 512 bytes and small files little more: gathered, so that hashing and compressing get
        # pieces worth their call.
        self._pending: list[bytes] = []
        self._pending_size = 0

    def write(self, data: bytes) -> None:
        self._pending.append(data)
        self._pending_size += len(data)
        if self._pending_size >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
        self._pending.clear()
        self._pending_size = 0
        self._tar_hash.update(data)
        self._tar_size += len(data)
        self._out(self._compressor.compress(data))

    def _out(self, data: bytes) -> None:
        self._blob_hash.update(data)
        self._size += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def finish(self) -> Written:
        """Writes what is left; the descriptor stays open and is not synced."""
        self._flush()
        self._out(self._compressor.finish())
        return Written(
            DiffId("sha256:" + self._tar_hash.hexdigest()),
            Digest("sha256:" + self._blob_hash.hexdigest()),
            self._tar_size,
            self._size,
            MEDIA_TYPES[self._compression],
        )


class LayerSource:
    """A layer tarball opened for reading, decompressed as its first bytes say (its name says nothing).

    Borrows `fd`, and reads it from its current position. Raises TarError where the compressed stream is
    broken or cut."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        st = os.fstat(fd)
        self._regular = stat.S_ISREG(st.st_mode)
        self._file_size = st.st_size
        head = b""
        while len(head) < 6 and (more := os.read(fd, _CHUNK)):
            head += more
        self._raw = head
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 16) if head.startswith(_GZIP_MAGIC) else None
        self._ended = False
        self._buffer = b""
        self._at = 0
        if head.startswith(_ZSTD_MAGIC):
            raise TarError(
                "the layer is compressed with zstd, which is not supported yet: decompress it first"
            )
        for magic, name in _OTHER_MAGIC.items():
            if head.startswith(magic):
                raise TarError(
                    f"the layer is compressed with {name}, which OCI layers may not be: decompress it first"
                )

    @property
    def compression(self) -> str:
        return "gzip" if self._inflate is not None else "none"

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        end = self._at + size
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            return data
        pieces = [self._buffer[self._at :]]
        missing = size - len(pieces[0])
        self._buffer, self._at = b"", 0
        while missing and (piece := self._fill()):
            pieces.append(piece[:missing])
            if len(piece) > missing:
                self._buffer, self._at = piece, missing
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def skip(self, size: int) -> bool:
        """Passes over `size` bytes; False when there are fewer."""
        here = min(size, len(self._buffer) - self._at)
        self._at += here
        size -= here
        while size:
            if self._inflate is None and self._regular and not self._raw:
                return os.lseek(self._fd, size, os.SEEK_CUR) <= self._file_size
            piece = self._fill()
            if not piece:
                return False
            if len(piece) > size:
                self._buffer, self._at = piece, size
                return True
            size -= len(piece)
        return True

    def _fill(self) -> bytes:
        """The next piece, b"" at the end. Never more than a chunk, however well it was compressed."""
        if self._inflate is None:
            raw, self._raw = self._raw, b""
            return raw or os.read(self._fd, _CHUNK)
        while not self._ended:
            if not self._raw and not self._inflate.unconsumed_tail:
                self._raw = os.read(self._fd, _CHUNK)
                if not self._raw:
                    raise TarError("the layer is truncated: its gzip stream ends too soon")
            data, self._raw = self._inflate.unconsumed_tail + self._raw, b""
            try:
                piece = self._inflate.decompress(data, _CHUNK)
            except zlib.error as error:
                raise TarError(f"the layer's gzip stream is damaged ({error})") from None
            if self._inflate.eof:
                self._next_stream(self._inflate.unused_data)
            if piece:
                return piece
        return b""

    def _next_stream(self, rest: bytes) -> None:
        """gzip files may be joined end to end (pigz, estargz); zeros or anything else behind the last one is
        padding, and ignored."""
        while len(rest) < len(_GZIP_MAGIC) and (more := os.read(self._fd, _CHUNK)):
            rest += more
        if rest.startswith(_GZIP_MAGIC):
            self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
            self._raw = rest
        else:
            self._ended = True
