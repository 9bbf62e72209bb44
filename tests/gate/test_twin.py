"""Random programs: the core and its Python twin say the same whatever comes, in whatever order."""

from __future__ import annotations

import os
import random
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.gate import frames as f
from tests.gate.pair import ROOT, Pair, make_socket, sync_files
from tests.gate.twin import NATIVE, Verdict

#: The merged directory of each id, below the first layer's root.
PLACES = {ROOT: "", 200: "a", 201: "a/b"}
KINDS = ("file", "empty", "big", "link", "pipe", "socket", "twice", "marked")
NAMES = [kind.encode() for kind in KINDS] + [b"new", b"absent", b".", b"x" * 255]
HANDLES = (5, 6)
OPCODES = st.one_of(st.integers(0, 63), st.sampled_from([64, 1000, (1 << 32) - 1]))
SIZES = st.sampled_from([0, 1, 170, 400, 4096, 65536])
DIRECTORIES = st.sampled_from(sorted(PLACES))


def lay_out(top: Path) -> None:
    for place in PLACES.values():
        here = top / place
        here.mkdir(exist_ok=True)
        (here / "file").write_text(f"text in {place}")
        (here / "empty").touch()
        (here / "big").write_bytes(random.Random(place).randbytes(9000))
        (here / "link").symlink_to("../somewhere")
        os.mkfifo(here / "pipe")
        make_socket(here / "socket")
        (here / "twice").write_text("linked")
        os.link(here / "twice", here / "again")
        (here / "marked").write_text("marked")
        os.setxattr(here / "marked", "user.mark", b"1")
        sync_files(here)


