"""The control socket of a running mount: where it is, who may speak, and how.

WORK/layerfs/control, a Unix stream socket of mode 0600 in a directory of mode 0700. It is bound and
connected to through a descriptor of that directory, as the path of a socket has room for 107 bytes only. One
that a killed daemon left is replaced at the next mount, which holds the lock of the work directory. The
daemon speaks to root and to its own user (SO_PEERCRED).

Lines of JSON. The daemon's first one is its greeting; then each request, an object with `op`, has one answer,
in order: an object, with `error` (a text) where it could not be done. What a connection holds is given free
when it ends, however it ends.

    greeting    {"layerfs": VERSION, "protocol": 1}
    ping        {}                              still there
    writing     {"inodes": [N, ...],            the upper's inode numbers of files that are open for writing;
                 "passed": [N, ...]}            those that the kernel writes itself (data=passthrough)
    hold        {"found": BOOL}                 asks with "node" (st_ino as the mount shows it) and "inode"
                                                (in the upper): if it is that file, its next fsync closes it;
                                                where the kernel writes it itself that fsync is answered when
                                                the file is released
    held        {"held": BOOL}                  asks with "node": it is closed, and nothing is under way on it
    release     {}                              asks with "node"
    pause       {"open": [PATH, ...],           nothing is opened for writing any more; these are, and not
                 "nodes": [N, ...]}             closed: make an fsync of each through the mount, until it has
                                                ended or the node is `held`; ask again until there are none,
                                                then ask for
    paused      {}                              nothing changes from now on
    stat        an object: `statistics.Statistics`

PROTOCOL changes when an op comes to mean something else. A new op needs none: a daemon that does not know it
says so.

Names are text whose surrogate escapes stand for undecodable bytes. What an op does to the tree is told in
`layerfs.vfs.hold`.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

SOCKET = "control"
#: Directory in the work directory that holds it.
STATE = "layerfs"
PROTOCOL = 1
#: Longest request (bytes); answers may be longer.
MAX_REQUEST = 64 << 10
_UCRED = struct.Struct("iII")


def encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Raises ValueError."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def peer_uid(sock: socket.socket) -> int:
    """Who is at the other end. Raises OSError."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[1])
