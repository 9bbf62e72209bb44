"""Numbers of upper objects that cannot carry an xattr: symbolic links and devices under `user.` xattrs.

WORK/layerfs/inodes is a log of lines `HANDLE-TYPE:HANDLE-HEX REAL-INO INO\\n` (decimal numbers). A file
handle holds the inode's generation, so an entry can never speak of another object that got the same inode
number later. Lines are appended with one write each; a torn last line (crash) is dropped at the next mount,
and the object then shows its own number. The log is compacted at mount.
"""

from __future__ import annotations

import os

from layerfs.fdutil import OwnedFd, name_to_handle

_NAME = b"inodes"


class InodeLog:
    def __init__(self, state: OwnedFd) -> None:
        self._state = state
        self._numbers: dict[int, tuple[bytes, int]] = {}
        self._fd: OwnedFd | None = None
        self._load()

    def _load(self) -> None:
        try:
            fd = os.open(_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._state.fd)
        except FileNotFoundError:
            return
        lines = 0
        with open(fd, "rb") as log:
            for line in log:
                lines += 1
                fields = line.split()
                if not line.endswith(b"\n") or len(fields) != 3 or not (fields[1] + fields[2]).isdigit():
                    continue
                self._numbers[int(fields[1])] = (fields[0], int(fields[2]))
        if lines != len(self._numbers):
            self._compact()

    def _compact(self) -> None:
        """Rewrites the log without torn and outdated lines: a temporary file, renamed."""
        draft = _NAME + b".new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(draft, flags, 0o600, dir_fd=self._state.fd), "wb") as log:
            for real, (key, ino) in self._numbers.items():
                log.write(b"%b %d %d\n" % (key, real, ino))
            log.flush()
            os.fsync(log.fileno())
        os.rename(draft, _NAME, src_dir_fd=self._state.fd, dst_dir_fd=self._state.fd)

    def __bool__(self) -> bool:
        return bool(self._numbers)

    def get(self, parent: int, name: bytes, real: int) -> int | None:
        """The number recorded for the object `name` in `parent`, whose inode number is `real`."""
        known = self._numbers.get(real)
        if known is None or known[0] != _key(parent, name):
            return None
        return known[1]

    def put(self, parent: int, name: bytes, real: int, ino: int) -> None:
        """Records it. Raises OSError (ENOSPC)."""
        key = _key(parent, name)
        if key is None:
            return
        if self._fd is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = OwnedFd(os.open(_NAME, flags, 0o600, dir_fd=self._state.fd))
        os.write(self._fd.fd, b"%b %d %d\n" % (key, real, ino))
        self._numbers[real] = (key, ino)


def _key(parent: int, name: bytes) -> bytes | None:
    handle = name_to_handle(parent, name)
    return None if handle is None else b"%d:%b" % (handle[0], handle[1].hex().encode())
