"""What changing a file's content takes from its mode: setuid, and setgid of an executable or of a group that
the writer is not in (write(2), inode(7); fs/attr.c setattr_should_drop_suidgid). Capabilities the backing
file system drops.
"""

from __future__ import annotations

import stat

from layerfs.fdutil import OwnedFd
from layerfs.upper.upper import Upper
from layerfs.vfs.caller import Caller
from layerfs.vfs.tree import Tree

SETID = stat.S_ISUID | stat.S_ISGID


def clear(tree: Tree, upper: Upper, fd: OwnedFd, writer: Caller, *, may_keep: bool) -> bool:
    """Takes from an open file of the upper what `writer` takes by changing its content; `may_keep`: nothing
    when the writer has CAP_FSETID (else it is known that it has not, or not known). Returns whether setuid or
    setgid is left. Raises OSError."""
    st = upper.stat(fd)
    if not st.st_mode & SETID:
        return False
    if may_keep and writer.keeps_setid():
        return True
    mode = st.st_mode & ~stat.S_ISUID
    if mode & stat.S_ISGID and (mode & stat.S_IXGRP or not writer.in_group(tree.shown_gid(st))):
        mode &= ~stat.S_ISGID
    upper.set_mode(fd, mode)
    return bool(mode & SETID)
