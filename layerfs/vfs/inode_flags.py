"""Inode flags (chattr(1), ioctl_iflags(2)) and their younger form, struct fsxattr: those of the real object,
as kernel overlayfs shows them (fs/overlayfs/inode.c ovl_fileattr_get).

Unlike there, immutable and append-only are real flags of the upper's object, so it is the upper's file system
that enforces them; `overlay.protattr`, where the kernel's overlayfs keeps the two, is neither read nor
written.

Numbers of ioctls are those of x86, arm, riscv and s390; elsewhere nobody's flags are known.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from typing import Final

from layerfs.fdutil import OwnedFd
from layerfs.vfs.node import Directory, File, Node
from layerfs.vfs.tree import Tree, fail

_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820
#: Command -> bytes of its argument: an unsigned int, whatever its number says, or a struct fsxattr.
ASKS: Final = {_FS_IOC_GETFLAGS: 4, _FS_IOC_FSGETXATTR: 28}
SETS: Final = {_FS_IOC_SETFLAGS: 4, _FS_IOC_FSSETXATTR: 28}


#: FS_IMMUTABLE_FL and FS_APPEND_FL.
IMMUTABLE: Final = 0x10
APPEND: Final = 0x20


def get_flags(tree: Tree, node: Node, command: int) -> bytes:
    """What a command of `ASKS` gives. Raises OSError: ENOTTY where the layer's file system has no flags."""
    value = bytearray(ASKS[command])
    opened = _open(tree, node)
    fcntl.ioctl(opened.fd, command, value)
    return bytes(value)


def set_flags(tree: Tree, node: Node, command: int, value: bytes) -> None:
    """Carries out a command of `SETS` on an object of the upper. Raises OSError."""
    assert node.in_upper
    if len(value) != SETS[command]:
        fail(errno.EINVAL)
    opened = _open(tree, node)
    fcntl.ioctl(opened.fd, command, value)
    if isinstance(node, File):
        now = bytearray(ASKS[_FS_IOC_GETFLAGS])
        fcntl.ioctl(opened.fd, _FS_IOC_GETFLAGS, now)
        node.guarded = int.from_bytes(now, sys.byteorder) & (IMMUTABLE | APPEND)


def _open(tree: Tree, node: Node) -> OwnedFd:
    fd, name = tree.where(node)
    if isinstance(node, File):
        return tree.open_real(fd, name, os.O_RDONLY)
    assert isinstance(node, Directory)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return OwnedFd(os.open(name or b".", flags, dir_fd=fd.fd))
