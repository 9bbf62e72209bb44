"""Reads layer tarballs, which are hostile until proved otherwise: yields checked `Member`s and their data.
Writes nothing anywhere.

Understands ustar, pax, GNU long names, base-256 numbers and old V7 headers; a global pax header is passed
over, as Go's archive/tar does. Refused with TarError: a damaged or cut archive, names that would leave the
root (`member.plain_path`), sparse and multi-volume members, numbers out of range, and headers that would have
to be held in memory beyond `MAX_HEADERS`.
"""

from __future__ import annotations

import os
import re
import struct
from array import array
from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol
from zlib import adler32

from layerfs.errors import TarError
from layerfs.oci.member import MAX_NAME, MAX_PATH, Kind, Member, display, plain_path
from layerfs.oci.tally import Tally
from layerfs.oci.tarwriter import BLOCK, XATTR_KEY, xattr_name

#: Bytes of extended headers for one member. The kernel lets an inode carry a list of 64 KiB of xattr names
#: and 64 KiB a value.
MAX_HEADERS = 8 << 20
#: Largest file a member may claim: the most that ext4 can hold. More is a lie that ends in a full disk.
MAX_FILE = 16 << 40
MAX_ID = 0xFFFFFFFE
#: An archive may be padded (GNU tar: to 10 KiB; tapes: more); a stream that goes on for longer than this is
#: not padding.
MAX_PADDING = 16 << 20
#: Largest value of an xattr (XATTR_SIZE_MAX).
MAX_XATTR = 64 << 10
_MAX_SECONDS = 1 << 40
#: Bytes that `Contents` may take, roughly counted: some 100,000 members.
MAX_KEPT = 32 << 20
_MEMBER_COST = 250

#: Name, mode, uid, gid, size, mtime, (checksum), type, link, magic, (version, owner's names), device, prefix.
_HEADER = struct.Struct("100s8s8s8s12s12s8x1s100s6s66x8s8s155s12x")
_ZERO = bytes(BLOCK)
_GLOBAL = "a global pax header was ignored"
_RECORD = re.compile(rb"([0-9]{1,9}) ([^=]+)=")
_TIME = re.compile(rb"(-?)([0-9]{1,13})(?:\.([0-9]*))?")
_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHAR,
    b"4": Kind.BLOCK,
    b"5": Kind.DIR,
    b"6": Kind.FIFO,
}
_POWERS: tuple[int, ...] = tuple(10**exponent for exponent in range(10))
#: Types of headers that belong to the next member, or to all.
_EXTENDED = frozenset((b"x", b"X", b"g", b"L", b"K"))
_LINKS = (Kind.SYMLINK, Kind.HARDLINK)
#: Pax records that are no xattrs; those that most members have.
_HARMLESS = frozenset((b"mtime", b"atime", b"ctime", b"path"))
_DEVICES = (Kind.CHAR, Kind.BLOCK)
_REFUSED = {
    b"S": "a GNU sparse file: write the archive without --sparse",
    b"M": "a piece of a multi-volume archive",
    b"D": "a GNU dump directory: write the archive without --incremental",
    b"N": "an old GNU long name",
    b"V": "a volume label: write the archive without --label",
}


def _text(raw: bytes) -> bytes:
    return raw.partition(b"\0")[0]


def _number(raw: bytes, what: str) -> int:
    digits = raw.rstrip(b"\0 ")
    if not digits.isdigit():
        if raw[0] & 0x80:
            # GNU base-256, big-endian; 0xff at the front: a negative number.
            value = int.from_bytes(raw, "big")
            return value - (1 << 8 * len(raw)) if raw[0] == 0xFF else value - (0x80 << 8 * (len(raw) - 1))
        digits = _text(raw).strip(b" ")
        if not digits:
            return 0
    try:
        if digits.isdigit():
            return int(digits, 8)
    except ValueError:  # an 8 or a 9
        pass
    raise TarError(f"the layer is damaged: a header's {what} is no number")


#: For the fields that are much the same for all members.
_same_number = lru_cache(1024)(_number)


