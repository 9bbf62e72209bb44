"""How the inode number that stat shows is made.

    bits 48..61  number of the layer: 0 the upper, 1 the lowest lower, counting upwards (so a layer put on top
                 moves nobody)
    bits  0..47  inode number in that layer's own file system
    bit  62      set: the other bits are a hash (see below)
    bit  63      set: a number handed out for this mount only

So numbers are unique in the mount and the same after a remount without anything being stored; an object that
was copied up keeps the number of its lower, which is stored beside it (`overlay.layerfs.ino` or
work/layerfs/inodes).

Where that does not fit the number is a hash of the same facts: inode numbers beyond 2^48 (a layerfs mount or
a kernel overlay with xino as a layer), more than 2^14 layers, and *regions*: parts of a layer that are
another file system or btrfs subvolume, where inode numbers start anew. A region is named by the path of its
root in the layer.

A number that is taken by another live node (a hostile upper can name one lower directory twice, a hash can
collide) is replaced by one from a counter, which lasts as long as the node.

1 is the root's (the kernel fixes its node id). No object inside a tree can have it on file systems we know:
ext4 and xfs keep it, btrfs starts at 256, and on tmpfs it is the root of the file system itself.
"""

from __future__ import annotations

from typing import Final

import xxhash

from layerfs.ids import Ino, LayerNumber, RealIno

_SHIFT: Final = 48
_REAL_MASK: Final = (1 << _SHIFT) - 1
_MAX_LAYER: Final = (1 << 14) - 1
HASHED: Final = 1 << 62
TEMPORARY: Final = 1 << 63


def compose(layer: LayerNumber, real: RealIno, region: bytes = b"") -> Ino:
    """The shown number of the object `real` in `region` (empty: the layer's own file system) of a layer."""
    if layer > _MAX_LAYER or real > _REAL_MASK or real <= 1 or region:
        digest = xxhash.xxh3_64_intdigest(b"%d:%d:%b" % (layer, real, region))
        return Ino(HASHED | digest & (HASHED - 1))
    return Ino(layer << _SHIFT | real)


def base(layer: LayerNumber) -> int | None:
    """What is or-ed to a real number above 1 and below 2^48 of the layer's own file system to make the shown
    one; None: it is a hash."""
    return layer << _SHIFT if layer <= _MAX_LAYER else None


def split(ino: Ino) -> tuple[LayerNumber, RealIno] | None:
    """Layer and real number of a composed number; None for hashes, temporary numbers and the root."""
    if ino & (TEMPORARY | HASHED) or ino <= 1:
        return None
    return LayerNumber(ino >> _SHIFT), RealIno(ino & _REAL_MASK)


def storable(ino: int) -> bool:
    """Whether a number found in an upper can be one that `compose` made: anything may stand there."""
    return 1 < ino < TEMPORARY
