"""Decompressing layers, which are hostile: a decoder for each compression, and the limits. Hashes nothing;
reads through a function.

Limits, so that a small blob cannot take the machine:

* A piece has at most PIECE bytes, whatever went in. Nothing else is held in memory but the window.
* A zstd window has at most MAX_WINDOW bytes: what `zstd -d` and the image tools take without being told.
  gzip's has 32 KiB.
* A stream that has given more than FREE_EXPANSION bytes of data, and more than MAX_RATIO times what was read
  for them, is refused. Pieces that are all zeros do not count: unpacked they become holes, and layers hold
  sparse files plainly, so zeros without end are honest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from layerfs.errors import TarError

#: Most bytes of one piece.
PIECE = 1 << 20
MAX_WINDOW = 128 << 20
FREE_EXPANSION = 4 << 30
MAX_RATIO = 200

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_OTHER_MAGIC = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
#: Length of the longest magic number here.
MAGIC = 6
#: Most bytes of a zstd block, as it is and decompressed.
_BLOCK = 128 << 10
_ZEROS = bytes(PIECE)
#: zlib's wbits for gzip with the window it can have.
_GZIP_WBITS = 31


class Decoder(Protocol):
    """Gives pieces of a tar; made with a function that gives raw bytes, b"" at their end."""

    name: str

    def read(self) -> bytes:
        """The next piece, b"" at the end. Raises TarError where the stream is damaged or cut."""
        ...


def make_decoder(head: bytes, read: Callable[[], bytes]) -> Decoder | None:
    """The decoder for a layer that begins with `head`, which `read` will give again; None when it is not
    compressed. Raises TarError for a compression that OCI layers may not have."""
    if head.startswith(_GZIP_MAGIC):
        return _Gzip(read)
    if head.startswith(_ZSTD_MAGIC) or _is_skippable(head[:4]):
        return _Zstd(read)
    for magic, name in _OTHER_MAGIC.items():
        if head.startswith(magic):
            raise TarError(
                f"the layer is compressed with {name}, which OCI layers may not be: decompress it first"
            )
    return None


class Expansion:
    """Holds a stream to the limits on what it may become."""

    def __init__(self) -> None:
        self._data = 0

    def add(self, piece: bytes, raw_size: int) -> None:
        """Counts a piece; `raw_size`: bytes read so far for all pieces. Raises TarError beyond the limit."""
        if not _ZEROS.startswith(piece):
            self._data += len(piece)
            if self._data > max(FREE_EXPANSION, MAX_RATIO * raw_size):
                raise TarError(
                    f"the layer is refused as a decompression bomb: more than {FREE_EXPANSION >> 30} GiB and "
                    f"more than {MAX_RATIO} times its compressed size; decompress it first if you trust it"
                )


class _Gzip:
    name = "gzip"

    def __init__(self, read: Callable[[], bytes]) -> None:
        from isal import isal_zlib
        from isal.igzip_lib import IsalError

        self._read = read
        self._library = isal_zlib
        self._error: type[Exception] = IsalError  # type: ignore[assignment]  # its stub says: an instance
        self._stream = isal_zlib.decompressobj(_GZIP_WBITS)
        self._ended = False
        #: given by `read`, and not yet to the stream
        self._raw = b""

    def read(self) -> bytes:
        while not self._ended:
            raw = self._raw or self._read()
            try:
                piece = self._stream.decompress(raw, PIECE)
            except self._error as error:
                raise TarError(f"the layer's gzip stream is damaged ({error})") from None
            self._raw = self._stream.unconsumed_tail
            if self._stream.eof:
                self._next_stream(self._stream.unused_data)
            elif not raw and not piece:
                raise TarError("the layer is truncated: its gzip stream ends too soon")
            if piece:
                return piece
        return b""

    def _next_stream(self, rest: bytes) -> None:
        """gzip files may be joined end to end (pigz, estargz); zeros or anything else behind the last one is
        padding, and ignored."""
        while len(rest) < len(_GZIP_MAGIC) and (more := self._read()):
            rest += more
        if rest.startswith(_GZIP_MAGIC):
            self._stream = self._library.decompressobj(_GZIP_WBITS)
            self._raw = rest
        else:
            self._ended = True


class _Zstd:
    """Walks frames and blocks itself and has libzstd decode a few blocks at a time: a block gives at most
    128 KiB (RFC 8878, 3.1.1.2.4), which bounds a piece. The binding has no other way to say "no more"."""

    name = "zstd"

    def __init__(self, read: Callable[[], bytes]) -> None:
        import zstandard

        self._read = read
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        self._error = zstandard.ZstdError
        #: the frame that is being decoded
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._has_checksum = False
        self._raw = b""
        self._at = 0

    def read(self) -> bytes:
        while True:
            if self._frame is None:
                magic = self._take(4, may_end=True)
                if not magic:
                    return b""
                if _is_skippable(magic):
                    self._skip(int.from_bytes(self._take(4), "little"))
                    continue
                raw = magic + self._frame_header(magic)
                self._frame = self._decompressor.decompressobj()
            else:
                raw = self._blocks()
            try:
                piece = self._frame.decompress(raw)
            except self._error as error:
                what = str(error).removeprefix("zstd decompressor error: ")
                raise TarError(f"the layer's zstd stream is refused ({what})") from None
            if self._frame.eof:
                self._frame = None
            if piece:
                return piece

    def _frame_header(self, magic: bytes) -> bytes:
        """The rest of a frame's header (RFC 8878, 3.1.1.1)."""
        if magic != _ZSTD_MAGIC:
            raise TarError("the layer's zstd stream is followed by something else")
        descriptor = self._take(1)
        flags = descriptor[0]
        self._has_checksum = bool(flags & 0x04)
        single_segment = bool(flags & 0x20)
        window = 0 if single_segment else 1
        dictionary = (0, 1, 2, 4)[flags & 3]
        content_size = (1 if single_segment else 0, 2, 4, 8)[flags >> 6]
        return descriptor + self._take(window + dictionary + content_size)

    def _blocks(self) -> bytes:
        """The next blocks of the frame, its checksum after the last one."""
        raw: list[bytes] = []
        for _ in range(PIECE // _BLOCK):
            header = self._take(3)
            bits = int.from_bytes(header, "little")
            size = 1 if bits >> 1 & 3 == 1 else bits >> 3  # one byte that is repeated
            if size > _BLOCK:
                raise TarError("the layer's zstd stream is damaged: a block is larger than blocks may be")
            raw += header, self._take(size)
            if bits & 1:
                raw.append(self._take(4) if self._has_checksum else b"")
                break
        return b"".join(raw)

    def _take(self, size: int, *, may_end: bool = False) -> bytes:
        """The next `size` raw bytes; with `may_end` b"" when there are none at all."""
        end = self._at + size
        if end > len(self._raw):
            self._raw = self._raw[self._at :]
            self._at, end = 0, size
            while size > len(self._raw):
                more = self._read()
                if not more:
                    if may_end and not self._raw:
                        return b""
                    raise TarError("the layer is truncated: its zstd stream ends too soon")
                self._raw += more
        data = self._raw[self._at : end]
        self._at = end
        return data

    def _skip(self, size: int) -> None:
        while size:
            size -= len(self._take(min(size, _BLOCK)))


def _is_skippable(magic: bytes) -> bool:
    return len(magic) == 4 and magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50
