"""Layer streams against other programs' gzip and zstd, against hostile bytes, and when writing fails."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import FrameType

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfs.errors import TarError, UsageError
from layerfs.oci import compression as compressing
from layerfs.oci import decompression
from layerfs.oci.streams import COMPRESSIONS, MEDIA_TYPES, LayerSink, LayerSource, Written, check_level

_SKIPPABLE = b"\x5f\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
needs_zstd = pytest.mark.skipif(not shutil.which("zstd"), reason="needs the zstd program")


def text(size: int, seed: int = 0) -> bytes:
    """Something like source code: it compresses, and is not the same all over."""
    choose = random.Random(seed)
    words = [bytes(choose.choices(b"abcdefghijklmnop_", k=choose.randint(2, 9))) for _ in range(400)]
    line = b" ".join(choose.choices(words, k=max(1, size // 5)))
    return line[:size].ljust(size, b".")


def write(
    data: bytes, compression: str, level: int | None = None, step: int = 70_000
) -> tuple[bytes, Written]:
    with tempfile.TemporaryFile() as file:
        with LayerSink(file.fileno(), compression, level) as sink:
            for at in range(0, len(data), step):
                sink.write(data[at : at + step])
            written = sink.finish()
        file.seek(0)
        return file.read(), written


@contextlib.contextmanager
def source(blob: bytes, *, size: int | None = None, digests: bool = False) -> Iterator[LayerSource]:
    with tempfile.TemporaryFile() as file:
        file.write(blob)
        file.seek(0)
        with LayerSource(file.fileno(), size=size, digests=digests) as opened:
            yield opened


def read(blob: bytes, step: int = 100_000) -> bytes:
    with source(blob) as opened:
        return b"".join(iter(lambda: opened.read(step), b""))


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def others_decode(blob: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.decompress(blob)
    if compression == "zstd":
        with zstandard.ZstdDecompressor().stream_reader(blob) as reader:
            return reader.read()
    return blob


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("layerfs")] == []


# --- writing ---


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(st.binary(max_size=3000), st.integers(0, 3 << 20).map(text)),
    st.sampled_from(COMPRESSIONS),
    st.sampled_from([1, 511, 512, 70_000, 1 << 20, 5 << 20]),
)
def test_read_gives_what_was_written(data: bytes, compression: str, step: int) -> None:
    data = data[: step * 5000]
    blob, written = write(data, compression, step=step)
    assert others_decode(blob, compression) == data
    assert written == Written(digest(data), digest(blob), len(data), len(blob), MEDIA_TYPES[compression])  # type: ignore[arg-type]
    with source(blob, digests=True) as opened:
        assert opened.compression == (compression if data or compression != "none" else "none")
        assert b"".join(iter(lambda: opened.read(step), b"")) == data
        opened.drain()
        assert (opened.raw_digest(), opened.diff_id(), opened.raw_size) == (
            written.digest,
            written.diff_id,
            written.size,
        )


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_bytes_do_not_depend_on_cpus_or_on_how_they_came(
    compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = text(9 << 20)
    blobs = set()
    for cpus, step in ((1, 1000), (2, 70_000), (5, 3 << 20)):
        monkeypatch.setattr(compressing, "_cpus", lambda cpus=cpus: cpus)
        blobs.add(write(data, compression, step=step)[0])
    assert len(blobs) == 1


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_every_level_is_read_by_others(compression: str) -> None:
    data = text(200_000) + text(50_000, seed=1)
    sizes = {}
    for level in compressing.LEVELS[compression]:
        blob, _ = write(data, compression, level)
        assert others_decode(blob, compression) == data
        sizes[level] = len(blob)
    assert sizes[max(sizes)] < sizes[min(sizes)]
    assert write(data, compression)[0] == write(data, compression, compressing.DEFAULT_LEVELS[compression])[0]


def test_levels_are_checked() -> None:
    for compression, level in (
        ("gzip", 0),
        ("gzip", 10),
        ("zstd", 0),
        ("zstd", 20),
        ("zstd", -5),
        ("none", 1),
    ):
        with pytest.raises(UsageError) as caught:
            check_level(compression, level)
        assert "level" in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(UsageError):
            LayerSink(1, compression, level)
    for compression in COMPRESSIONS:
        check_level(compression, None)


def test_gzip_header_tells_nothing() -> None:
    """No name, no time, no system (RFC 1952, 2.3), whatever the level."""
    for level in compressing.LEVELS["gzip"]:
        for data in (b"", b"x"):
            assert write(data, "gzip", level)[0][:10] == bytes((0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255))


def test_zstd_frame_has_a_checksum_and_a_small_window() -> None:
    for level in compressing.LEVELS["zstd"]:
        frame = zstandard.get_frame_parameters(write(text(100), "zstd", level)[0])
        assert frame.has_checksum
        assert frame.window_size <= 8 << 20, (
            "more than every reader is asked to support (RFC 8878, 3.1.1.1.2)"
        )


_MEASURED = """
import os, resource, sys
from layerfs.oci.streams import LayerSink
block = os.urandom(1 << 15) * 8
sink = LayerSink(os.open("/dev/null", os.O_WRONLY), sys.argv[1])
for size in (32, int(sys.argv[2])):
    for _ in range(size << 2):
        sink.write(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(sink.finish().tar_size)
"""


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_memory_is_flat_while_writing(compression: str) -> None:
    """32 MiB fill all buffers and the compressor's own; 480 more may not need more."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, compression, "480"], capture_output=True, text=True, check=True
    )
    before, after, size = map(int, done.stdout.split())
    assert size == 512 << 20
    assert after - before < 24 << 10  # KiB


