"""The origin xattr: file handle of the lower object that an upper object was copied from.

Source: fs/overlayfs/overlayfs.h `struct ovl_fb` (packed, as stored in the xattr):

    offset  size  field
    0       1     version, 0
    1       1     magic, 0xfb
    2       1     length of the whole, header included
    3       1     flags: bit 0 big-endian, bit 1 any endian, bit 2 the object is an upper (used in the index)
    4       1     handle type, as name_to_handle_at(2) gives it
    5       16    UUID of the file system
    21      -     handle
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import Final

_VERSION: Final = 0
_MAGIC: Final = 0xFB
_HEADER: Final = struct.Struct("=BBBBB16s")
_FLAG_BIG_ENDIAN: Final = 1
_FLAG_ANY_ENDIAN: Final = 2
_FLAGS_HERE: Final = _FLAG_BIG_ENDIAN if sys.byteorder == "big" else 0

# Handle types whose first words are the inode number (include/linux/exportfs.h).
_INO32: Final = (1, 2)  # FILEID_INO32_GEN, …_PARENT: ino32, generation (ext4)
_INO64: Final = (0x81, 0x82)  # xfs: ino64, generation
_BTRFS: Final = (0x4D, 0x4E, 0x4F)  # objectid64, root64, generation


@dataclass(frozen=True, slots=True)
class Origin:
    uuid: bytes
    handle_type: int
    handle: bytes


def encode(origin: Origin) -> bytes | None:
    """The xattr's value, or None when the handle is too long or of a type that cannot be stored."""
    length = _HEADER.size + len(origin.handle)
    if length > 255 or not 0 <= origin.handle_type <= 255:
        return None
    return (
        _HEADER.pack(_VERSION, _MAGIC, length, _FLAGS_HERE, origin.handle_type, origin.uuid) + origin.handle
    )


def decode(value: bytes) -> Origin | None:
    """The origin, or None for a value that is empty (the kernel's "unknown"), malformed, or of another byte
    order. Never raises.
    """
    if len(value) < _HEADER.size:
        return None
    version, magic, length, flags, handle_type, uuid = _HEADER.unpack_from(value)
    if version != _VERSION or magic != _MAGIC or length != len(value):
        return None
    if not flags & _FLAG_ANY_ENDIAN and flags & _FLAG_BIG_ENDIAN != _FLAGS_HERE:
        return None
    return Origin(uuid, handle_type, value[_HEADER.size :])


def real_ino(origin: Origin) -> int | None:
    """The inode number inside the handle, read and not opened (DESIGN: origin handles of lowers are not
    opened); None where unknown.
    """
    handle = origin.handle
    if origin.handle_type == 1 and len(handle) == 12:
        # tmpfs (mm/shmem.c shmem_encode_fh): generation, then the two halves of the inode number
        _, low, high = struct.unpack("=III", handle)
        return int(high << 32 | low)
    if origin.handle_type in _INO32 and len(handle) >= 8:
        return int(struct.unpack_from("=I", handle)[0])
    if origin.handle_type in (*_INO64, *_BTRFS) and len(handle) >= 8:
        return int(struct.unpack_from("=Q", handle)[0])
    return None
