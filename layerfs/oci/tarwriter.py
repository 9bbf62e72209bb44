"""Writes layer tarballs: POSIX pax, the same bytes for the same members. Does not choose members nor their
order (`commit` does).

Layout of a member: a pax header (typeflag x) when something does not fit, the ustar header, the data padded
to 512 bytes. The archive ends with two zero blocks and no further padding. What goes into pax records:

    path, linkpath         longer than 100 bytes, or not ASCII (raw bytes: names have no encoding here)
    size, uid, gid         beyond what the octal fields hold
    mtime                  when negative, beyond the field, or not a whole second
    SCHILY.xattr.NAME      every xattr, its value raw (the form Go's archive/tar, GNU tar and libarchive
    share)

Owners have no names, only numbers; sparse files are written plainly.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Protocol
from zlib import adler32

from layerfs.oci.member import Kind, Member, split

BLOCK = 512
XATTR_KEY = b"SCHILY.xattr."
_MAX_8 = 0o7777777
_MAX_12 = 0o77777777777
#: Parts of a header that stay empty: the owner's names; no device; the prefix of the name, and padding.
_NO_NAMES = bytes(32 + 32)
_NO_DEVICE = b"0000000\x000000000\0"
_NO_PREFIX = bytes(155 + 12)
_ZEROS = bytes(BLOCK)
_LINKS = (Kind.SYMLINK, Kind.HARDLINK)
_DEVICES = (Kind.CHAR, Kind.BLOCK)
#: For translate(): a byte that is not ASCII becomes `_`.
_ASCII = bytes(range(0x80)) + b"_" * 0x80


def xattr_keyword(name: bytes) -> bytes:
    """An xattr's name as a pax keyword, which cannot hold `=`: GNU tar's escape (`%3D`, `%25`), used only
    where a name needs it.

    Law: `xattr_name(xattr_keyword(n)) == n` for every n."""
    if b"=" not in name and xattr_name(name) == name:
        return name
    return name.replace(b"%", b"%25").replace(b"=", b"%3D")


def xattr_name(keyword: bytes) -> bytes:
    """Inverse of `xattr_keyword`."""
    return keyword.replace(b"%3D", b"=").replace(b"%25", b"%") if b"%" in keyword else keyword


def format_time(mtime_ns: int) -> bytes:
    """Decimal seconds, with as many digits after the point as needed: 1500000000 -> 1.5, -1 ->
    -0.000000001."""
    seconds, nanoseconds = divmod(abs(mtime_ns), 1_000_000_000)
    text = b"%s%d" % (b"-" if mtime_ns < 0 else b"", seconds)
    return text + (b".%09d" % nanoseconds).rstrip(b"0") if nanoseconds else text


def _record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    # The length counts its own digits: it may grow by one when adding them crosses a power of ten.
    digits = len(str(rest))
    length = rest + digits
    if length >= 10**digits:
        length += 1
    return b"%d %b=%b\n" % (length, key, value)


#: Some fields in a row and the sum of their bytes.
_Field = tuple[bytes, int]
#: Name, owner, size and time, checksum, all else; filled up with NULs.
_BLOCK = struct.Struct("100s24s24s8s356s").pack


@lru_cache(1024)
def _owner(mode: int, uid: int, gid: int) -> _Field:
    """Three fields of a header that are much the same for all members."""
    return _summed(b"%07o\0%07o\0%07o\0" % (mode, uid, gid))


@lru_cache(64)
def _tail(kind: bytes, link: bytes, devices: bytes) -> _Field:
    """All behind the checksum."""
    return _summed(b"%b%bustar\00000%b%b%b" % (kind, link.ljust(100, b"\0"), _NO_NAMES, devices, _NO_PREFIX))


def _summed(field: bytes) -> _Field:
    return field, sum(field)


def _ustar(name: bytes, owner: _Field, size: int, seconds: int, tail: _Field) -> bytes:
    """One header block; `name` is ASCII and fits, and so do the numbers."""
    numbers = b"%011o\0%011o\0" % (size, seconds)
    # The checksum is the sum of all bytes, its own field taken as blanks.
    checksum = (adler32(numbers, adler32(name)) & 0xFFFF) + owner[1] + tail[1] + (8 * 0x20 - 1)
    return _BLOCK(name, owner[0], numbers, b"%06o\0 " % checksum, tail[0])


_PAX_OWNER = _owner(0o644, 0, 0)
_PAX_TAIL = _tail(b"x", b"", _NO_DEVICE)
_PLAIN_TAIL = _tail(Kind.FILE.value, b"", _NO_DEVICE)


def _short(name: bytes, records: dict[bytes, bytes], key: bytes) -> bytes:
    """The header's form of a name; the full one goes to `records` when it does not fit."""
    if len(name) <= 100 and name.isascii():
        return name
    records[key] = name
    return name[:100].translate(_ASCII)


def _number(value: int, limit: int, records: dict[bytes, bytes], key: bytes) -> int:
    if 0 <= value <= limit:
        return value
    records[key] = b"%d" % value
    return 0


