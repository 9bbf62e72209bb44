"""What reaches the backing file system: fsync and its kin in the daemon's system calls, and `volatile`."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.posix.calls import IN_CREATE, IN_MOVED_TO, Inotify
from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs
from tests.support.stack import Dir, File, Hardlink, Stack
from tests.support.tree import assert_equal, snapshot

SYNCING = "fsync,fdatasync,syncfs,sync,sync_file_range,msync"
MARK = Path("work/incompat/volatile")
TREE = {
    "d": Dir(),
    "d/lower": File(data=b"x" * 100_000),
    "d/meta": File(data=b"x" * 100_000),
    "d/linked": File(data=b"linked"),
    "d/linked2": Hardlink("d/linked"),
    "d/gone": File(data=b"gone"),
}


class Trace:
    """The daemon's system calls on descriptors, with the paths that they mean."""

    def __init__(self, m: Layerfs, calls: str) -> None:
        if not shutil.which("strace"):
            pytest.skip("no strace")
        (pid,) = m.pids()
        self.file = m.stack.dir / "strace"
        self.process = subprocess.Popen(
            ["strace", "-f", "-y", "-s", "0", "-e", f"trace={calls}", "-o", self.file, "-p", str(pid)],
            stderr=subprocess.PIPE,
        )
        assert self.process.stderr is not None
        said = self.process.stderr.readline()
        if b"attached" not in said:
            self.process.wait()
            pytest.skip(f"strace cannot attach: {said!r}")

    def lines(self) -> list[str]:
        """All calls so far. Every answered request's calls are there: strace stops the thread at each."""
        return self.file.read_text(errors="replace").splitlines()

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait()


@contextmanager
def traced(m: Layerfs, calls: str = SYNCING) -> Iterator[Trace]:
    trace = Trace(m, calls)
    try:
        yield trace
    finally:
        trace.close()


def synced(lines: list[str]) -> list[tuple[str, str]]:
    """(call, path) of each that succeeded; a call and its end may stand on two lines."""
    found = []
    for line in lines:
        if match := re.search(r"(\w+)\(\d+<([^>]*)>", line):
            found.append((match[1], re.sub(r"/#[0-9a-f]+$", "/#N", match[2])))
    return found


@pytest.fixture
def stack(root: None, make_stack: type[Stack]) -> Stack:
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)
    made = make_stack()
    made.write(made.lowers[0], TREE)
    return made


class Since:
    def __init__(self, trace: Trace, stack: Stack) -> None:
        self.trace, self.stack, self.at = trace, stack, 0

    def __call__(self) -> list[tuple[str, str]]:
        """What was synced since the last call; paths relative to the stack's directory."""
        lines = self.trace.lines()
        fresh, self.at = lines[self.at :], len(lines)
        return [(call, path.removeprefix(f"{self.stack.dir}/")) for call, path in synced(fresh)]


def test_each_sync_reaches_the_upper(stack: Stack) -> None:
    with Layerfs(stack) as m, traced(m) as trace:
        since = Since(trace, stack)
        p = m.mnt
        # A new file.
        fd = os.open(p / "new", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"new")
        assert since() == [], "nobody asked for it"
        os.fsync(fd)
        assert since() == [("fsync", "upper/new")]
        os.write(fd, b"more")
        os.fdatasync(fd)
        assert since() == [("fdatasync", "upper/new")]
        os.close(fd)
        assert since() == []
        # A copy-up, by the first write or the open before it, is on disk before it is seen.
        fd = os.open(p / "d" / "lower", os.O_RDWR)
        os.write(fd, b"x")
        assert ("fsync", "work/work/#N") in since()
        os.fsync(fd)
        assert since() == [("fsync", "upper/d/lower")]
        os.close(fd)
        # Through a descriptor that was opened for reading, before the copy-up.
        reader = os.open(p / "d" / "linked", os.O_RDONLY)
        with open(p / "d" / "linked2", "ab") as file:
            file.write(b"x")
        since()
        os.fsync(reader)
        (one,) = since()
        assert one[0] == "fsync" and one[1] in ("upper/d/linked", "upper/d/linked2", "work/work/#N")
        os.close(reader)
        # After a rename, by the name that it has now; and of an unlinked file.
        fd = os.open(p / "new", os.O_WRONLY)
        os.rename(p / "new", p / "d" / "renamed")
        since()
        os.fsync(fd)
        assert since() == [("fsync", "upper/d/renamed")]
        os.close(fd)
        # Directories: of the upper, merged, and one that is in a lower only (nothing to do, no error).
        for name, upper in (("d", "upper/d"), (".", "upper")):
            fd = os.open(p / name, os.O_RDONLY)
            os.fsync(fd)
            assert since() == [("fsync", upper)]
            os.close(fd)
        os.rename(p / "d", p / "moved")
        since()
        fd = os.open(p / "moved", os.O_RDONLY)
        os.fsync(fd)
        assert since() == [("fsync", "upper/moved")]
        os.fdatasync(fd)
        assert [path for _, path in since()] == ["upper/moved"]
        os.close(fd)


