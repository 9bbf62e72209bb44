"""A command's end of the control socket (`wire` has the protocol): asks the daemon of a mount, and has
writers held. What is held is free again when the connection is closed, by whatever."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, Self

from layerfs.control import wire
from layerfs.control.apart import Syncer
from layerfs.errors import MountError
from layerfs.fdutil import RESOLVE_INSIDE_MOUNT, OwnedFd, at_path, openat2

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: Attempts at closing all files, each after some were renamed meanwhile.
_ROUNDS = 100
#: Seconds for one fsync, which may have much to write.
_PATIENCE = 60.0
#: Seconds to wait for its end before the daemon is asked whether it has arrived.
_LOOK = 0.01
#: What opening a name says that is not there any more, or has become something else.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV)


class Channel:
    """Questions to the daemon of one mount, and its answers."""

    #: What else can be done when there are none.
    otherwise = ""

    def __init__(self, mountpoint: str, work: str) -> None:
        """`work`: the mount's work directory. Raises MountError."""
        self._mountpoint = mountpoint
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._file = self._socket.makefile("rb")
        try:
            state = OwnedFd(os.open(os.path.join(work, wire.STATE), _DIRECTORY))
            self._socket.connect(at_path(state.fd, wire.SOCKET.encode()))
            greeting = self._receive()
        except OSError as error:
            self.close()
            raise self._lost(error) from None
        except MountError:
            self.close()
            raise
        if greeting.get("protocol") != wire.PROTOCOL:
            self.close()
            raise MountError(
                f"{mountpoint}: is served by layerfs {greeting.get('layerfs')}, which speaks another"
                f" protocol{self.otherwise}",
                errno.EPROTO,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called again."""
        self._file.close()
        self._socket.close()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Raises MountError where it cannot be done, or the daemon is gone."""
        try:
            self._socket.sendall(wire.encode({"op": op, **arguments}))
        except OSError as error:
            raise self._lost(error) from None
        answer = self._receive()
        if "error" in answer:
            raise MountError(f"{self._mountpoint}: {op}: {answer['error']}")
        return answer

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._file.readline()
            if not line.endswith(b"\n"):
                raise self._lost(None)
            return wire.decode(line)
        except OSError as error:
            raise self._lost(error) from None
        except ValueError:
            raise MountError(f"{self._mountpoint}: its daemon talks nonsense", errno.EPROTO) from None

    def _lost(self, error: OSError | None) -> MountError:
        why = f" ({error.strerror})" if error is not None else ""
        return MountError(
            f"{self._mountpoint}: its daemon cannot be asked{why}{self.otherwise}",
            error.errno if error is not None else errno.ECONNRESET,
        )


class Connection(Channel):
    """Has writers held. Implements `oci.snapshot.Writers`."""

    otherwise = ": unmount it and use --upper and --lower"

    def __init__(self, mountpoint: str, work: str) -> None:
        """As `Channel`. Raises MountError."""
        self._closed = False
        self._mountpoint = mountpoint
        try:
            self._root = OwnedFd(os.open(mountpoint, _DIRECTORY))
            self._syncer = Syncer(self._root.fd)
        except OSError as error:
            raise self._lost(error) from None
        super().__init__(mountpoint, work)

    def close(self) -> None:
        """May be called again."""
        self._closed = True
        super().close()
        self._syncer.close()
        self._root.close()

    # -- one file ----------------------------------------------------------------------------------

    def writing(self, inode: int) -> bool:
        return inode in self.ask("writing")["inodes"]

    def undivided(self, inode: int) -> bool:
        return inode in self.ask("writing").get("passed", ())

    @contextlib.contextmanager
    def held(self, inode: int, path: bytes) -> Iterator[bool]:
        try:
            # O_PATH: see `apart`.
            file = OwnedFd(openat2(self._root.fd, path, os.O_PATH, resolve=RESOLVE_INSIDE_MOUNT))
        except OSError as error:
            if error.errno not in _GONE:
                raise
            yield False
            return
        node = os.fstat(file.fd).st_ino
        if not self.ask("hold", node=node, inode=inode)["found"]:
            yield False
            return
        try:
            yield self._fsync(path, node)
        finally:
            if not self._closed:
                self.ask("release", node=node)

    def _fsync(self, path: bytes, node: int) -> bool:
        """Whether the fsync of a file closed it; with data=passthrough it lasts as long as that. What is gone
        meanwhile is left. Raises MountError: then all is given free."""
        name = os.fsdecode(path)
        patience = time.monotonic() + _PATIENCE
        try:
            number = self._syncer.start(path)
            while not self._syncer.ended(number, _LOOK):
                if self.ask("held", node=node)["held"]:
                    return True
                if time.monotonic() > patience:
                    # It may wait for the lock of a directory that a held change has, or for the mount's
                    # background requests, of which held ones may be too many.
                    self.close()
                    raise MountError(f"{self._mountpoint}: {name} is in use and cannot be held; try again")
        except OSError as error:
            if error.errno not in _GONE:
                raise MountError(
                    f"{self._mountpoint}: {name} is written to, and cannot be held: {error.strerror}",
                    error.errno,
                ) from None
        return bool(self.ask("held", node=node)["held"])

    # -- everything ----------------------------------------------------------------------------------

    def pause(self) -> None:
        """Returns when nothing changes in the mount any more; so it is until `close`. Raises MountError."""
        for _ in range(_ROUNDS):
            answer = self.ask("pause")
            if not answer["open"]:
                self.ask("paused")
                return
            for text, node in zip(answer["open"], answer["nodes"], strict=True):
                self._fsync(os.fsencode(text), node)
        raise MountError(f"{self._mountpoint}: files in it are renamed too fast for a pause; try again")
