"""Names of overlay xattrs: which are ours, which a user sees, and under which name a user's own is stored.

Source: Documentation/filesystems/overlayfs.rst, "Nesting overlayfs mounts"; fs/overlayfs/xattrs.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

TRUSTED: Final = "trusted.overlay."
USER: Final = "user.overlay."

#: On the root of an upper whose marks are `user.` ones: says so to whoever could set the other kind.
USER_UPPER: Final = USER + "layerfs.upper"

#: Marks of fuse-overlayfs and containers/storage: read where DESIGN says so, never shown, never set through a
#: mount.
FOREIGN: Final = ("user.fuseoverlayfs.", "security.fuseoverlayfs.", "user.containers.override_stat")
#: What is ours alone is no user's under the other prefix either (both forms, that of a user's own too).
_OURS: Final = (USER_UPPER, USER + "overlay.layerfs.upper")

#: Forms in which others mark a directory opaque; honoured in lower layers beside our own.
FOREIGN_OPAQUE: Final = ("trusted.overlay.opaque", "user.overlay.opaque", "user.fuseoverlayfs.opaque")


#: Beginnings of all names that may mean something in a merge.
MARKS: Final = (TRUSTED, USER, *FOREIGN)


class XattrNames:
    """The names under one prefix, `trusted.overlay.` or `user.overlay.` (mount option userxattr)."""

    def __init__(self, prefix: str) -> None:
        assert prefix in (TRUSTED, USER)
        self.prefix = prefix
        self.opaque = prefix + "opaque"
        self.redirect = prefix + "redirect"
        self.metacopy = prefix + "metacopy"
        self.origin = prefix + "origin"
        self.impure = prefix + "impure"
        self.nlink = prefix + "nlink"
        self.whiteout = prefix + "whiteout"
        #: layerfs's own: the inode number shown, in ASCII. The kernel hides and ignores names under its
        #: prefix that it does not know.
        self.ino = prefix + "layerfs.ino"
        #: layerfs's own: the birth time shown, in ns since 1970, in ASCII.
        self.btime = prefix + "layerfs.btime"
        #: layerfs's own, on a directory: it holds objects with such a number. `impure` says nearly the same,
        #: but the kernel takes it away again where its own rules need none (fs/overlayfs/readdir.c
        #: ovl_dir_read_impure).
        self.numbers = prefix + "layerfs.numbers"

    def shown(self, stored: str) -> str | None:
        """The name under which a user of the mount sees a stored xattr; None when it is hidden.

        Only the mount's own prefix is special, as in the kernel: under `trusted.` a `user.overlay.X` is a
        user's xattr like any other (it is no mark in this mount, so it steers nothing)."""
        if stored.startswith((self.prefix, *FOREIGN, *_OURS)):
            return shown(stored)
        return stored

    def stored(self, name: str) -> str | None:
        """Inverse of `shown`: where a user's xattr is kept; None when users may not have it."""
        if name.startswith((self.prefix, *FOREIGN, *_OURS)):
            return stored(name)
        return name

    def __repr__(self) -> str:
        return f"XattrNames({self.prefix!r})"


class LateNames(XattrNames):
    """Names whose prefix is found out when one of them is asked for. Who asks only about an object that
    carries marks (`has_marks`) has it never found out where there are none.

    Test: test_commit_work.py::test_calls_for_each_file."""

    def __init__(self, find: Callable[[], str]) -> None:
        self._find = find

    def __getattr__(self, name: str) -> Any:  # called for what is not there yet
        if name.startswith("_"):
            raise AttributeError(name)
        super().__init__(self._find())
        return getattr(self, name)

    def __repr__(self) -> str:
        return super().__repr__() if "prefix" in self.__dict__ else "LateNames()"


def has_marks(present: Iterable[str]) -> bool:
    """Whether one of these stored names may mean something in a merge."""
    return any(name.startswith(MARKS) for name in present)


def shown(stored: str) -> str | None:
    """The name under which a user sees the stored xattr; None when it is hidden.

    One level of escape is taken off: `trusted.overlay.overlay.X` is a user's `trusted.overlay.X`."""
    for prefix in (TRUSTED, USER):
        if stored.startswith(prefix):
            rest = stored[len(prefix) :]
            return prefix + rest[len("overlay.") :] if rest.startswith("overlay.") else None
    if stored.startswith(FOREIGN):
        return None
    return stored


def stored(name: str) -> str | None:
    """The name under which a user's xattr is kept on disk; None when users may not have it. Inverse of
    `shown`.
    """
    for prefix in (TRUSTED, USER):
        if name.startswith(prefix):
            return prefix + "overlay." + name[len(prefix) :]
    if name.startswith(FOREIGN):
        return None
    return name
