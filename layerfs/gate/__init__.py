"""The native path: what `vfs` publishes, and who answers from it.

`vfs` publishes the names of a directory that it has loaded. A *plain* name is an object of one lower that is
shown as it is there, but for its inode number; a directory is one when no other layer has it. For such names,
and for those that are absent, the gate answers the kernel itself, without Python. Everything else is asked of
Python. Python makes a node of a plain name when it needs one (`adopt`): from then on the name is Python's
until it lets go of the node (`give_back`).

The gate runs on the thread of the event loop, inside pyfuse3's read of the device. So there is no moment at
which a fact is half retracted: what `vfs` retracts, before it replies to the request that makes it false, is
gone.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

from layerfs.ids import NodeId

#: (descriptor of the layer's root, path below it, what makes a real inode number the shown one).
Plain = tuple[int, bytes, int]


class Name(Protocol):
    """An entry of a merged directory (`stack.merge`)."""

    real: int
    is_dir: bool
    node: Any

    @property
    def home(self) -> Any: ...

    @property
    def lowers(self) -> Sequence[Any]: ...


class Shown(Protocol):
    """Attributes as `vfs.tree` computes them."""

    st: os.stat_result
    uid: int
    gid: int
    nlink: int
    ctime_ns: int
    blocks: int


class Gate(Protocol):
    #: somebody answers from what is published
    native: bool

    def publish_directory(
        self, directory: NodeId, names: Mapping[bytes, Name], plain: Mapping[Any, Plain]
    ) -> None:
        """All names of `directory`: whatever is not among them is known to be absent. `plain`: the homes
        whose files are shown as they are."""

    def unpublish_directory(self, directory: NodeId) -> None:
        """All of them are Python's again. Nothing that the gate answered for may be known to the kernel."""

    def retract_name(self, directory: NodeId, name: bytes) -> None:
        """`name` in `directory` is about to appear or mean something else."""

    def vanish_name(self, directory: NodeId, name: bytes) -> None:
        """`name` in `directory` is about to vanish: it is absent until it is retracted. Listings stay good:
        they pass it over."""

    def tell_attributes(self, node: NodeId, shown: Shown) -> None:
        """What stat shows of a node, until it is retracted or forgotten."""

    def retract_attributes(self, node: NodeId) -> None:
        """Attributes or the backing file of `node` are about to change."""

    def tell_no_capability(self, node: NodeId) -> None:
        """`node` has no `security.capability`, for which the kernel asks before the first write."""

    def retract_capability(self, node: NodeId) -> None:
        """`node` is about to get xattrs."""

    def claim(self, node: NodeId) -> None:
        """There is a node with this id now."""

    def forget(self, node: NodeId) -> None:
        """There is no such node any more."""

    def knows(self, node: NodeId) -> bool:
        """Whether the kernel has an object with this id that Python has no node for."""

    def whereabouts(self, node: NodeId) -> tuple[NodeId, bytes] | None:
        """Of such an object: its directory and its name there."""

    def holds(self, directory: NodeId) -> bool:
        """Whether the kernel has such objects in `directory`; if so the node must stay until `on_let_go`."""

    def known_in(self, directory: NodeId) -> list[NodeId]:
        """The objects that the kernel has in `directory` and Python has no node for."""

    def knows_in(self, directory: NodeId) -> bool:
        """Whether there are any."""

    def loaded(self) -> int:
        """How many names are published, those that have gone among them."""

    def loaded_in(self, directory: NodeId) -> int:
        """Of a directory."""

    def prune(self, nodes: Sequence[NodeId]) -> None:
        """Asks the kernel to forget nodes, in this order, those that nobody uses. For a thread: it may wait
        until their pages are written back, which takes answers. Raises OSError, EINVAL where the kernel
        cannot (FUSE_NOTIFY_PRUNE is Linux 6.18's)."""

    def adopt(self, directory: NodeId, name: bytes) -> int:
        """Python makes a node of a name. Its lookup count until now."""

    def entrust(self, directory: NodeId, name: bytes, lookups: int) -> bool:
        """The object of a plain name, which the kernel has looked up so many times, is the gate's. Returns
        whether it is."""

    def give_back(self, directory: NodeId, name: bytes, is_dir: bool) -> None:
        """Python has let go of the node of a name that is what it was when it was published."""

    def lend(self, handle: int, fd: int, writes: bool) -> None:
        """The open file `handle` (a node id, where files are opened without asking) may be read through `fd`,
        which stays the caller's; `writes`: written, too. Said again: through another descriptor."""

    def take_back(self, handle: int) -> None:
        """That ends; before the descriptor is closed at the latest."""

    def was_used(self, handle: int) -> bool:
        """Whether what was lent was read or written since this was asked last."""

    def open_backing(self, handle: int, node: NodeId, fd: int, allowed: bool) -> int:
        """`handle` of `node` is about to be opened; `fd` is its file. `allowed`: the kernel may read and
        write that itself (passthrough), unless it has the node open otherwise. Returns the id of the file
        that it reads and writes, the same for all handles that are open at a time; 0: it asks us, and keeps
        pages."""

    def close_backing(self, handle: int, node: NodeId) -> None:
        """It was released."""

    def hold_writes(self, held: bool) -> None:
        """Whether Python must see every WRITE that begins."""

    def settle_writes(self) -> None:
        """Waits until the gate has ended every WRITE that it began: for a thread."""

    def switch(self, node: NodeId, fd: int) -> None:
        """Files of `node` that the gate opened read `fd`, which stays the caller's, from now on."""

    def list_names(
        self, handle: int, directory: NodeId, parent: NodeId, names: Collection[bytes], fresh: bool
    ) -> tuple[list[bytes], Sequence[int]]:
        """The open directory `handle` lists `names`. `fresh`: a read from its start need not look again.

        Returns them in the order in which they are to be listed (those that were not plain when they came
        before the others, those that came later before all) and the offset behind each, which grows. Where
        the gate lists, a name keeps its offset as long as the directory lives."""

    def lists_now(self, handle: int) -> bool:
        """Whether what the open directory `handle` lists is what is there now. True where the gate does not
        list."""

    def answers(self, directory: NodeId, name: bytes) -> bool:
        """Whether the gate answers for `name`."""

    def counters(self) -> dict[str, int]:
        """What it did since the mount, and what it holds now:

            native.OPCODE       requests it answered; an opcode of FUSE in small letters ("lookup")
            passed.OPCODE       requests it handed on to Python
            latency.OPCODE.K    of those it answered, how many took less than 2**K µs and no less than half of
                                that (K 0: less than 1 µs)
            read, written       bytes of files it moved itself
            entries, known      names, and nodes, it has an answer for
            bytes               its memory

        What it does not count is left out.
        """


