"""The upper's file system fills up, runs out of inodes, or goes read-only: the right errno, the tree as it
was, nothing half-made in sight, and work goes on when there is room again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crash.harness import NOLOGFLUSH, SHUTDOWN, Ground, loop_ground
from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs
from tests.support.stack import Dir, File, Hardlink, Stack, Symlink, Tree
from tests.support.tree import Snapshot, assert_equal, lowers_guard, snapshot

MIB = 1 << 20
KERNEL = "redirect_dir=on,metacopy=on,index=on"
LOWER: Tree = {
    "big": File(data=b"0123456789abcdef" * (8 * MIB // 16), mode=0o640, xattrs={"user.a": b"1"}),
    "small": File(data=b"small"),
    "link": Symlink(target="small"),
    "dir": Dir(),
    "dir/sub": Dir(),
    "dir/sub/file": File(data=b"file" * 5000),
    "dir/one": File(data=b"shared" * 5000),
    "dir/two": Hardlink("dir/one"),
    "gone": File(data=b"gone"),
}


@pytest.fixture
def top(root: None) -> Iterator[Path]:
    if not shutil.which("mkfs.ext4") or not shutil.which("losetup"):
        pytest.skip("needs losetup and mkfs.ext4")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    made = Path(tempfile.mkdtemp(prefix="layerfs-full-", dir=memory))
    try:
        yield made
    finally:
        shutil.rmtree(made)


@pytest.fixture
def ground(top: Path) -> Iterator[Ground]:
    """A small ext4: 16 MiB, 200 inodes."""
    with loop_ground("ext4", top, 16 * MIB, "-N", "200", "-m", "0") as made:
        yield made


@pytest.fixture
def stack(ground: Ground) -> Iterator[Stack]:
    """Lowers on the scratch file system, upper and work on the small one."""
    made = Stack(None, 1, name="full")
    made.write(made.lowers[0], LOWER)
    home = ground.path / "home"
    home.mkdir()
    made.upper, made.work = home / "upper", home / "work"
    made.upper.mkdir()
    made.work.mkdir()
    try:
        with lowers_guard(made.lowers):
            yield made
    finally:
        made.upper = made.work = None
        if not mounts.mounts_below(made.dir):
            made.remove()


def fill_blocks(ground: Ground) -> Path:
    """Take all blocks of the file system; the file to remove for room."""
    ballast = ground.path / "ballast"
    with ballast.open("wb", buffering=0) as f:
        for size in (MIB, 65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    f.write(b"x" * size)
    return ballast


def fill_inodes(ground: Ground) -> Path:
    ballast = ground.path / "ballast"
    ballast.mkdir()
    with contextlib.suppress(OSError):
        for number in range(100_000):
            (ballast / str(number)).touch()
    return ballast


def discard(ballast: Path) -> None:
    shutil.rmtree(ballast) if ballast.is_dir() else ballast.unlink()


def rewrite(mnt: Path, name: str, flags: int = 0) -> None:
    fd = os.open(mnt / name, os.O_WRONLY | flags)
    try:
        os.write(fd, b"new")
    finally:
        os.close(fd)


def create(mnt: Path, name: str) -> None:
    os.close(os.open(mnt / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))


Operation = Callable[[Path], None]

# What needs blocks, and what needs inodes. Each must change nothing when there are none.
WITH_BLOCKS: dict[str, Operation] = {
    "write-big": lambda m: rewrite(m, "big"),
    "append-big": lambda m: rewrite(m, "big", os.O_APPEND),
    "write-hard-link": lambda m: rewrite(m, "dir/two"),
    "write-deep": lambda m: rewrite(m, "dir/sub/file"),
    "link-big": lambda m: os.link(m / "big", m / "big2"),
    "truncate-big": lambda m: os.truncate(m / "big", 7 * MIB),
    "mkdir": lambda m: os.mkdir(m / "dir/new"),
    "create-deep": lambda m: create(m, "dir/sub/new"),
    "rename-dir": lambda m: os.rename(m / "dir", m / "moved"),
}
WITH_INODES: dict[str, Operation] = {
    "create": lambda m: create(m, "new"),
    "create-deep": lambda m: create(m, "dir/sub/new"),
    "create-over-whiteout": lambda m: create(m, "gone"),
    "mkdir": lambda m: os.mkdir(m / "new"),
    "mkdir-over-whiteout": lambda m: os.mkdir(m / "gone"),
    "symlink": lambda m: os.symlink("x", m / "new"),
    "mknod": lambda m: os.mkfifo(m / "new"),
    "write-small": lambda m: rewrite(m, "small"),
    "write-hard-link": lambda m: rewrite(m, "dir/two"),
    "chmod-big": lambda m: os.chmod(m / "big", 0o600),
    "chown-symlink": lambda m: os.chown(m / "link", 5, 5, follow_symlinks=False),
    "chmod-dir": lambda m: os.chmod(m / "dir/sub", 0o700),
    "rename": lambda m: os.rename(m / "big", m / "dir/moved"),
    "rename-dir": lambda m: os.rename(m / "dir", m / "moved"),
    "link": lambda m: os.link(m / "small", m / "small2"),
}
READ_ONLY: dict[str, Operation] = {**WITH_BLOCKS, **WITH_INODES, "unlink": lambda m: os.unlink(m / "big")}
# Removing must work on a full file system wherever it works on a plain one.
REMOVALS: dict[str, Operation] = {
    "unlink-upper": lambda m: os.unlink(m / "made"),
    "unlink-lower": lambda m: os.unlink(m / "big"),
    "rmdir-upper": lambda m: os.rmdir(m / "made-dir"),
}


def failing(operation: Operation, mnt: Path) -> int | None:
    try:
        operation(mnt)
    except OSError as error:
        return error.errno
    return None


def work_left(stack: Stack) -> list[str]:
    """What is in the work directory, apart from the shared whiteout (a device 0/0)."""
    assert stack.work is not None
    scratch = stack.work / "work"
    return [p.name for p in scratch.iterdir() if not (p.is_char_device() and p.lstat().st_rdev == 0)]


def under_the_kernel(stack: Stack, expected: Snapshot) -> None:
    if not mounts.why_no_kernel_overlay():
        with KernelOverlay(stack, KERNEL) as kernel:
            assert_equal(expected, snapshot(kernel.mnt), labels=("layerfs", "kernel overlayfs"))


def refused(
    stack: Stack,
    ground: Ground,
    fill: Callable[[Ground], Path],
    operation: Operation,
    expected_errno: int,
) -> None:
    with Layerfs(stack) as mounted:
        os.unlink(mounted.mnt / "gone")
        before = snapshot(mounted.mnt)
        ballast = fill(ground)
        got = failing(operation, mounted.mnt)
        if got is None:
            # Fair where it needed nothing after all; the result must then be whole.
            changed = snapshot(mounted.mnt)
            assert work_left(stack) == []
            discard(ballast)
            mounted.remount()
            assert_equal(changed, snapshot(mounted.mnt), message="what had room is not whole after a remount")
            pytest.skip("there was room for it")
        assert got == expected_errno, f"{errno.errorcode[got]}, expected {errno.errorcode[expected_errno]}"
        # Times of directories: a parent that was copied up on the way shows them as they were.
        assert_equal(before, snapshot(mounted.mnt), message="a refused operation changed something")
        assert work_left(stack) == [], "left in the work directory"
        discard(ballast)
        mounted.remount()
        assert_equal(before, snapshot(mounted.mnt), message="a refused operation shows after a remount")
        assert failing(operation, mounted.mnt) is None, "with room again"
        after = snapshot(mounted.mnt)
        mounted.remount()
        assert_equal(after, snapshot(mounted.mnt), message="after room was made and a remount")
    under_the_kernel(stack, after)


@pytest.mark.parametrize("operation", WITH_BLOCKS)
def test_out_of_blocks(stack: Stack, ground: Ground, operation: str) -> None:
    refused(stack, ground, fill_blocks, WITH_BLOCKS[operation], errno.ENOSPC)


@pytest.mark.parametrize("operation", WITH_INODES)
def test_out_of_inodes(stack: Stack, ground: Ground, operation: str) -> None:
    refused(stack, ground, fill_inodes, WITH_INODES[operation], errno.ENOSPC)


@pytest.mark.parametrize("fill", [fill_blocks, fill_inodes])
@pytest.mark.parametrize("operation", REMOVALS)
def test_removing_from_a_full_upper(
    stack: Stack, ground: Ground, fill: Callable[[Ground], Path], operation: str
) -> None:
    """What is only in the upper can go. A lower object needs a whiteout: one more link to the shared one."""
    with Layerfs(stack) as mounted:
        (mounted.mnt / "made").write_bytes(b"made")
        (mounted.mnt / "made-dir").mkdir()
        os.unlink(mounted.mnt / "gone")
        ballast = fill(ground)
        before = snapshot(mounted.mnt)
        got = failing(REMOVALS[operation], mounted.mnt)
        if operation != "unlink-lower":
            assert got is None
        if got is not None:
            assert got == errno.ENOSPC
            assert_equal(before, snapshot(mounted.mnt))
        seen = snapshot(mounted.mnt)
        assert work_left(stack) == []
        discard(ballast)
        mounted.remount()
        assert_equal(seen, snapshot(mounted.mnt))


def test_a_write_that_fills_the_disk_keeps_what_it_wrote(stack: Stack, ground: Ground) -> None:
    with Layerfs(stack) as mounted:
        written = 0
        with (mounted.mnt / "new").open("wb", buffering=0) as f:
            with pytest.raises(OSError) as caught:
                while True:
                    written += f.write(b"y" * 65536)
            assert caught.value.errno == errno.ENOSPC
        assert written > MIB
        assert (mounted.mnt / "new").read_bytes()[:written] == b"y" * written
        mounted.remount()
        assert (mounted.mnt / "new").read_bytes()[:written] == b"y" * written
        os.unlink(mounted.mnt / "new")
        rewrite(mounted.mnt, "big")
        with (mounted.mnt / "big").open("rb") as f:
            assert f.read(8) == b"new34567"


def test_mounting_with_a_full_upper(stack: Stack, ground: Ground) -> None:
    """The mount works, or says in one line why not; and works when there is room."""
    with Layerfs(stack) as mounted:
        rewrite(mounted.mnt, "small")
        before = snapshot(mounted.mnt)
    ballast = [fill_blocks(ground)]
    with contextlib.suppress(OSError):
        for number in range(1000):
            ballast.append(ground.path / f"inode{number}")
            ballast[-1].touch()
    mounted = Layerfs(stack)
    try:
        with mounted:
            assert_equal(before, snapshot(mounted.mnt))
    except RuntimeError as error:
        assert "No space left" in str(error) and "Traceback" not in str(error), error
    for path in ballast:
        path.unlink(missing_ok=True)
    with Layerfs(stack) as again:
        assert_equal(before, snapshot(again.mnt))


def test_the_upper_goes_read_only(stack: Stack, ground: Ground) -> None:
    """As ext4 does when it finds an error: everything that would write gets EROFS, reading goes on."""
    assert ground.device is not None
    trigger = Path("/sys/fs/ext4") / Path(ground.device).name / "trigger_fs_error"
    if not trigger.exists():
        pytest.skip("this kernel cannot make an ext4 go read-only")
    subprocess.run(["mount", "-o", "remount,errors=remount-ro", ground.path], check=True)
    mounted = Layerfs(stack, expected_log="Read-only file system|Traceback")
    mounted.open()
    try:
        os.unlink(mounted.mnt / "gone")
        rewrite(mounted.mnt, "small")
        before = snapshot(mounted.mnt)
        os.sync()
        trigger.write_text("a test")
        for name, operation in READ_ONLY.items():
            assert failing(operation, mounted.mnt) == errno.EROFS, name
            assert_equal(before, snapshot(mounted.mnt), message=f"{name} changed something")
        assert work_left(stack) == []
    finally:
        with contextlib.suppress(RuntimeError):  # not everything may have reached the disk: it says so
            mounted.close()
        ground.power_cycle()
    with mounted as again:
        assert_equal(before, snapshot(again.mnt), message="after the file system was mounted again")
        rewrite(again.mnt, "big")


def test_the_upper_fails(stack: Stack, ground: Ground) -> None:
    """A file system that was shut down answers EIO (ESHUTDOWN) to everything: so does the mount, where it
    needs the upper; lower files can still be read, and the mount ends.
    """
    import fcntl
    import struct

    mounted = Layerfs(stack, expected_log="Input/output error|Traceback")
    mounted.open()
    try:
        rewrite(mounted.mnt, "small")
        os.listdir(mounted.mnt / "dir")
        os.sync()
        fd = os.open(ground.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NOLOGFLUSH))
        os.close(fd)
        for operation in ("create", "write-hard-link", "rename-dir", "chmod-big"):
            assert failing(WITH_INODES[operation], mounted.mnt) in (errno.EIO, errno.ESHUTDOWN), operation
        with (mounted.mnt / "big").open("rb") as f:
            assert f.read(4) == b"0123"
    finally:
        with pytest.raises(RuntimeError, match="not everything reached the disk"):
            mounted.close()
        ground.power_cycle()
    with mounted as again:
        assert set(os.listdir(again.mnt)) == {"big", "small", "link", "dir", "gone"}
        rewrite(again.mnt, "big")
