"""Types of numbers that must not be mixed. No behaviour."""

from __future__ import annotations

from typing import NewType

#: What the kernel calls a node by. Over pyfuse3 it equals the shown inode number (pyfuse3 has one field for
#: both).
NodeId = NewType("NodeId", int)
#: The inode number that stat shows.
Ino = NewType("Ino", int)
#: The inode number inside one layer's own file system.
RealIno = NewType("RealIno", int)
#: Number of a layer for inode numbers: 0 is the upper, 1 the lowest lower, counting upwards.
LayerNumber = NewType("LayerNumber", int)
#: Handle of an open file or directory.
HandleId = NewType("HandleId", int)
#: `sha256:HEX` of bytes as stored.
Digest = NewType("Digest", str)
#: `sha256:HEX` of an uncompressed layer tar (OCI config.md, "Layer DiffID").
DiffId = NewType("DiffId", str)

ROOT = NodeId(1)
