"""Members for tests: a strategy for any that a layer may hold, and short ways to make and read tarballs.
Asserts nothing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence

from hypothesis import strategies as st

from layerfs.oci.member import Kind, Member
from layerfs.oci.streams import LayerSink, LayerSource, Written
from layerfs.oci.tarreader import TarReader
from layerfs.oci.tarwriter import TarWriter

_name = (
    st.binary(min_size=1, max_size=20)
    .map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"0"))
    .filter(lambda name: name not in (b".", b"..") and not name.startswith(b".wh."))
)
_long = st.sampled_from([b"n" * 255, "ä".encode() * 120, b"\xff\xfe" * 100, b"new\nline = 7", b"%3D=%25"])
names = st.one_of(_name, _long)
paths = st.lists(names, min_size=1, max_size=5).map(b"/".join)
times = st.one_of(
    st.integers(-(10**18), 10**20),
    st.sampled_from([0, 1, -1, -(10**9), 10**9, 8**11 * 10**9, 8**11 * 10**9 - 1]),
)
ids = st.one_of(st.integers(0, 70000), st.sampled_from([0, 8**7 - 1, 8**7, 2**32 - 2]))
xattr_names = st.one_of(
    st.sampled_from(
        [
            "user.a",
            "user.with space",
            "security.capability",
            "system.posix_acl_access",
            "user.=",
            "user.%3D=%25",
        ]
    ),
    st.binary(min_size=1, max_size=30)
    .filter(lambda raw: b"\0" not in raw)
    .map(lambda raw: "user." + os.fsdecode(raw)),
)
xattrs = st.dictionaries(xattr_names, st.one_of(st.binary(max_size=40), st.just(b"\n17 x=y\0")), max_size=3)


@st.composite
def members(draw: st.DrawFn) -> tuple[Member, bytes]:
    """A member and its data."""
    kind = draw(st.sampled_from(list(Kind)))
    data = draw(st.binary(max_size=1200)) if kind is Kind.FILE else b""
    name = draw(paths)
    target = b""
    if kind is Kind.SYMLINK:
        target = draw(st.binary(min_size=1, max_size=300).filter(lambda raw: b"\0" not in raw))
    elif kind is Kind.HARDLINK:
        target = draw(paths.filter(lambda other: other != name))
    rdev = (0, 0)
    if kind in (Kind.CHAR, Kind.BLOCK):
        rdev = (draw(st.integers(0, 4095)), draw(st.integers(0, 2**20 - 1)))
    if kind is Kind.DIR and draw(st.integers(0, 9)) == 0:
        name = b""
    member = Member(
        name,
        kind,
        draw(st.integers(0, 0o7777)),
        draw(ids),
        draw(ids),
        draw(times),
        len(data),
        target,
        rdev,
        draw(xattrs),
    )
    return member, data


def write_to(fd: int, entries: Iterable[tuple[Member, bytes]], compression: str = "none") -> Written:
    with LayerSink(fd, compression) as sink:
        writer = TarWriter(sink.write)
        for member, data in entries:
            writer.add(member, [data])
        writer.finish()
        return sink.finish()


def tar_bytes(entries: Iterable[tuple[Member, bytes]], compression: str = "none") -> bytes:
    with tempfile.TemporaryFile() as file:
        write_to(file.fileno(), entries, compression)
        file.seek(0)
        return file.read()


def read_bytes(raw: bytes, notes: list[str] | None = None) -> list[tuple[Member, bytes]]:
    """All members of a tarball with their data, read through a file in pieces of an odd size."""
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.seek(0)
        with LayerSource(file.fileno()) as source:
            reader = TarReader(source, notes)
            found = []
            for member in reader:
                pieces = []
                while piece := reader.read(333):
                    pieces.append(piece)
                found.append((member, b"".join(pieces)))
            return found


def file(name: bytes, data: bytes = b"", **more: object) -> tuple[Member, bytes]:
    return Member(name, Kind.FILE, size=len(data), **more), data  # type: ignore[arg-type]


def directory(name: bytes, **more: object) -> tuple[Member, bytes]:
    return Member(name, Kind.DIR, **{"mode": 0o755, **more}), b""  # type: ignore[arg-type]


def link(name: bytes, target: bytes) -> tuple[Member, bytes]:
    return Member(name, Kind.SYMLINK, 0o777, target=target), b""


def hardlink(name: bytes, target: bytes) -> tuple[Member, bytes]:
    return Member(name, Kind.HARDLINK, target=target), b""


def layer_file(
    path: str | os.PathLike[str], entries: Sequence[tuple[Member, bytes]], compression: str = "none"
) -> str:
    """Writes a tarball to `path`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_to(fd, entries, compression)
    finally:
        os.close(fd)
    return os.fspath(path)
