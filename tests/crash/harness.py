"""Mounts that die at a chosen step, and what must hold of the upper that they leave behind.

`Ground` is where uppers live: the scratch file system, or a loop mount of its own that can lose its power.
`Trial` takes one prepared stack through: run the operation, die at step N, mount again, compare.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.support import mounts
from tests.support.stack import Stack
from tests.support.tree import Snapshot, differences, snapshot

PATIENCE = 20.0
# Same number on ext4 (EXT4_IOC_SHUTDOWN) and xfs (XFS_IOC_GOINGDOWN); 2: the log is not flushed.
SHUTDOWN, NOLOGFLUSH = 0x8004587D, 2

KERNELS = ("redirect_dir=on,metacopy=on,index=off", "redirect_dir=on,metacopy=on,index=on")


class Zygote:
    """Starts layerfs daemons as forks of one process (`zygote`)."""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE)

    def mount(self, stack: Stack, **request: Any) -> int:
        """Pid of the daemon that serves `stack`, which is mounted now. Raises RuntimeError."""
        request |= {
            "lowers": [str(lower) for lower in stack.lowers],
            "upper": str(stack.upper),
            "work": str(stack.work),
            "mountpoint": str(stack.mnt),
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            raise RuntimeError("the daemon did not answer")
        word, _, rest = os.read(self.process.stdout.fileno(), 65536).decode().partition(" ")
        if word != "ready":
            raise RuntimeError(f"layerfs did not mount: {rest}")
        return int(rest)


def wait_dead(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline, f"daemon {pid} is still alive"
        time.sleep(0.002)


@dataclass
class Ground:
    """A directory for uppers. With `device`, a file system of its own there that can lose its power."""

    path: Path
    kind: str = ""
    device: str | None = None

    def power_cycle(self) -> None:
        """After a shutdown: what reached the log comes back, nothing else."""
        assert self.device is not None
        mounts.umount(self.path)
        self.mount()

    def mount(self) -> None:
        assert self.device is not None
        mounts.mount(self.device, self.path, self.kind)


@contextlib.contextmanager
def loop_ground(kind: str, where: Path, size: int, *options: str) -> Iterator[Ground]:
    """A fresh file system of `kind` and `size` bytes on a loop device, mounted at `where`/mount."""
    image, point = where / "image", where / "mount"
    point.mkdir()
    with image.open("wb") as f:
        f.truncate(size)
    quiet = ["-q", "-F"] if kind.startswith("ext") else ["-q", "-f"]
    subprocess.run([f"mkfs.{kind}", *quiet, *options, image], check=True, capture_output=True)
    found = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    ground = Ground(point, kind, found.stdout.strip())
    try:
        ground.mount()
        try:
            yield ground
        finally:
            for mounted, _ in reversed(mounts.mounts_below(point)):
                mounts.umount(mounted, mounts.MNT_DETACH if mounted != str(point) else 0)
    finally:
        subprocess.run(["losetup", "--detach", str(ground.device)], check=True)


@dataclass(frozen=True)
class Scenario:
    """An operation that takes several steps on disk.

    `prepare`: what is done on an earlier mount. `operation`: must either have happened or not, wherever it is
    cut short. `result`: a path whose fsync makes it last.
    """

    name: str
    operation: Callable[[Path], None]
    prepare: Callable[[Path], None] | None = None
    result: str = ""
    file_whiteouts: bool = False  # as where mknod of 0/0 is not allowed: the kernel cannot read that
    options: dict[str, Any] = field(default_factory=dict)  # of StackConfig

    def __str__(self) -> str:
        return self.name


class Trial:
    """One scenario on one ground. `since_ns`: later times are "now"."""

    def __init__(
        self, zygote: Zygote, ground: Ground, scenario: Scenario, lowers: Callable[[Stack], None]
    ) -> None:
        self.zygote, self.ground, self.scenario = zygote, ground, scenario
        self.since_ns = time.time_ns() - 10**9
        self.stack = Stack(None, 2, name=scenario.name)
        lowers(self.stack)
        self.arm = self.stack.dir / "arm"
        self.trace = self.stack.dir / "trace"
        self.seed = self.stack.dir / "prepared"
        self.home = ground.path / f"{scenario.name}-{os.getpid()}"
        self.options = {**scenario.options, "file_whiteouts": scenario.file_whiteouts}
        if scenario.prepare is not None:
            with self.mounted():
                scenario.prepare(self.stack.mnt)
        self.seed.mkdir()
        self._copy(self.stack.dir, self.seed)
        # What the tree is like before and after, and what steps lead from one to the other.
        self.fresh()
        with self.mounted() as mnt:
            self.before_arming(mnt)
            self.old = snapshot(mnt)
        self.fresh()
        with self.mounted(arm=str(self.arm), trace=str(self.trace)) as mnt:
            self.before_arming(mnt)
            self.arm.touch()
            scenario.operation(mnt)
            self.arm.unlink()
        self.steps = self.trace.read_text().split()
        with self.mounted() as mnt:
            self.new = snapshot(mnt)
        assert differences(self.old, self.new, recent_ns=self.since_ns) or not scenario.result

    def before_arming(self, mnt: Path) -> None:
        """Something that is on disk for sure before the operation begins."""
        with (mnt / "synced").open("xb", buffering=0) as f:
            f.write(b"on disk")
            os.fsync(f.fileno())
        self.sync_path(mnt)

    @staticmethod
    def sync_path(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        pair = [source / "upper", source / "work"]
        subprocess.run(["cp", "-a", "--sparse=always", *pair, target], check=True)

    def fresh(self) -> None:
        """The prepared upper and work directory again, on the ground and on disk."""
        if self.home.exists():
            shutil.rmtree(self.home)
        self.home.mkdir()
        self._copy(self.seed, self.home)
        self.stack.upper, self.stack.work = self.home / "upper", self.home / "work"
        os.sync()

    @contextlib.contextmanager
    def mounted(self, **request: Any) -> Iterator[Path]:
        pid = self.zygote.mount(self.stack, **self.options, **request)
        try:
            yield self.stack.mnt
        finally:
            mounts.umount(self.stack.mnt)
            wait_dead(pid)

    def die_at(self, number: int) -> None:
        """Run the operation until the daemon dies at step `number` (from 1); clear the dead mount."""
        self.fresh()
        request: dict[str, Any] = {"arm": str(self.arm), "trace": os.devnull, "at": number}
        if self.ground.device is not None:
            request["shutdown"] = [str(self.ground.path), SHUTDOWN, NOLOGFLUSH]
        pid = self.zygote.mount(self.stack, **self.options, **request)
        try:
            self.before_arming(self.stack.mnt)
            self.arm.touch()
            try:
                self.scenario.operation(self.stack.mnt)
            except OSError:
                pass
            finally:
                self.arm.unlink()
            wait_dead(pid)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise
        finally:
            mounts.umount(self.stack.mnt, mounts.MNT_DETACH)
        if self.ground.device is not None:
            self.ground.power_cycle()

    def cut_after_fsync(self) -> None:
        """The whole operation, fsync of its result, then the power goes."""
        self.fresh()
        pid = self.zygote.mount(self.stack, **self.options)
        try:
            self.before_arming(self.stack.mnt)
            self.scenario.operation(self.stack.mnt)
            self.sync_path(self.stack.mnt / self.scenario.result)
            fd = os.open(self.ground.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NOLOGFLUSH))
            finally:
                os.close(fd)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_dead(pid)
            mounts.umount(self.stack.mnt, mounts.MNT_DETACH)
        self.ground.power_cycle()

    def is_like(self, seen: Snapshot, reference: Snapshot) -> list[str]:
        """How `seen` differs from one of the two trees there may be.

        Times of directories may be "now": putting them back after a copy-up is a step of its own. After a
        power cut times of files may be, too: the file system may have written them before the data.
        """
        alike = {}
        for name, entry in seen.items():
            loose = entry.type == "dir" or self.ground.device is not None
            if loose and entry.mtime_ns >= self.since_ns and name in reference:
                entry = dataclasses.replace(entry, mtime_ns=reference[name].mtime_ns)
            alike[name] = entry
        return differences(reference, alike, recent_ns=self.since_ns, labels=("reference", "found"))

    def check(self, when: str, only_new: bool = False) -> None:
        """The tree is the old one or the new one, nothing is left over, and the kernel sees the same."""
        assert self.stack.work is not None
        with self.mounted() as mnt:
            left = os.listdir(self.stack.work / "work")
            journals = [n for n in os.listdir(self.stack.work / "layerfs") if "links" in n]
            seen = snapshot(mnt)
        problems = []
        old, new = self.is_like(seen, self.old), self.is_like(seen, self.new)
        if only_new and new:
            problems += ["is not the new tree:", *new[:8]]
        elif old and new:
            problems += ["is neither the old tree:", *old[:8], "nor the new one:", *new[:8]]
        if left or journals:
            problems.append(f"left in the work directory: {left} {journals}")
        if not self.scenario.file_whiteouts and not mounts.why_no_kernel_overlay():
            for options in KERNELS:
                with mounts.KernelOverlay(self.stack, options) as kernel:
                    other = snapshot(kernel.mnt)
                differs = differences(seen, other, labels=("layerfs", "kernel"))
                problems += [f"under kernel overlayfs ({options}): {line}" for line in differs[:8]]
        if not old:  # it can be done again
            with self.mounted() as mnt:
                try:
                    self.scenario.operation(mnt)
                except OSError as error:
                    problems.append(f"doing it again fails: {error}")
                seen = snapshot(mnt)
            problems += [f"done again: {line}" for line in self.is_like(seen, self.new)[:8]]
        assert not problems, "\n  ".join([f"{self.scenario.name}, {when}:", *problems])

    def remove(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)
        self.stack.upper = self.stack.work = None
        if not mounts.mounts_below(self.stack.dir):
            self.stack.remove()
