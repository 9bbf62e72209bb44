"""Who may speak on the control socket, and what it answers to nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.control import wire
from layerfs.control.client import Connection
from layerfs.errors import MountError
from layerfs.fdutil import at_path
from tests.support.mounts import Layerfs, why_no_layerfs
from tests.support.stack import Stack

live = pytest.mark.skipif(bool(why_no_layerfs()), reason=str(why_no_layerfs()))


@contextlib.contextmanager
def raw(work: Path) -> Iterator[socket.socket]:
    state = os.open(work / wire.STATE, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(20)
            sock.connect(at_path(state, wire.SOCKET.encode()))
            yield sock
    finally:
        os.close(state)


def connection(stack: Stack) -> Connection:
    assert stack.work is not None
    return Connection(str(stack.mnt), str(stack.work))


@live
def test_it_is_there_while_mounted_and_private(stack: Stack) -> None:
    assert stack.work is not None
    path = stack.work / wire.STATE / wire.SOCKET
    with Layerfs(stack):
        st = path.lstat()
        assert stat.S_ISSOCK(st.st_mode) and stat.S_IMODE(st.st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with connection(stack) as asked:
            assert asked.ask("ping") == {}
    assert not path.exists()


@live
def test_one_that_a_killed_daemon_left_is_replaced(stack: Stack) -> None:
    assert stack.work is not None
    with Layerfs(stack) as mount:
        mount.kill()
        assert (stack.work / wire.STATE / wire.SOCKET).exists()
        with pytest.raises(MountError, match="cannot be asked"):
            connection(stack)
        mount.remount()
        with connection(stack) as asked:
            assert asked.ask("ping") == {}


@live
def test_long_paths(make_stack: type[Stack]) -> None:
    """sockaddr_un has room for 107 bytes."""
    short = make_stack()
    deep = short.dir / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    stack = make_stack(deep)
    with Layerfs(stack), connection(stack) as asked:
        assert asked.ask("ping") == {}


@live
def test_nonsense_is_answered_and_harms_nobody(stack: Stack) -> None:
    assert stack.work is not None
    with Layerfs(stack):
        for line in (
            b"",
            b"{",
            b"[]",
            b"3",
            b"\xff\x00",
            b"{}",
            b'{"op": "no-such"}',
            b'{"op": 7}',
            b'{"op": "hold"}',
            b'{"op": "hold", "node": "x", "inode": []}',
            b'{"op": "hold", "node": 99999999999999999999999, "inode": 1}',
            b'{"op": "release", "node": 5}',
            b'{"op": "held", "node": -1}',
        ):
            with raw(stack.work) as sock, sock.makefile("rb") as file:
                assert json.loads(file.readline())["protocol"] == wire.PROTOCOL
                sock.sendall(line + b"\n")
                answer = json.loads(file.readline())
                assert "error" in answer or answer in ({}, {"found": False}, {"held": False}), (line, answer)
                sock.sendall(b'{"op": "ping"}\n')
                assert json.loads(file.readline()) == {}
        with raw(stack.work) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(40):
                sock.sendall(b"x" * 10000)  # one line without an end: hung up on
            while sock.recv(1000):
                pass
        (stack.mnt / "f").write_text("1")


@live
def test_strangers_are_hung_up_on(root: None, stack: Stack) -> None:
    """Even where the modes of directories let them through to the socket."""
    assert stack.work is not None
    with Layerfs(stack):
        for path in (stack.work / wire.STATE / wire.SOCKET, stack.work / wire.STATE, stack.work, stack.dir):
            os.chmod(path, 0o777)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            said = b"no connection"
            with contextlib.suppress(Exception), raw(stack.work) as sock:
                said = b"<%s>" % sock.recv(100)
            os.write(write, said)
            os._exit(0)
        os.close(write)
        assert os.read(read, 100) == b"<>"
        os.close(read)
        os.waitpid(child, 0)


def test_another_protocol_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / wire.STATE).mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(tmp_path / wire.STATE / wire.SOCKET))
        listening.listen()

        def greet() -> None:
            for greeting in (b'{"layerfs": "9", "protocol": 2}\n', b"hello\n", b""):
                with listening.accept()[0] as sock:
                    sock.sendall(greeting)

        thread = threading.Thread(target=greet)
        thread.start()
        for expected in ("another protocol", "talks nonsense", "cannot be asked"):
            with pytest.raises(MountError, match=expected) as caught:
                Connection(str(tmp_path), str(tmp_path))
            assert "\n" not in str(caught.value)
        thread.join()
