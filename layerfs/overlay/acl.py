"""POSIX ACLs in their xattr form, as far as inheritance and mapped owners need them.

Source: include/uapi/linux/posix_acl_xattr.h; POSIX.1e 23.1.2 "Object creation and default ACL";
fs/posix_acl.c posix_acl_create_masq.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

ACCESS: Final = "system.posix_acl_access"
DEFAULT: Final = "system.posix_acl_default"

_HEADER: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")
_VERSION: Final = 2
_USER_OBJ: Final = 0x01
_USER: Final = 0x02
_GROUP_OBJ: Final = 0x04
_GROUP: Final = 0x08
_MASK: Final = 0x10
_OTHER: Final = 0x20


def inherit(default: bytes, mode: int) -> tuple[int, bytes | None]:
    """What a new object gets from its directory's default ACL.

    `default` is the xattr's value, `mode` the mode asked for. Returns the mode it really gets (type and high
    bits kept) and the value of its access ACL, or None when the mode says it all. Raises ValueError when
    `default` is not an ACL."""
    entries = _entries(default)
    if entries is None:
        raise ValueError("not a POSIX ACL")
    has_mask = any(tag == _MASK for tag, _, _ in entries)
    new = mode & ~0o777
    for entry in entries:
        tag = entry[0]
        if tag == _USER_OBJ:
            entry[1] &= mode >> 6 & 7
            new |= entry[1] << 6
        elif tag == _MASK or (tag == _GROUP_OBJ and not has_mask):
            entry[1] &= mode >> 3 & 7
            new |= entry[1] << 3
        elif tag == _OTHER:
            entry[1] &= mode & 7
            new |= entry[1]
    if not has_mask and all(tag not in (_USER, _GROUP) for tag, _, _ in entries):
        return new, None
    return new, _packed(entries)


def translate(
    value: bytes, uid: Callable[[int], int | None], gid: Callable[[int], int | None]
) -> bytes | None:
    """`value` with the ids of its named users and groups put through `uid` and `gid`; None when one of these
    says None. What is no ACL comes back as it is."""
    entries = _entries(value)
    if entries is None:
        return value
    for entry in entries:
        if entry[0] in (_USER, _GROUP):
            mapped = (uid if entry[0] == _USER else gid)(entry[2])
            if mapped is None:
                return None
            entry[2] = mapped
    # Named entries stand in the order of their ids, as everything that writes ACLs has them.
    entries.sort(key=lambda entry: (entry[0], entry[2]))
    return _packed(entries)


def _entries(value: bytes) -> list[list[int]] | None:
    """Tag, permissions and id of each entry; None when this is no ACL."""
    if len(value) < _HEADER.size or _HEADER.unpack_from(value)[0] != _VERSION:
        return None
    if (len(value) - _HEADER.size) % _ENTRY.size:
        return None
    return [list(entry) for entry in _ENTRY.iter_unpack(value[_HEADER.size :])]


def _packed(entries: list[list[int]]) -> bytes:
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)
