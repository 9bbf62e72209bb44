"""Directories shown through something else: another mount, or an image of a read-only file system. Not tests.

Each of `SHOWN` is a context manager over a directory full of layers' content; inside, the same tree is to be
seen in the directory that it gives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.mounts import FuseOverlayfs, KernelOverlay, Layerfs
from tests.support.stack import Stack
from tests.support.tree import lowers_guard

Show = Callable[[Stack], AbstractContextManager[Path]]


@contextmanager
def through_layerfs(stack: Stack) -> Iterator[Path]:
    with lowers_guard(stack.lowers), Layerfs(stack) as m:
        yield m.mnt


@contextmanager
def through_layerfs_read_only(stack: Stack) -> Iterator[Path]:
    stack.upper = stack.work = None
    with lowers_guard(stack.lowers), Layerfs(stack) as m:
        yield m.mnt


@contextmanager
def through_kernel(stack: Stack) -> Iterator[Path]:
    with lowers_guard(stack.lowers), KernelOverlay(stack) as m:
        yield m.mnt


@contextmanager
def through_fuse_overlayfs(stack: Stack) -> Iterator[Path]:
    if reason := mounts.why_no_fuse_overlayfs():
        pytest.skip(reason)
    with lowers_guard(stack.lowers), FuseOverlayfs(stack) as m:
        yield m.mnt


@contextmanager
def _image(stack: Stack, kind: str, *command: str | os.PathLike[str]) -> Iterator[Path]:
    """`command` makes the image `stack.dir/image` of what a mount of the stack shows."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip(f"not installed: {command[0]}")
    assert done.returncode == 0, done.stderr
    target = stack.dir / "shown"
    target.mkdir()
    mount = ["mount", "-t", kind, "-o", "loop,ro", stack.dir / "image", target]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no {kind} on a loop device here: {done.stderr.strip()}")
    try:
        yield target
    finally:
        mounts.umount(target)


@contextmanager
def as_squashfs(stack: Stack) -> Iterator[Path]:
    if not shutil.which("mksquashfs"):
        pytest.skip("not installed: mksquashfs")
    with KernelOverlay(stack) as m:
        made = _image(stack, "squashfs", "mksquashfs", m.mnt, stack.dir / "image", "-noappend", "-quiet")
        with made as shown:
            yield shown


@contextmanager
def as_erofs(stack: Stack) -> Iterator[Path]:
    if not shutil.which("mkfs.erofs"):
        pytest.skip("not installed: mkfs.erofs")
    with KernelOverlay(stack) as m:
        with _image(stack, "erofs", "mkfs.erofs", "--quiet", stack.dir / "image", m.mnt) as shown:
            yield shown


SHOWN: dict[str, Show] = {
    "layerfs": through_layerfs,
    "layerfs-ro": through_layerfs_read_only,
    "kernel": through_kernel,
    "fuse-overlayfs": through_fuse_overlayfs,
    "squashfs": as_squashfs,
    "erofs": as_erofs,
}
