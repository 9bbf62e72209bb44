"""A stack with a canary beside it: a tree outside every layer, never to be read or written through the mount.

After each test that used `box` the lowers and the canary are byte for byte what they were, nothing of the
canary was read, and the daemon still answers.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs, Mounted
from tests.support.stack import Stack
from tests.support.tree import assert_equal, lowers_guard, snapshot

P = "trusted.overlay."
#: Stands in every file of the canary: seen in a mount, it was read from outside the layers.
SECRET = b"canary: nobody may read this"
CANARY_NAME = "only-in-the-canary"


def err(call: Callable[..., Any], *args: Any, **how: Any) -> str | None:
    """Name of the errno that the call raises; None when it succeeds."""
    try:
        call(*args, **how)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return None


def names(path: Path | str) -> list[str] | str:
    """The sorted names in a directory, or the name of the errno."""
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))


def content(path: Path | str) -> bytes | str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may have become a fifo
        try:
            return os.read(fd, 1 << 16)
        finally:
            os.close(fd)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))


def mark(path: Path | str, name: str, value: bytes = b"") -> None:
    os.setxattr(path, P + name, value, follow_symlinks=False)


def fill(path: Path, *files: str) -> Path:
    """A directory holding `files`, each with its own name as content."""
    path.mkdir(parents=True, exist_ok=True)
    for name in files:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path / name, flags, 0o644)
        try:
            os.write(fd, name.encode())
        finally:
            os.close(fd)
    return path


def make_canary(path: Path) -> Path:
    path.mkdir()
    (path / "secret").write_bytes(SECRET)
    (path / CANARY_NAME).write_bytes(SECRET)
    (path / "sub").mkdir()
    (path / "sub" / "secret").write_bytes(SECRET)
    (path / "sub" / CANARY_NAME).write_bytes(SECRET)
    (path / "fifo-less").symlink_to("secret")
    return path


class Box:
    """`stack`, `upper`, `lowers` (top first) and the `canary`."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        assert stack.upper is not None
        self.upper = stack.upper
        self.lowers = stack.lowers
        self.mnt = stack.mnt
        self.canary = make_canary(stack.dir / "canary")
        self.canary_before = snapshot(self.canary)
        self._guards = ExitStack()

    @property
    def up(self) -> str:
        """From a layer's root to the canary, as far as `..` goes there."""
        return "../canary"

    def layers_done(self) -> None:
        """The layers are laid out: from now on nobody may change a lower."""
        self._guards.enter_context(lowers_guard(self.lowers))

    def layerfs(self, options: str = "", **how: Any) -> Layerfs:
        return Layerfs(self.stack, options, **how)

    def kernel(self, options: str = "redirect_dir=on,metacopy=on") -> KernelOverlay:
        return KernelOverlay(self.stack, options)

    def check(self) -> None:
        """The canary and the lowers are what they were."""
        assert_equal(
            self.canary_before,
            snapshot(self.canary),
            strict=["ino", "ctime_ns"],
            message="something outside the layers was changed",
        )
        self._guards.close()


def walk(mnt: Path | str) -> dict[str, str]:
    """Does what a backup or `rm -r` does first: lists, stats, reads links, files and xattrs of everything.

    Path -> what it was, or the errno that one of these calls gave. Fails when anything of the canary is seen.
    """
    found: dict[str, str] = {}
    todo = [str(mnt)]
    root = str(mnt)
    while todo:
        here = todo.pop()
        listed = names(here)
        if isinstance(listed, str):
            found[os.path.relpath(here, root)] = listed
            continue
        assert CANARY_NAME not in listed, f"{here} shows the canary"
        for name in listed:
            path = os.path.join(here, name)
            rel = os.path.relpath(path, root)
            try:
                status = os.lstat(path)
                os.listxattr(path, follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    found[rel] = "-> " + os.readlink(path)
                elif stat.S_ISDIR(status.st_mode):
                    found[rel] = "dir"
                    todo.append(path)
                elif stat.S_ISREG(status.st_mode):
                    data = content(path)
                    assert data != SECRET, f"{rel} was read from outside the layers"
                    found[rel] = data if isinstance(data, str) else f"file {status.st_size}"
                else:
                    found[rel] = stat.filemode(status.st_mode)[0]
            except OSError as error:
                found[rel] = errno.errorcode.get(error.errno or 0, "?")
    return found


def assert_alive(mounted: Mounted) -> None:
    """The daemon is there and does new work. Leaves the tree as it was, times included."""
    assert isinstance(mounted, Layerfs) and len(mounted.pids()) == 1
    before = os.stat(mounted.mnt)
    fresh = mounted.mnt / "alive?"
    fresh.write_text("yes")
    assert fresh.read_text() == "yes" and "alive?" in os.listdir(mounted.mnt)
    fresh.unlink()
    os.utime(mounted.mnt, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def box(root: None, request: pytest.FixtureRequest) -> Iterator[Box]:
    """Two lowers unless the test is parametrised or marked otherwise."""
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)
    stack = Stack(n_lowers=2)
    made = Box(stack)
    yield made
    for point, _ in reversed(mounts.mounts_below(stack.dir)):
        if not any(str(m.mnt) == point for m in mounts.live):
            mounts.umount(point, mounts.MNT_DETACH)
    made.check()
    if not mounts.mounts_below(stack.dir) and not request.config.getoption("--keep-stacks"):
        # Not shutil.rmtree: some trees are deeper than Python's stack.
        subprocess.run(["rm", "-rf", stack.dir], check=True)
