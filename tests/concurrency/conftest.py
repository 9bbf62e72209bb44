"""Lower layers with files that take long to copy, and ways to see from outside what the daemon is doing."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import processes
from tests.support.mounts import Layerfs
from tests.support.stack import Stack, scratch_root

from .valve import Valve

MIB = 1 << 20
GIB = 1 << 30
#: What nobody ever waits for: reaching it means that something hangs.
PATIENCE = 120.0
eventually = partial(processes.eventually, patience=PATIENCE)


@pytest.fixture(params=[pytest.param(1, id="1GiB"), pytest.param(4, id="4GiB", marks=pytest.mark.long)])
def big(request: pytest.FixtureRequest) -> int:
    """Bytes of a big file."""
    return int(request.param) * GIB


@pytest.fixture
def valve(root: None, stack: Stack) -> Iterator[Valve]:
    """A disk that can be stopped."""
    base = stack.dir / "slow"
    base.mkdir()
    try:
        made = Valve(base)
    except (OSError, subprocess.SubprocessError, AssertionError) as error:
        pytest.skip(f"no loop device on a FUSE file here: {error}")
    yield made
    made.close()


def real_data(path: Path, size: int) -> None:
    """A file of `size` bytes without holes, none of its blocks like another."""
    block = os.urandom(MIB)
    with open(path, "wb", buffering=0) as file:
        for number in range(size // MIB):
            file.write(struct.pack("=Q", number) + block[8:])


@pytest.fixture(scope="session")
def big_files() -> Iterator[Callable[[int], Path]]:
    """`big_files(size)`: a directory, to be a lower layer, with `big` of that size and `elsewhere/0…999`.
    Made once.
    """
    made: dict[int, Path] = {}

    def get(size: int) -> Path:
        if size not in made:
            top = scratch_root() / f"big-{size}"
            top.mkdir()
            real_data(top / "big", size)
            elsewhere_in(top)
            made[size] = top
        return made[size]

    yield get
    for top in made.values():
        shutil.rmtree(top)


def elsewhere_in(layer: Path) -> None:
    (layer / "elsewhere").mkdir()
    for number in range(1000):
        (layer / "elsewhere" / str(number)).write_text(str(number))


def thousand_stats(mnt: Path) -> None:
    """Each for the first time, so each asks the daemon."""
    for number in range(1000):
        assert os.stat(mnt / "elsewhere" / str(number)).st_size == len(str(number))


class Doing(threading.Thread):
    """Something in a thread; `ended` is looked at from outside."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    @property
    def ended(self) -> bool:
        return not self.is_alive()

    def result(self) -> Any:
        self.join(PATIENCE)
        assert self.ended, "hangs"
        if self._error is not None:
            raise self._error
        return self._result


def copies_under_way(stack: Stack) -> list[os.stat_result]:
    """The copies in the work directory that have some data already."""
    found = []
    with os.scandir(f"{stack.work}/work") as entries:
        for entry in entries:
            try:
                st = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if st.st_blocks:
                found.append(st)
    return found


_SYSCALL_FSYNC = {"x86_64": 74, "aarch64": 82}.get(os.uname().machine, -1)


def in_fsync(mount: Layerfs) -> bool:
    """Whether a thread of the daemon is inside fsync(2)."""
    for pid in mount.pids():
        for task in os.listdir(f"/proc/{pid}/task"):
            try:
                said = Path(f"/proc/{pid}/task/{task}/syscall").read_text().split()
            except OSError:
                continue
            if said and said[0] == str(_SYSCALL_FSYNC):
                return True
    return False


class Created:
    """Names made in a directory while it is watched (inotify)."""

    def __init__(self, directory: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        in_create = 0x100
        assert libc.inotify_add_watch(self._fd, os.fsencode(directory), in_create) >= 0

    def names(self) -> list[str]:
        found = []
        try:
            while data := os.read(self._fd, 1 << 16):
                while data:
                    _, _, _, length = struct.unpack_from("iIII", data)
                    found.append(data[16 : 16 + length].rstrip(b"\0").decode())
                    data = data[16 + length :]
        except BlockingIOError:
            pass
        return found

    def __enter__(self) -> Created:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
