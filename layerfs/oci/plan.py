"""What a layer would do to a directory, followed in mind: tells whether it can be applied, and changes
nothing. `apply` does it, and checks everything again."""

from __future__ import annotations

import os
import stat

from layerfs.errors import TarError
from layerfs.fdutil import OwnedFd
from layerfs.oci.beneath import behind_link, below_no_directory, open_beneath
from layerfs.oci.member import Kind, Mark, Member, classify, display, join, split
from layerfs.overlay import whiteout


def check_names(member: Member) -> tuple[Mark, bytes]:
    """What the last name of `member` stands for, and what it hides.

    Raises TarError for a member below a whiteout, and for a whiteout that is no plain file."""
    if member.name.find(whiteout.PREFIX) < 0:
        return Mark.ENTRY, b""
    directory, name = split(member.name)
    if any(part.startswith(whiteout.PREFIX) for part in directory.split(b"/")):
        raise TarError(f"member {display(member.name)} lies below a whiteout")
    mark, hidden = classify(name)
    if mark in (Mark.WHITEOUT, Mark.OPAQUE) and member.kind not in (Kind.FILE, Kind.HARDLINK):
        raise TarError(f"member {display(member.name)} is a whiteout that is no regular file")
    return mark, hidden


def is_whiteout_device(member: Member) -> bool:
    return member.kind is Kind.CHAR and member.rdev == (0, 0)


class Plan:
    """Follows a layer as far as that decides whether a member can be made.

    Test: test_apply_evil.py::test_refused_before_the_first_change."""

    def __init__(self, root: OwnedFd) -> None:
        self._root = root
        #: what the layer made so far, directories that it implies or uses included
        self._kinds: dict[bytes, Kind] = {}
        #: names whose object in the target is gone, with all below it
        self._removed: set[bytes] = set()
        #: directories of the target that stay, and lose all below
        self._emptied: set[bytes] = set()
        #: directories in which members can be made: all are in `_kinds`
        self._usable: set[bytes] = {b""}

    def add(self, member: Member) -> None:
        """Raises TarError for a member that cannot be made."""
        mark, hidden = check_names(member)
        if mark is Mark.AUFS or is_whiteout_device(member):
            return
        directory, _ = split(member.name)
        if mark is not Mark.ENTRY:
            what = f"member {display(member.name)}"
            kind = self._walk(directory, what, make=False)
            if kind is Kind.SYMLINK:
                raise behind_link(what)
            if kind is Kind.DIR:
                if mark is Mark.OPAQUE:
                    self._emptied.add(directory)
                else:
                    self._removed.add(join(directory, hidden))
            return
        if directory not in self._usable:
            what = f"member {display(member.name)}"
            if self._walk(directory, what, make=True) is not Kind.DIR:
                raise below_no_directory(what)
            self._usable.add(directory)
        if not member.name:
            return
        # A link to a symbolic link is one.
        kind = self._need_partner(member) if member.kind is Kind.HARDLINK else member.kind
        before = self._kinds.get(member.name)
        if kind is Kind.DIR:
            self._walk(member.name, f"member {display(member.name)}", make=False)  # finds mount points
            if before not in (None, Kind.DIR):
                self._removed.add(member.name)
        elif before is Kind.DIR:
            inside = member.name + b"/"
            for gone in [name for name in self._kinds if name.startswith(inside)]:
                del self._kinds[gone]
            self._usable = {b""}
        self._kinds[member.name] = kind

    def _need_partner(self, member: Member) -> Kind:
        """What a hard link joins."""
        wanted = f"hard link {display(member.name)} to {display(member.target)}"
        kind = self._walk(member.target, wanted, make=False)
        if kind is None:
            raise TarError(f"{wanted}: that is not there")
        if kind is Kind.DIR:
            raise TarError(f"{wanted}: that is a directory")
        return kind

    def _walk(self, path: bytes, what: str, *, make: bool) -> Kind | None:
        """What is under `path` by now; None when there is nothing. `make`: missing directories are made.

        Raises TarError when a symbolic link is on the way to it, and with `make` also when `path` is one."""
        visible = b"" not in self._emptied
        kind: Kind | None = Kind.DIR
        here = b""
        for part in path.split(b"/") if path else ():
            if kind is Kind.SYMLINK:
                raise behind_link(what)
            if kind is not Kind.DIR:
                return None
            here = join(here, part)
            below = self._in_target(here) if visible and here not in self._removed else None
            kind = self._kinds.get(here, below)
            visible = below is Kind.DIR and here not in self._emptied
            if make and kind in (None, Kind.DIR):
                kind = self._kinds[here] = Kind.DIR
        if make and kind is Kind.SYMLINK:
            raise behind_link(what)
        return kind

    def _in_target(self, path: bytes) -> Kind | None:
        """What the target has under `path`, all above which are directories."""
        try:
            fd = open_beneath(self._root.fd, path, os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        mode = os.fstat(fd.fd).st_mode
        if stat.S_ISLNK(mode):
            return Kind.SYMLINK
        return Kind.DIR if stat.S_ISDIR(mode) else Kind.FILE
