"""How the inode number that stat shows is made.

    bits 48..62  number of the layer: 0 the upper, 1 the lowest lower, counting upwards (so a layer put on top
    moves nobody) bits  0..47  inode number in that layer's own file system bit  62      set: a number handed
    out for this mount only (see below)

So numbers are unique in the mount and the same after a remount without anything being stored; an object that
was copied up keeps the number of its lower, which is stored beside it (`overlay.layerfs.ino` or
work/layerfs/inodes).

Numbers that do not fit (a file system with inode numbers beyond 2^48, or 2^14 layers), and numbers that are
taken by another live node (a hostile upper can name one lower directory twice), come from a counter above bit
62 and last as long as the node.

1 is the root's (the kernel fixes its node id). No object inside a tree can have it on file systems we know:
ext4 and xfs keep it, btrfs starts at 256, and on tmpfs it is the root of the file system itself.
"""

from __future__ import annotations

from typing import Final

from layerfs.ids import Ino, LayerNumber, RealIno

_SHIFT: Final = 48
_REAL_MASK: Final = (1 << _SHIFT) - 1
_MAX_LAYER: Final = (1 << 14) - 1
TEMPORARY: Final = 1 << 62


def compose(layer: LayerNumber, real: RealIno) -> Ino | None:
    """The shown number, or None when it does not fit and a temporary one is needed."""
    if layer > _MAX_LAYER or real > _REAL_MASK or real <= 1:
        return None
    return Ino(layer << _SHIFT | real)


def split(ino: Ino) -> tuple[LayerNumber, RealIno] | None:
    """Inverse of `compose`; None for temporary numbers and the root."""
    if ino & TEMPORARY or ino <= 1:
        return None
    return LayerNumber(ino >> _SHIFT), RealIno(ino & _REAL_MASK)
