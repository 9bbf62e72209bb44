"""fsync of files of a mount, each in a process of its own, for whoever has their writers held.

Why apart: closing a file of a FUSE mount waits until the pages that others stored through mappings are
written back (fs/fuse/file.c fuse_flush), and a held WRITE is not answered. The holder must not be the one
that waits: killed, it would close the file before its socket, and nobody could give anything free. So the
process that has the control socket never opens a file of the mount for reading or writing, and these here do
not have the socket.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct

from layerfs.fdutil import RESOLVE_INSIDE_MOUNT, openat2

#: Number of the question, and errno or 0.
_ANSWER = struct.Struct("=Ii")
_NUMBER = struct.Struct("=I")
_LONGEST = 1 << 16


class Syncer:
    """A process that starts one more for each file. To be made before there are threads; ends with whoever
    made it."""

    def __init__(self, root: int) -> None:
        """`root`: a descriptor of the mount's root. Raises OSError."""
        self._started = 0
        self._answers: dict[int, int] = {}
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._socket.close()
                _serve(theirs, root)
            finally:
                os._exit(0)
        theirs.close()

    def start(self, path: bytes) -> int:
        """Begins an fsync of the file `path` of the mount: its number. Raises OSError."""
        if len(path) > _LONGEST:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        self._started += 1
        self._socket.send(_NUMBER.pack(self._started) + path)
        return self._started

    def ended(self, number: int, timeout: float) -> bool:
        """Whether that fsync has ended, within so many seconds. Raises OSError: also what it failed with."""
        while number not in self._answers and select.select([self._socket], [], [], timeout)[0]:
            answer = self._socket.recv(_ANSWER.size)
            if len(answer) != _ANSWER.size:
                raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            which, error = _ANSWER.unpack(answer)
            self._answers[which] = error
        error = self._answers.pop(number, None)
        if error:
            raise OSError(error, os.strerror(error))
        return error is not None

    def close(self) -> None:
        """May be called again."""
        self._socket.close()
        pid, self._pid = self._pid, 0
        if pid:
            os.waitpid(pid, 0)


def _serve(sock: socket.socket, root: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for all; the end of the socket is ours
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    low, high = sorted((root, sock.fileno()))
    os.closerange(0, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, os.sysconf("SC_OPEN_MAX"))
    for _ in range(3):
        os.open(os.devnull, os.O_RDWR)  # the standard streams, unless they are in use here
    while question := sock.recv(_NUMBER.size + _LONGEST):
        if os.fork() == 0:
            try:
                (number,) = _NUMBER.unpack_from(question)
                sock.send(_ANSWER.pack(number, _sync(root, question[_NUMBER.size :])))
            finally:
                os._exit(0)  # which may wait until the file is given free


def _sync(root: int, path: bytes) -> int:
    """errno, or 0."""
    try:
        fd = openat2(root, path, os.O_RDONLY | os.O_NONBLOCK, resolve=RESOLVE_INSIDE_MOUNT)
        os.fsync(fd)
        return 0
    except OSError as error:
        return error.errno or errno.EIO
