"""`oci.snapshot` on real file systems, without a mount: a writer keeps two halves of a file equal by one
pwrite(2) a turn, and no copy ever has two that differ.

Tried by taking parts of `take` away (4 s, 64 KiB): without the wait for a write that is under way, 2,891 of
275,375 copies were torn on btrfs and 488 of 294,151 on tmpfs; without comparing stamps 52 and 990. On ext4
the same shows with files of 512 KiB and more."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from layerfs.errors import LayerError
from layerfs.fdutil import OwnedFd
from layerfs.oci import snapshot
from layerfs.oci.changes import ChangeFinder
from layerfs.oci.objects import Data
from layerfs.oci.snapshot import Moment, Snapshots
from layerfs.overlay.names import USER, XattrNames
from layerfs.stack import Stack
from tests.overlay.loops import file_system

#: Seconds of trying for each.
LONG = 1.5


@pytest.fixture(params=["ext4", "xfs", "btrfs", "tmpfs"])
def place(request: pytest.FixtureRequest, root: None) -> Iterator[Path]:
    with file_system(request.param) as path:
        yield path


class Held(Exception):
    """Three tries were not enough."""


class NoMount:
    """Writers of a file that is in no mount; `open_for_writing` is what the daemon would say."""

    open_for_writing = False

    def writing(self, inode: int) -> bool:
        return self.open_for_writing

    def undivided(self, inode: int) -> bool:
        return False

    def held(self, inode: int, path: bytes) -> AbstractContextManager[bool]:
        raise Held


@contextlib.contextmanager
def writer(path: Path, size: int, pause: float) -> Iterator[None]:
    path.write_bytes(bytes(size))
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            fd = os.open(path, os.O_WRONLY)
            turn = 0
            while os.getppid() != 1:
                turn += 1
                half = struct.pack("<Q", turn) * (size // 16)
                os.pwrite(fd, half + half, 0)
                time.sleep(pause)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def nothing_more() -> Moment:
    return Moment([], {}, has_data=True)


def take(snapshots: Snapshots, path: Path) -> tuple[os.stat_result, bytes]:
    fd = OwnedFd(os.open(path, os.O_RDONLY))
    _, st, copy = snapshots.take(fd, b"f", nothing_more)
    assert copy is not None
    data = copy if isinstance(copy, bytes) else os.pread(copy.fd, st.st_size + 1, 0)
    return st, data


def try_for_a_while(place: Path, size: int, pause: float) -> None:
    path = place / "f"
    upper = OwnedFd(os.open(place, os.O_RDONLY))
    snapshots = Snapshots(upper.fd, str(place), NoMount())
    taken = 0
    with writer(path, size, pause):
        end = time.monotonic() + LONG
        while time.monotonic() < end or not taken:
            try:
                st, data = take(snapshots, path)
            except Held:
                continue
            taken += 1
            assert len(data) == st.st_size == size
            assert data[: size // 2] == data[size // 2 :], f"copy {taken} is torn"
    assert os.listdir(place) in (["f"], ["lost+found", "f"], ["f", "lost+found"]), "copies have no names"


@pytest.mark.parametrize("size", [4096, 64 << 10])
def test_small_files(place: Path, size: int) -> None:
    try_for_a_while(place, size, 0.0003)


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "file"])
def test_big_files(place: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    """In one request, as it were; copied into memory, or by the cheapest way that the file system has."""
    monkeypatch.setattr(snapshot, "_ONE_REQUEST", 1 << 30)
    monkeypatch.setattr(snapshot, "_IN_MEMORY", 1 << 30 if in_memory else 0)
    try_for_a_while(place, 1 << 20, 0.02)


def test_clocks_that_tick(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on kernels before 6.13: two writes of one tick have one ctime."""
    monkeypatch.setattr(snapshot, "_kernel", lambda: (5, 10))
    try_for_a_while(place, 4096, 0.05)


