"""What a running mount counts, as it tells it: the object that the op `stat` of `wire` and the virtual xattr
`layerfs.stat` answer with, and that `layerfs stat --json` prints. Counts nothing.
"""

from __future__ import annotations

from typing import TypedDict


class DataPath(TypedDict):
    #: "passthrough", "cached" or "python"
    mode: str
    #: why this one, for people
    why: str


class GateState(TypedDict):
    #: requests are answered natively, where they can be
    on: bool
    #: why, or why not, for people
    why: str
    #: names it has an answer for
    entries: int
    #: nodes it has an answer for
    known: int
    #: its memory (bytes); `memory` has it as well
    bytes: int


class Requests(TypedDict):
    """Of one kind. Histograms: item k is the number of requests that took less than 2**k µs and no less than
    half of that (item 0: less than 1 µs); the last item is not 0."""

    #: answered by the gate
    native: int
    #: answered by Python; for kinds that it never sees, by libfuse
    python: int
    #: times of those answered by the gate; empty where it does not measure
    native_us: list[int]
    #: times of those answered by Python, from the start of the handler to its end
    python_us: list[int]


class CopyUps(TypedDict):
    """Objects that came into the upper because something in them was changed."""

    count: int
    #: those of `count` that are directories
    directories: int
    #: those of `count` that got attributes only; once more in `count` when their data follow
    metadata_only: int
    #: those of `count` whose data were cloned
    reflinked: int
    #: data copied for the others; holes are not
    bytes: int


class Moved(TypedDict):
    """Bytes of files that went through the daemon; what the kernel has in its page cache or passes through
    did not."""

    read: int
    written: int


class Statistics(TypedDict):
    """Numbers are since the mount, where not said otherwise."""

    #: of layerfs
    version: str
    #: seconds since the mount
    uptime: float
    data: DataPath
    gate: GateState
    #: by kind: an opcode of FUSE, in small letters
    requests: dict[str, Requests]
    copyups: CopyUps
    bytes: Moved
    #: now: objects that the kernel holds, or Python keeps in use
    nodes: int
    #: now: resident memory of the daemon (bytes)
    memory: int
    #: now: descriptors the daemon has open
    descriptors: int
