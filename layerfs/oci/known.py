"""What one layer has done so far, by name: a tree, so that a name goes with all below it in one step, however
much else the layer holds. Opens no file and has no rules; `building`, `apply` and `unpack` write in it.

A table by whole paths would have to be searched for what lies below a name, at each of the thousands of times
that a hostile layer replaces it (tests/oci/test_evil_work.py).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from layerfs.oci.member import Member, join


class Made(enum.Enum):
    """What the layer has made under a name; whiteouts hide the layers below only."""

    NOTHING = enum.auto()
    #: anything but a directory
    OBJECT = enum.auto()
    #: a directory that was needed, and that no member has named (yet)
    IMPLIED = enum.auto()
    DIRECTORY = enum.auto()


#: Of all that have none: most are no directories.
_NO_CHILDREN: dict[bytes, Known] = {}


class Known:
    """What is known of one name. Made where there is something to know; `OBJECT` stands for the many of which
    nothing else is."""

    __slots__ = ("children", "emptied", "hidden", "made", "member", "missing", "pruned", "touched")

    def __init__(self) -> None:
        #: written by `child` and `put` alone
        self.children = _NO_CHILDREN
        self.made = Made.NOTHING
        #: how a directory is to look at the end
        self.member: Member | None = None
        #: a directory that changed though no member names it: the time and the mode to leave it with
        self.touched: tuple[int, int] | None = None
        #: `apply`: nothing is left in it that the layer did not make
        self.pruned = False
        #: `unpack`: what is below is gone, with all in it; all that is in it below is gone
        self.hidden = False
        self.emptied = False
        #: `unpack`: a hard link whose partner, this, is in a layer below
        self.missing: bytes | None = None

    @property
    def is_own(self) -> bool:
        return self.made is not Made.NOTHING

    @property
    def is_own_directory(self) -> bool:
        return self.made in (Made.IMPLIED, Made.DIRECTORY)

    def find(self, path: bytes) -> Known | None:
        """What is known of `path` below this."""
        here = self
        for part in path.split(b"/") if path else ():
            found = here.children.get(part)
            if found is None:
                return None
            here = found
        return here

    def child(self, name: bytes) -> Known:
        """What is known of `name`, to be written in."""
        found = self.children.get(name)
        if found is None or found is OBJECT:
            fresh = Known()
            if found is not None:
                fresh.made = found.made
            self.put(name, fresh)
            return fresh
        return found

    def put(self, name: bytes, known: Known) -> None:
        if self.children is _NO_CHILDREN:
            self.children = {}
        self.children[name] = known

    def at(self, path: bytes) -> Known:
        """The same of `path` below this."""
        here = self
        for part in path.split(b"/") if path else ():
            here = here.child(part)
        return here

    def replace(self) -> None:
        """`unpack`: a directory that has nothing to do with what is below."""
        self.hidden = self.emptied = True

    def walk(self) -> Iterator[tuple[bytes, Known]]:
        """Everything, this too, under its path: what is in a directory before the directory. No stack
        grows: a tree may be as deep as it likes."""
        levels = [(b"", self, iter(self.children.items()))]
        while levels:
            path, here, children = levels[-1]
            name, child = next(children, (b"", None))
            if child is None:
                levels.pop()
                yield path, here
            elif child.children:
                levels.append((join(path, name), child, iter(child.children.items())))
            else:
                yield join(path, name), child


#: An object that is no directory, and of which there is nothing more to know; never changed.
OBJECT = Known()
OBJECT.made = Made.OBJECT
