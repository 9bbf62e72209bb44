"""What every change of names needs: the names of a directory as they are noted, and what happens when one
goes.

Changes nothing on disk but the marks that its callers ask for; `namespace` and `rename` do.
"""

from __future__ import annotations

import errno

from layerfs.ids import NodeId, RealIno
from layerfs.inodes import numbers
from layerfs.overlay import whiteout
from layerfs.stack import Entry, Merged
from layerfs.upper.upper import Upper
from layerfs.upper.work import Pin
from layerfs.vfs.caller import Caller
from layerfs.vfs.copyup import CopyUp
from layerfs.vfs.node import Directory, File, Node
from layerfs.vfs.tree import NAME_MAX, Tree, fail


class Names:
    def __init__(self, tree: Tree, upper: Upper, copyup: CopyUp) -> None:
        self.tree = tree
        self.upper = upper
        self.copyup = copyup

    @staticmethod
    def check_name(name: bytes) -> None:
        if len(name) > NAME_MAX:
            fail(errno.ENAMETOOLONG)
        if name.startswith(whiteout.PREFIX):
            # In every layer these names mean whiteouts, in image layers by the OCI specification: an object
            # could not be told from one.
            fail(errno.EINVAL)

    @staticmethod
    def check_parent(parent: Directory) -> None:
        if parent.unlinked:
            fail(errno.ENOENT)

    @staticmethod
    def merged(directory: Directory) -> Merged:
        assert directory.merged is not None, "loaded by prepare"
        return directory.merged

    def set_entry(self, parent: Directory, name: bytes, entry: Entry) -> None:
        merged = self.merged(parent)
        self.tree.gate.retract_name(parent.id, name)
        merged.names[name] = entry
        merged.devices.discard(name)
        self.tree.grown()

    def drop_entry(self, parent: Directory, name: bytes, *, hidden: bool) -> None:
        merged = self.merged(parent)
        self.tree.gate.vanish_name(parent.id, name)
        del merged.names[name]
        if hidden:
            (merged.devices if self.upper.ability.whiteouts == "device" else merged.marks).add(name)

    def has_origin(self, node: Node) -> bool:
        """Whether an upper object shows another number than its own, so that its directory must be marked
        impure.
        """
        return node.id != NodeId(numbers.compose(self.upper.layer.number, RealIno(node.real), node.region))

    async def present(self, parent: Directory, name: bytes) -> Entry:
        merged = await self.tree.load(parent)
        self.check_parent(parent)
        entry = merged.names.get(name)
        if entry is None:
            fail(errno.ENOENT)
        return entry

    async def all_names_up(self, node: File, caller: Caller) -> bool:
        """Before a name of a hard-linked lower file goes, the file moves up with all its names, so that its
        link count stays right.

        Returns whether anything was awaited."""
        if node.in_upper or self.tree.stat_real(node).st_nlink == 1:
            return False
        if not await self.copyup.links.has_several(node):
            return node.in_upper  # other links of it are outside the tree
        await self.copyup.attributes_only(node, caller)
        return True

    def gone(
        self, parent: Directory, name: bytes, entry: Entry, node: Node, pin: Pin | None, *, hidden: bool
    ) -> None:
        """Notes that an object lost a name; `hidden`: a whiteout stands there now."""
        entry.node = None
        self.drop_entry(parent, name, hidden=hidden)
        self.tree.drop_name(node, parent, name)
        if node.parent is None:
            self.tree.pin(node, pin)
            self.tree.stack.pool.drop(node)
        self.tree.changed(node)
        self.tree.changed(parent)
        self.tree.release(node)


def merged_is(directory: Directory, name: bytes, entry: Entry) -> bool:
    """Whether a name still means what it meant before something was awaited."""
    return directory.merged is not None and directory.merged.names.get(name) is entry
