"""Byte streams of layers: a tar on its way out (hashed, compressed, hashed again, written) and on its way in
(read, hashed, decompressed, hashed again). Knows nothing of tar, and leaves formats to `compression` and
`decompression`.

The work is spread over threads, all of which run without the interpreter's lock while they hash, compress,
read and write. A stream has a fixed number of buffers, so memory is flat whatever the size of a layer.
Threads end with the stream: use both classes in a `with`, or close them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from layerfs.ids import DiffId, Digest
from layerfs.oci.compression import BLOCK_SIZE, COMPRESSIONS, MEDIA_TYPES, check_level, make_encoder
from layerfs.oci.decompression import MAGIC, PIECE, Decoder, Expansion, make_decoder
from layerfs.oci.rawio import RAW, RawInput, RawOutput

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["COMPRESSIONS", "MEDIA_TYPES", "LayerSink", "LayerSource", "Written", "check_level"]

#: Blocks in work beyond two for each thread that compresses: they are filled, hashed and written in order,
#: and on a busy machine each of these waits for its turn now and then.
_MORE_BUFFERS = 6
#: Who passes over so many bytes of a file at once will pass over more, and reads fewer ahead as long as he
#: does.
_FAR = 4 << 10
_NEAR = 2 << 10
#: Pieces that are decompressed before somebody asks for them.
_AHEAD = 3


@dataclass(frozen=True, slots=True)
class Written:
    """A finished layer: digests and sizes in bytes, before (`diff_id`, `tar_size`) and after compression
    (`digest`, `size`)."""

    diff_id: DiffId
    digest: Digest
    tar_size: int
    size: int
    media_type: str


@dataclass(slots=True)
class _Block:
    """A buffer and what still needs it."""

    buffer: memoryview
    busy: list[Future[Any]] = field(default_factory=list)

    def wait(self) -> None:
        """Raises what went wrong with it."""
        for future in self.busy:
            future.result()
        self.busy.clear()


def _new_block() -> _Block:
    return _Block(memoryview(bytearray(BLOCK_SIZE)))


class LayerSink:
    """Where a layer's tar goes: hashed, compressed, hashed again and written to a descriptor, in one pass.

    The caller fills one block while others are hashed, compressed and written behind it. What goes wrong
    there (ENOSPC, EPIPE, EIO) is raised as the OSError it was by a later `write` or by `finish`.
    `close` (or leaving the `with`) drops what is not written and waits for the threads; `fd` stays open and
    is not synced."""

    def __init__(self, fd: int, compression: str = "none", level: int | None = None) -> None:
        self._encoder = make_encoder(compression, level)
        self._output = RawOutput(fd, hashed=compression != "none")
        self._compression = compression
        self._tar_hash = hashlib.sha256()
        self._tar_size = 0
        self._hasher = _threads(1, "hash")
        encoders = self._encoder.threads if self._encoder is not None else 1
        self._encoders = _threads(encoders, "compress")
        self._writer = _threads(1, "write")
        #: The least recently used one first. All but `_block` may be busy.
        self._blocks = deque(_new_block() for _ in range(2 * encoders + _MORE_BUFFERS))
        self._block = self._blocks.popleft()
        self._buffer = self._block.buffer
        self._used = 0

    def __enter__(self) -> LayerSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        end = self._used + len(data)
        if end < BLOCK_SIZE:
            self._buffer[self._used : end] = data
            self._used = end
            return
        rest = memoryview(data)
        while rest:
            room = self.room(len(rest))
            room[:] = rest[: len(room)]
            self.filled(len(room))
            rest = rest[len(room) :]

    def room(self, size: int) -> memoryview:
        """Where the next bytes belong: at least one, at most `size`. Of no use any more after the next call
        of anything here."""
        return self._buffer[self._used : self._used + size]

    def filled(self, size: int) -> None:
        """The first `size` bytes of the last `room` are there now."""
        self._used += size
        if self._used == BLOCK_SIZE:
            self._pass_on()

    def _pass_on(self) -> None:
        """Gives the block to the threads, and waits for the next free one."""
        block, data = self._block, self._buffer[: self._used]
        self._tar_size += self._used
        block.busy.append(self._hasher.submit(self._sum, data))
        if self._encoder is None:
            block.busy.append(self._writer.submit(self._output.write, data))
        else:
            encoded = self._encoders.submit(self._encoder.job(data))
            block.busy.append(encoded)
            block.busy.append(self._writer.submit(self._write_result, encoded))
        self._blocks.append(block)
        self._block, self._used = self._blocks.popleft(), 0
        self._block.wait()
        self._buffer = self._block.buffer

    def _sum(self, data: memoryview) -> None:
        self._tar_hash.update(data)
        if self._encoder is not None:
            self._encoder.sum(data)

    def _write_result(self, encoded: Future[bytes]) -> None:
        self._output.write(encoded.result())

    def finish(self) -> Written:
        """Writes what is left, ends the threads and says what it was."""
        if self._used:
            self._pass_on()
        for block in self._blocks:
            block.wait()
        if self._encoder is not None:
            self._output.write(self._encoder.finish())
        self.close()
        diff_id = DiffId("sha256:" + self._tar_hash.hexdigest())
        blob_hash = self._output.hash
        return Written(
            diff_id,
            Digest("sha256:" + blob_hash.hexdigest() if blob_hash is not None else diff_id),
            self._tar_size,
            self._output.size,
            MEDIA_TYPES[self._compression],
        )

    def close(self) -> None:
        """Waits for the threads; without `finish` the blob stays incomplete. May be called again."""
        self._output.closed = True
        try:
            for pool in (self._hasher, self._encoders, self._writer):
                pool.shutdown(cancel_futures=True)
        finally:
            self._output.close()


class LayerSource:
    """A layer tarball opened for reading, decompressed as its first bytes say (its name says nothing).

    Reads `fd` from its current position, at most `size` raw bytes when that is given. With `digests`
    everything read is hashed on the way. Raises TarError where the compressed stream is broken, cut or goes
    beyond the limits of `decompression`, OSError as read does."""

    def __init__(self, fd: int, *, size: int | None = None, digests: bool = False) -> None:
        self._input = RawInput(fd, size, hashed=digests)
        try:
            self._decoder = make_decoder(self._input.head(MAGIC), self._input.read)
        except BaseException:
            self._input.close()
            raise
        self._digests = digests
        self._pieces: _Pieces | None = None
        if self._decoder is not None or digests:
            self._pieces = _Pieces(self._input, self._decoder, hashed=digests)
        self._buffer = b""
        self._at = 0
        #: bytes of the tar up to the end of `_buffer`
        self._end = 0
        #: bytes of a tar that are read at once where it lies in a file as it is
        self._ahead = RAW
        self._drained = False

    def __enter__(self) -> LayerSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_drained"):  # else the constructor failed, and closed what there was
            self.close()

    def close(self) -> None:
        """Waits for the threads. May be called again."""
        self._input.closed = True
        if self._pieces is not None:
            self._pieces.close()
        self._input.close()

    @property
    def compression(self) -> str:
        return self._decoder.name if self._decoder is not None else "none"

    @property
    def raw_size(self) -> int:
        """Raw bytes read so far, some of them ahead of what was asked for."""
        return self._input.taken

    @property
    def position(self) -> int:
        """Bytes of the tar that were read or passed over."""
        return self._end - len(self._buffer) + self._at

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        end = self._at + size
        if end <= len(self._buffer):
            data = self._buffer[self._at : end]
            self._at = end
            return data
        parts = [self._buffer[self._at :]]
        missing = size - len(parts[0])
        self._buffer, self._at = b"", 0
        while missing and (piece := self._fill()):
            parts.append(piece[:missing])
            if len(piece) > missing:
                self._buffer, self._at = piece, missing
            missing -= len(parts[-1])
        return b"".join(parts)

    def skip(self, size: int) -> bool:
        """Passes over `size` bytes; False when there are fewer."""
        here = min(size, len(self._buffer) - self._at)
        self._at += here
        size -= here
        if size and self._pieces is None and self._input.seekable:
            if size >= _FAR:
                self._ahead = _NEAR
            self._end += size
            return self._input.skip(size)
        while size:
            piece = self._fill()
            if not piece:
                return False
            if len(piece) > size:
                self._buffer, self._at = piece, size
            size -= min(size, len(piece))
        return True

    def _fill(self) -> bytes:
        """The next piece, b"" at the end. Never more than a piece, however well it was compressed."""
        if self._pieces is not None:
            piece = self._pieces.next()
        else:
            ahead = self._ahead
            if ahead < RAW:
                self._ahead = 4 * ahead
            piece = self._input.read(ahead)
        self._end += len(piece)
        return piece

    def drain(self) -> None:
        """Reads all that is left, so that the digests are complete: they are of all raw bytes, padding behind
        a compressed stream included, and of all that they gave."""
        while self._fill():
            pass
        self._buffer, self._at = b"", 0
        while self._input.read():
            pass
        self._drained = True

    def raw_digest(self) -> Digest:
        """Of the bytes as they were read; only after `drain`."""
        assert self._drained and self._input.hash is not None
        return Digest("sha256:" + self._input.hash.hexdigest())

    def diff_id(self) -> DiffId:
        """Of the decompressed bytes; only after `drain`."""
        assert self._drained and self._pieces is not None
        self._pieces.wait()
        digest = self._input.hash if self._decoder is None else self._pieces.hash
        assert digest is not None
        return DiffId("sha256:" + digest.hexdigest())


class _Pieces:
    """Pieces of a tar, made and hashed in threads a few ahead of who reads them."""

    def __init__(self, raw: RawInput, decoder: Decoder | None, *, hashed: bool) -> None:
        self._raw = raw
        self._decoder = decoder
        self._expansion = Expansion()
        self._reader = _threads(1, "read")
        self._hasher = _threads(1, "hash")
        #: of the decompressed bytes; without a decoder they are the raw ones
        self.hash = hashlib.sha256() if hashed and decoder is not None else None
        self._hashing: Future[None] | None = None
        self._ahead: deque[Future[bytes]] = deque()
        self._failure: BaseException | None = None

    def next(self) -> bytes:
        """b"" at the end. What is wrong with the stream is raised again at every call after it."""
        while len(self._ahead) < _AHEAD:
            self._ahead.append(self._reader.submit(self._make))
        return self._ahead.popleft().result()

    def _make(self) -> bytes:
        if self._failure is not None:
            raise self._failure
        try:
            return self._make_next()
        except BaseException as failure:
            self._failure = failure
            raise

    def _make_next(self) -> bytes:
        if self._decoder is None:
            return self._raw.read(PIECE)
        piece = self._decoder.read()
        self._expansion.add(piece, self._raw.taken)
        if self.hash is not None:
            self.wait()
            self._hashing = self._hasher.submit(self.hash.update, piece)
        return piece

    def wait(self) -> None:
        """Until all that was made is hashed."""
        if self._hashing is not None:
            self._hashing.result()

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._hasher.shutdown(cancel_futures=True)


def _threads(count: int, what: str) -> ThreadPoolExecutor:
    # Takes longer to import than all else here, and who only looks at an image starts no thread.
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(count, thread_name_prefix=f"layerfs-{what}")
