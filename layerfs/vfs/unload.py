"""Keeps what is known of a tree bounded, where a gate knows it.

The names of a directory are loaded when it is first touched, and kept as long as the kernel has anything of
it, which is until *it* wants its memory back. So a walk of millions of files would fill ours. When more
names are loaded than there may be, the directories that were loaded first are gone through: the kernel is
asked to forget what it has in them and nobody uses, and the names of those in which nothing is known any more
are dropped, to be read again at the next touch.
"""

from __future__ import annotations

from layerfs.ids import ROOT, NodeId
from layerfs.vfs.node import Directory, Node
from layerfs.vfs.tree import Tree

#: Of the names that there may be, how many are left when enough was dropped.
_LEFT = 0.75
#: By how much more may be loaded before it is tried again, where what is there is in use.
_MORE = 1.25


class Unload:
    def __init__(self, tree: Tree, most: int) -> None:
        """`most`: names that may be loaded."""
        self.tree = tree
        self._most = most
        #: what is borne now
        self._limit = most

    @property
    def too_many(self) -> bool:
        return self.tree.gate.loaded() > self._limit

    def bear(self) -> bool:
        """What is left is in use, if there are still too many: they are put up with until there are more.
        Returns whether it is so."""
        loaded = self.tree.gate.loaded()
        self._limit = max(self._most, int(loaded * _MORE)) if loaded > self._most else self._most
        return loaded > self._most

    def to_forget(self) -> list[NodeId]:
        """Node ids that the kernel should forget, if nobody uses them: those of the directories that were
        loaded first, what is in a directory before itself. These directories count as the last ones from then
        on: some cannot be forgotten, and others get their turn."""
        tree = self.tree
        surplus = self._surplus()
        ids: list[NodeId] = []
        turned: list[Directory] = []
        for node in tree.nodes.values():
            if surplus <= 0:
                break
            if isinstance(node, Directory) and node.merged is not None:
                surplus -= tree.gate.loaded_in(node.id)
                ids += tree.gate.known_in(node.id)
                ids += [
                    each.node.id
                    for each in node.merged.names.values()
                    if isinstance(each.node, Node) and each.node.lookups > 0
                ]
                turned.append(node)
        for node in turned:
            if node.id != ROOT:
                ids.append(node.id)
            tree.nodes[node.id] = tree.nodes.pop(node.id)
        return ids

    def drop(self) -> int:
        """Drops the names of directories in which nothing is known and that nobody uses, the first loaded
        first, until there are few enough. How many names. Only between requests: one that awaits may have
        looked at the names already."""
        tree = self.tree
        surplus = before = self._surplus()
        for node in list(tree.nodes.values()):
            if surplus <= 0:
                break
            if isinstance(node, Directory) and node.merged is not None and not self._is_used(node):
                surplus -= tree.gate.loaded_in(node.id)
                tree.unload(node)
        return before - surplus

    def _surplus(self) -> int:
        return self.tree.gate.loaded() - int(self._most * _LEFT)

    def _is_used(self, node: Directory) -> bool:
        """Whether something leans on the names that a directory has now. `users` are children's nodes and
        open handles. (One without a name is empty and stays so.)"""
        return bool(node.users) or node.unlinked or self.tree.gate.knows_in(node.id)
