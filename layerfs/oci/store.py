"""Directories that are made once and then only read: published whole under a key, or not at all. Two
processes that want the same one meet at a lock. Does not know what is in them (`cache` does).

    KIND/HEX/              an entry: `root/`, what was made, and `record.json`, what is known of it (`names`:
                           how many there are in the root)
    tmp/KIND-HEX/          the same, being made by whoever holds the lock
    locks/KIND-HEX         flock(2) of whoever makes the entry; the files stay

| order of writes                         | a crash leaves            | who clears it                 |
|-----------------------------------------|---------------------------|-------------------------------|
| lock taken, what is in tmp/KIND-HEX     | a lock that nobody holds  | nobody has to                 |
| removed; tmp/KIND-HEX/root filled       | a part, in tmp/           | the next that makes any entry |
| record.json written, file system synced | a whole, in tmp/          | the same                      |
| renamed to KIND/HEX: the commit point   | the entry                 | -                             |
| KIND/ synced                            | the entry, or one in tmp/ | -                             |
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from layerfs.errors import LayerError, LayerfsError
from layerfs.fdutil import OwnedFd, syncfs
from layerfs.oci.beneath import DIRECTORY, ROOT, names_in, remove
from layerfs.oci.member import display

_ROOT = "root"
_RECORD = "record.json"
#: In the record: how many names the root had when it was published.
_NAMES = "names"
_MAX_RECORD = 256 << 20

#: Fills the empty directory that a descriptor is of, and returns what is to be known of it (JSON; names of
#: files as `os.fsdecode` gives them).
Make = Callable[[int], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Made:
    """An entry. `path` is that of its root; `new`: this very call has made it."""

    path: str
    record: dict[str, Any]
    new: bool


class Store:
    def __init__(self, path: str) -> None:
        """Opens the store in the directory `path`, or makes it. Raises LayerError where it is not this user's
        own."""
        self.path = path
        with self._plainly("cannot be used"):
            with contextlib.suppress(FileExistsError):
                os.makedirs(path, 0o700)
            self._fd = OwnedFd(os.open(path, ROOT | os.O_NOFOLLOW))
            st = os.fstat(self._fd.fd)
            if st.st_uid != os.geteuid():
                raise LayerError(
                    f"{self._shown} belongs to user {st.st_uid}: set XDG_CACHE_HOME to a directory of yours",
                    errno.EPERM,
                )
            # What is there is not made right: it may be anything that somebody named to us.
            if stat.S_IMODE(st.st_mode) & 0o022:
                raise LayerError(
                    f"{self._shown} can be written to by others: chmod go-w, or set XDG_CACHE_HOME",
                    errno.EPERM,
                )

    @property
    def _shown(self) -> str:
        return f"the cache {display(os.fsencode(self.path))}"

    def find(self, kind: str, key: str) -> Made | None:
        """The entry; None when there is none. Raises LayerError for one that somebody damaged."""
        path = os.path.join(self.path, kind, key)
        try:
            with open(os.path.join(path, _RECORD), "rb") as file:
                record = json.loads(file.read(_MAX_RECORD))
            if isinstance(record, dict) and _is_whole(os.path.join(path, _ROOT), record):
                return Made(os.path.join(path, _ROOT), record, new=False)
        except FileNotFoundError:
            if not os.path.lexists(path):
                return None
        except (OSError, ValueError):
            pass
        raise LayerError(f"{display(os.fsencode(path))} in the cache is damaged: remove that directory")

    def get(self, kind: str, key: str, make: Make, waits: Callable[[], None] = lambda: None) -> Made:
        """The entry, made by `make` when there is none; `waits` is called before waiting for another process
        that makes it. Raises what `make` raises, LayerError."""
        found = self.find(kind, key)
        if found is not None:
            return found
        with self._plainly("cannot be written"):
            for name in ("locks", "tmp", kind):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=self._fd.fd)
            name = f"{kind}-{key}"
            with self._locked(name, waits):
                found = self.find(kind, key)
                if found is not None:
                    return found
                self._sweep(name)
                return self._make_locked(kind, key, make)

    def _make_locked(self, kind: str, key: str, make: Make) -> Made:
        tmp = OwnedFd(os.open("tmp", DIRECTORY, dir_fd=self._fd.fd))
        name = os.fsencode(f"{kind}-{key}")
        remove(tmp, name)
        try:
            os.mkdir(name, 0o700, dir_fd=tmp.fd)
            entry = OwnedFd(os.open(name, DIRECTORY, dir_fd=tmp.fd))
            os.mkdir(_ROOT, 0o700, dir_fd=entry.fd)
            root = OwnedFd(os.open(_ROOT, DIRECTORY, dir_fd=entry.fd))
            record = make(root.fd) | {_NAMES: len(names_in(root))}
            _write(entry, json.dumps(record).encode())
            syncfs(entry.fd)
            kinds = OwnedFd(os.open(kind, DIRECTORY, dir_fd=self._fd.fd))
            os.rename(name, key, src_dir_fd=tmp.fd, dst_dir_fd=kinds.fd)
            os.fsync(kinds.fd)
        except BaseException:
            with contextlib.suppress(OSError, LayerfsError):
                remove(tmp, name)
            raise
        return Made(os.path.join(self.path, kind, key, _ROOT), record, new=True)

    @contextlib.contextmanager
    def _locked(self, name: str, waits: Callable[[], None]) -> Iterator[None]:
        fd = self._open_lock(name)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waits()
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _open_lock(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(f"locks/{name}", flags, 0o600, dir_fd=self._fd.fd)

    def _sweep(self, own: str) -> None:
        """Removes what killed processes left: what nobody holds the lock of."""
        tmp = OwnedFd(os.open("tmp", DIRECTORY, dir_fd=self._fd.fd))
        for name in names_in(tmp):
            if os.fsdecode(name) == own:
                continue
            fd = self._open_lock(os.fsdecode(name))
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(tmp, name)
            except (OSError, LayerError):
                pass  # somebody is at it; what cannot be removed stays out of sight
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _plainly(self, what: str) -> Iterator[None]:
        """One line for what the file system refuses."""
        try:
            yield
        except OSError as error:
            raise LayerError(f"{self._shown} {what}: {error.strerror}", error.errno) from error


def _is_whole(root: str, record: dict[str, Any]) -> bool:
    """Whether an entry looks as it did when it was published: as far as one listing tells, for every mount
    asks. It shows most of what a broken-off `rm -r` leaves."""
    if not os.path.isdir(root):
        return False
    try:
        return record.get(_NAMES) in (None, len(os.listdir(root)))
    except PermissionError:  # an ordinary user's layer, whose root says so
        return True


def _write(directory: OwnedFd, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(_RECORD, flags, 0o600, dir_fd=directory.fd), "wb") as file:
        file.write(data)
