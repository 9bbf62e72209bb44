"""The raw bytes of a blob on their way through a descriptor: hashed and counted, in a thread that can be
called off. Knows nothing of what they are.

A descriptor is duplicated, so that a thread that is late never meets a number that was closed and given to
another file. A pipe is waited for with patience: who closes a stream need not wait for what may never come.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import stat

#: Bytes that are read at once when nobody says how many.
RAW = 128 << 10
#: Milliseconds after which a thread that waits for a pipe looks whether its stream was closed.
_PATIENCE = 200


class RawOutput:
    """Writes a blob."""

    def __init__(self, fd: int, *, hashed: bool) -> None:
        self._fd = os.dup(fd)
        self._nowait = not stat.S_ISREG(os.fstat(fd).st_mode)
        self.hash = hashlib.sha256() if hashed else None
        self.size = 0
        self.closed = False

    def write(self, data: bytes | memoryview) -> None:
        if self.hash is not None:
            self.hash.update(data)
        self.size += len(data)
        view = memoryview(data)
        while view and not self.closed:
            view = view[self._write_some(view) :]

    def _write_some(self, view: memoryview) -> int:
        """Does not block for long: a write to a pipe that nobody reads could not be called off."""
        try:
            if self._nowait:
                return os.pwritev(self._fd, [view], -1, os.RWF_NOWAIT)
            return os.write(self._fd, view)
        except BlockingIOError:
            _ready(self._fd, select.POLLOUT)
        except OSError as error:
            if not self._nowait or error.errno not in (errno.EOPNOTSUPP, errno.ESPIPE, errno.EINVAL):
                raise
            self._nowait = False
        return 0

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class RawInput:
    """Reads a blob from a descriptor's position on, at most `limit` bytes."""

    def __init__(self, fd: int, limit: int | None, *, hashed: bool) -> None:
        self._fd = os.dup(fd)
        st = os.fstat(fd)
        self.seekable = stat.S_ISREG(st.st_mode)
        self._file_size = st.st_size
        self._left = limit
        self._head = b""
        self.hash = hashlib.sha256() if hashed else None
        self.taken = 0
        self.closed = False

    def head(self, size: int) -> bytes:
        """At least the first `size` bytes, if there are as many. `read` gives them again."""
        while len(self._head) < size and (more := self._read(RAW)):
            self._head += more
        return self._head

    def read(self, size: int = RAW) -> bytes:
        """The next raw bytes, about `size` of them; b"" at the end."""
        data, self._head = self._head or self._read(size), b""
        self.taken += len(data)
        if self.hash is not None:
            self.hash.update(data)
        return data

    def _read(self, size: int) -> bytes:
        if self._left is not None:
            size = min(size, self._left)
        data = b""
        if size and (self.seekable or self._wait()):
            data = os.read(self._fd, size)
        if self._left is not None:
            self._left -= len(data)
        return data

    def _wait(self) -> bool:
        """Until there is something to read; False when nobody wants it any more."""
        while not self.closed:
            if _ready(self._fd, select.POLLIN):
                return True
        return False

    def skip(self, size: int) -> bool:
        """Passes over `size` bytes of a regular file; False when there are fewer."""
        here = min(size, len(self._head))
        self._head = self._head[here:]
        rest = size - here
        if self._left is not None:
            if rest > self._left:
                return False
            self._left -= rest
        self.taken += size
        return not rest or os.lseek(self._fd, rest, os.SEEK_CUR) <= self._file_size

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _ready(fd: int, events: int) -> bool:
    """Whether a pipe or the like can be read or written, after waiting a moment for it."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(_PATIENCE))
