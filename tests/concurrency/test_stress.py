"""Several processes change the same names at once, at random: whatever came out, it is the same after a
remount, and under kernel overlayfs.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import KernelOverlay, Layerfs
from tests.support.stack import Stack
from tests.support.tree import assert_equal, lowers_guard, snapshot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("root")]

DIRECTORIES = ("a", "b", "b/c", "new")
NAMES = ("f0", "f1", "f2", "f3", "hard", "g0", "g1", "dir")
#: What may be answered when others change the same names.
EXPECTED = {
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EINVAL,  # a directory into itself
    errno.ELOOP,
    errno.EPERM,  # a link to a directory
}


def work(top: str, seed: int, count: int) -> None:
    """One of the processes."""
    source = random.Random(seed)
    root = os.open(top, os.O_RDONLY)

    def path() -> str:
        return f"{source.choice(DIRECTORIES)}/{source.choice(NAMES)}"

    def write() -> None:
        fd = os.open(
            path(), os.O_RDWR | source.choice((0, os.O_CREAT, os.O_TRUNC, os.O_APPEND)), 0o644, dir_fd=root
        )
        os.write(fd, b"w" * source.randrange(1, 9000))
        os.close(fd)

    def read() -> None:
        fd = os.open(path(), os.O_RDONLY, dir_fd=root)
        try:
            os.read(fd, 10_000)
        finally:
            os.close(fd)

    ways = (
        write,
        read,
        lambda: os.unlink(path(), dir_fd=root),
        lambda: os.rename(path(), path(), src_dir_fd=root, dst_dir_fd=root),
        lambda: os.rename(
            source.choice(DIRECTORIES), source.choice(DIRECTORIES), src_dir_fd=root, dst_dir_fd=root
        ),
        lambda: os.link(path(), path(), src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False),
        lambda: os.symlink("f0", path(), dir_fd=root),
        lambda: os.mkdir(path(), dir_fd=root),
        lambda: os.mkdir(source.choice(DIRECTORIES), dir_fd=root),
        lambda: os.rmdir(path(), dir_fd=root),
        lambda: os.chmod(path(), source.choice((0o600, 0o644, 0o755)), dir_fd=root),
        lambda: os.utime(path(), ns=(1, source.randrange(10**9)), dir_fd=root, follow_symlinks=False),
        lambda: os.truncate(f"/proc/self/fd/{root}/{path()}", source.randrange(5000)),
        lambda: os.stat(path(), dir_fd=root, follow_symlinks=False),
        lambda: os.listdir(f"/proc/self/fd/{root}/{source.choice(DIRECTORIES)}"),
    )
    for _ in range(count):
        try:
            source.choice(ways)()
        except OSError as error:
            if error.errno not in EXPECTED:
                raise


def _lay_out(stack: Stack) -> None:
    assert stack.upper is not None
    for number, layer in enumerate([stack.upper, *stack.lowers]):
        for directory in ("a", "b", "b/c"):
            (layer / directory).mkdir()
            for index in range(number, 4):
                (layer / directory / f"f{index}").write_text(f"{layer.name} {directory} {index}" * 100)
    bottom = stack.lowers[-1]
    (bottom / "a" / "hard").write_text("one file, three names")
    os.link(bottom / "a" / "hard", bottom / "b" / "hard")
    os.link(bottom / "a" / "hard", bottom / "b" / "c" / "hard")
    (bottom / "b" / "dir" / "below").mkdir(parents=True)
    (bottom / "b" / "dir" / "below" / "file").write_text("deep")


@pytest.mark.parametrize("options", ["", "redirect_dir=off,metacopy=off", "volatile"])
@pytest.mark.parametrize("drops", [False, True], ids=["", "caches dropped"])
@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)]
)
def test_many_at_once(
    make_stack: type[Stack], kernel_overlay: None, seed: int, drops: bool, options: str
) -> None:
    stack = make_stack(n_lowers=2)
    _lay_out(stack)
    with lowers_guard(stack.lowers):
        with Layerfs(stack, options) as mount:
            workers = [
                subprocess.Popen(
                    [sys.executable, "-m", __name__, str(mount.mnt), str(seed * 100 + number), "1500"]
                )
                for number in range(4)
            ]
            while any(worker.poll() is None for worker in workers):
                if drops:
                    Path("/proc/sys/vm/drop_caches").write_text("2")
                try:
                    workers[0].wait(0.05)
                except subprocess.TimeoutExpired:
                    pass
            assert [worker.wait() for worker in workers] == [0] * len(workers)
            live = snapshot(mount.mnt)
            mount.remount()
            assert_equal(live, snapshot(mount.mnt))
        with KernelOverlay(stack) as kernel:
            assert_equal(live, snapshot(kernel.mnt))


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