def test_sync_of_a_metadata_only_copy(stack: Stack) -> None:
    """The new attributes are in the upper: syncing them means the upper's inode, however it was opened."""
    with Layerfs(stack) as m, traced(m) as trace:
        since = Since(trace, stack)
        before = os.open(m.mnt / "d" / "meta", os.O_RDONLY)
        os.chmod(m.mnt / "d" / "meta", 0o600)
        after = os.open(m.mnt / "d" / "meta", os.O_RDONLY)
        since()
        for fd in (before, after):
            os.fsync(fd)
            assert ("fsync", "upper/d/meta") in since()
            os.close(fd)


def test_o_sync_writes(stack: Stack) -> None:
    """A write through O_SYNC or O_DSYNC is on disk when it returns: the backing descriptor has the
    flag, or is synced.
    """
    with Layerfs(stack) as m, traced(m, SYNCING + ",pwrite64,pwritev2,openat,openat2") as trace:
        for flag, name in ((os.O_SYNC, "s"), (os.O_DSYNC, "ds")):
            for path in (m.mnt / name, m.mnt / "d" / "lower"):
                before = len(trace.lines())
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | flag, 0o644)
                start = len(trace.lines())
                os.pwrite(fd, b"synced", 0)
                calls = synced(trace.lines()[start:])
                opened = "\n".join(trace.lines()[before:start])
                as_calls = any(call in ("fsync", "fdatasync") for call, _ in calls)
                as_flag = re.search(r"O_(SYNC|DSYNC)", opened)
                of_the_write = re.search(r"pwritev2\(.*RWF_D?SYNC", "\n".join(trace.lines()[start:]))
                assert as_calls or as_flag or of_the_write, (path, calls)
                os.close(fd)


def test_nothing_is_synced_for_reading(stack: Stack) -> None:
    with Layerfs(stack) as m, traced(m) as trace:
        snapshot(m.mnt)
        fd = os.open(m.mnt / "d" / "lower", os.O_RDONLY)
        os.read(fd, 100)
        os.close(fd)
        assert synced(trace.lines()) == []


def test_the_end_of_a_mount_syncs(stack: Stack) -> None:
    """umount returns when all of the upper's file system is on disk: one syncfs by the daemon at the end."""
    m = Layerfs(stack).open()
    with traced(m) as trace:
        (m.mnt / "new").write_text("new")
        with open(m.mnt / "d" / "lower", "ab") as file:
            file.write(b"x")
        m.close()
        calls = [call for call, _ in synced(trace.lines())]
    assert "syncfs" in calls


# --- volatile -------------------------------------------------------------------------------------


