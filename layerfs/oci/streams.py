"""Byte streams of layers: a tar on its way out (hashed, compressed, hashed again, written) and on its way in
(read, hashed, decompressed, hashed again). Knows nothing of tar, and leaves formats to `compression` and
`decompression`.

The work is spread over threads, all of which run without the interpreter's lock while they hash, compress,
read and write. A stream has a fixed number of buffers, so memory is flat whatever the size of a layer.
Threads end with the stream: use both classes in a `with`, or close them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import stat
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from layerfs.ids import DiffId, Digest
from layerfs.oci.compression import BLOCK_SIZE, COMPRESSIONS, MEDIA_TYPES, check_level, make_encoder
from layerfs.oci.decompression import MAGIC, PIECE, RAW, Decoder, Expansion, make_decoder

__all__ = ["COMPRESSIONS", "MEDIA_TYPES", "LayerSink", "LayerSource", "Written", "check_level"]

#: Blocks in work beyond those being compressed: one being filled, one being hashed, one being written.
_MORE_BUFFERS = 3
#: Pieces that are decompressed before somebody asks for them.
_AHEAD = 3
#: Milliseconds after which a thread that waits for a pipe looks whether its stream was closed.
_PATIENCE = 200


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


class LayerSink:
    """Where a layer's tar goes: hashed, compressed, hashed again and written to a descriptor, in one pass.

    The caller fills one block while others are hashed, compressed and written behind it. What goes wrong
    there (ENOSPC, EPIPE, EIO) is raised as the OSError it was by a later `write`, `copy_from` or `finish`.
    `close` (or leaving the `with`) drops what is not written and waits for the threads; `fd` stays open and
    is not synced."""

    def __init__(self, fd: int, compression: str = "none", level: int | None = None) -> None:
        self._encoder = make_encoder(compression, level)
        self._output = _Output(fd, hashed=compression != "none")
        self._compression = compression
        self._tar_hash = hashlib.sha256()
        self._tar_size = 0
        self._hasher = _threads(1, "hash")
        self._encoders = _threads(self._encoder.threads, "compress")
        self._writer = _threads(1, "write")
        free = [
            _Block(memoryview(bytearray(BLOCK_SIZE))) for _ in range(self._encoder.threads + _MORE_BUFFERS)
        ]
        #: The least recently used one first. All but `_block` may be busy.
        self._blocks = deque(free)
        self._block = self._blocks.popleft()
        self._used = 0

    def __enter__(self) -> LayerSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        size = len(data)
        end = self._used + size
        if end < BLOCK_SIZE:
            self._block.buffer[self._used : end] = data
            self._used = end
            return
        rest = memoryview(data)
        while rest:
            piece = rest[: BLOCK_SIZE - self._used]
            self._block.buffer[self._used : self._used + len(piece)] = piece
            self._filled(len(piece))
            rest = rest[len(piece) :]

    def copy_from(self, fd: int, size: int) -> int:
        """Appends the first `size` bytes of an open file; returns how many there were. Raises OSError as read
        does."""
        done = 0
        while done < size:
            room = self._block.buffer[self._used : self._used + size - done]
            count = os.preadv(fd, [room], done)
            if not count:
                break
            self._filled(count)
            done += count
        return done

    def _filled(self, count: int) -> None:
        self._used += count
        if self._used == BLOCK_SIZE:
            self._pass_on()

    def _pass_on(self) -> None:
        """Gives the block to the threads, and waits for the next free one."""
        block, data = self._block, self._block.buffer[: self._used]
        self._tar_size += self._used
        hashed = self._hasher.submit(self._sum, data)
        encoded = self._encoders.submit(self._encoder.job(data))
        block.busy = [hashed, encoded, self._writer.submit(self._output.write_result, encoded)]
        self._blocks.append(block)
        self._block, self._used = self._blocks.popleft(), 0
        self._block.wait()

    def _sum(self, data: memoryview) -> None:
        self._tar_hash.update(data)
        self._encoder.sum(data)

    def finish(self) -> Written:
        """Writes what is left, ends the threads and says what it was."""
        if self._used:
            self._pass_on()
        for block in self._blocks:
            block.wait()
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


class _Output:
    """Writes a blob to a descriptor of its own, so that a thread that is late never meets a number that was
    closed and given to another file."""

    def __init__(self, fd: int, *, hashed: bool) -> None:
        self._fd = os.dup(fd)
        self._nowait = not stat.S_ISREG(os.fstat(fd).st_mode)
        self.hash = hashlib.sha256() if hashed else None
        self.size = 0
        self.closed = False

    def write_result(self, encoded: Future[bytes | memoryview]) -> None:
        self.write(encoded.result())

    def write(self, data: bytes | memoryview) -> None:
        if self.hash is not None:
            self.hash.update(data)
        self.size += len(data)
        view = memoryview(data)
        while view and not self.closed:
            view = view[self._write_some(view) :]

    def _write_some(self, view: memoryview) -> int:
        """Does not block for long: a write to a pipe that nobody reads could not be called off."""
        try:
            if self._nowait:
                return os.pwritev(self._fd, [view], -1, os.RWF_NOWAIT)
            return os.write(self._fd, view)
        except BlockingIOError:
            _ready(self._fd, select.POLLOUT)
        except OSError as error:
            if not self._nowait or error.errno not in (errno.EOPNOTSUPP, errno.ESPIPE, errno.EINVAL):
                raise
            self._nowait = False
        return 0

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class LayerSource:
    """A layer tarball opened for reading, decompressed as its first bytes say (its name says nothing).

    Reads `fd` from its current position, at most `size` raw bytes when that is given. With `digests`
    everything read is hashed on the way. Raises TarError where the compressed stream is broken, cut or goes
    beyond the limits of `decompression`, OSError as read does."""

    def __init__(self, fd: int, *, size: int | None = None, digests: bool = False) -> None:
        self._input = _Input(fd, size, hashed=digests)
        try:
            self._decoder = make_decoder(self._input.head(), self._input.read)
        except BaseException:
            self._input.close()
            raise
        self._digests = digests
        self._pieces: _Pieces | None = None
        if self._decoder is not None or digests:
            self._pieces = _Pieces(self._input, self._decoder, hashed=digests)
        self._buffer = b""
        self._at = 0
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
        return self._pieces.next() if self._pieces is not None else self._input.read()

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


class _Input:
    """Raw bytes of a descriptor, from its position on, at most `limit`. Reads through a descriptor of its
    own, which is not given to another file while a thread still reads."""

    def __init__(self, fd: int, limit: int | None, *, hashed: bool) -> None:
        self._fd = os.dup(fd)
        st = os.fstat(fd)
        self.seekable = stat.S_ISREG(st.st_mode)
        self._file_size = st.st_size
        self._left = limit
        self._head = b""
        self.hash = hashlib.sha256() if hashed else None
        self.taken = 0
        self.closed = False

    def head(self) -> bytes:
        """The first bytes, which `read` gives again."""
        while len(self._head) < MAGIC and (more := self._read(RAW)):
            self._head += more
        return self._head

    def read(self, size: int = RAW) -> bytes:
        """The next raw bytes, about `size` of them; b"" at the end."""
        data, self._head = self._head or self._read(size), b""
        self.taken += len(data)
        if self.hash is not None:
            self.hash.update(data)
        return data

    def _read(self, size: int) -> bytes:
        if self._left is not None:
            size = min(size, self._left)
        data = b""
        if size and (self.seekable or self._wait()):
            data = os.read(self._fd, size)
        if self._left is not None:
            self._left -= len(data)
        return data

    def _wait(self) -> bool:
        """Until there is something to read; False when nobody wants it any more."""
        while not self.closed:
            if _ready(self._fd, select.POLLIN):
                return True
        return False

    def skip(self, size: int) -> bool:
        """Passes over `size` bytes of a regular file; False when there are fewer."""
        here = min(size, len(self._head))
        self._head = self._head[here:]
        rest = size - here
        if self._left is not None:
            if rest > self._left:
                return False
            self._left -= rest
        self.taken += size
        return not rest or os.lseek(self._fd, rest, os.SEEK_CUR) <= self._file_size

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _Pieces:
    """Pieces of a tar, made and hashed in threads a few ahead of who reads them."""

    def __init__(self, raw: _Input, decoder: Decoder | None, *, hashed: bool) -> None:
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
    return ThreadPoolExecutor(count, thread_name_prefix=f"layerfs-{what}")


def _ready(fd: int, events: int) -> bool:
    """Whether a pipe or the like can be read or written, after waiting a moment for it."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(_PATIENCE))
