"""Directories of very many names: nothing is lost, nothing is quadratic, nothing is kept that the kernel has
forgotten.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest
import trio

from layerfs.ids import ROOT
from layerfs.overlay.names import TRUSTED, USER, XattrNames
from layerfs.stack import Stack as Layers
from layerfs.upper.upper import Upper
from layerfs.vfs import tree
from layerfs.vfs.vfs import Caller, Vfs
from tests.support.mounts import Layerfs
from tests.support.stack import Stack

from .conftest import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


# -- listing while removing ------------------------------------------------------------------------


def _fill(directory: Path, count: int) -> None:
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY)
    for number in range(count):
        os.mknod(f"{number}", 0o100644, dir_fd=fd)
    os.close(fd)


@pytest.mark.parametrize("where", ["upper", "lower", "both"])
def test_rm_r_loses_none(root: None, stack: Stack, where: str) -> None:
    """`rm -r` reads on in the listing while it removes what it has read."""
    count = 20_000
    assert stack.upper is not None
    if where != "upper":
        _fill(stack.lowers[0] / "d", count)
    if where != "lower":
        _fill(stack.upper / "d", count if where == "upper" else count // 2)
    with Layerfs(stack) as mount:
        done = subprocess.run(["rm", "-r", mount.mnt / "d"], capture_output=True, text=True, timeout=600)
        assert (done.returncode, done.stderr) == (0, "")
        assert os.listdir(mount.mnt) == []
        mount.remount()
        assert os.listdir(mount.mnt) == []


def test_every_name_is_listed_once_while_others_come_and_go(root: None, stack: Stack) -> None:
    _fill(stack.lowers[0] / "d", 20_000)
    with Layerfs(stack) as mount:
        directory = mount.mnt / "d"
        seen = []
        with os.scandir(directory) as entries:
            for number, entry in enumerate(entries):
                seen.append(entry.name)
                if number % 2:
                    os.unlink(directory / entry.name)
                elif number < 5000:
                    (directory / f"new{number}").touch()
        kept = [name for name in seen if not name.startswith("new")]
        assert len(kept) == len(set(kept))
        assert {str(number) for number in range(20_000)} == set(kept)
        assert sum(1 for name in os.listdir(directory) if not name.startswith("new")) == 10_000


# -- linear ----------------------------------------------------------------------------------------


class _Calls:
    """Counts calls of functions, Python's and C's: system calls, dict operations, all that is done one at
    a time.
    """

    def __init__(self) -> None:
        self.count = 0

    def _note(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            self.count += 1

    def __enter__(self) -> _Calls:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


async def _life_of(count: int, lower: Path, upper: Path, work: Path) -> dict[str, int]:
    """Calls needed to create, list, stat and remove `count` files, and to list and remove as many of a
    lower layer.
    """
    names = XattrNames(TRUSTED if os.geteuid() == 0 else USER)
    stack = Layers([str(lower)], str(upper), names)
    assert stack.upper is not None
    me = Caller(os.geteuid(), os.getegid(), 0)
    used: dict[str, int] = {}
    async with trio.open_nursery() as nursery:
        vfs = Vfs(stack, Upper(stack.upper, str(work), names, volatile=True), nursery)
        files = [b"%d" % number for number in range(count)]
        ids: dict[bytes, int] = {}

        async def look(directory: int) -> None:
            for name in files:
                found = await vfs.lookup(directory, name)
                assert found is not None
                ids[name] = found.ino

        async def listing(directory: int) -> None:
            handle = await vfs.opendir(directory)
            await vfs.rewind(handle)
            for name in vfs.listing(handle).names:
                found = await vfs.lookup(directory, name)
                assert found is not None
                vfs.forget(found.ino, 1)
            vfs.files.release_directory(handle)

        async def remove(directory: int) -> None:
            for name in files:
                await vfs.unlink(directory, name, me)

        new = await vfs.make(ROOT, b"new", _directory(), me)
        with _Calls() as calls:
            for name in files:
                handle, made = await vfs.create(new.ino, name, 0o644, os.O_WRONLY, me)
                vfs.files.release(handle.id)
                ids[name] = made.ino
        used["create"] = calls.count
        for directory, kind in ((new.ino, "new"), ((await _lookup(vfs, ROOT, b"old")), "old")):
            with _Calls() as calls:
                await listing(directory)
            used[f"list {kind}"] = calls.count
            with _Calls() as calls:
                await look(directory)
            used[f"stat {kind}"] = calls.count
            with _Calls() as calls:
                await remove(directory)
            used[f"remove {kind}"] = calls.count
            for id in ids.values():
                vfs.forget(id, 1 if kind == "old" else 2)
            assert len(vfs.tree.nodes) <= 3, "what the kernel has forgotten is kept"
    return used


def _directory() -> object:
    from layerfs.vfs.vfs import New

    return New(0o755 | stat.S_IFDIR)


async def _lookup(vfs: Vfs, parent: int, name: bytes) -> int:
    found = await vfs.lookup(parent, name)
    assert found is not None
    return found.ino


@pytest.mark.parametrize("few", [pytest.param(1_000), pytest.param(10_000, marks=pytest.mark.long)])
def test_ten_times_the_names_take_ten_times_the_calls(
    make_stack: type[Stack], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "_THREAD_ABOVE", 1 << 40)  # calls are counted in this thread only
    used = []
    for count in (few, 10 * few):
        stack = make_stack()
        _fill(stack.lowers[0] / "old", count)
        assert stack.upper is not None and stack.work is not None
        used.append(trio.run(_life_of, count, stack.lowers[0], stack.upper, stack.work))
    ratios = {what: used[1][what] / used[0][what] for what in used[0]}
    wrong = {what: ratio for what, ratio in ratios.items() if ratio > 11}
    assert not wrong, wrong


@pytest.mark.long
def test_a_hundred_thousand(root: None, stack: Stack) -> None:
    """Through the kernel: created, listed, stat'ed and removed."""
    count = 100_000
    with Layerfs(stack) as mount:
        _fill(mount.mnt / "d", count)
        assert len(os.listdir(mount.mnt / "d")) == count
        assert all(os.stat(mount.mnt / "d" / str(number)).st_size == 0 for number in range(count))
        for number in range(count):
            os.unlink(mount.mnt / "d" / str(number))
        os.rmdir(mount.mnt / "d")
        assert os.listdir(mount.mnt) == []


# -- memory ----------------------------------------------------------------------------------------


def _resident(mount: Layerfs) -> int:
    (pid,) = mount.pids()
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _forgotten(mount: Layerfs) -> bool:
    """Has the kernel forget all it can, and says whether the daemon has heard of it."""
    Path("/proc/sys/vm/drop_caches").write_text("2")
    return mount.known() < 100


def test_memory_comes_back(root: None, stack: Stack) -> None:
    """Walking a tree again and again, with the kernel forgetting it in between, ends where it was after
    the first times.
    """
    for number in range(40):
        _fill(stack.lowers[0] / f"d{number}", 500)
    with Layerfs(stack) as mount:
        sizes = []
        for _ in range(6):
            found = subprocess.run(
                ["find", mount.mnt, "-ls"], capture_output=True, text=True, timeout=300, check=True
            )
            assert found.stdout.count("\n") == 40 * 501 + 1
            assert eventually(lambda: _forgotten(mount), every=0.1), mount.statistics()
            sizes.append(_resident(mount))
        assert sizes[-1] < sizes[1] * 1.1, sizes
