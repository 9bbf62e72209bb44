"""What a layer would do to a directory, followed in mind: tells whether it can be applied, and changes
nothing. `apply` does it, and meets whatever has changed meanwhile in the directory."""

from __future__ import annotations

import os
import stat

from layerfs.errors import TarError
from layerfs.fdutil import OwnedFd
from layerfs.oci.beneath import behind_link, below_no_directory, open_beneath
from layerfs.oci.member import Kind, Mark, Member, classify, display, is_aufs, split
from layerfs.overlay import whiteout


def check_names(member: Member) -> tuple[Mark, bytes]:
    """What the last name of `member` stands for, and what it hides.

    Old layers hold what AUFS kept for itself: `.wh..wh.aufs`, `.wh..wh.orph/`, and `.wh..wh.plnk/` with files
    that were shared between layers. docker and containerd pass all of it over, but make a copy of a file in
    plnk for each hard link to it (moby pkg/archive/diff.go, containerd archive/tar.go); umoci knows nothing
    of it. We pass it over and refuse such links: their partners, however large, would have to be kept in case
    one comes, and docker has left these names out of what it writes for ten years.

    Raises TarError for that, for a member below a whiteout, and for a whiteout that is no plain file."""
    mark, hidden = _mark(member) if member.name.find(whiteout.PREFIX) >= 0 else (Mark.ENTRY, b"")
    target = member.target if member.kind is Kind.HARDLINK and mark is not Mark.AUFS else b""
    if target.find(whiteout.PREFIX) >= 0 and any(is_aufs(part) for part in target.split(b"/")):
        what = f"hard link {display(member.name)} to {display(target)}"
        raise TarError(f"{what}: that is book-keeping of AUFS, which is not kept")
    return mark, hidden


def _mark(member: Member) -> tuple[Mark, bytes]:
    directory, name = split(member.name)
    for part in directory.split(b"/"):
        if is_aufs(part):
            return Mark.AUFS, part
        if part.startswith(whiteout.PREFIX):
            raise TarError(f"member {display(member.name)} lies below a whiteout")
    mark, hidden = classify(name)
    if mark in (Mark.WHITEOUT, Mark.OPAQUE) and member.kind not in (Kind.FILE, Kind.HARDLINK):
        raise TarError(f"member {display(member.name)} is a whiteout that is no regular file")
    return mark, hidden


def is_whiteout_device(member: Member) -> bool:
    return member.kind is Kind.CHAR and member.rdev == (0, 0)


class _Name:
    """What a layer and the target have under one name."""

    __slots__ = ("asked", "below", "children", "emptied", "gone", "kind")

    def __init__(self) -> None:
        #: None where there can be none
        self.children: dict[bytes, _Name] | None = None
        #: what the layer made, directories that it implies or uses included
        self.kind: Kind | None = None
        #: the target's object is gone, with all below it
        self.gone = False
        #: the target's directory stays, and loses all below
        self.emptied = False
        #: what the target had when the layer came, once it was `asked`
        self.below: Kind | None = None
        self.asked = False

    def child(self, name: bytes) -> _Name:
        """What is under `name`, to be written in."""
        found = self.children.get(name) if self.children is not None else None
        if found is None or found is _LEAVES.get(found.kind):
            fresh = _Name()
            if found is not None:
                fresh.kind = found.kind
            self.put(name, fresh)
            return fresh
        return found

    def put(self, name: bytes, found: _Name) -> None:
        if self.children is None:
            self.children = {}
        self.children[name] = found


def _leaf(kind: Kind) -> _Name:
    leaf = _Name()
    leaf.kind = kind
    return leaf


#: What the layer made that is no directory: nothing else counts under such a name. Never changed.
_LEAVES: dict[Kind | None, _Name] = {kind: _leaf(kind) for kind in Kind if kind is not Kind.DIR}


class Plan:
    """Follows a layer as far as that decides whether a member can be made. The target is asked once for a
    name.

    Test: test_apply_evil.py::test_refused_before_the_first_change."""

    def __init__(self, root: OwnedFd) -> None:
        self._root = root
        self._names = _Name()
        self._names.kind = self._names.below = Kind.DIR
        self._names.asked = True
        #: the directory that members are being made in, and its path
        self._here = (b"", self._names)

    def add(self, member: Member) -> None:
        """Raises TarError for a member that cannot be made."""
        mark, hidden = check_names(member)
        if mark is Mark.AUFS or is_whiteout_device(member):
            return
        directory, name = split(member.name)
        if mark is not Mark.ENTRY:
            what = f"member {display(member.name)}"
            kind, found = self._walk(directory, what, make=False)
            if kind is Kind.SYMLINK:
                raise behind_link(what)
            if kind is Kind.DIR:
                assert found is not None, "a directory is known by now"
                if mark is Mark.OPAQUE:
                    found.emptied = True
                else:
                    found.child(hidden).gone = True
            return
        if directory != self._here[0]:
            what = f"member {display(member.name)}"
            kind, found = self._walk(directory, what, make=True)
            if kind is not Kind.DIR:
                raise below_no_directory(what)
            assert found is not None, "it was made"
            self._here = (directory, found)
        if not member.name:
            return
        # A link to a symbolic link is one.
        kind = self._need_partner(member) if member.kind is Kind.HARDLINK else member.kind
        here = self._here[1]
        if kind is not Kind.DIR:
            here.put(name, _LEAVES[kind])
            return
        self._walk(member.name, f"member {display(member.name)}", make=False)  # finds mount points
        made = here.child(name)
        if made.kind not in (None, Kind.DIR):
            made.gone = True  # where something else was, nothing of the target comes back
        made.kind = Kind.DIR

    def _need_partner(self, member: Member) -> Kind:
        """What a hard link joins."""
        wanted = f"hard link {display(member.name)} to {display(member.target)}"
        kind, _ = self._walk(member.target, wanted, make=False)
        if kind is None:
            raise TarError(f"{wanted}: that is not there")
        if kind is Kind.DIR:
            raise TarError(f"{wanted}: that is a directory")
        return kind

    def _walk(self, path: bytes, what: str, *, make: bool) -> tuple[Kind | None, _Name | None]:
        """What is under `path` by now; None when there is nothing. `make`: missing directories are made. A
        directory comes with what is known of it.

        Raises TarError when a symbolic link is on the way to it, and with `make` also when `path` is one."""
        visible = not self._names.emptied
        kind: Kind | None = Kind.DIR
        found: _Name | None = self._names
        parts = path.split(b"/") if path else []
        for number, part in enumerate(parts, 1):
            if kind is Kind.SYMLINK:
                raise behind_link(what)
            if kind is not Kind.DIR:
                return None, None
            assert found is not None, "a directory is known by now"
            above, found = found, found.children.get(part) if found.children is not None else None
            below = None
            if visible and (found is None or (not found.gone and found.kind in (None, Kind.DIR))):
                if found is not None and found.asked:
                    below = found.below
                else:
                    below = self._in_target(b"/".join(parts[:number]))
                    if below is not None or found is not None or make:
                        found = above.child(part)
                        found.below, found.asked = below, True
            kind = found.kind if found is not None and found.kind is not None else below
            visible = below is Kind.DIR and not (found is not None and found.emptied)
            if make and kind in (None, Kind.DIR):
                found = above.child(part)
                kind = found.kind = Kind.DIR
        if make and kind is Kind.SYMLINK:
            raise behind_link(what)
        return kind, found

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