def encode_header(member: Member) -> bytes:
    """All header blocks of `member`: a pure function of it."""
    if member.kind is Kind.FILE and not member.xattrs:
        header = _encode_plain(member)
        if header is not None:
            return header
    return encode_any(member)


def _encode_plain(member: Member) -> bytes | None:
    """What `encode_any` makes of a file of which nothing but the fraction of its time needs a pax record;
    None for others. Most members are such, and this takes a third of the time (1.7 against 4.9 µs).

    Law: test_tar.py::test_the_short_way_gives_the_same."""
    name, uid, gid, size = member.name, member.uid, member.gid, member.size
    seconds, rest = divmod(member.mtime_ns, 1_000_000_000)
    if (
        len(name) > 100
        or not name.isascii()
        or not 0 <= uid <= _MAX_8
        or not 0 <= gid <= _MAX_8
        or not 0 <= size <= _MAX_12
        or not 0 <= seconds <= _MAX_12
    ):
        return None
    header = _ustar(name, _owner(member.mode & 0o7777, uid, gid), size, seconds, _PLAIN_TAIL)
    if not rest:
        return header
    time = (b"%d.%09d" % (seconds, rest)).rstrip(b"0")
    length = len(time) + 10  # with its own two digits
    pax = _ustar(b"PaxHeaders.0/" + name[name.rfind(b"/") + 1 :][:80], _PAX_OWNER, length, seconds, _PAX_TAIL)
    return b"%b%d mtime=%b\n%b%b" % (pax, length, time, _ZEROS[length:], header)


def encode_any(member: Member) -> bytes:
    """`encode_header` for every member."""
    records: dict[bytes, bytes] = {}
    kind, name = member.kind, member.name
    if kind is Kind.DIR:
        name = name + b"/" if name else b"./"
    link = _short(member.target, records, b"linkpath") if kind in _LINKS else b""
    short = _short(name, records, b"path")
    uid = _number(member.uid, _MAX_8, records, b"uid")
    gid = _number(member.gid, _MAX_8, records, b"gid")
    size = _number(member.size, _MAX_12, records, b"size") if kind is Kind.FILE else 0
    seconds, rest = divmod(member.mtime_ns, 1_000_000_000)
    if rest or not 0 <= seconds <= _MAX_12:
        records[b"mtime"] = format_time(member.mtime_ns)
        seconds = min(max(seconds, 0), _MAX_12)
    for attribute, value in member.xattrs.items():
        records[XATTR_KEY + xattr_keyword(os.fsencode(attribute))] = value
    devices = b"%07o\0%07o\0" % member.rdev if kind in _DEVICES else _NO_DEVICE
    tail = _tail(kind.value, link, devices)
    header = _ustar(short, _owner(member.mode & 0o7777, uid, gid), size, seconds, tail)
    if not records:
        return header
    body = b"".join([_record(key, value) for key, value in sorted(records.items())])
    last = split(member.name)[1] or b"root"
    pax_name = b"PaxHeaders.0/" + last[:80].translate(_ASCII)
    pax = _ustar(pax_name, _PAX_OWNER, len(body), seconds, _PAX_TAIL)
    return b"%b%b%b%b" % (pax, body, bytes(-len(body) % BLOCK), header)


class Room(Protocol):
    """Where a tar goes: `streams.LayerSink`."""

    def write(self, data: bytes) -> object:
        """Takes all of it."""

    def room(self, size: int) -> memoryview:
        """Where the next bytes of the tar belong: at least one, at most `size`."""

    def filled(self, size: int) -> object:
        """The first `size` bytes of the last `room` are there now."""


class FileData(Protocol):
    """The bytes of a file."""

    def read_into(self, target: memoryview, offset: int) -> int:
        """Puts bytes from `offset` on into `target`: their number, which is 0 only at the end of the file."""


class TarWriter:
    """Writes members to `write`, which takes all bytes it is given. Holds no more than one chunk of data at a
    time."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        #: of the last member; goes out with the next header
        self._padding = b""

    def add(self, member: Member, data: Iterable[bytes] = ()) -> None:
        """Appends one member. `data` must give exactly `member.size` bytes; AssertionError otherwise (our
        bug, not the user's)."""
        self._write(self._padding + encode_header(member))
        self._padding = b""
        if member.kind is not Kind.FILE or not member.size:
            return
        written = 0
        for chunk in data:
            written += len(chunk)
            self._write(chunk)
        assert written == member.size, (member.name, written, member.size)
        self._padding = _ZEROS[: -written % BLOCK]

    def add_file(self, member: Member, data: FileData, sink: Room) -> None:
        """Appends a file whose bytes go straight to where `sink`, which takes this tar, wants them. Raises
        EOFError when there are less than `member.size`."""
        self._write(self._padding + encode_header(member))
        size = member.size
        offset = 0
        while offset < size:
            read = data.read_into(sink.room(size - offset), offset)
            if not read:
                raise EOFError(member.name)
            sink.filled(read)
            offset += read
        self._padding = _ZEROS[: -size % BLOCK]

    def finish(self) -> None:
        self._write(self._padding + bytes(2 * BLOCK))