_MEASURED_READING = """
import os, resource, sys
from layerfs.oci.streams import LayerSource
with LayerSource(os.open(sys.argv[1], os.O_RDONLY), digests=True) as source:
    read = 0
    while piece := source.read(200_000):
        read += len(piece)
        if 40 << 20 < read < (40 << 20) + 200_001:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(read)
"""


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_memory_is_flat_while_reading(compression: str, tmp_path: Path) -> None:
    block = os.urandom(1 << 15) * 8
    fd = os.open(tmp_path / "layer", os.O_WRONLY | os.O_CREAT)
    with LayerSink(fd, compression, 1 if compression != "none" else None) as sink:
        for _ in range(300 << 2):
            sink.write(block)
        sink.finish()
    os.close(fd)
    command = [sys.executable, "-c", _MEASURED_READING, str(tmp_path / "layer")]
    before, after, size = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    (tmp_path / "layer").unlink()
    assert size == 300 << 20
    assert after - before < 16 << 10  # KiB


# --- when it goes wrong ---


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("size", [100, 40 << 20])
def test_a_full_disk_is_the_error_it_is(compression: str, size: int) -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    noise = os.urandom(1 << 20)
    try:
        with pytest.raises(OSError) as caught, LayerSink(fd, compression) as sink:
            for at in range(0, size, len(noise)):
                sink.write(noise[: size - at])
            sink.finish()
    finally:
        os.close(fd)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_reader_that_leaves_is_epipe(compression: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with pytest.raises(BrokenPipeError), LayerSink(write_end, compression) as sink:
        sink.write(os.urandom(3 << 20))
        sink.finish()
    os.close(write_end)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_an_interrupt_ends_it_though_nobody_reads(compression: str) -> None:
    """The caller waits for a block, the writing thread for a pipe that is full."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    read_end, write_end = os.pipe()
    before = signal.signal(signal.SIGALRM, interrupt)
    noise = os.urandom(1 << 20)
    try:
        with pytest.raises(KeyboardInterrupt), LayerSink(write_end, compression) as sink:
            signal.setitimer(signal.ITIMER_REAL, 1)
            while True:
                sink.write(noise)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(read_end)
        os.close(write_end)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_slow_reader_of_a_pipe_gets_everything(compression: str) -> None:
    data = text(4 << 20)
    read_end, write_end = os.pipe()
    got: list[bytes] = []

    def reader() -> None:
        while piece := os.read(read_end, 50_000):
            got.append(piece)
            if len(got) % 8 == 1:
                time.sleep(0.01)

    thread = threading.Thread(target=reader)
    thread.start()
    with LayerSink(write_end, compression) as sink:
        sink.write(data)
        written = sink.finish()
    os.close(write_end)
    thread.join()
    os.close(read_end)
    assert digest(b"".join(got)) == written.digest
    assert others_decode(b"".join(got), compression) == data


def test_an_abandoned_sink_writes_into_no_other_file(tmp_path: Path) -> None:
    """The caller closed its descriptor, and the number went to another file, before the sink was dropped."""
    fd = os.open(tmp_path / "layer", os.O_WRONLY | os.O_CREAT)
    sink = LayerSink(fd)
    sink.write(bytes(5 << 20))
    os.close(fd)
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    assert other == fd
    sink.write(bytes(3 << 20))
    sink.close()
    os.close(other)
    assert (tmp_path / "other").read_bytes() == b""


@pytest.mark.parametrize("start", [b"", b"plain", gzip.compress(b"x" * 100)[:20]])
def test_a_source_whose_pipe_gives_nothing_can_be_closed(start: bytes) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, start.ljust(6, b"-"))
    opened = LayerSource(read_end, digests=True)

    def ask() -> None:
        with contextlib.suppress(TarError, CancelledError):
            opened.read(1 << 20)

    asked = threading.Thread(target=ask, daemon=True)
    asked.start()
    time.sleep(0.1)
    opened.close()
    os.close(read_end)
    os.close(write_end)
    asked.join(10)
    assert not asked.is_alive()


# --- reading ---


def test_gzip_members_are_joined_and_padding_is_passed_over() -> None:
    data = text(300_000)
    for padding in (b"", bytes(1), bytes(10_000), b"\x1f", b"something else"):
        blob = b"".join(gzip.compress(data[at : at + 70_000]) for at in range(0, len(data), 70_000)) + padding
        assert read(blob) == data
        with source(blob, digests=True) as opened:
            opened.read(5)
            opened.drain()
            assert (opened.raw_digest(), opened.diff_id()) == (digest(blob), digest(data))


def test_zstd_frames_are_joined_and_skippable_ones_skipped() -> None:
    data = text(500_000)
    one = zstandard.ZstdCompressor(write_content_size=True)
    other = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False)
    for frames in (
        [one.compress(data)],
        [_SKIPPABLE, one.compress(data), _SKIPPABLE],
        [one.compress(data[:9]), _SKIPPABLE, _SKIPPABLE, other.compress(data[9:])],
        [one.compress(b""), other.compress(b""), one.compress(data[:-1]), other.compress(data[-1:])],
    ):
        blob = b"".join(frames)
        assert read(blob) == data
        with source(blob, digests=True) as opened:
            opened.drain()
            assert (opened.raw_digest(), opened.diff_id()) == (digest(blob), digest(data))


@needs_zstd
@pytest.mark.parametrize(
    "options",
    [
        ["-1"],
        ["-19"],
        ["-T0"],
        ["--long=27"],
        ["--no-check"],
        ["--ultra", "-22"],
        ["--rsyncable"],
        ["--fast=5"],
    ],
)
def test_what_zstd_makes_is_read(options: list[str]) -> None:
    for data in (b"", b"x", bytes(2 << 20), text(2 << 20), os.urandom(300_000)):
        done = subprocess.run(["zstd", "-c", *options], input=data, capture_output=True, check=True)
        assert read(done.stdout) == data


def test_pieces_are_small_and_windows_too() -> None:
    """A megabyte of zstd that would be 30 GB, as fast as it can be read: no more than a piece at a time."""
    rle = bytes.fromhex("28b52ffd") + b"\x00\x58"  # frame header: a window of 2 MiB
    blocks = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"x"
    bomb = rle + blocks * 250_000
    with source(bomb) as opened:
        for _ in range(20):
            assert len(opened._fill()) <= decompression.PIECE
    assert sys.getsizeof(opened._buffer) <= decompression.PIECE + 100

    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    wide = stream.compress(b"x" * 1000) + stream.flush()
    with pytest.raises(TarError, match="too much memory"):
        read(wide)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_bombs_are_refused_and_zeros_are_not(compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompression, "FREE_EXPANSION", 8 << 20)
    bomb, _ = write(b"bomb" * (16 << 20), compression)
    with pytest.raises(TarError, match="bomb"):
        read(bomb)
    # Again and again, and by way of the digests too.
    with source(bomb, digests=True) as opened:
        for _ in range(2):
            with pytest.raises(TarError, match="bomb"):
                opened.drain()
    zeros = text(1000) + bytes(64 << 20)
    assert len(read(write(zeros, compression)[0])) == len(zeros)
    plenty = text(20 << 20)
    assert read(write(plenty, compression)[0]) == plenty


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_what_is_cut_anywhere_is_truncated(compression: str) -> None:
    blob, _ = write(text(4000), compression)
    assert len(blob) < 3000
    for cut in range(2 if compression == "gzip" else 4, len(blob)):
        with pytest.raises(TarError, match="truncated"):
            read(blob[:cut])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["gzip", "zstd"]), st.data())
def test_damage_is_never_read_as_data(compression: str, draw: st.DataObject) -> None:
    data = text(3000)
    blob = bytearray(write(data, compression)[0])
    at = draw.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= draw.draw(st.integers(1, 255))
    try:
        got = read(bytes(blob))
    except TarError as error:
        assert "\n" not in str(error)
    else:
        # A magic number that is none makes it a plain file; flags in the header may mean nothing.
        assert got in (data, bytes(blob))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("digests", [False, True])
def test_a_layer_inside_another_file(compression: str, digests: bool) -> None:
    """`size` bounds what is read: of a tar in a docker archive nothing behind it is looked at."""
    data = text(2 << 20)
    blob, written = write(data, compression)
    with tempfile.TemporaryFile() as file:
        file.write(b"before" + blob + b"\x1f\x8bbehind")
        file.seek(6)
        with LayerSource(file.fileno(), size=len(blob), digests=digests) as opened:
            assert opened.read(10) == data[:10]
            assert opened.skip(1 << 20)
            assert opened.read(1 << 30) == data[10 + (1 << 20) :]
            assert not opened.skip(1)
            opened.drain()
            assert opened.raw_size == len(blob)
            if digests:
                assert (opened.raw_digest(), opened.diff_id()) == (written.digest, written.diff_id)
        file.seek(6)
        with LayerSource(file.fileno(), size=len(blob) - 1, digests=digests) as opened:
            with contextlib.suppress(TarError):
                assert opened.read(1 << 30) == data[:-1]
            assert opened.raw_size == len(blob) - 1


@given(
    st.sampled_from(COMPRESSIONS), st.lists(st.tuples(st.booleans(), st.integers(0, 900_000)), max_size=12)
)
@settings(max_examples=30, deadline=None)
def test_skipping_and_reading_agree(compression: str, steps: list[tuple[bool, int]]) -> None:
    data = text(2_500_000)
    blob = write(data, compression)[0]
    at = 0
    with source(blob) as opened:
        for skips, size in steps:
            if skips:
                assert opened.skip(size) == (at + size <= len(data))
                if at + size > len(data):
                    return
            else:
                assert opened.read(size) == data[at : at + size]
            at = min(at + size, len(data))


def test_other_compressions_are_named() -> None:
    for blob, name in (
        (b"\xfd7zXZ\0" + bytes(50), "xz"),
        (b"BZh9" + bytes(50), "bzip2"),
        (b"PK\x03\x04" * 9, "zip"),
    ):
        with pytest.raises(TarError, match=name), source(blob):
            pass
