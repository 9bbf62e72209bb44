"""All names of a hard-linked lower file in the merged tree.

A lower inode with several names has some of them hidden by layers above; what a user sees as its link count,
and what must be linked in the upper when it is copied up, are the names that are *seen*. They are found by
walking the merged tree once; the index stays right afterwards because a name of such a file is never removed
or replaced before the file (all its names) was copied up, and is made anew after a directory moved.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from layerfs.stack import LowerDir
from layerfs.vfs.node import Directory, File
from layerfs.vfs.tree import Tree

#: layer (index from the top), region, real inode number
_Key = tuple[int, bytes, int]


#: Names that are looked at before others get their turn.
_TURN = 64


class LinkIndex:
    def __init__(self, tree: Tree, *, upper_was_empty: bool) -> None:
        self.tree = tree
        #: nothing hides the names of the top lower when the upper was empty at mount (see the file's head)
        self._trusted_layer = 0 if upper_was_empty else -1
        self._names: dict[_Key, list[tuple[bytes, bytes]]] | None = None
        self._moves = -1
        self._lock = trio.Lock()

    async def count(self, node: File, nlink: int) -> int:
        """Link count to show for a lower file whose inode says `nlink` (> 1)."""
        assert node.home is not None
        if node.home.layer.index == self._trusted_layer:
            return nlink
        index = await self._index()
        return len(index.get((node.home.layer.index, node.region, node.real), ())) or 1

    def moved(self, old: bytes, new: bytes) -> None:
        """A directory moved from one path to another: what is known of the names below it stays right."""
        if self._names is None or self._moves != self.tree.moves - 1:
            return
        below = old + b"/"
        for names in self._names.values():
            for index, (path, name) in enumerate(names):
                if path == old or path.startswith(below):
                    names[index] = (new + path[len(old) :], name)
        self._moves = self.tree.moves

    async def has_several(self, node: File) -> bool:
        """Whether a lower file is seen under more than one name. Raises OSError."""
        assert node.home is not None
        key = (node.home.layer.index, node.region, node.real)
        return len((await self._index()).get(key, ())) > 1

    async def names(self, node: File) -> list[tuple[Directory, bytes]]:
        """Every (loaded directory, name) of a lower file. The directories are pinned (`users`): give them
        back with `unpin`.

        Raises OSError when a layer cannot be read."""
        assert node.home is not None
        key = (node.home.layer.index, node.region, node.real)
        while True:
            index = await self._index()
            moves = self.tree.moves
            found: dict[tuple[int, bytes], tuple[Directory, bytes]] = {}
            try:
                for path, name in index.get(key, ()):
                    directory = await self.resolve(path)
                    if directory is not None and (directory.id, name) in found:
                        self._unpin_one(directory)
                    elif directory is not None:
                        found[directory.id, name] = (directory, name)
            except OSError:
                self.unpin(list(found.values()))
                raise
            if node.parent is not None and (node.parent.id, node.name) not in found:
                node.parent.users += 1
                found[node.parent.id, node.name] = (node.parent, node.name)
            if self.tree.moves == moves:
                return list(found.values())
            self.unpin(list(found.values()))

    def unpin(self, names: list[tuple[Directory, bytes]]) -> None:
        for directory, _ in names:
            self._unpin_one(directory)

    def _unpin_one(self, directory: Directory) -> None:
        directory.users -= 1
        self.tree.release(directory)

    async def resolve(self, path: bytes) -> Directory | None:
        """The loaded directory at `path` in the merged tree, pinned; None when there is none any more."""
        here: Directory = self.tree.root
        here.users += 1
        try:
            for part in path.split(b"/") if path else ():
                entry = await self.tree.find(here, part)
                child = self.tree.child(here, part, entry) if entry is not None else None
                if not isinstance(child, Directory):
                    self.tree.release(child)
                    self._unpin_one(here)
                    return None
                child.users += 1
                self._unpin_one(here)
                here = child
            await self.tree.load(here)
        except BaseException:
            self._unpin_one(here)
            raise
        return here

    async def _index(self) -> dict[_Key, list[tuple[bytes, bytes]]]:
        async with self._lock:
            while self._names is None or self._moves != self.tree.moves:
                moves = self.tree.moves
                self._names = await self._several()
                self._moves = moves
            return self._names

    async def _several(self) -> dict[_Key, list[tuple[bytes, bytes]]]:
        """The names of every inode that is seen under more than one."""
        first: dict[_Key, tuple[bytes, bytes]] = {}
        several: dict[_Key, list[tuple[bytes, bytes]]] = {}

        def visit(path: bytes, name: bytes, home: LowerDir, real: int) -> None:
            key = (home.layer.index, home.region, real)
            if key not in first:
                first[key] = (path, name)
            else:
                several.setdefault(key, [first[key]]).append((path, name))

        await self.walk(visit)
        return several

    async def walk(self, visit: Callable[[bytes, bytes, LowerDir, int], None]) -> None:
        """Calls `visit(directory's path, name, lower directory, real inode number)` for every name of a lower
        non-directory in the merged tree; new directories are walked too, as others may have been moved into
        them.
        """
        todo: list[tuple[Directory, bytes]] = [(self.tree.root, b"")]
        self.tree.root.users += 1
        try:
            while todo:
                directory, path = todo.pop()
                try:
                    await trio.lowlevel.checkpoint()
                    try:
                        merged = await self.tree.load(directory)
                    except OSError:
                        continue  # changed or unreadable: nobody sees names in there
                    for count, (name, entry) in enumerate(list(merged.names.items())):
                        if count % _TURN == _TURN - 1:
                            await trio.lowlevel.checkpoint()
                        if entry.is_dir:
                            try:
                                child = self.tree.child(directory, name, entry)
                            except OSError:
                                continue  # nonsense that a layer's author wrote: nobody sees names in there
                            assert isinstance(child, Directory)
                            child.users += 1
                            todo.append((child, path + b"/" + name if path else name))
                        elif entry.home is not None:
                            visit(path, name, entry.home, entry.real)
                finally:
                    directory.users -= 1
                    self.tree.release(directory)
        finally:
            for directory, _ in todo:
                directory.users -= 1
                self.tree.release(directory)
