"""Nodes: what the kernel has a name for. Data only; `tree` keeps them consistent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerfs.ids import NodeId
from layerfs.stack import LowerDir, Merged
from layerfs.upper.work import Pin

if TYPE_CHECKING:
    import trio

    from layerfs.vfs.copyup import Job
    from layerfs.vfs.files import Handle


class Node:
    """One object of the merged tree that is in use: looked up by the kernel, open, or parent of such a one.

    The upper path of a node is its path in the merged tree, so it is never stored: it is `parent`'s directory
    and `name`, and a rename of a directory moves all below it at once."""

    __slots__ = (
        "home",
        "home_name",
        "id",
        "in_upper",
        "lookups",
        "name",
        "names",
        "parent",
        "pin",
        "real",
        "region",
        "users",
    )

    def __init__(self, id: NodeId, parent: Directory | None, name: bytes) -> None:
        self.id = id
        #: a directory that holds it and its name there; None when it has none (the root; unlinked)
        self.parent = parent
        self.name = name
        #: further (directory, name) pairs of a hard-linked file, as far as they were looked up
        self.names: set[tuple[Directory, bytes]] | None = None
        self.in_upper = False
        #: the lower directory that holds it and its name there, while it is not in the upper
        self.home: LowerDir | None = None
        self.home_name = b""
        #: inode number on its layer's file system
        self.real = 0
        #: which file system of its layer that is (`inodes.numbers`); empty: the layer's own
        self.region = b""
        #: of an upper object that has no name we know: what keeps it reachable, and its inode number from
        #: being used again; set by `Tree.pin`
        self.pin: Pin | None = None
        #: what the kernel holds (FUSE lookup count)
        self.lookups = 0
        #: nodes that have this one as parent, open handles, running jobs
        self.users = 0

    @property
    def unlinked(self) -> bool:
        return self.parent is None and self.id != 1

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.name!r}>"


class Directory(Node):
    __slots__ = (
        "has_default_acl",
        "impure",
        "loading",
        "lower_path",
        "lowers",
        "marked",
        "merged",
        "upper_region",
    )

    def __init__(self, id: NodeId, parent: Directory | None, name: bytes) -> None:
        super().__init__(id, parent, name)
        #: the lower directories that are merged into it, top first; fixed for the node's life
        self.lowers: tuple[LowerDir, ...] = ()
        #: its path in the tree of the lowers alone (what a redirect to it says); None when it has no lowers
        self.lower_path: bytes | None = None
        #: its names, once it was loaded
        self.merged: Merged | None = None
        self.loading: trio.Event | None = None
        #: whether its upper part has a default ACL; None: not looked yet
        self.has_default_acl: bool | None = None
        #: whether the upper directory is marked to hold objects with recorded numbers; None: not looked yet
        self.impure: bool | None = None
        #: the mark is there, and it is ours (the kernel may take its own away)
        self.marked = False
        #: region of the upper that its upper part lies in; None: not looked yet
        self.upper_region: bytes | None = None


class File(Node):
    """Everything that is not a directory."""

    __slots__ = (
        "bypassed",
        "failure",
        "fleeting",
        "guarded",
        "handles",
        "is_regular",
        "job",
        "lookup_dirs",
        "metacopy",
        "privileged",
    )

    def __init__(self, id: NodeId, parent: Directory | None, name: bytes) -> None:
        super().__init__(id, parent, name)
        self.is_regular = False
        self.handles: set[Handle] | None = None
        self.job: Job | None = None
        #: errno of a write that stopped short, to be told by the next fsync
        self.failure: int | None = None
        #: in the upper with attributes only; None: not looked yet
        self.metacopy: bool | None = None
        #: where the data of a metadata-only file are looked for when it has no redirect
        self.lookup_dirs: tuple[LowerDir, ...] = ()
        #: setuid or setgid is set (so that a write must clear it); kept while it is open for writing
        self.privileged = False
        #: it was open in passthrough when it was opened last (`vfs.passthrough`)
        self.bypassed = False
        #: its attributes may change and nobody tells: the kernel is not to keep them
        self.fleeting = False
        #: inode flags that forbid writing (`inode_flags.IMMUTABLE`, `APPEND`), if set through this mount
        self.guarded = 0
