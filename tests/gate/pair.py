"""The C core and its Python twin side by side, over the same layers: whatever is done to one is done to both,
and what they say must be the same."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tests.gate import frames as f
from tests.gate.driver import Driver
from tests.gate.twin import Answer, Home, Plain, Twin

#: The root's node id, and a handle of Python's that lists it.
ROOT, LISTS_ROOT = 1, 5
#: Where the numbers of layer n begin.
SHIFT = 48


class Pair:
    def __init__(
        self,
        program: Path,
        base: Path,
        *,
        layers: int = 1,
        descriptors: int = 8,
        xattrs: bool = True,
        carries: bool = False,
        statfs: str | None = "/proc",
        openless: bool = False,
        opendirless: bool = False,
    ) -> None:
        self.core = Driver(program, descriptors=descriptors, xattrs=xattrs, carries=carries, statfs=statfs)
        self.twin = Twin(descriptors=descriptors, xattrs=xattrs, carries=carries, statfs=statfs)
        if openless:
            self.core.opens_without_asking(directories=opendirless)
            self.twin.openless, self.twin.opendirless = True, opendirless
        self.layers = [base / f"layer{number}" for number in range(layers)]
        for layer in self.layers:
            layer.mkdir()
            self.core.add_layer(str(layer))
            self.twin.layers.append(str(layer))

    def close(self) -> None:
        self.twin.close()
        self.core.close()

    # -- facts ------------------------------------------------------------------------------------

    def home(self, layer: int = 0, path: bytes = b"") -> Home:
        return Home(layer, path, layer + 1 << SHIFT)

    def node(self, path: str, layer: int = 0) -> int:
        return self.home(layer).base | os.lstat(self.layers[layer] / path).st_ino

    def publish(self, id: int = ROOT, *, path: str = "", asked: tuple[bytes, ...] = ()) -> None:
        """All that lies in one directory of the first layer; of `asked`, that it is there."""
        self.publish_names(id, [self.home(0, os.fsencode(path))], self.names_in(path, asked))

    def names_in(self, path: str = "", asked: tuple[bytes, ...] = ()) -> dict[bytes, Plain | None]:
        names: dict[bytes, Plain | None] = {}
        with os.scandir(os.fsencode(self.layers[0] / path)) as found:
            for each in sorted(found, key=lambda each: each.name):
                plain = Plain(0, each.inode(), each.is_dir(follow_symlinks=False))
                names[each.name] = None if each.name in asked else plain
        return names

    def publish_names(self, id: int, homes: list[Home], names: dict[bytes, Plain | None]) -> None:
        self.core.publish(id, homes, names)
        self.twin.publish(id, homes, names)

    def forget_directory(self, id: int) -> None:
        self.core.forget_directory(id)
        self.twin.forget_directory(id)

    def retract(self, id: int, name: bytes) -> bool:
        done = self.twin.retract(id, name)
        assert self.core.retract(id, name) == done
        return done

    def vanish(self, id: int, name: bytes) -> None:
        self.core.vanish(id, name)
        self.twin.vanish(id, name)

    def adopt(self, id: int, name: bytes) -> int:
        lookups = self.twin.adopt(id, name)
        assert self.core.adopt(id, name) == lookups
        return lookups

    def give_back(self, id: int, name: bytes) -> None:
        directory = self.twin.directories.get(id)
        found = directory.names.get(name) if directory else None
        self.core.give_back(id, name, found.plain if found else None)
        self.twin.give_back(id, name)

    def tell_attributes(self, node: int, path: str) -> None:
        self.core.tell_attributes(node, path)
        self.twin.told[node] = os.lstat(path)

    def tell_no_capability(self, node: int) -> None:
        self.core.tell_no_capability(node)
        self.twin.no_capability.add(node)

    def untell(self, node: int) -> None:
        self.core.untell(node)
        self.twin.told.pop(node, None)
        self.twin.no_capability.discard(node)

    def lend(self, handle: int, path: str, writes: bool) -> bool:
        lent = self.twin.lend(handle, path, writes)
        assert self.core.lend(handle, path, writes) == lent
        return lent

    def take_back(self, handle: int) -> None:
        self.core.take_back(handle)
        self.twin.take_back(handle)

    def takes_calls(self) -> None:
        self.core.takes_calls()
        self.twin.takes_calls = True

    def hold_writes(self, held: bool) -> None:
        self.core.hold_writes(held)
        self.twin.writes_held = held

    def init_flags(self, offered: int, wanted: int) -> None:
        """What the kernel offered, and what is asked for."""
        self.core.init_flags(offered, wanted)
        self.twin.offered, self.twin.wanted = offered, wanted

    def pass_through(self, stack_depth: int, lowers: bool) -> None:
        self.core.pass_through(stack_depth, lowers)
        self.twin.stack_depth, self.twin.passes_lowers = stack_depth, lowers

    def open_backing(self, handle: int, node: int, allowed: bool) -> int:
        id = self.twin.open_backing(handle, node, allowed)
        assert self.core.open_backing(handle, node, allowed) == id
        return id

    def close_backing(self, handle: int, node: int) -> None:
        self.core.close_backing(handle, node)
        self.twin.close_backing(handle, node)

    def libfuse_replies(self, opcode: int, payload: bytes) -> bytes:
        """What of it goes out."""
        packet = self.twin.libfuse_replies(opcode, payload)
        assert self.core.libfuse_replies(opcode, payload) == packet
        return packet[f.OUT_HEADER.size :]

    def claim(self, node: int) -> None:
        self.core.claim(node)
        self.twin.claimed.add(node)

    def unclaim(self, node: int) -> None:
        self.core.unclaim(node)
        self.twin.claimed.discard(node)

    def holds(self, id: int) -> bool:
        held = self.twin.holds(id)
        assert self.core.holds(id) == held
        return held

    def offset(self, name: bytes, id: int = ROOT) -> int:
        """Behind a name, in any listing."""
        return self.twin.directories[id].names[name].offset

    def list_names(self, handle: int, id: int, names: list[bytes], parent: int = ROOT) -> None:
        names = self.twin.arrange(id, names)
        self.core.list_names(handle, id, parent, names)
        self.twin.list_names(handle, id, parent, names)

    def switch(self, node: int, path: str) -> int:
        count = self.twin.switch(node, path)
        assert self.core.switch(node, path) == count
        return count

    def plug(self, arrive: bool) -> None:
        """Whether replies arrive from now on."""
        if arrive != self.twin.plugged:
            self.core.plug(arrive)
            self.twin.plugged = arrive

    # -- frames -----------------------------------------------------------------------------------

    def feed(self, frame: bytes) -> Answer:
        """What both say."""
        core = self.core.answer(frame, arrive=self.twin.plugged)
        twin = self.twin.answer(frame)
        assert core == twin
        return twin

    def agree(self) -> None:
        """On what is known, open and listed."""
        counts = self.core.counts()
        twin = self.twin
        assert counts.known == len(twin.known)
        assert counts.names == sum(len(directory.names) for directory in twin.directories.values())
        assert counts.claimed == len(twin.claimed)
        assert counts.open == len(twin.open) + len(twin.kept)
        assert counts.listings == len(twin.listings)
        assert self.core.open_directories() == twin.open_directories
        assert counts.ways == len(twin.ways)
        assert counts.backings == sum(way.backing > 0 for way in twin.ways.values())
        for node, known in twin.known.items():
            assert self.core.known(node) == (known.lookups, known.directory.id)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def sync_files(directory: Path) -> None:
    """So that their st_blocks is final."""
    for path in directory.iterdir():
        if path.is_file():
            with open(path) as file:
                os.fsync(file)
