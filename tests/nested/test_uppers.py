"""Uppers inside other stacks: those that work, and those that are refused at mount, in one line."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.overlay import work
from tests.support import mounts
from tests.support.mounts import FuseOverlayfs, KernelOverlay, Layerfs, Mounted
from tests.support.stack import Stack
from tests.support.tree import assert_equal, lowers_guard

from .below import as_erofs, as_squashfs

OUTSIDE = "put upper and work directory outside of that mount"


@pytest.fixture(autouse=True)
def needs(kernel_overlay: None) -> None:
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)


def inside(outer: Mounted | Path, stack: Stack) -> None:
    """Upper and work directory of `stack` in the mount `outer`."""
    where = outer.mnt if isinstance(outer, Mounted) else outer
    stack.upper, stack.work = where / "upper", where / "work"
    for path in (stack.upper, stack.work):
        path.mkdir(exist_ok=True)


def refusal(stack: Stack, *options: str) -> str:
    """What `layerfs mount` says when it refuses; asserts that it is one line and that nothing is left."""
    m = Layerfs(stack, options)
    done = m.run(*m.command())
    assert done.returncode == 1 and done.stdout == "", done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("layerfs mount: "), done.stderr
    assert not os.path.ismount(stack.mnt) and m.wait_gone()
    return lines[0].removeprefix("layerfs mount: ")


@pytest.mark.parametrize("options", ["", "userxattr", "redirect_dir=off,metacopy=off"])
def test_upper_on_kernel_overlayfs(options: str, make_stack: type[Stack]) -> None:
    """Whiteouts are `.wh.` files there, marks are kept escaped by the kernel below: the work is as on a plain
    directory, before and after a remount. Then the upper is moved out of it, and is the same.
    """
    began = time.time_ns() - 10**9
    plain, outer, stack = make_stack(n_lowers=0), make_stack(), make_stack(n_lowers=2)
    work.plain(plain)
    work.work_in(plain.mnt)
    work.lay_out(stack)
    with lowers_guard(stack.lowers):
        with KernelOverlay(outer) as kernel:
            inside(kernel, stack)
            with Layerfs(stack, options) as m:
                work.work_in(m.mnt)
                live = work.look(m.mnt)
                assert_equal(work.look(plain.mnt), live, recent_ns=began, labels=("plain", "layerfs"))
                m.remount()
                assert_equal(live, work.look(m.mnt), message="after remount")
            moved = make_stack(n_lowers=0)
            for name in ("upper", "work"):
                subprocess.run(["cp", "-a", f"{kernel.mnt}/{name}/.", moved.dir / name], check=True)
        moved.lowers = stack.lowers
        with Layerfs(moved, options) as m:
            assert_equal(live, work.look(m.mnt), recent_ns=began, message="moved out")


def test_upper_inside_layerfs_is_refused(make_stack: type[Stack]) -> None:
    outer, stack = make_stack(), make_stack()
    with Layerfs(outer) as m:
        inside(m, stack)
        said = refusal(stack)
        assert said.startswith(
            f"upper directory {stack.upper}: its file system (fuse.layerfs) takes no whiteouts"
        )
        assert said.endswith(OUTSIDE)
        assert os.listdir(m.mnt / "work") == [] and os.listdir(m.mnt / "upper") == []


def test_upper_inside_fuse_overlayfs_is_refused(make_stack: type[Stack]) -> None:
    if reason := mounts.why_no_fuse_overlayfs():
        pytest.skip(reason)
    outer, stack = make_stack(), make_stack()
    with FuseOverlayfs(outer) as m:
        inside(m, stack)
        said = refusal(stack)
        assert "takes no whiteouts" in said and said.endswith(OUTSIDE)


@pytest.mark.parametrize("show", [as_squashfs, as_erofs])
def test_upper_in_an_image_is_refused(
    show: Callable[[Stack], AbstractContextManager[Path]], make_stack: type[Stack]
) -> None:
    image, stack = make_stack(), make_stack()
    for name in ("upper", "work"):
        (image.lowers[0] / name).mkdir()
    with show(image) as shown:
        stack.upper, stack.work = shown / "upper", shown / "work"
        assert refusal(stack) == f"upper directory {stack.upper} is on a read-only file system"


def test_upper_in_a_read_only_layerfs_is_refused(make_stack: type[Stack]) -> None:
    outer, stack = make_stack(), make_stack()
    for name in ("upper", "work"):
        (outer.lowers[0] / name).mkdir()
    with Layerfs(outer, "ro") as m:
        inside(m, stack)
        assert refusal(stack) == f"upper directory {stack.upper} is on a read-only file system"


def test_upper_and_work_in_two_mounts_are_refused(make_stack: type[Stack]) -> None:
    """On one file system, but the work directory seen through a kernel overlay of it."""
    outer, stack = make_stack(), make_stack()
    with KernelOverlay(outer) as m:
        stack.work = m.mnt / "work"
        stack.work.mkdir()
        assert "are not on the same mounted file system" in refusal(stack)


def test_upper_without_xattrs_is_refused(make_stack: type[Stack]) -> None:
    """ramfs keeps none; nor did tmpfs keep `user.` ones before Linux 6.6, which an ordinary user is told."""
    holder, stack = make_stack(n_lowers=0), make_stack()
    mounts.mount("none", holder.mnt, "ramfs")
    try:
        inside(holder.mnt, stack)
        assert "does not keep extended attributes" in refusal(stack)
    finally:
        mounts.umount(holder.mnt)


def test_upper_of_a_live_mount_below_is_refused(make_stack: type[Stack]) -> None:
    """The upper of the mount whose tree is our lower, as our own upper."""
    outer, stack = make_stack(), make_stack(n_lowers=0)
    with Layerfs(outer) as m:
        stack.lowers = [m.mnt]
        stack.upper = outer.upper
        assert "is in use by another layerfs mount" in refusal(stack)
    with KernelOverlay(outer) as k:
        stack.lowers = [k.mnt]
        assert "is in use by the kernel overlay" in refusal(stack)
