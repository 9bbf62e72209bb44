"""Opening a file of the upper whatever its mode says by now.

Whoever has a file open may read and write it though its mode was changed since. Where no descriptor is kept
for him (`vfs.unasked`) this process must be able to open the file again. Root can. An ordinary user can as
the file's owner, who may change its mode: for a moment, in which nobody sees it through the mount, as nothing
else is answered. A crash in that moment leaves the owner's bits for reading and writing set.
"""

from __future__ import annotations

import os
import stat

from layerfs.fdutil import OwnedFd, fd_path
from layerfs.vfs.node import File
from layerfs.vfs.tree import Tree

_OWNERS = stat.S_IRUSR | stat.S_IWUSR


def open_upper(tree: Tree, node: File, flags: int) -> OwnedFd:
    """Opens a regular file that is in the upper. Raises OSError."""
    fd, name = tree.where(node)
    try:
        return tree.open_real(fd, name, flags)
    except PermissionError:
        target = tree.object_path(fd, name)
        st = os.fstat(target.fd)
        # A setgid bit of a group that is not ours would not survive it.
        if st.st_uid != os.geteuid() or st.st_mode & stat.S_ISGID:
            raise
    return _as_owner(tree, node, target, flags)


def _as_owner(tree: Tree, node: File, target: OwnedFd, flags: int) -> OwnedFd:
    path = fd_path(target.fd)
    ctime, mode = tree.shown_ctime(node), stat.S_IMODE(os.fstat(target.fd).st_mode)
    os.chmod(path, mode | _OWNERS)
    try:
        return OwnedFd(os.open(path, flags | os.O_CLOEXEC))
    finally:
        os.chmod(path, mode)
        tree.keep_ctime(node, ctime)
