"""Members by the million, packed: what a `flatten` tree knows of each object but its names. Has no rules.

Memory: 45 bytes an object, more for link targets and xattrs. In a `FlatTree`, with its name, a member takes
173 bytes (measured: CPython 3.11, names of 12 bytes, 100 in a directory).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from layerfs.errors import LayerError
from layerfs.oci.member import Kind, Member

#: Bytes that names and attributes may take, roughly counted: some fifteen million members. A few MiB of
#: compressed headers can hold as many as they like, and the alternative is that the kernel chooses a victim.
MAX_HELD = 3 << 30
#: What a name costs beside its own bytes.
NAME_COST = 120
_XATTR_COST = 200

#: Index of the kind, mode, uid, gid, seconds, nanoseconds, size or rdev, layer and offset of the data, 1 +
#: index in `_extras` for whatever has a target or xattrs.
_RECORD = struct.Struct("=BHIIqIQHQI")
_KINDS = tuple(Kind)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file's data are: number of the layer, and an offset in bytes that means something to whoever
    reads it."""

    layer: int
    offset: int


class PackedObjects:
    """Objects are numbered from 0 and stay: one that lost its last name is not worth the trouble."""

    def __init__(self, max_held: int = MAX_HELD) -> None:
        self._max_held = max_held
        self._held = 0
        self._records = bytearray()
        self._extras: list[tuple[bytes, dict[str, bytes]]] = []

    def hold(self, size: int) -> None:
        """Counts bytes that somebody keeps. Raises LayerError when it is too much."""
        self._held += size
        if self._held > self._max_held:
            limit = self._max_held >> 20
            raise LayerError(f"the layers are refused: their names and attributes take more than {limit} MiB")

    def add(self, member: Member, place: Place) -> int:
        """Keeps all of `member` but its name. Raises LayerError."""
        extra = 0
        if member.target or member.xattrs:
            self._extras.append((member.target, dict(member.xattrs)))
            extra = len(self._extras)
            self.hold(len(member.target))
            self.hold(sum(_XATTR_COST + len(value) for value in member.xattrs.values()))
        self.hold(_RECORD.size)
        number = len(self._records) // _RECORD.size
        self._records += _RECORD.pack(
            _KINDS.index(member.kind),
            member.mode,
            member.uid,
            member.gid,
            *divmod(member.mtime_ns, 1_000_000_000),
            member.size if member.kind is Kind.FILE else member.rdev[0] << 32 | member.rdev[1],
            place.layer,
            place.offset,
            extra,
        )
        return number

    def kind(self, number: int) -> Kind:
        return _KINDS[self._records[number * _RECORD.size]]

    def get(self, number: int, path: bytes) -> tuple[Member, Place | None]:
        """The object as the member `path`, and the place of its data if it has any."""
        index, mode, uid, gid, seconds, nanoseconds, size, layer, offset, extra = _RECORD.unpack_from(
            self._records, number * _RECORD.size
        )
        kind = _KINDS[index]
        target, xattrs = self._extras[extra - 1] if extra else (b"", {})
        mtime_ns = seconds * 1_000_000_000 + nanoseconds
        rdev = (0, 0)
        if kind is not Kind.FILE:
            rdev, size = (size >> 32, size & 0xFFFFFFFF), 0
        member = Member(path, kind, mode, uid, gid, mtime_ns, size, target, rdev, xattrs)
        return member, Place(layer, offset) if size else None
