"""Extended attributes of an object named by (directory descriptor, name), symbolic links included.

The *at() forms of these calls are younger than the kernels we support (6.13), so the way goes through
`/proc/self/fd`: the directory is reached by its descriptor, only the last component is looked up, and it is
never followed.
"""

from __future__ import annotations

import os

_PROC = b"/proc/"
_proc = _PROC


def stand_in_proc() -> None:
    """Make /proc this process's working directory, and reach it from there from now on. Raises OSError.

    pivot_root(2) changes the root directory of every process of its mount namespace whose root was the old
    one. Where a mount becomes the root, its own daemon's absolute paths would lead into that mount, and the
    daemon would wait for itself. A working directory other than the root stays what it is.
    """
    global _proc
    os.chdir(_PROC)
    _proc = b""


def proc_path(below: bytes) -> bytes:
    """The path of `below` in /proc."""
    return _proc + below


def at_path(dirfd: int, name: bytes) -> bytes:
    """A path for calls that take no directory descriptor. The last component may be a symbolic link: use
    calls that do not follow.
    """
    return b"%bself/fd/%d/%b" % (_proc, dirfd, name)


def fd_path(fd: int) -> bytes:
    """A path to exactly the object of `fd` (O_PATH ones too), whatever its name is now. Calls that follow
    links end at the object.
    """
    return b"%bself/fd/%d" % (_proc, fd)


def lgetxattr(dirfd: int, name: bytes, attribute: str) -> bytes:
    return os.getxattr(at_path(dirfd, name), attribute, follow_symlinks=False)


def lsetxattr(dirfd: int, name: bytes, attribute: str, value: bytes) -> None:
    os.setxattr(at_path(dirfd, name), attribute, value, follow_symlinks=False)
