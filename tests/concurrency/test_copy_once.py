"""One copy-up for all who want it; who waits can be interrupted and killed; a copy that nobody wants is given
up and leaves nothing.

Where the kernel asks before it opens a file (data=python) that is open(2). Where it does not (data=cached) it
is the first write(2), for which the kernel holds the inode's lock: a second writer waits for that, and so
does unlink(2) of the file.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import Layerfs
from tests.support.stack import Stack

from .conftest import GIB, PATIENCE, Created, Doing, copies_under_way, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("root")]

#: Opens argv[1] for writing by open(2) itself: Python would call it again after EINTR; then writes argv[2],
#: if there is one. Says what came of it.
_OPENER = """
import ctypes, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.siginterrupt(signal.SIGUSR1, True)
libc = ctypes.CDLL(None, use_errno=True)
print("ready", flush=True)
sys.stdin.readline()
done = fd = libc.open(os.fsencode(sys.argv[1]), os.O_RDWR)
if sys.argv[2:]:
    done = libc.pwrite(fd, sys.argv[2].encode(), len(sys.argv[2]), 0)
print(ctypes.get_errno() if done < 0 else "done", flush=True)
"""

_OPENAT, _PWRITE = {"x86_64": (257, 18), "aarch64": (56, 68)}.get(os.uname().machine, (-1, -1))


class Opener:
    """A process that opens a file for writing, and writes `text` to its start, as soon as it may `go`: a copy
    may be over in the time that an interpreter takes to start."""

    def __init__(self, path: Path, text: str = "") -> None:
        self._waits_in = str(_PWRITE if text else _OPENAT)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OPENER, str(path), *([text] if text else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def waits(self) -> bool:
        """Whether it is inside open(2), or pwrite(2) when it writes."""
        try:
            said = Path(f"/proc/{self.process.pid}/syscall").read_text().split()
        except OSError:
            return False
        return said[0] == self._waits_in

    def answer(self) -> str:
        return self.process.communicate(timeout=PATIENCE)[0].strip()


@pytest.fixture
def big_stack(make_stack: type[Stack], big_files: Callable[[int], Path]) -> Stack:
    stack = make_stack()
    stack.lowers = [big_files(GIB)]
    return stack


def test_two_writers_copy_once(big_stack: Stack) -> None:
    with Layerfs(big_stack, "data=python") as mount, Created(f"{big_stack.work}/work") as created:
        path = mount.mnt / "big"
        writers = [Doing(lambda: os.open(path, os.O_RDWR)) for _ in range(2)]
        one, two = (writer.result() for writer in writers)
        copies = created.names()
        assert len(copies) == 1, f"temporaries made: {copies}"
        os.pwrite(one, b"ONE", 0)
        os.pwrite(two, b"TWO", 3)
        assert os.pread(one, 6, 0) == os.pread(two, 6, 0) == b"ONETWO"
        assert os.fstat(one).st_ino == os.fstat(two).st_ino
        os.close(one)
        os.close(two)
    assert big_stack.upper is not None
    with open(big_stack.upper / "big", "rb") as file:
        assert file.read(6) == b"ONETWO"


def test_a_signal_ends_waiting(big_stack: Stack) -> None:
    """The one who got it is told EINTR while the other one still waits for the copy, which goes on."""
    with Layerfs(big_stack, "data=python") as mount, Created(f"{big_stack.work}/work") as created:
        other, hit = openers = [Opener(mount.mnt / "big") for _ in range(2)]
        for opener in openers:
            opener.go()
        assert eventually(lambda: copies_under_way(big_stack) and hit.waits)
        os.kill(hit.process.pid, signal.SIGUSR1)
        assert hit.answer() == str(errno.EINTR)
        assert not other.ended, "the copy-up was over when the signal was answered"
        assert other.answer() == "done"
        assert len(created.names()) == 1


def test_a_killed_waiter_is_gone(big_stack: Stack) -> None:
    with Layerfs(big_stack, "data=python") as mount:
        other, hit = openers = [Opener(mount.mnt / "big") for _ in range(2)]
        for opener in openers:
            opener.go()
        assert eventually(lambda: copies_under_way(big_stack) and hit.waits)
        hit.process.kill()
        assert hit.process.wait(PATIENCE) == -signal.SIGKILL
        assert not other.ended, "the copy-up was over when the killed process was gone"
        hit.answer()
        assert other.answer() == "done"


def test_two_that_write_copy_once(big_stack: Stack) -> None:
    with Layerfs(big_stack, "data=cached") as mount, Created(f"{big_stack.work}/work") as created:
        writers = [Opener(mount.mnt / "big", text) for text in ("one", "twotwo")]
        for writer in writers:
            writer.go()
        assert [writer.answer() for writer in writers] == ["done", "done"]
        assert len(created.names()) == 1
        with open(mount.mnt / "big", "rb") as file:
            assert file.read(6) in (b"onetwo", b"twotwo")


def test_a_signal_does_not_end_a_write(big_stack: Stack) -> None:
    """write(2) to a file is not interrupted, and nobody expects it to be; SA_RESTART would not help."""
    with Layerfs(big_stack, "data=cached") as mount:
        writer = Opener(mount.mnt / "big", "text")
        writer.go()
        assert eventually(lambda: copies_under_way(big_stack) and writer.waits)
        os.kill(writer.process.pid, signal.SIGUSR1)
        assert writer.answer() == "done"


@pytest.mark.parametrize(
    ("at", "how"),
    [("open", signal.SIGUSR1), ("open", signal.SIGKILL), ("write", signal.SIGKILL)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_copy_that_nobody_wants_leaves_nothing(big_stack: Stack, at: str, how: signal.Signals) -> None:
    with Layerfs(big_stack, "data=python" if at == "open" else "data=cached") as mount:
        opener = Opener(mount.mnt / "big", "" if at == "open" else "text")
        opener.go()
        assert eventually(lambda: copies_under_way(big_stack) and opener.waits)
        os.kill(opener.process.pid, how)
        opener.process.wait(PATIENCE)
        assert opener.answer() == ("" if how == signal.SIGKILL else str(errno.EINTR))
        assert eventually(lambda: not os.listdir(f"{big_stack.work}/work")), os.listdir(
            f"{big_stack.work}/work"
        )
        assert big_stack.upper is not None
        assert os.listdir(big_stack.upper) == []
        # And it can be copied after all.
        with open(mount.mnt / "big", "r+b") as file:
            file.write(b"NOW")
        with open(big_stack.upper / "big", "rb") as file:
            assert file.read(3) == b"NOW"


def test_another_name_is_free_while_the_mount_waits_for_a_copy(big_stack: Stack) -> None:
    """Names can be changed beside a copy-up: the copied file's own, too."""
    with Layerfs(big_stack, "data=python") as mount:
        opener = Opener(mount.mnt / "big")
        opener.go()
        assert eventually(lambda: copies_under_way(big_stack))
        (mount.mnt / "new").mkdir()
        (mount.mnt / "new" / "file").write_text("x")
        os.rename(mount.mnt / "new", mount.mnt / "newer")
        os.unlink(mount.mnt / "big")
        assert not opener.ended, "changes waited for the copy-up"
        assert not os.path.exists(mount.mnt / "big")
        assert opener.answer() == "done"
        assert sorted(os.listdir(mount.mnt)) == ["elsewhere", "newer"]
