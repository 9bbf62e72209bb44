"""A command's end of the control socket (`wire` has the protocol): asks the daemon of a mount who writes, and
has writers held. What is held is free again when the connection is closed, by whatever."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

from layerfs.control import wire
from layerfs.errors import MountError
from layerfs.fdutil import (
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    OwnedFd,
    at_path,
    openat2,
)

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: Attempts at closing all files, each after some were renamed meanwhile.
_ROUNDS = 100
#: Seconds for one fsync, which may have much to write.
_PATIENCE = 60.0
_INSIDE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV


class Connection:
    """To the daemon of one mount. Implements `oci.snapshot.Writers`."""

    def __init__(self, mountpoint: str, work: str) -> None:
        """`work`: the mount's work directory. Raises MountError."""
        self._mountpoint = mountpoint
        try:
            self._root = OwnedFd(os.open(mountpoint, _DIRECTORY))
            state = OwnedFd(os.open(os.path.join(work, wire.STATE), _DIRECTORY))
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            self._socket.connect(at_path(state.fd, wire.SOCKET.encode()))
        except OSError as error:
            raise self._lost(error) from None
        self._file = self._socket.makefile("rb")
        greeting = self._receive()
        if greeting.get("protocol") != wire.PROTOCOL:
            self.close()
            raise MountError(
                f"{mountpoint}: is served by layerfs {greeting.get('layerfs')}, which speaks another"
                " protocol: unmount it and use --upper and --lower",
                errno.EPROTO,
            )

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._socket.close()
        self._root.close()

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
            f"{self._mountpoint}: its daemon cannot be asked{why}: unmount it and use --upper and --lower",
            error.errno if error is not None else errno.ECONNRESET,
        )

    # -- one file ----------------------------------------------------------------------------------

    def writing(self, inode: int) -> bool:
        return inode in self.ask("writing")["inodes"]

    @contextlib.contextmanager
    def held(self, inode: int, path: bytes) -> Iterator[bool]:
        try:
            file = self._open(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
                raise
            yield False
            return
        node = os.fstat(file.fd).st_ino
        if not self.ask("hold", node=node, inode=inode)["found"]:
            yield False
            return
        try:
            os.fsync(file.fd)
            yield bool(self.ask("held", node=node)["held"])
        finally:
            self.ask("release", node=node)

    def _open(self, path: bytes) -> OwnedFd:
        """A file of the mount. Raises OSError."""
        return OwnedFd(openat2(self._root.fd, path, os.O_RDONLY | os.O_NONBLOCK, resolve=_INSIDE))

    # -- everything ----------------------------------------------------------------------------------

    def pause(self) -> None:
        """Returns when nothing changes in the mount any more; so it is until `close`. Raises MountError."""
        for _ in range(_ROUNDS):
            answer = self.ask("pause")
            if not answer["open"]:
                self.ask("paused")
                return
            for text, node in zip(answer["open"], answer["nodes"], strict=True):
                self._sync(os.fsencode(text), node)
        raise MountError(f"{self._mountpoint}: files in it are renamed too fast for a pause; try again")

    def _sync(self, path: bytes, node: int) -> None:
        """fsync of a file that is open for writing, if `path` still is it. Raises MountError.

        In a thread: where the way to it is not in the kernel's cache (another name of a hard link), it may
        wait for the lock of a directory that a held change has. Then all is given free."""

        def work() -> None:
            try:
                file = self._open(path)
                # Renamed meanwhile, or something is mounted over it: the next round will tell.
                if os.fstat(file.fd).st_ino == node:
                    os.fsync(file.fd)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
                    failed.append(error)

        failed: list[OSError] = []
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        if thread.is_alive():
            self.close()
            raise MountError(
                f"{self._mountpoint}: cannot be paused: {os.fsdecode(path)} is in use; try again"
            )
        if failed:
            raise MountError(
                f"{self._mountpoint}: cannot be paused: {os.fsdecode(path)} is written to, and cannot be"
                f" opened: {failed[0].strerror}",
                failed[0].errno,
            )