def _decimal(value: bytes, key: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,20}", value):
        raise TarError(f"the layer is damaged: pax {display(key)}={display(value[:40])} is no number")
    return int(value)


#: Less than any sum can be, of signed bytes too.
_NO_SUM = -1 << 40


@lru_cache(4096)
def _told_sum(field: bytes) -> int:
    """The sum of all bytes of a header that has this in its field for the checksum, which counts as blanks;
    `_NO_SUM` when it is no number."""
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) + sum(field) - 8 * 0x20 if digits.isdigit() else _NO_SUM
    except ValueError:  # an 8 or a 9
        return _NO_SUM


def _check_sum(block: bytes) -> None:
    told = _told_sum(block[148:156])
    # Adler-32's low half is one more than the sum of the bytes, modulo 65,521: more than 512 bytes of ASCII
    # can reach, and more than 256 of any.
    if block.isascii():
        total = (adler32(block) & 0xFFFF) - 1
    else:
        total = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2
    wrong = told - total
    # Some old writers summed signed bytes.
    if wrong and wrong != -256 * sum(byte >= 0x80 for byte in block[:148] + block[156:]):
        raise TarError("the layer is damaged or no tar archive: a header's checksum is wrong")


def parse_time(value: bytes) -> int:
    """Nanoseconds of a pax time; digits beyond nine are cut off. Raises TarError. Inverse of
    `tarwriter.format_time`."""
    whole, _, fraction = value.partition(b".")
    if whole.isdigit() and fraction.isdigit() and len(whole) <= 13 and len(fraction) <= 9:  # most of them
        return int(whole) * 1_000_000_000 + int(fraction) * _POWERS[9 - len(fraction)]
    match = _TIME.fullmatch(value)
    if match is None:
        raise TarError(f"the layer is damaged: pax mtime={display(value[:40])} is no time")
    nanoseconds = int(match[2]) * 1_000_000_000 + int((match[3] or b"0")[:9].ljust(9, b"0"))
    return -nanoseconds if match[1] else nanoseconds


def parse_records(body: bytes) -> dict[bytes, bytes]:
    """Pax records (`LENGTH KEY=VALUE\\n`). A key given twice: the last one counts (POSIX). Raises
    TarError."""
    records: dict[bytes, bytes] = {}
    at, size = 0, len(body)
    while at < size:
        start = _RECORD.match(body, at)
        if start is not None:
            length, key = start.groups()
            begin, end = start.end(), at + int(length)
            if begin < end <= size and body[end - 1] == 0x0A:
                records[key] = body[begin : end - 1]
                at = end
                continue
        raise TarError("the layer is damaged: a pax header has a malformed record")
    return records


class Source(Protocol):
    """Bytes in order, as `streams.LayerSource` gives them."""

    def read(self, size: int) -> bytes: ...

    def skip(self, size: int) -> bool: ...

    @property
    def position(self) -> int: ...


class Contents:
    """What an archive holds, for who reads it a second time: its members and where their data begin.
    `complete`: all of it; else it was too much to keep, and nothing is there."""

    def __init__(self) -> None:
        self.complete = True
        self.notes: list[str] = []
        self._members: list[Member] = []
        self._positions = array("q")
        self._held = 0

    def add(self, member: Member, position: int) -> None:
        """`position`: of the source, at the member's data."""
        self._held += _MEMBER_COST + len(member.name) + len(member.target)
        if member.xattrs:
            self._held += sum(_MEMBER_COST + len(value) for value in member.xattrs.values())
        if self._held <= MAX_KEPT:
            self._members.append(member)
            self._positions.append(position)
        elif self.complete:
            self.complete = False
            self._members.clear()

    def __iter__(self) -> Iterator[tuple[Member, int]]:
        return zip(self._members, self._positions, strict=True)