class Program(RuleBasedStateMachine):
    core: Path
    pair: Pair

    @initialize(
        descriptors=st.sampled_from([1, 3, 40]),
        xattrs=st.booleans(),
        carries=st.booleans(),
        statfs=st.booleans(),
        openless=st.booleans(),
        passes=st.sampled_from([None, "upper", "lowers"]),
        calls=st.booleans(),
    )
    def begin(
        self,
        descriptors: int,
        xattrs: bool,
        carries: bool,
        statfs: bool,
        openless: bool,
        passes: str | None,
        calls: bool,
    ) -> None:
        passes = None if openless else passes
        self.base = Path(tempfile.mkdtemp(prefix="layerfs-twin-"))
        self.pair = Pair(
            self.core,
            self.base,
            descriptors=40 if openless else descriptors,
            xattrs=xattrs,
            carries=carries,
            statfs="/proc" if statfs else None,
            openless=openless,
            opendirless=openless and xattrs,
        )
        lay_out(self.pair.layers[0])
        (self.base / "backing").touch()
        #: nodes of objects that nobody may have looked up
        self.unknown = [self.pair.node("file"), self.pair.node("a/link")]
        self.handles: list[int] = [NATIVE, NATIVE | 1, 9, 0, 0, 0]
        #: handles that are Python's, of these nodes
        self.backed: dict[int, int] = {}
        self.pair.pass_through(2 if passes else 0, passes == "lowers")
        if calls:
            self.pair.takes_calls()
        for id in PLACES:
            self.publish(id, ())

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            try:
                self.pair.close()
            finally:
                shutil.rmtree(self.base)

    def nodes(self, choose: int) -> int:
        """A node that the kernel may name: mostly one that it has from here."""
        known = sorted(self.pair.twin.known)
        others = [ROOT, 200, 0, 1 << 48 | 5, *self.unknown]
        return known[choose % len(known)] if known and choose % 4 else others[choose % len(others)]

    # -- what vfs does ----------------------------------------------------------------------------

    def _in_use(self, id: int) -> bool:
        twin = self.pair.twin
        directory = twin.directories.get(id)
        return (directory is not None and directory.known > 0) or any(
            listing.directory == id for listing in twin.listings.values()
        )

    @rule(id=DIRECTORIES, asked=st.lists(st.sampled_from(NAMES), max_size=3))
    def publish(self, id: int, asked: tuple[bytes, ...]) -> None:
        """Never of a directory that is in use: `vfs` publishes one when its node is loaded."""
        if not self._in_use(id):
            self.pair.publish(id, path=PLACES[id], asked=tuple(asked))

    @rule(id=DIRECTORIES)
    def forget_directory(self, id: int) -> None:
        if not self._in_use(id):
            self.pair.forget_directory(id)

    @rule(id=DIRECTORIES, name=st.sampled_from(NAMES))
    def adopt(self, id: int, name: bytes) -> None:
        self.pair.adopt(id, name)

    @rule(id=DIRECTORIES, name=st.sampled_from(NAMES))
    def retract(self, id: int, name: bytes) -> None:
        self.pair.adopt(id, name)  # Python makes a node of whatever it changes
        self.pair.retract(id, name)

    @rule(id=DIRECTORIES, name=st.sampled_from(NAMES))
    def vanish(self, id: int, name: bytes) -> None:
        self.pair.adopt(id, name)  # Python makes a node of whatever it changes
        self.pair.vanish(id, name)

    @rule(id=DIRECTORIES, name=st.sampled_from(NAMES))
    def give_back(self, id: int, name: bytes) -> None:
        self.pair.give_back(id, name)

    @rule(choose=st.integers(0, 99))
    def claim(self, choose: int) -> None:
        if (node := self.nodes(choose)) and node not in self.pair.twin.known:
            self.pair.claim(node)

    @rule(choose=st.integers(0, 99))
    def unclaim(self, choose: int) -> None:
        if node := self.nodes(choose):
            self.pair.unclaim(node)

    @rule(id=DIRECTORIES)
    def holds(self, id: int) -> None:
        self.pair.holds(id)

    @rule(handle=st.sampled_from(HANDLES), id=DIRECTORIES, order=st.randoms(use_true_random=False))
    def list_names(self, handle: int, id: int, order: random.Random) -> None:
        if id in self.pair.twin.directories:
            names = list(self.pair.twin.directories[id].names)
            order.shuffle(names)
            self.pair.list_names(handle, id, names[: order.randrange(len(names) + 1)])

    @rule(choose=st.integers(0, 99))
    def switch(self, choose: int) -> None:
        self.pair.switch(self.nodes(choose), str(self.pair.layers[0] / "big"))

    @rule(choose=st.integers(0, 99), what=st.sampled_from(["attributes", "capability", "nothing"]))
    def tell(self, choose: int, what: str) -> None:
        node = self.nodes(choose) or 5
        if what == "attributes":
            self.pair.tell_attributes(node, str(self.base))
        elif what == "capability":
            self.pair.tell_no_capability(node)
        else:
            self.pair.untell(node)

    @rule(handle=st.sampled_from([9, 10]), writes=st.booleans())
    def lend(self, handle: int, writes: bool) -> None:
        self.pair.lend(handle, str(self.base / "backing"), writes)

    @rule(handle=st.sampled_from([9, 10]))
    def take_back(self, handle: int) -> None:
        self.pair.take_back(handle)

    @rule(handle=st.integers(1, 9), choose=st.integers(0, 99), allowed=st.booleans())
    def open_or_close(self, handle: int, choose: int, allowed: bool) -> None:
        if not self.pair.twin.stack_depth:
            return
        if handle in self.backed:
            self.pair.close_backing(handle, self.backed.pop(handle))
        elif node := self.nodes(choose):
            self.pair.open_backing(handle, node, allowed)
            self.backed[handle] = node

    @rule(held=st.booleans(), flags=st.sampled_from([0, f.HANDLE_KILLPRIV_V2, f.SETXATTR_EXT]))
    def options(self, held: bool, flags: int) -> None:
        self.pair.hold_writes(held)
        self.pair.init_flags(flags, f.HANDLE_KILLPRIV_V2 | f.SETXATTR_EXT)

    # -- what happens outside ---------------------------------------------------------------------

    @rule(
        id=DIRECTORIES,
        name=st.sampled_from(KINDS),
        how=st.sampled_from(["replace", "remove", "link", "chmod"]),
    )
    def change_outside(self, id: int, name: str, how: str) -> None:
        path = self.pair.layers[0] / PLACES[id] / name
        if not os.path.lexists(path):
            return
        if how == "replace":
            other = path.with_name("other")
            other.write_text("other")
            with open(other) as file:
                os.fsync(file)
            other.rename(path)
        elif how == "remove":
            path.unlink()
        elif how == "link" and not os.path.lexists(path.with_name(f"{name}-2")):
            os.link(path, path.with_name(f"{name}-2"), follow_symlinks=False)
        elif how == "chmod" and not path.is_symlink():
            path.chmod(0o640)

    @rule(arrive=st.sampled_from([True, True, False]))
    def plug(self, arrive: bool) -> None:
        self.pair.plug(arrive)

    # -- what the kernel asks ---------------------------------------------------------------------

    def feed(self, frame: bytes) -> None:
        answer = self.pair.feed(frame)
        opened = frame[4:8] == struct.pack("<I", f.OPEN) and not self.pair.twin.openless
        if answer.verdict is Verdict.ANSWERED and opened and answer.replies:
            self.handles.append(struct.unpack_from("<Q", answer.replies[0], f.OUT_HEADER.size)[0])

    @rule(id=st.sampled_from([*PLACES, 0, 99]), name=st.sampled_from(NAMES))
    def lookup(self, id: int, name: bytes) -> None:
        self.feed(f.lookup(id, name))

    @rule(choose=st.integers(0, 99), opcode=st.sampled_from([f.GETATTR, f.READLINK, f.STATFS]))
    def look(self, choose: int, opcode: int) -> None:
        self.feed(f.frame(opcode, self.nodes(choose), bytes(16)))

    @rule(choose=st.integers(0, 99), size=SIZES)
    def xattrs(self, choose: int, size: int) -> None:
        self.feed(f.getxattr(self.nodes(choose), b"user.mark", size))
        self.feed(f.listxattr(self.nodes(choose), size))

    @rule(choose=st.integers(0, 99), count=st.integers(0, 3))
    def forget(self, choose: int, count: int) -> None:
        self.feed(f.forget(self.nodes(choose), count))

    @rule(items=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2)), max_size=6))
    def batch_forget(self, items: list[tuple[int, int]]) -> None:
        self.feed(f.batch_forget(*((self.nodes(choose), count) for choose, count in items)))

    @rule(
        handle=st.sampled_from([*HANDLES, 0, 7]),
        offset=st.integers(-14, 14),
        of=st.sampled_from([0, 1 << 29, 1 << 30]),
        size=SIZES,
    )
    def readdirplus(self, handle: int, offset: int, of: int, size: int) -> None:
        self.feed(f.readdirplus(ROOT, handle, abs(of + offset), size))

    @rule(id=DIRECTORIES, offset=st.integers(0, 14), of=st.sampled_from([0, 1 << 29, 1 << 30]), size=SIZES)
    def readdirplus_of_a_node(self, id: int, offset: int, of: int, size: int) -> None:
        self.feed(f.readdirplus(id, 0, of + offset, size))

    @rule(id=DIRECTORIES, order=st.randoms(use_true_random=False))
    def list_node(self, id: int, order: random.Random) -> None:
        """As Python does where directories are opened without asking."""
        if id in self.pair.twin.directories and self.pair.twin.opendirless:
            names = list(self.pair.twin.directories[id].names)
            order.shuffle(names)
            self.pair.list_names(id, id, names[: order.randrange(len(names) + 1)])

    @rule(id=DIRECTORIES)
    def opendir(self, id: int) -> None:
        self.feed(f.frame(f.OPENDIR, id, f.OPEN_IN.pack(0, 0)))

    @rule(handle=st.sampled_from([*HANDLES, 0, 7, 0x1001, 0x1002, 0x1003]))
    def releasedir(self, handle: int) -> None:
        self.feed(f.release(ROOT, handle, f.RELEASEDIR))

    @rule(
        choose=st.integers(0, 99),
        flags=st.sampled_from([0, 0, 0, os.O_RDWR, os.O_TRUNC, os.O_DIRECT, os.O_NONBLOCK]),
    )
    def open(self, choose: int, flags: int) -> None:
        self.feed(f.open(self.nodes(choose), flags))

    @rule(
        choose=st.integers(0, 99),
        which=st.integers(0, 99),
        offset=st.one_of(st.integers(0, 10000), st.sampled_from([-1, 1 << 63, (1 << 63) - 1])),
        size=SIZES,
    )
    def read(self, choose: int, which: int, offset: int, size: int) -> None:
        self.feed(f.read(self.nodes(choose), self.handles[which % len(self.handles)], offset, size))

    @rule(
        choose=st.integers(0, 99),
        which=st.integers(0, 99),
        opcode=st.sampled_from([f.FLUSH, f.FSYNC, f.RELEASE, f.LSEEK, f.WRITE]),
        whence=st.sampled_from([0, 1, 2, os.SEEK_DATA, os.SEEK_HOLE, 1 << 31]),
    )
    def on_handle(self, choose: int, which: int, opcode: int, whence: int) -> None:
        handle = self.handles[which % len(self.handles)]
        self.feed(f.frame(opcode, self.nodes(choose), f.LSEEK_IN.pack(handle, 10, whence, 0)))

    @rule(
        choose=st.integers(0, 99),
        handle=st.sampled_from([9, 10, 11, 0, NATIVE]),
        offset=st.sampled_from([0, 7, 5000, -1]),
        data=st.binary(max_size=40),
        flags=st.sampled_from([0, f.WRITE_KILL_SUIDGID]),
        how=st.sampled_from([0, 0, os.O_DSYNC]),
    )
    def write(self, choose: int, handle: int, offset: int, data: bytes, flags: int, how: int) -> None:
        node = self.nodes(choose)
        self.feed(f.write(node, handle, offset, data, flags=flags, how=how))
        self.feed(f.read(node, handle, offset, 50))

    @rule(choose=st.integers(0, 99), writes=st.booleans())
    def lend_node(self, choose: int, writes: bool) -> None:
        """Of a node that Python has, where there are no handles."""
        if (node := self.nodes(choose)) and node not in self.pair.twin.known and self.pair.twin.openless:
            self.pair.lend(node, str(self.base / "backing"), writes)

    @rule(choose=st.integers(0, 99), command=st.sampled_from([*f.INODE_IOCTLS, 0x5401]))
    def ioctl(self, choose: int, command: int) -> None:
        self.feed(f.ioctl(self.nodes(choose), 9, command))

    @rule(choose=st.integers(0, 99))
    def ask_for_capability(self, choose: int) -> None:
        self.feed(f.getxattr(self.nodes(choose), b"security.capability"))

    @rule(
        opcode=st.sampled_from([f.INIT, f.OPENDIR, f.OPEN, f.CREATE]),
        payload=st.binary(max_size=90),
        handle=DIRECTORIES,
    )
    def reply(self, opcode: int, payload: bytes, handle: int) -> None:
        self.pair.plug(True)
        self.pair.libfuse_replies(opcode, payload)
        self.pair.libfuse_replies(opcode, f.OPEN_OUT.pack(handle % 10, 0, 0))

    @rule(opcode=OPCODES, choose=st.integers(0, 99), body=st.binary(max_size=80), cut=st.integers(0, 60))
    def garbage(self, opcode: int, choose: int, body: bytes, cut: int) -> None:
        frame = f.frame(opcode, self.nodes(choose), body)
        self.feed(frame[: len(frame) - cut] if cut % 3 == 0 else frame)

    @precondition(lambda self: hasattr(self, "pair"))
    @invariant()
    def both_know_the_same(self) -> None:
        self.pair.agree()


def run(core: Path, examples: int, steps: int) -> None:
    machine = type("Program", (Program,), {"core": core})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=examples < 100,
            database=None,
        ),
    )


@pytest.mark.slow
def test_random_programs(core: Path) -> None:
    run(core, 40, 60)


@pytest.mark.long
def test_more_random_programs(core: Path) -> None:
    run(core, 120, 100)
