"""One mount, as the jobs see it: fresh upper directory, and ways to time what is done in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from . import work
from .commands import BenchmarkError, Command, run, seconds
from .contenders import Contender
from .measures import Measure, Measures
from .requests import RequestCounter
from .stacks import Stack

JOB_TIMEOUT = 300  # seconds
_NONE: Mapping[str, str] = {}


class Place:
    """`contender` shows `stack` at `mnt`, since `start_up` seconds after it was told to."""

    def __init__(
        self,
        contender: Contender,
        stack: Stack,
        mnt: Path,
        start_up: float,
        measures: Measures,
        group: str,
        number: int,
        counter: RequestCounter | None,
    ) -> None:
        self.contender = contender
        self.stack = stack
        self.mnt = mnt
        self.start_up = start_up
        self._measures = measures
        self._group = group
        self._number = number
        self.first_round = number == 0
        # Only then: counting costs a little time.
        self._counter = counter if contender.fuse and self.first_round else None
        self._st_dev = mnt.stat().st_dev

    def time(
        self,
        key: str,
        title: str,
        operations: int,
        take: Callable[[], float],
        check: Callable[[], None] | None = None,
        *,
        unit: str = "us",
    ) -> None:
        """Notes what `take` returns. `check` looks at the result when the clock has stopped; a wrong one is
        kept in the place of all times of this contender, and does not stop the rest."""
        measure = self._measures.setdefault(key, Measure(key, title, operations, unit, self._group))
        name = self.contender.name
        if name in measure.wrong:
            return
        try:
            with self._counter.counting(self._st_dev) if self._counter else nullcontext() as kinds:
                value = take()
            if check:
                check()
        except (BenchmarkError, OSError) as error:
            measure.wrong[name] = str(error)
            return
        measure.values.setdefault(name, {})[self._number] = value
        if kinds is not None:
            measure.requests[name] = dict(kinds.most_common())

    def note_start_up(self) -> None:
        new = Measure("start", "start-up to usable", 1, "ms", self._group)
        measure = self._measures.setdefault("start", new)
        measure.values.setdefault(self.contender.name, {})[self._number] = self.start_up

    def many(self, program: Path, what: str, which: str = "present", of: Stack | None = None) -> float:
        """Seconds that `many` needs for all names of a list of the stack, or of a part of it."""
        names = of or self.stack
        expected = len(names.contents) if which == "present" else len(names.absent)
        said = run([program, what, names.base / which], cwd=self.mnt, timeout=JOB_TIMEOUT)
        nanoseconds, *counts = map(int, said.split())
        if counts != ([expected, 0, 0] if which == "present" else [0, expected, 0]):
            found = "{} present, {} absent, {} failed".format(*counts)
            raise BenchmarkError(f"{what} of {expected} {which} names: {found}")
        return nanoseconds / 1e9

    def work(self, name: str, *words: object) -> float:
        """Seconds of a piece of work from `work.py`, which runs as a program of its own."""
        return float(self._work(name, *words))

    def check(self, name: str, *words: object) -> None:
        """A check from `work.py`. Raises BenchmarkError."""
        self._work(name, *words)

    def _work(self, name: str, *words: object) -> str:
        return run([sys.executable, work.__file__, name, *map(str, words)], timeout=JOB_TIMEOUT)

    def program(
        self, *command: str | Path, output: Path | None = None, variables: Mapping[str, str] = _NONE
    ) -> float:
        """Seconds of a program that is started in the mount, with some more environment variables."""
        return seconds(command, self.mnt, JOB_TIMEOUT, _environment(variables), output)

    def said(self, *command: str | Path, variables: Mapping[str, str] = _NONE) -> str:
        return run(command, self.mnt, JOB_TIMEOUT, _environment(variables))


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", **variables}


@contextmanager
def mounted(
    contender: Contender, stack: Stack, base: Path, *, own_disk: bool = False
) -> Iterator[tuple[Path, float]]:
    """A mount with a fresh upper directory below `base`; gives the mount point and the seconds until it was
    usable.

    `own_disk`: the upper directory lies on an ext4 made for it. On a used one the price of a create hangs on
    what was removed before: for minutes ext4 steps around inodes that were freed just now."""
    mnt, disk = base / "mnt", base / "disk"
    disk.mkdir(parents=True)
    try:
        if own_disk:
            run(["truncate", "-s", "2G", base / "image"])
            run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", base / "image"])
            run(["mount", "-o", "loop", base / "image", disk])
        elapsed = contender.mount(stack, disk / "upper", disk / "work", mnt)
        yield mnt, elapsed
    finally:
        if os.path.ismount(mnt):
            try:
                contender.unmount(mnt)
            except BenchmarkError:
                subprocess.run(["umount", "-l", str(mnt)], check=False)
                raise
        if os.path.ismount(disk):
            umount_when_free(disk)
        shutil.rmtree(base, ignore_errors=True)


@contextmanager
def mounted_inside(mnt: Path, *what: Command) -> Iterator[None]:
    """Other mounts inside of one: arguments of mount(8), the last one relative to `mnt`."""
    done: list[Path] = []
    try:
        for *options, where in what:
            run(["mount", *options, mnt / where])
            done.append(mnt / where)
        yield
    finally:
        for path in reversed(done):
            umount_when_free(path)


def umount_when_free(mnt: Path) -> None:
    """A daemon may hold its directories for a moment after its own mount is gone."""
    for _ in range(100):
        if subprocess.run(["umount", mnt], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return
        time.sleep(0.05)
    run(["umount", "-l", mnt])