class TarReader:
    """The members of one archive, in order. The data of a member is there until the next one is asked for.

    `notes` gathers what was passed over, one line each."""

    def __init__(
        self, source: Source, notes: list[str] | None = None, contents: Contents | None = None
    ) -> None:
        """`contents`: what the archive holds, if that is known; then headers are not read again."""
        self._source = source
        self._contents = contents if contents is not None and contents.complete else None
        self.notes: list[str] = notes if notes is not None else []
        self._tally = Tally()
        if self._contents is not None:
            self.notes += self._contents.notes
        self._left = 0
        self._padding = 0
        self._name = b""

    def __iter__(self) -> Iterator[Member]:
        return self._read() if self._contents is None else self._read_again(self._contents)

    def _read_again(self, contents: Contents) -> Iterator[Member]:
        for member, position in contents:
            self._left = member.size
            if member.size:
                self._name = member.name
                if not self._source.skip(position - self._source.position):
                    raise self._truncated()
            yield member

    def _read(self) -> Iterator[Member]:
        while True:
            self._pass_over()
            member = self._next()
            if member is None:
                self._finish()
                return
            self._left = member.size
            self._padding = -member.size % BLOCK
            self._name = member.name
            yield member

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of the current member's data, b"" at its end. Raises TarError when the archive
        ends before."""
        want = min(size, self._left)
        data = self._source.read(want)
        self._left -= len(data)
        if len(data) < want:
            raise self._truncated()
        return data

    def _truncated(self) -> TarError:
        where = f"in the data of {display(self._name)}" if self._name else "in a header"
        return TarError(f"the layer is truncated: it ends {where}")

    def _pass_over(self) -> None:
        rest = self._left + self._padding
        if rest and not self._source.skip(rest):
            raise self._truncated()
        self._left = self._padding = 0
        self._name = b""

    def _block(self) -> bytes:
        block = self._source.read(BLOCK)
        if not block:
            # Only the end mark tells a whole archive from one cut between two members; every writer in use
            # writes it.
            raise TarError("the layer is truncated: its end mark is missing")
        if len(block) < BLOCK:
            raise self._truncated()
        return block

    def _next(self) -> Member | None:
        records: dict[bytes, bytes] | None = None
        long_name: bytes | None = None
        long_link: bytes | None = None
        used = 0
        while True:
            block = self._block()
            if block == _ZERO:
                if records is not None or long_name is not None or long_link is not None:
                    raise TarError("the layer is damaged: an extended header is followed by no member")
                return None
            kind = block[156:157]
            _check_sum(block)
            if kind not in _EXTENDED:
                return self._member(block, records or {}, long_name, long_link)
            size = _number(block[124:136], "size")
            used += BLOCK + size
            if size < 0 or used > MAX_HEADERS:
                raise TarError(
                    f"the layer is refused: an extended header of more than {MAX_HEADERS >> 20} MiB"
                )
            padded = size + -size % BLOCK
            body = self._source.read(padded)
            if len(body) < padded:
                raise self._truncated()
            body = body[:size]
            if kind == b"g":
                if any(key != b"comment" for key in parse_records(body)) and _GLOBAL not in self.notes:
                    self.notes.append(_GLOBAL)
            elif kind in b"xX":
                if records is not None:
                    raise TarError("the layer is damaged: two pax headers for one member")
                records = parse_records(body)
            elif kind == b"L":
                long_name = _text(body)
            else:
                long_link = _text(body)

    def _member(
        self,
        block: bytes,
        records: dict[bytes, bytes],
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Member:
        name, mode, uid, gid, size, mtime, flag, link, magic, major, minor, prefix = _HEADER.unpack(block)
        name = _text(name)
        if magic == b"ustar\0" and prefix[0]:
            name = _text(prefix) + b"/" + name
        name = records.get(b"path") or long_name or name
        if flag in _REFUSED:
            raise TarError(f"member {display(name)} is {_REFUSED[flag]}")
        kind = _KINDS.get(flag)
        if kind is None:
            raise TarError(f"member {display(name)} is of a type that layers do not have ({flag!r})")
        if kind is Kind.FILE and name.endswith(b"/"):
            kind = Kind.DIR  # how V7 marked directories
        path = self._plain(name)
        if not path and kind is not Kind.DIR:
            raise TarError(f"member {display(name)}: the root of a layer is a directory")
        told = self._size(path, records, size)
        target = b""
        if kind in _LINKS:
            target = self._target(path, kind, records.get(b"linkpath") or long_link or _text(link))
        return Member(
            path,
            kind,
            _same_number(mode, "mode") & 0o7777,
            self._owner(path, records, b"uid", "uid", uid),
            self._owner(path, records, b"gid", "gid", gid),
            self._time(path, records, mtime),
            # Some writers repeat the size of what a hard link joins; no data follow.
            told if kind is Kind.FILE else 0,
            target,
            self._device(path, major, minor) if kind in _DEVICES else (0, 0),
            self._xattrs(path, records) if records else {},
        )

    def _plain(self, name: bytes, what: str = "member") -> bytes:
        path = plain_path(name, what)
        if path and name.startswith(b"/"):
            self._tally.add("its name begins with a slash, which was taken away", path)
        return path

    # --- the fields of a member, which has a name by now ---

    @staticmethod
    def _size(path: bytes, records: dict[bytes, bytes], raw: bytes) -> int:
        size = _decimal(records[b"size"], b"size") if b"size" in records else _number(raw, "size")
        if not 0 <= size <= MAX_FILE:
            raise TarError(f"member {display(path)} claims {size} bytes: more than any file may have")
        return size

    @staticmethod
    def _owner(path: bytes, records: dict[bytes, bytes], key: bytes, what: str, raw: bytes) -> int:
        owner = _decimal(records[key], key) if key in records else _same_number(raw, what)
        if not 0 <= owner <= MAX_ID:
            raise TarError(f"member {display(path)} has an owner that does not exist ({what} {owner})")
        return owner

    @staticmethod
    def _time(path: bytes, records: dict[bytes, bytes], raw: bytes) -> int:
        if b"mtime" in records:
            nanoseconds = parse_time(records[b"mtime"])
        else:
            nanoseconds = _number(raw, "mtime") * 1_000_000_000
        if abs(nanoseconds) > _MAX_SECONDS * 1_000_000_000:
            raise TarError(f"member {display(path)} has an impossible time")
        return nanoseconds

    @staticmethod
    def _device(path: bytes, raw_major: bytes, raw_minor: bytes) -> tuple[int, int]:
        major, minor = _number(raw_major, "device number"), _number(raw_minor, "device number")
        if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            raise TarError(f"member {display(path)} has an impossible device number")
        return major, minor

    def _target(self, path: bytes, kind: Kind, link: bytes) -> bytes:
        if kind is Kind.SYMLINK:
            if not link or b"\0" in link or len(link) > MAX_PATH:
                raise TarError(f"member {display(path)} is a symbolic link to nothing that can be named")
            return link
        target = self._plain(link, f"hard link {display(path)} to")
        if not target or target == path:
            raise TarError(f"member {display(path)} is a hard link to itself or to the root")
        return target

    @staticmethod
    def _xattrs(path: bytes, records: dict[bytes, bytes]) -> dict[str, bytes]:
        found = {}
        for key, value in records.items():
            if key in _HARMLESS:
                continue
            if key.startswith(XATTR_KEY):
                name = xattr_name(key[len(XATTR_KEY) :])
                if not name or b"\0" in name or len(name) > MAX_NAME or len(value) > MAX_XATTR:
                    raise TarError(f"member {display(path)} has an impossible extended attribute")
                found[os.fsdecode(name)] = value
            elif key.startswith(b"GNU.sparse."):
                raise TarError(f"member {display(path)} is {_REFUSED[b'S']}")
        return found

    def _finish(self) -> None:
        """Reads what stands behind the end mark, so that a compressed stream's own checksum is verified;
        there is nothing of use in it."""
        left = MAX_PADDING
        noted = False
        while data := self._source.read(BLOCK * 128):
            left -= len(data)
            if left < 0:
                raise TarError(f"the layer is refused: more than {MAX_PADDING >> 20} MiB behind its end mark")
            if not noted and data.strip(b"\0"):
                self.notes.append("data behind the end mark were ignored")
                noted = True
        self.notes.extend(self._tally.lines())
