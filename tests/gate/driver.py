"""The C core in a process of its own, under ASan and UBSan: `driver.c`'s other side."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from layerfs.fdutil import RESOLVE_INSIDE
from tests.gate import frames as f
from tests.gate.twin import Answer, Home, Plain, Verdict

SOURCES = Path(__file__).parents[2] / "layerfs" / "gate"
CORE = ("map.c", "facts.c", "files.c", "workers.c", "answer.c", "backing.c")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1")


def compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "gcc"))


def build(to: Path, compile: str, how: tuple[str, ...] = SANITIZERS) -> Path:
    """Compiles the driver."""
    sources = [Path(__file__).with_name("driver.c"), *(SOURCES / name for name in CORE)]
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", *how, f"-I{SOURCES}"]
    done = subprocess.run(
        [compile, *flags, *map(str, sources), "-o", str(to), "-lpthread", "-ldl"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return to


@dataclass(frozen=True)
class Counts:
    names: int
    bytes: int
    known: int
    claimed: int
    open: int
    listings: int
    #: slots of the table of known objects
    slots: int
    #: bytes that the process has from malloc; 0 under ASan
    taken: int
    #: backing files that the kernel has, and nodes that are open while there is passthrough
    backings: int
    ways: int
    natively: dict[int, int]
    passed: dict[int, int]


class Driver:
    """One gate. Has `Twin`'s methods. A report of a sanitizer raises AssertionError with its text."""

    def __init__(
        self,
        program: Path,
        *,
        descriptors: int,
        xattrs: bool = True,
        carries: bool = False,
        statfs: str | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._layers = 0
        start = struct.pack("<IQBBB", descriptors, RESOLVE_INSIDE, xattrs, carries, statfs is not None)
        self._do(b"I", start + (_string(os.fsencode(statfs)) if statfs else b""))

    def _do(self, letter: bytes, operands: bytes = b"") -> bytes:
        assert self._process.stdin and self._process.stdout
        command = letter + operands
        try:
            self._process.stdin.write(struct.pack("<I", len(command)) + command)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        size = self._process.stdout.read(4)
        if len(size) < 4:
            self._broken()
        return self._process.stdout.read(struct.unpack("<I", size)[0])

    def _broken(self) -> None:
        assert self._process.stderr
        said = self._process.stderr.read().decode(errors="replace")
        raise AssertionError(f"the core ended with status {self._process.wait()}:\n{said[-6000:]}")

    def close(self) -> None:
        """Ends it: a leak is a report too."""
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._process.stdin.close()
        said = self._process.stderr.read().decode(errors="replace")
        status = self._process.wait(60)
        self._process.stdout.close()
        self._process.stderr.close()
        assert status == 0 and not said, f"the core ended with status {status}:\n{said[-6000:]}"

    # -- facts ------------------------------------------------------------------------------------

    def add_layer(self, path: str) -> None:
        self._do(b"L", _string(os.fsencode(path)))

    def publish(self, id: int, homes: list[Home], names: dict[bytes, Plain | None]) -> None:
        parts = [struct.pack("<QHI", id, len(homes), len(names))]
        parts += [struct.pack("<BQ", home.layer, home.base) + _string(home.path) for home in homes]
        for name, plain in names.items():
            home, real = (plain.home, plain.real) if plain else (0, 0)
            parts.append(struct.pack("<BHQ", _kind(plain), home, real) + _string(name))
        assert self._do(b"P", b"".join(parts)) == b"\1"

    def forget_directory(self, id: int) -> None:
        self._do(b"D", struct.pack("<Q", id))

    def retract(self, id: int, name: bytes) -> bool:
        return self._do(b"R", _named(id, name)) == b"\1"

    def vanish(self, id: int, name: bytes) -> None:
        self._do(b"v", _named(id, name))

    def adopt(self, id: int, name: bytes) -> int:
        return _number(self._do(b"A", _named(id, name)))

    def give_back(self, id: int, name: bytes, plain: Plain | None) -> None:
        self._do(b"B", _named(id, name) + bytes([_kind(plain)]))

    def tell_attributes(self, node: int, path: str) -> None:
        """Those of the object at `path`."""
        self._do(b"T", struct.pack("<Q", node) + _string(os.fsencode(path)))

    def tell_no_capability(self, node: int) -> None:
        self._do(b"Q", struct.pack("<Q", node))

    def untell(self, node: int) -> None:
        self._do(b"V", struct.pack("<Q", node))

    def lend(self, handle: int, path: str, writes: bool) -> bool:
        return self._do(b"E", struct.pack("<QB", handle, writes) + _string(os.fsencode(path))) == b"\1"

    def take_back(self, handle: int) -> None:
        self._do(b"Y", struct.pack("<Q", handle))

    def opens_without_asking(self, *, directories: bool) -> None:
        self._do(b"u", b"\1")
        self._do(b"d", bytes([directories]))

    def takes_calls(self) -> None:
        """Directories are opened and released by calls."""
        self._do(b"l")

    def open_directories(self) -> set[int]:
        """Handles that were given out so."""
        raw = self._do(b"o")
        return set(struct.unpack(f"<{len(raw) // 8}Q", raw))

    def hold_writes(self, held: bool) -> None:
        self._do(b"W", bytes([held]))

    def settle_writes(self) -> None:
        self._do(b"w")

    def init_flags(self, offered: int, wanted: int) -> None:
        """What the kernel offered, and what is asked for."""
        self._do(b"O", struct.pack("<QQ", offered, wanted))

    def pass_through(self, stack_depth: int, lowers: bool) -> None:
        """`lowers`: lower files that are opened here, too."""
        self._do(b"M", struct.pack("<IB", stack_depth, lowers))

    def open_backing(self, handle: int, node: int, allowed: bool) -> int:
        return _number(self._do(b"J", struct.pack("<QQB", handle, node, allowed)))

    def close_backing(self, handle: int, node: int) -> None:
        self._do(b"j", struct.pack("<QQ", handle, node))

    def libfuse_replies(self, opcode: int, payload: bytes) -> bytes:
        """The packet that goes out."""
        return self._do(b"Z", struct.pack("<I", opcode) + payload)

    def claim(self, node: int) -> None:
        self._do(b"C", struct.pack("<Q", node))

    def unclaim(self, node: int) -> None:
        self._do(b"U", struct.pack("<Q", node))

    def holds(self, id: int) -> bool:
        return self._do(b"H", struct.pack("<Q", id)) == b"\1"

    def known(self, node: int) -> tuple[int, int]:
        """Its lookup count, 0 when it is not known, and its directory."""
        lookups, directory = struct.unpack("<QQ", self._do(b"K", struct.pack("<Q", node)))
        return lookups, directory

    def list_names(self, handle: int, id: int, parent: int, names: list[bytes]) -> None:
        listed = b"".join(_string(name) for name in names)
        self._do(b"S", struct.pack("<QQQI", handle, id, parent, len(names)) + listed)

    def switch(self, node: int, path: str) -> int:
        return _number(self._do(b"X", struct.pack("<Q", node) + _string(os.fsencode(path))))

    def plug(self, arrive: bool) -> None:
        """Whether replies arrive from now on."""
        self._do(b"G", struct.pack("<B", not arrive))

    def counts(self) -> Counts:
        numbers = struct.unpack("<138Q", self._do(b"N"))
        natively, passed = numbers[10:74], numbers[74:]
        return Counts(*numbers[:10], _some(natively), _some(passed))

    # -- frames -----------------------------------------------------------------------------------

    def answer(self, frame: bytes, *, arrive: bool = True) -> Answer:
        """`arrive`: whether a reply can."""
        opcode = struct.unpack_from("<I", frame, 4)[0] if len(frame) >= f.IN_HEADER.size else 0
        got = memoryview(self._do(b"F", struct.pack("<B", arrive and opcode in (f.READ, f.WRITE)) + frame))
        size = _number(got[1:5])
        answer = Answer(Verdict(got[0]), bytes(got[5 : 5 + size]))
        at = 5 + size
        for _ in range(_number(got[at : at + 4])):
            size = _number(got[at + 4 : at + 8])
            answer.replies.append(bytes(got[at + 8 : at + 8 + size]))
            at += 4 + size
        answer.let_go = list(struct.unpack(f"<{_number(got[at + 4 : at + 8])}Q", got[at + 8 :]))
        return answer


def _string(text: bytes) -> bytes:
    return struct.pack("<H", len(text)) + text


def _named(id: int, name: bytes) -> bytes:
    return struct.pack("<Q", id) + _string(name)


def _kind(plain: Plain | None) -> int:
    return 0 if plain is None else 2 if plain.directory else 1


def _number(raw: bytes | memoryview) -> int:
    return int.from_bytes(raw, "little")


def _some(counts: tuple[int, ...]) -> dict[int, int]:
    return {opcode: count for opcode, count in enumerate(counts) if count}
