"""Whatever bytes the device or libfuse gives, the gate stays whole: libFuzzer over frames and replies
(`fuzz.c`), guided by coverage, under ASan and UBSan."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gate import frames as f
from tests.gate.driver import CORE, SOURCES

SECONDS = int(os.environ.get("LAYERFS_FUZZ_SECONDS", "60"))
_FLAGS = ("-std=gnu11", "-g", "-O1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
_MEMORY_MIB = 1500


def _clang() -> str | None:
    names = ["clang", *(f"clang-{version}" for version in range(25, 12, -1))]
    return next((found for name in names if (found := shutil.which(name))), None)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fuzzer's program; skips, with what the compiler said, where libFuzzer cannot be had."""
    base = tmp_path_factory.mktemp("fuzz")
    clang = _clang()
    if clang is None:
        pytest.skip("no clang here: libFuzzer is a part of it")
    empty = base / "empty.c"
    empty.write_text("int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return d && n > 9; }")
    tried = subprocess.run(
        [clang, *_FLAGS, str(empty), "-o", str(base / "empty")], capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"{clang} without libFuzzer: {tried.stderr.strip().splitlines()[-1]}")
    sources = [Path(__file__).with_name("fuzz.c"), *(SOURCES / name for name in CORE)]
    done = subprocess.run(
        [clang, *_FLAGS, f"-I{SOURCES}", *map(str, sources), "-o", str(base / "fuzz"), "-ldl", "-lpthread"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return base / "fuzz"


def _step(kind: int, data: bytes) -> bytes:
    return struct.pack("<BH", kind, len(data)) + data


def _made(opcode: int, node: int = 0, handle: int = 0, body: bytes = b"") -> bytes:
    return _step(1, bytes([opcode, node, handle]) + body)


def _seeds() -> Iterator[bytes]:
    """Requests as the kernel makes them, in an order that makes sense. Nodes are named by their position
    in the directory, so each thing is asked of all."""
    names = [b"file", b"link", b"pipe", b"asked", b"marked", b"none"]
    lookups = b"".join(_made(f.LOOKUP, 99, 0, name + b"\0") for name in names)
    looks = b"".join(
        _made(opcode, node, 0, bytes(16))
        for node in range(8)
        for opcode in (f.GETATTR, f.READLINK, f.GETXATTR, f.LISTXATTR, f.STATFS, f.OPEN, f.FORGET)
    )
    read = struct.pack("<QIIQII", 0, 4096, 0, 0, 0, 0)
    data = b"".join(_made(opcode, 0, 3, read) for opcode in (f.READ, f.LSEEK, f.FLUSH, f.FSYNC, f.RELEASE))
    listing = b"".join(
        _made(f.READDIRPLUS, 99, 1, struct.pack("<QIIQII", offset, 4096, 0, 0, 0, 0))
        for offset in (0, 1, 2, 3, (1 << 29) - 4, 1 << 29, 1 << 29 | 4, 1 << 30, 1 << 30 | 4)
    )
    init = _step(0, f.frame(f.INIT, 0, f.INIT_IN.pack(7, 38, 0, (1 << 32) - 1, (1 << 32) - 1)))
    replied = _step(2, bytes([0, 0, 0xFF]) + bytes(f.INIT_OUT.size))
    opened = _made(f.OPENDIR, 99) + _step(2, bytes([1, 0, 0xFF]) + bytes(f.OPEN_OUT.size))
    changes = b"".join(_step(3, bytes([what, which])) for what in range(9) for which in range(4))
    lent = _step(3, bytes([5, 1])) + _made(f.WRITE, 0, 2, struct.pack("<QIIQII", 0, 4, 0, 0, 0, 0) + b"data")
    lent += _made(f.READ, 0, 2, read) + _made(f.IOCTL, 0, 2, f.IOCTL_IN.pack(0, 0, 0x5401, 0, 0, 0)[8:])
    forgets = _step(0, f.batch_forget((1 << 48 | 5, 1), (1, 1)))
    for options in (0, 1, 7, 32):
        yield bytes([options]) + lookups + looks + data + lent + forgets
        yield bytes([options]) + init + replied + opened + listing + _made(f.RELEASEDIR, 99, 1)
        yield bytes([options]) + lookups + changes + lookups + looks + listing + changes


@pytest.fixture
def run(target: Path, tmp_path: Path) -> Iterator[object]:
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "file").write_text("text")
    (layer / "link").symlink_to("file")
    os.mkfifo(layer / "pipe")
    (layer / "asked").write_text("Python's")
    (layer / "marked").write_text("marked")
    os.setxattr(layer / "marked", "user.mark", b"1")
    (layer / "once").write_text("twice")
    os.link(layer / "once", layer / "twice")
    (layer / "directory").mkdir()
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(_seeds()):
        (corpus / f"seed-{number:02}").write_bytes(seed)

    def go(*options: str) -> str:
        done = subprocess.run(
            [
                target,
                *options,
                "-max_len=3000",
                f"-rss_limit_mb={_MEMORY_MIB}",
                "-timeout=20",
                "-print_final_stats=1",
                f"-artifact_prefix={tmp_path}/",
                str(corpus),
            ],
            env={**os.environ, "LAYERFS_FUZZ_DIR": str(layer)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS + 200,
        )
        broken = "".join(f"\n{path.name}: {path.read_bytes().hex()}" for path in tmp_path.glob("*-*"))
        assert done.returncode == 0, f"{done.stderr[-6000:]}{broken}"
        return done.stderr

    yield go


def test_seeds_and_their_neighbours(run) -> None:
    """The same changed seeds every time."""
    run("-seed=1", "-runs=20000")


@pytest.mark.long
def test_fuzz(run) -> None:
    """LAYERFS_FUZZ_SECONDS says for how long."""
    print(run(f"-max_total_time={SECONDS}")[-700:])