def test_big_files_that_are_open_for_writing_are_held(tmp_path: Path) -> None:
    upper = OwnedFd(os.open(tmp_path, os.O_RDONLY))
    writers = NoMount()
    snapshots = Snapshots(upper.fd, str(tmp_path), writers)
    (tmp_path / "big").write_bytes(b"b" * (1 << 20))
    (tmp_path / "small").write_bytes(b"s")
    assert take(snapshots, tmp_path / "big")[1] == b"b" * (1 << 20)
    writers.open_for_writing = True
    with pytest.raises(Held):
        take(snapshots, tmp_path / "big")
    assert take(snapshots, tmp_path / "small")[1] == b"s"


class Replacer(NoMount):
    """Somebody renames a new file over `path` each time that its writers are to be held, so many times."""

    open_for_writing = True

    def __init__(self, path: Path, times: int) -> None:
        self.path = path
        self.left = times

    def held(self, inode: int, path: bytes) -> AbstractContextManager[bool]:
        if not self.left:
            return contextlib.nullcontext(True)
        self.left -= 1
        other = self.path.with_suffix(".new")
        other.write_bytes(bytes((self.left % 255,)) * (1 << 20))
        other.rename(self.path)
        return contextlib.nullcontext(False)


def test_a_file_that_is_another_one_by_now(tmp_path: Path) -> None:
    upper = OwnedFd(os.open(tmp_path, os.O_RDONLY))
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        take(Snapshots(upper.fd, str(tmp_path), Replacer(tmp_path / "f", 1)), tmp_path / "f")


def added(upper: Path, times: int) -> Data:
    """The data of the one file of an upper that is replaced so many times while it is looked at."""
    stack = Stack([], str(upper), XattrNames(USER))
    assert stack.upper is not None
    snapshots = Snapshots(stack.upper.fd.fd, str(upper), Replacer(upper / "f", times))
    changes = ChangeFinder(stack, [], whole=True, with_data=True, snapshots=snapshots)
    (data,) = [change.data for change in changes if change.data is not None]
    return data


def test_a_file_that_is_replaced_all_the_time(tmp_path: Path) -> None:
    """It is looked at again, many times, and then given up in one line."""
    (tmp_path / "f").write_bytes(b"x" * (1 << 20))
    assert added(tmp_path, 50).read(0, 2 << 20) == bytes(1 << 20)
    with pytest.raises(LayerError, match=r"f: is replaced faster than it can be read; .*--pause"):
        added(tmp_path, 1000)


def test_no_room_for_a_copy(root: None) -> None:
    """One line that names the way out; and holes need no room."""
    with file_system("tmpfs") as place:
        subprocess.run(["mount", "-o", "remount,size=12M", place], check=True)
        (place / "full").write_bytes(b"x" * (8 << 20))
        said = refusal(place, "full")
        assert "no room for a copy" in said and "--pause" in said and "\n" not in said
        os.unlink(place / "full")
        with open(place / "sparse", "wb") as file:
            file.truncate(64 << 20)
        assert blocks_of_copy(place, "sparse") == 0


def refusal(place: Path, name: str) -> str:
    """Not by `pytest.raises`, which keeps the frames, and with them what they have open."""
    upper = OwnedFd(os.open(place, os.O_RDONLY))
    try:
        take(Snapshots(upper.fd, str(place), NoMount()), place / name)
    except LayerError as error:
        return str(error)
    raise AssertionError("there was room")


def blocks_of_copy(place: Path, name: str) -> int:
    upper, fd = (OwnedFd(os.open(path, os.O_RDONLY)) for path in (place, place / name))
    _, st, copy = Snapshots(upper.fd, str(place), NoMount()).take(fd, b"f", nothing_more)
    assert isinstance(copy, OwnedFd) and os.fstat(copy.fd).st_size == st.st_size
    return os.fstat(copy.fd).st_blocks
