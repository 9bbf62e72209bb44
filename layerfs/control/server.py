"""The daemon's end of the control socket. What is asked for is done by the `Session` that whoever serves the
mount gives; the protocol is `wire`."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable
from typing import Any, Protocol

import trio

import layerfs
from layerfs.control import wire
from layerfs.fdutil import at_path

log = logging.getLogger("layerfs.control")


class Session(Protocol):
    """One connection."""

    async def answer(self, op: str, request: dict[str, Any]) -> dict[str, Any]:
        """Raises LookupError for an op that there is not, ValueError or TypeError for one asked in a wrong
        way, OSError."""

    def end(self) -> None:
        """The connection is gone."""


def bind(state: int) -> socket.socket | None:
    """The listening socket in the directory `state` (a descriptor); the caller holds the work directory's
    lock. None, with a line in the log, where there can be none: the mount is good without."""
    remove(state)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        sock.bind(at_path(state, wire.SOCKET.encode()))
        sock.listen(16)
    except OSError as error:
        sock.close()
        log.info("no control socket: %s", error.strerror)
        return None
    finally:
        os.umask(before)
    return sock


def remove(state: int) -> None:
    try:
        os.unlink(wire.SOCKET, dir_fd=state)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.info("control socket: %s", error.strerror)


async def serve(sock: socket.socket, open_session: Callable[[], Session]) -> None:
    """Serves connections until cancelled."""

    async def connected(stream: trio.SocketStream) -> None:
        try:
            if wire.peer_uid(stream.socket._sock) in (0, os.geteuid()):  # type: ignore[attr-defined]
                session = open_session()
                try:
                    await _converse(stream, session)
                finally:
                    session.end()
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # it went away
        except Exception:
            log.exception("a control connection failed")

    listener = trio.SocketListener(_listening(sock))
    await trio.serve_listeners(connected, [listener])


def _listening(sock: socket.socket) -> trio.socket.SocketType:
    sock.setblocking(False)
    return trio.socket.from_stdlib_socket(sock)


async def _converse(stream: trio.SocketStream, session: Session) -> None:
    await stream.send_all(wire.encode({"layerfs": layerfs.__version__, "protocol": wire.PROTOCOL}))
    buffer = b""
    while True:
        line, found, rest = buffer.partition(b"\n")
        if found:
            buffer = rest
            answer = await _answer_while_connected(stream, session, line)
            if answer is None:
                return
            await stream.send_all(wire.encode(answer))
            continue
        if len(buffer) > wire.MAX_REQUEST:
            return
        more = await stream.receive_some(wire.MAX_REQUEST)
        if not more:
            return
        buffer += more


async def _answer_while_connected(
    stream: trio.SocketStream, session: Session, line: bytes
) -> dict[str, Any] | None:
    """The answer to one request; None when whoever asked went away before it was ready."""
    answer: dict[str, Any] | None = None

    async def hang_up(scope: trio.CancelScope) -> None:
        # Readable means gone: nobody sends a second request before the first is answered.
        await trio.lowlevel.wait_readable(stream.socket)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up, nursery.cancel_scope)
        answer = await _answer(session, line)
        nursery.cancel_scope.cancel()
    return answer


async def _answer(session: Session, line: bytes) -> dict[str, Any]:
    try:
        request = wire.decode(line)
        return await session.answer(str(request.get("op")), request)
    except OSError as error:
        return {"error": os.strerror(error.errno or errno.EIO)}
    except (KeyError, ValueError, TypeError) as error:
        return {"error": f"a request that makes no sense: {error!r}"}
    except LookupError as error:
        return {"error": f"no such request: {error}"}