def test_volatile_syncs_nothing(stack: Stack) -> None:
    with Layerfs(stack, "volatile") as m:
        assert stack.work is not None and (stack.work / MARK).is_dir()
        assert m.info()["volatile"] is True
        with traced(m, SYNCING + ",openat,openat2") as trace:
            fd = os.open(m.mnt / "new", os.O_WRONLY | os.O_CREAT | os.O_SYNC)
            os.write(fd, b"new")
            os.fsync(fd)
            os.fdatasync(fd)
            os.close(fd)
            fd = os.open(m.mnt / "d" / "lower", os.O_RDWR | os.O_DSYNC)
            os.pwrite(fd, b"new", 0)
            os.fsync(fd)
            os.close(fd)
            with open(m.mnt / "d" / "linked", "ab") as file:
                file.write(b"x")
            os.rename(m.mnt / "d", m.mnt / "e")
            os.unlink(m.mnt / "e" / "gone")
            fd = os.open(m.mnt / "e", os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            os.sync()
            lines = trace.lines()
    assert [line for line in lines if re.search(r"\b(fsync|fdatasync|syncfs|sync_file_range)\(", line)] == []
    assert [line for line in lines if re.search(r"O_D?SYNC", line)] == []


def test_volatile_after_a_crash_is_refused_by_both(stack: Stack, kernel_overlay: None) -> None:
    m = Layerfs(stack, "volatile").open()
    (m.mnt / "new").write_text("new")
    m.kill()
    m.close()
    assert stack.work is not None and (stack.work / MARK).is_dir()
    for options in ("", "volatile"):
        again = Layerfs(stack, options)
        done = again.run(*again.command())
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "volatile" in done.stderr
        with pytest.raises(OSError):
            KernelOverlay(stack, ["redirect_dir=on", *([options] if options else [])]).open()
        assert not mounts.mounts_below(stack.mnt)
    # Removing the mark, as the message says, is the user's decision to trust it.
    shutil.rmtree(stack.work / "work" / "incompat")
    with Layerfs(stack) as m:
        assert (m.mnt / "new").exists()


def test_volatile_of_the_kernel_is_respected(stack: Stack, kernel_overlay: None) -> None:
    """The kernel leaves its mark even after a clean umount; layerfs does not mount such an upper."""
    with KernelOverlay(stack, "volatile,redirect_dir=on") as kernel:
        (kernel.mnt / "by-kernel").write_text("x")
    assert stack.work is not None and (stack.work / MARK).is_dir()
    m = Layerfs(stack)
    done = m.run(*m.command())
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "volatile" in done.stderr
    assert (stack.work / MARK).is_dir()


def test_the_end_makes_nothing_in_the_work_directory(stack: Stack) -> None:
    """umount returns before the daemon has ended, and buildah removes the work directory of a volatile mount
    then: whatever the end made there, even for a moment, would fail its rmdir."""
    assert stack.work is not None
    with Layerfs(stack, "volatile") as m:
        (m.mnt / "new").write_text("new")
        watches = [
            Inotify(directory, IN_CREATE | IN_MOVED_TO)
            for directory in (stack.work, stack.work / "work", stack.work / "layerfs")
        ]
    assert not (stack.work / "work" / "incompat").exists()
    for watch in watches:
        with watch:
            assert watch.events() == []


def test_volatile_that_ended_well(stack: Stack, kernel_overlay: None) -> None:
    """Either all was synced at the end and the mark is gone, or, as with the kernel, neither."""
    m = Layerfs(stack, "volatile").open()
    with traced(m) as trace:
        (m.mnt / "new").write_text("new")
        os.unlink(m.mnt / "d" / "gone")
        before = snapshot(m.mnt)
        m.close()
        at_end = [call for call, _ in synced(trace.lines())]
    assert stack.work is not None
    if (stack.work / MARK).exists():
        assert at_end == []
    else:
        assert at_end == ["syncfs"]
        with KernelOverlay(stack) as kernel:
            assert_equal(before, snapshot(kernel.mnt), labels=("layerfs", "kernel"))
        with Layerfs(stack) as m:
            assert_equal(before, snapshot(m.mnt))


def test_waiting_for_a_sync_holds_nobody_up(stack: Stack) -> None:
    """fsync of a file with much to write, from several callers, while others go on: order, not time."""
    with Layerfs(stack) as m:
        fds = [os.open(m.mnt / f"f{n}", os.O_RDWR | os.O_CREAT) for n in range(4)]
        for fd in fds:
            os.pwrite(fd, os.urandom(8 << 20), 0)
        children = []
        for fd in fds:
            child = os.fork()
            if child == 0:
                try:
                    os.fsync(fd)
                finally:
                    os._exit(0)
            children.append(child)
        for n in range(100):
            (m.mnt / f"small{n}").write_text("x")
        deadline = time.monotonic() + 60
        for child in children:
            while os.waitpid(child, os.WNOHANG)[0] == 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        for fd in fds:
            os.close(fd)
