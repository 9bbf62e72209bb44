"""Other stacks whose layers lie in a layerfs mount: kernel overlayfs, fuse-overlayfs, layerfs, as a container
engine inside a container mounts them.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.overlay import work
from tests.posix.place import forked
from tests.support import mounts
from tests.support.mounts import FuseOverlayfs, KernelOverlay, Layerfs
from tests.support.stack import Stack
from tests.support.tree import assert_equal, lowers_guard

#: What each of them leaves out of the work: its own known deviations on any lower.
HOW: dict[str, dict[str, bool]] = {"kernel": {"whole_links": False}, "layerfs": {}}
SYSTEMS = {"kernel": KernelOverlay, "layerfs": Layerfs}


@pytest.fixture(autouse=True)
def needs(kernel_overlay: None) -> None:
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)


@pytest.fixture
def outer(make_stack: type[Stack]) -> Iterator[Layerfs]:
    """A layerfs mount, the root of an outer container, in which there are `store/low1` and `store/low0`.

    Without whiteouts: one in a lower of the outer mount, whatever directory it is in, hides a name there.
    """
    stack = make_stack(n_lowers=1, name="outer")
    (stack.lowers[0] / "store").mkdir()
    inner = make_stack(n_lowers=2, name="content")
    work.lay_out(inner)
    (inner.lowers[0] / "junk").unlink()
    (inner.lowers[1] / "junk").unlink()
    for number, lower in enumerate(inner.lowers):
        subprocess.run(["cp", "-a", lower, stack.lowers[0] / "store" / f"low{number}"], check=True)
    with lowers_guard(stack.lowers), Layerfs(stack) as m:
        yield m


@contextmanager
def volume(where: Path) -> Iterator[Path]:
    """What is mounted for /var/lib/containers in such a container: a file system of its own, in the mount."""
    where.mkdir()
    mounts.mount("none", where, "tmpfs")
    try:
        yield where
    finally:
        mounts.umount(where)


def split_stack(make_stack: type[Stack], store: Path, vol: Path) -> Stack:
    """Lowers and mount point in the mount, at `store`; upper and work directory on a volume."""
    stack = make_stack(n_lowers=0)
    stack.lowers = [store / "low0", store / "low1"]
    stack.upper, stack.work, stack.mnt = vol / "upper", vol / "work", store / "merged"
    for path in (stack.upper, stack.work, stack.mnt):
        path.mkdir()
    return stack


@pytest.mark.parametrize("system", SYSTEMS)
def test_lowers_in_the_mount_and_the_upper_on_a_volume(
    system: str, outer: Layerfs, make_stack: type[Stack]
) -> None:
    """Mounted inside the mount too, on a directory of it."""
    began = time.time_ns() - 10**9
    plain = make_stack(n_lowers=0, name="plain")
    work.plain(plain)
    store = outer.mnt / "store"
    with volume(store / "volume") as vol:
        stack = split_stack(make_stack, store, vol)
        below = work.look(store / "low1")
        with SYSTEMS[system](stack) as m:
            work.work_in(plain.mnt, **HOW[system])
            work.work_in(m.mnt, **HOW[system])
            live = work.look(m.mnt)
            assert_equal(work.look(plain.mnt), live, recent_ns=began, labels=("plain", system))
            m.remount()
            assert_equal(live, work.look(m.mnt), message="after remount")
        assert_equal(below, work.look(store / "low1"), strict=["ino"])
        if system == "layerfs":  # the upper is the kernel's too, over the same lowers in the mount
            with KernelOverlay(stack) as kernel:
                assert_equal(live, work.look(kernel.mnt), labels=("layerfs", "kernel"))


def test_fuse_overlayfs_inside(outer: Layerfs, make_stack: type[Stack]) -> None:
    """Lowers in the mount, upper on a volume. (1.10 does not do all of the work anywhere: a part of it.)"""
    if reason := mounts.why_no_fuse_overlayfs():
        pytest.skip(reason)
    store = outer.mnt / "store"
    with volume(store / "volume") as vol:
        stack = split_stack(make_stack, store, vol)
        with FuseOverlayfs(stack) as m:
            work.write(m.mnt / "big", b"changed", 5000)
            os.unlink(m.mnt / "gone")
            (m.mnt / "dir" / "new").write_text("new")
            os.rename(m.mnt / "file-swap1", m.mnt / "dir" / "swapped")
            live = work.look(m.mnt)
            m.remount()
            assert_equal(live, work.look(m.mnt), ignore=["mtime_ns"])  # it forgets times of what it wrote
            assert not (m.mnt / "gone").exists() and (m.mnt / "dir" / "swapped").read_bytes() == b"file one"
        assert (store / "low1" / "gone").exists()


@pytest.mark.parametrize("uid", [0, 1000])
def test_the_kernel_copies_up_every_xattr(uid: int, outer: Layerfs, make_stack: type[Stack]) -> None:
    """It lists them with its mounter's rights, in the thread of whoever changes a file, and so does `outer`
    for it. Who lists them himself is not shown `trusted.` ones for that."""
    store = outer.mnt / "store"
    file = store / "low0" / "copied"
    file.write_bytes(b"x")
    os.chmod(file, 0o666)
    for name in ("user.a", "trusted.a"):
        os.setxattr(file, name, b"1")

    def append(path: Path) -> list[list[str]]:
        with open(path, "ab") as opened:
            opened.write(b"y")
        return [sorted(os.listxattr(each)) for each in (path, file)]

    with volume(store / "volume") as vol:
        stack = split_stack(make_stack, store, vol)
        with KernelOverlay(stack) as m:
            listed = forked(lambda: append(m.mnt / "copied"), uid=uid, gid=uid)
            assert listed == 2 * [["trusted.a", "user.a"] if uid == 0 else ["user.a"]]
            assert stack.upper is not None
            for path in (m.mnt / "copied", stack.upper / "copied"):
                assert {"trusted.a", "user.a"} <= set(os.listxattr(path))


def test_the_kernel_refuses_a_layerfs_mount_as_upper(outer: Layerfs, make_stack: type[Stack]) -> None:
    """It wants O_TMPFILE and RENAME_WHITEOUT of an upper's file system, and says so in its log. The rest of
    the command is right: with the upper elsewhere it mounts.
    """
    stack = make_stack(n_lowers=1)
    stack.upper, stack.work = outer.mnt / "upper", outer.mnt / "work"
    stack.upper.mkdir()
    stack.work.mkdir()
    with pytest.raises(OSError, match="Invalid argument"):
        KernelOverlay(stack, "").open()
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=False)
    assert log.returncode or "overlayfs: upper fs missing required features" in log.stdout
    stack.upper, stack.work = stack.dir / "upper", stack.dir / "work"
    stack.lowers.append(outer.mnt)
    with KernelOverlay(stack, "") as m:
        assert (m.mnt / "upper").is_dir()


def test_removed_while_a_stack_lies_on_it(outer: Layerfs, make_stack: type[Stack]) -> None:
    """The daemon below is killed: the stack above answers with errors, goes on with its upper, and ends."""
    stack = make_stack(n_lowers=0)
    stack.lowers = [outer.mnt / "store" / "low0", outer.mnt / "store" / "low1"]
    with Layerfs(stack, expected_log=".*") as m:
        assert (m.mnt / "dir" / "f").read_bytes() == b"f"
        outer.kill()
        with pytest.raises(OSError):
            (m.mnt / "moved" / "child" / "leaf").read_bytes()
        (m.mnt / "made").write_text("in the upper")
        assert (m.mnt / "made").read_text() == "in the upper"
