"""Takes over what kernel overlayfs with index=on knows of hard links, at mount.

With index=on the kernel copies a hard-linked lower file up once, into WORK/index/HEX (the hex of the lower's
file handle, in the form of the origin xattr), and links only the names that were used into the upper; the
others it finds through the index. Linking those names into the upper says the same to everybody: to us, and
to the kernel with index on and off. Each link is one step that can be repeated, so a crash needs no journal.

Source: overlayfs.rst "Inode index"; fs/overlayfs/namei.c ovl_get_index_name_fh.
"""

from __future__ import annotations

import os
import stat

from layerfs.fdutil import OwnedFd, at_path
from layerfs.overlay import origin
from layerfs.stack import LowerDir
from layerfs.upper.copyup import restore_times
from layerfs.upper.upper import Upper
from layerfs.vfs.copyup import CopyUp
from layerfs.vfs.links import LinkIndex
from layerfs.vfs.tree import Tree

#: `overlay.nlink` of an inode all of whose names are in the upper: as many as its links but the index's.
_COMPLETE = b"U-1"


async def adopt(tree: Tree, upper: Upper, copyup: CopyUp, links: LinkIndex) -> None:
    """Before the first request. Raises OSError when a name cannot be linked (ENOSPC)."""
    index = _open(upper)
    if index is None:
        return
    copies = _copies(index, upper.names.nlink)
    reals = {real for found in copies.values() if (real := origin.real_ino(found)) is not None}
    if not reals:
        return
    names: list[tuple[bytes, bytes, bytes]] = []

    def visit(path: bytes, name: bytes, home: LowerDir, real: int) -> None:
        if real in reals:
            directory = tree.stack.open(home)
            copy = upper.make_origin(directory.fd, name).hex().encode()
            if copy in copies:
                names.append((path, name, copy))

    await links.walk(visit)
    for path, name, copy in names:
        directory = await links.resolve(path)
        if directory is None:
            continue
        try:
            fd = copyup.directory(directory)
            before = os.fstat(fd.fd)
            copyup.mark_impure(directory)
            os.link(copy, name, src_dir_fd=index.fd, dst_dir_fd=fd.fd, follow_symlinks=False)
            restore_times(fd, before)
            if directory.merged is not None:
                entry = directory.merged.names[name]
                entry.home, entry.node = None, None
                tree.gate.retract_name(directory.id, name)
                entry.real = os.stat(name, dir_fd=fd.fd, follow_symlinks=False).st_ino
        finally:
            links.unpin([(directory, name)])
    for copy in copies:
        # Now every name in the tree is a link of the upper inode, and the index has one more
        # (fs/overlayfs/util.c ovl_get_nlink).
        os.setxattr(at_path(index.fd, copy), upper.names.nlink, _COMPLETE, follow_symlinks=False)


def _open(upper: Upper) -> OwnedFd | None:
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return OwnedFd(os.open(b"index", flags, dir_fd=upper.work.base.fd))
    except OSError:
        return None


def _copies(index: OwnedFd, nlink: str) -> dict[bytes, origin.Origin]:
    """Names in the index that are copies of non-directories and lack names. Whiteouts (of files that are
    gone) and directories are none; one whose count says that all names are linked needs nothing.
    """
    copies: dict[bytes, origin.Origin] = {}
    for item in os.listdir(index.fd):
        try:
            found = origin.decode(bytes.fromhex(item))
        except ValueError:
            continue
        st = os.stat(item, dir_fd=index.fd, follow_symlinks=False)
        if found is None or stat.S_ISDIR(st.st_mode) or (stat.S_ISCHR(st.st_mode) and st.st_rdev == 0):
            continue
        name = os.fsencode(item)
        try:
            complete = os.getxattr(at_path(index.fd, name), nlink, follow_symlinks=False) == _COMPLETE
        except OSError:
            complete = False
        if not complete:
            copies[name] = found
    return copies