class NoGate:
    """Everything is asked of Python."""

    native = False

    def publish_directory(
        self, directory: NodeId, names: Mapping[bytes, Name], plain: Mapping[Any, Plain]
    ) -> None:
        pass

    def unpublish_directory(self, directory: NodeId) -> None:
        pass

    def retract_name(self, directory: NodeId, name: bytes) -> None:
        pass

    def vanish_name(self, directory: NodeId, name: bytes) -> None:
        pass

    def tell_attributes(self, node: NodeId, shown: Shown) -> None:
        pass

    def retract_attributes(self, node: NodeId) -> None:
        pass

    def tell_no_capability(self, node: NodeId) -> None:
        pass

    def retract_capability(self, node: NodeId) -> None:
        pass

    def claim(self, node: NodeId) -> None:
        pass

    def forget(self, node: NodeId) -> None:
        pass

    def knows(self, node: NodeId) -> bool:
        return False

    def whereabouts(self, node: NodeId) -> tuple[NodeId, bytes] | None:
        return None

    def holds(self, directory: NodeId) -> bool:
        return False

    def known_in(self, directory: NodeId) -> list[NodeId]:
        return []

    def knows_in(self, directory: NodeId) -> bool:
        return False

    def loaded(self) -> int:
        return 0

    def loaded_in(self, directory: NodeId) -> int:
        return 0

    def prune(self, nodes: Sequence[NodeId]) -> None:
        pass

    def adopt(self, directory: NodeId, name: bytes) -> int:
        return 0

    def entrust(self, directory: NodeId, name: bytes, lookups: int) -> bool:
        return False

    def give_back(self, directory: NodeId, name: bytes, is_dir: bool) -> None:
        pass

    def lend(self, handle: int, fd: int, writes: bool) -> None:
        pass

    def take_back(self, handle: int) -> None:
        pass

    def was_used(self, handle: int) -> bool:
        return False

    def open_backing(self, handle: int, node: NodeId, fd: int, allowed: bool) -> int:
        return 0

    def close_backing(self, handle: int, node: NodeId) -> None:
        pass

    def hold_writes(self, held: bool) -> None:
        pass

    def settle_writes(self) -> None:
        pass

    def switch(self, node: NodeId, fd: int) -> None:
        pass

    def list_names(
        self, handle: int, directory: NodeId, parent: NodeId, names: Collection[bytes], fresh: bool
    ) -> tuple[list[bytes], Sequence[int]]:
        return list(names), range(3, len(names) + 3)

    def lists_now(self, handle: int) -> bool:
        return True

    def answers(self, directory: NodeId, name: bytes) -> bool:
        return False

    def counters(self) -> dict[str, int]:
        return {}


#: Why there is no native gate; None: there is.
unavailable: str | None = "not loaded"
_native: ModuleType | None = None


def import_pyfuse3() -> None:
    """Imports pyfuse3, behind the native module where there is one: `fuse_session_mount` must be found there
    first. Sets `unavailable`."""
    global unavailable, _native
    if "pyfuse3" in sys.modules:
        if _native is None:
            unavailable = "pyfuse3 was loaded first"
        return
    before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        _native = importlib.import_module("layerfs.gate.native")
    except ImportError as error:
        unavailable = f"it was not built ({error})"
    finally:
        sys.setdlopenflags(before)
    import pyfuse3

    if _native is not None:
        _native.serve(os.fsencode(pyfuse3.__file__))
        unavailable = None


def make(
    descriptors: int, resolve: int, *, statfs: int, xattrs: bool, read_only: bool, openless: bool
) -> Any:
    """The process's native gate (`native.NativeGate`), or None: see `unavailable`. Raises MemoryError."""
    if _native is None:
        return None
    return _native.NativeGate(
        descriptors, resolve, statfs=statfs, xattrs=xattrs, read_only=read_only, openless=openless
    )
