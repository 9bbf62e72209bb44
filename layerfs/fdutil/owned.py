"""Descriptors that close themselves, and a bounded pool of them."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable


class OwnedFd:
    """A descriptor with one owner: closed when the last reference goes.

    Holding the object is what keeps the number valid: take a local reference before an `await` or before
    handing it to a thread, and the pool may drop its own meanwhile (reference counts are exact in CPython,
    which pyfuse3 needs anyway)."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # A number that was closed behind our back is our bug; there is nobody to tell in __del__, but closing
        # twice must not raise.
        try:
            self.close()
        except (OSError, TypeError):
            pass

    def __repr__(self) -> str:
        return f"OwnedFd({self.fd})"


class FdPool:
    """Least-recently-used pool of descriptors that can be opened again at any time.

    `capacity` bounds the descriptors kept, not those in use: an evicted one lives on while somebody holds its
    OwnedFd."""

    def __init__(self, capacity: int) -> None:
        self.capacity = max(1, capacity)
        self._fds: OrderedDict[Hashable, OwnedFd] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._fds

    def __len__(self) -> int:
        return len(self._fds)

    def get(self, key: Hashable, opener: Callable[[], int]) -> OwnedFd:
        """The descriptor kept under `key`, opened by `opener` (which returns a number) when there is none."""
        owned = self._fds.get(key)
        if owned is not None:
            self._fds.move_to_end(key)
            return owned
        try:
            fd = opener()
        except OSError as error:
            if error.errno != errno.EMFILE or not self._fds:
                raise
            self._fds.clear()  # what is kept here is the first thing to give up
            fd = opener()
        owned = OwnedFd(fd)
        self._fds[key] = owned
        if len(self._fds) > self.capacity:
            self._fds.popitem(last=False)
        return owned

    def drop(self, key: Hashable) -> None:
        self._fds.pop(key, None)

    def clear(self) -> None:
        self._fds.clear()
