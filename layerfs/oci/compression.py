"""Compressing layers: what `--compression` and `--level` take, and an encoder for each. Hashes nothing,
writes nothing, starts no thread of its own (libzstd does).

The same tar gives the same bytes whatever the number of CPUs: gzip is made of blocks of a fixed size that do
not wait for each other (each begins with the 32 KiB before it as its dictionary, as pigz does), and libzstd's
workers cut the input by the level alone. Bytes may change with the version of a library; ISA-L's also between
families of processors (https://github.com/intel/isa-l/issues/140 and its dispatchers).

The libraries are imported when they are used: who mounts does not pay for them.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from typing import Protocol

from layerfs.errors import UsageError

#: What `--compression` takes, with the media type that an image manifest gives such a layer (image-spec
#: media-types.md).
MEDIA_TYPES = {
    "none": "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}
COMPRESSIONS = tuple(MEDIA_TYPES)
#: What `--level` takes. gzip: 1 to 3 are ISA-L's (300 to 600 MB/s a core, about as small as zlib's 1), 4 to 9
#: zlib's (20 to 100 MB/s a core, up to a tenth smaller). zstd: without the levels that `zstd` calls ultra,
#: which make every reader hold a window of 32 MiB and more.
LEVELS = {"gzip": range(1, 10), "zstd": range(1, 20)}
DEFAULT_LEVELS = {"gzip": 3, "zstd": 3}
_FIRST_OF_ZLIB = 4

#: Bytes of tar that are compressed at a time. Part of the format of our gzip layers: another number, other
#: bytes.
BLOCK_SIZE = 1 << 20
_WINDOW = 32 << 10
#: ID1 ID2 CM=deflate FLG=0 MTIME=0 XFL=0 OS=255 (unknown): RFC 1952, 2.3.
_GZIP_HEADER = bytes((0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255))
#: The last block of a deflate stream, empty, with fixed codes: RFC 1951, 3.2.6.
_LAST_BLOCK = b"\x03\x00"


def check_level(compression: str, level: int | None) -> None:
    """Raises UsageError for a level that `compression` does not have; None is always right."""
    if level is None:
        return
    levels = LEVELS.get(compression)
    if levels is None:
        raise UsageError(f"compression {compression!r} has no levels: leave the level out")
    if level not in levels:
        raise UsageError(f"{compression} has levels {levels[0]} to {levels[-1]}, not {level}")


class Encoder(Protocol):
    """Makes pieces of a blob of the blocks of a tar. All blocks but the last have BLOCK_SIZE bytes."""

    #: How many jobs may run at once; with 1 they must run in order.
    threads: int

    def job(self, block: memoryview) -> Callable[[], bytes]:
        """The work for the next block, for any thread; called in the order of the blocks. The block must stay
        as it is until the work is done."""
        ...

    def sum(self, block: memoryview) -> None:
        """Called for each block in order, all from one thread."""
        ...

    def finish(self) -> bytes:
        """The last bytes, when all jobs and sums are done."""
        ...


def make_encoder(compression: str, level: int | None = None) -> Encoder | None:
    """None for a tar that stays as it is. Raises UsageError for a level that does not exist, KeyError for a
    compression that does not."""
    check_level(compression, level)
    if compression == "none":
        return None
    encoders: dict[str, Callable[[int], Encoder]] = {"gzip": _Gzip, "zstd": _Zstd}
    return encoders[compression](DEFAULT_LEVELS[compression] if level is None else level)


class _Gzip:
    def __init__(self, level: int) -> None:
        from isal import isal_zlib

        self.threads = _cpus()
        self._level = level
        self._deflate = isal_zlib.compressobj if level < _FIRST_OF_ZLIB else zlib.compressobj
        self._crc32 = isal_zlib.crc32
        self._crc = 0
        self._size = 0
        self._before = b""
        self._header = _GZIP_HEADER

    def job(self, block: memoryview) -> Callable[[], bytes]:
        header, self._header = self._header, b""
        before, self._before = self._before, bytes(block[-_WINDOW:])

        def work() -> bytes:
            deflate = self._deflate(self._level, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=before)
            # A full byte at the end, so that the next block can be made without this one.
            return header + deflate.compress(block) + deflate.flush(zlib.Z_SYNC_FLUSH)

        return work

    def sum(self, block: memoryview) -> None:
        self._crc = self._crc32(block, self._crc)
        self._size += len(block)

    def finish(self) -> bytes:
        return self._header + _LAST_BLOCK + struct.pack("<LL", self._crc, self._size & 0xFFFFFFFF)


class _Zstd:
    threads = 1

    def __init__(self, level: int) -> None:
        import zstandard

        # With `threads=0` libzstd would not cut the input into jobs, and give other bytes than with any
        # number of workers: so it is never 0.
        compressor = zstandard.ZstdCompressor(level, threads=_cpus(), write_checksum=True)
        self._stream = compressor.compressobj()

    def job(self, block: memoryview) -> Callable[[], bytes]:
        return lambda: self._stream.compress(block)

    def sum(self, block: memoryview) -> None:
        pass

    def finish(self) -> bytes:
        return self._stream.flush()


def _cpus() -> int:
    return max(1, len(os.sched_getaffinity(0)))
