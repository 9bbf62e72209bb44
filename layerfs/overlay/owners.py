"""Owners as a layer stores them and as a mount shows them: the options `uidmapping`, `gidmapping` and
`squash_to_*` as values, and the places where an id stands: owner, ACL, file capability. Touches no file.

Source: fuse-overlayfs(1), whose options these are; what containers/storage passes for a container with a user
namespace. A map does what an idmapped mount does where it can be had: a layer's files are left alone.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from layerfs.errors import UsageError
from layerfs.overlay import acl

#: What an id that the map does not know is shown and stored as (/proc/sys/kernel/overflowuid).
OVERFLOW = 65534
_MAX_ID = 0xFFFFFFFE

CAPABILITY = "security.capability"
#: include/uapi/linux/capability.h: struct vfs_cap_data, and vfs_ns_cap_data with the root that they are for.
_CAP_2 = struct.Struct("<I16x")
_CAP_3 = struct.Struct("<I16xI")
_REVISION_MASK = 0xFF000000
_REVISION_2 = 0x02000000
_REVISION_3 = 0x03000000


@dataclass(frozen=True, slots=True)
class IdRange:
    """`count` ids from `stored` on are shown from `shown` on."""

    stored: int
    shown: int
    count: int


@dataclass(frozen=True, slots=True)
class IdMap:
    """Without ranges an id is its own image. `squash`: every owner is shown as this id, and stored as if it
    were not given (as fuse-overlayfs does).
    """

    ranges: tuple[IdRange, ...] = ()
    squash: int | None = None

    def __bool__(self) -> bool:
        return bool(self.ranges) or self.squash is not None

    def shown(self, stored: int) -> int:
        """The owner to show."""
        return self.squash if self.squash is not None else self.mapped(stored)

    def mapped(self, stored: int) -> int:
        """`stored` by the ranges alone."""
        if not self.ranges:
            return stored
        for each in self.ranges:
            if each.stored <= stored < each.stored + each.count:
                return stored - each.stored + each.shown
        return OVERFLOW

    def stored(self, shown: int) -> int | None:
        """Inverse of `mapped`; None when nothing that is stored would be shown so."""
        if not self.ranges:
            return shown
        for each in self.ranges:
            if each.shown <= shown < each.shown + each.count:
                return shown - each.shown + each.stored
        return None


@dataclass(frozen=True, slots=True)
class Owners:
    """The maps of a mount. False when nothing is mapped."""

    uid: IdMap = field(default_factory=IdMap)
    gid: IdMap = field(default_factory=IdMap)

    def __bool__(self) -> bool:
        return bool(self.uid or self.gid)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Owners:
        """Inverse of `dataclasses.asdict`."""
        maps = (values["uid"], values["gid"])
        return Owners(*(IdMap(tuple(IdRange(**each) for each in m["ranges"]), m["squash"]) for m in maps))

    def shown_xattr(self, attribute: str, value: bytes) -> bytes:
        """The value of an xattr as the mount shows it. What is malformed is left as it is."""
        if attribute in (acl.ACCESS, acl.DEFAULT):
            return acl.translate(value, self.uid.mapped, self.gid.mapped) or value
        if attribute == CAPABILITY:
            return _capability(value, self.uid.mapped) or value
        return value

    def stored_xattr(self, attribute: str, value: bytes) -> bytes | None:
        """The value to store for one that a user sets; None when it names an id that cannot be stored."""
        if attribute in (acl.ACCESS, acl.DEFAULT):
            return acl.translate(value, self.uid.stored, self.gid.stored)
        if attribute == CAPABILITY:
            return _capability(value, self.uid.stored)
        return value


#: Nothing is mapped.
AS_STORED = Owners()


def _capability(value: bytes, root: Callable[[int], int | None]) -> bytes | None:
    """A file capability is for the namespaces of one root user: of id 0 in its short form, of any in the long
    one (security/commoncap.c). None when `root` does not know the id."""
    if len(value) == _CAP_2.size:
        (magic,), owner = _CAP_2.unpack(value), 0
    elif len(value) == _CAP_3.size:
        magic, owner = _CAP_3.unpack(value)
    else:
        return value
    if magic & _REVISION_MASK not in (_REVISION_2, _REVISION_3):
        return value
    mapped = root(owner)
    if mapped is None:
        return None
    flags, sets = magic & ~_REVISION_MASK, value[4:20]
    if mapped == 0:
        return struct.pack("<I", _REVISION_2 | flags) + sets
    return struct.pack("<I", _REVISION_3 | flags) + sets + struct.pack("<I", mapped)


def parse_ranges(option: str, value: str) -> tuple[IdRange, ...]:
    """`STORED:SHOWN:COUNT[:STORED:SHOWN:COUNT]…`, a colon in front allowed. Raises UsageError."""
    numbers = value.removeprefix(":").split(":")
    if len(numbers) % 3 or not all(re.fullmatch("[0-9]{1,10}", number) for number in numbers):
        raise UsageError(f"option {option}={value}: must be STORED:SHOWN:COUNT, once or more")
    fields = iter(map(int, numbers))
    ranges = tuple(IdRange(*each) for each in zip(fields, fields, fields, strict=True))
    for each in ranges:
        if not each.count or max(each.stored, each.shown) + each.count - 1 > _MAX_ID:
            raise UsageError(f"option {option}={value}: there are no such ids")
    return ranges


def parse_id(option: str, value: str | None) -> int:
    """Raises UsageError."""
    if value is None or not re.fullmatch("[0-9]{1,10}", value) or int(value) > _MAX_ID:
        raise UsageError(f"option {option}: must be an id")
    return int(value)
