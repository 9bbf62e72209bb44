"""The seam to the native path: what `vfs` publishes, and the gate that does nothing with it.

`vfs` calls these at the places where a fact becomes true or stops being true; the rules are:

* `retract_*` is called *before* the reply to the request that makes the fact false, and returns only when no
  answer from the old fact is still being built.
* A fact is published with the generation of its directory at which it was computed; a publish that comes late
  (the task awaited and somebody retracted meanwhile) must be dropped by the receiver.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from layerfs.ids import NodeId


class Gate(Protocol):
    def publish_directory(self, directory: NodeId, generation: int, names: Iterable[bytes]) -> None:
        """All names of `directory`: whatever is not among them is known to be absent."""

    def retract_name(self, directory: NodeId, name: bytes) -> None:
        """`name` in `directory` is about to appear, vanish or mean something else."""

    def retract_attributes(self, node: NodeId) -> None:
        """Attributes, xattrs or the backing file of `node` are about to change."""

    def forget(self, node: NodeId) -> None:
        """The kernel has forgotten `node`."""

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

    def publish_directory(self, directory: NodeId, generation: int, names: Iterable[bytes]) -> None:
        pass

    def retract_name(self, directory: NodeId, name: bytes) -> None:
        pass

    def retract_attributes(self, node: NodeId) -> None:
        pass

    def forget(self, node: NodeId) -> None:
        pass

    def counters(self) -> dict[str, int]:
        return {}
