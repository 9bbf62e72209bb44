"""Runs the jobs: every contender once in every round, in turning order, so that what else the machine does
falls on all alike. Checks what each mount shows before anything is timed. Prints only progress, to stderr."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import jobs
from .contenders import BenchmarkError, Contender, run
from .stacks import SHAPES, Stack, mixed

JOB_TIMEOUT = 180  # seconds


@dataclass(frozen=True)
class Sizes:
    """How much is done; `QUICK` only shows that everything works."""

    rounds: int
    layers: int  # of the mixed stack
    files: int  # in the mixed stack
    created: int
    untarred: int
    shape_rounds: int
    shape_layers: tuple[int, ...]
    shape_directories: int


FULL = Sizes(5, 10, 20_000, 3_000, 3_000, 3, (1, 8, 32, 128), 1_200)
QUICK = Sizes(1, 10, 2_000, 300, 400, 1, (1, 32), 120)


@dataclass
class Measure:
    """Seconds of one job, in the order of the rounds, by contender."""

    key: str
    title: str
    operations: int
    unit: str  # "us" for each operation, or "ms" for the whole job
    seconds: dict[str, list[float]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """Median in the measure's unit."""
        taken = self.seconds.get(name)
        if not taken:
            return None
        return statistics.median(taken) * (1e6 / self.operations if self.unit == "us" else 1e3)

    def ratios(self, name: str, base: str) -> list[float]:
        """Round by round, against the base contender in the same round."""
        return [a / b for a, b in zip(self.seconds.get(name, []), self.seconds.get(base, []), strict=False)]


class Bench:
    def __init__(self, contenders: Sequence[Contender], sizes: Sizes, scratch: Path) -> None:
        self.contenders = list(contenders)
        self.sizes = sizes
        self.scratch = scratch
        self.measures: dict[str, Measure] = {}
        self.failures: list[str] = []
        self.statmany = scratch / "statmany"
        self._mounts = 0

    # --- helpers ---

    @contextmanager
    def mounted(
        self, contender: Contender, stack: Stack, *, own_disk: bool = False
    ) -> Iterator[tuple[Path, float]]:
        """A mount with a fresh upper directory; gives the mount point and the seconds until it was usable.

        `own_disk`: the upper directory lies on an ext4 made for it. On a used one the price of a create hangs
        on what was removed before: for minutes ext4 steps around inodes that were freed just now."""
        self._mounts += 1
        base = self.scratch / f"mount{self._mounts}"
        mnt, disk = base / "mnt", base / "disk"
        disk.mkdir(parents=True)
        try:
            if own_disk:
                run(["truncate", "-s", "1G", base / "image"])
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

    def measure(self, key: str, title: str, operations: int, unit: str) -> Measure:
        return self.measures.setdefault(key, Measure(key, title, operations, unit))

    def note(self, measure: Measure, contender: Contender, take: Callable[[], float]) -> None:
        """Takes one time; a wrong result is kept in its place and does not stop the rest."""
        try:
            measure.seconds.setdefault(contender.name, []).append(take())
        except (BenchmarkError, OSError) as error:
            measure.wrong.setdefault(contender.name, str(error))

    def stats(self, stack: Stack, mnt: Path, which: str) -> float:
        expected = len(stack.contents) if which == "present" else len(stack.absent)
        said = run([self.statmany, stack.base / which], cwd=mnt, timeout=JOB_TIMEOUT)
        nanoseconds, *counts = map(int, said.split())
        if counts != ([expected, 0, 0] if which == "present" else [0, expected, 0]):
            found = "{} present, {} absent, {} failed".format(*counts)
            raise BenchmarkError(f"stat of {expected} {which} names: {found}")
        return nanoseconds / 1e9

    def job(self, name: str, *words: object) -> float:
        return float(run([sys.executable, jobs.__file__, name, *map(str, words)], timeout=JOB_TIMEOUT))

    def turns(self, rounds: int, say: str) -> Iterator[Contender]:
        for number in range(rounds):
            progress(f"{say}: round {number + 1} of {rounds}")
            shift = number % len(self.contenders)
            yield from self.contenders[shift:] + self.contenders[:shift]

    # --- what is run ---

    def run(self) -> None:
        source = Path(__file__).with_name("statmany.c")
        run(["gcc", "-O2", "-o", self.statmany, source])
        sizes = self.sizes
        progress(f"making {sizes.layers} layers with {sizes.files} files")
        stack = mixed(self.scratch / "mixed", sizes.layers, sizes.files)
        jobs.make_tar(self.scratch / "untar.tar", sizes.untarred)
        self.check(stack)
        for contender in self.turns(sizes.rounds, f"{sizes.layers} layers"):
            self.attempt(contender, stack, self.time_stats)
            self.attempt(contender, stack, self.time_changes)
        stack.remove()
        for shape, make in SHAPES.items():
            for count in sizes.shape_layers:
                progress(f"making the {shape} shape with {count} layers")
                stack = make(self.scratch / f"{shape}{count}", count, sizes.shape_directories)
                self.check(stack)
                for contender in self.turns(sizes.shape_rounds, f"{shape}, {count} layers"):
                    self.attempt(contender, stack, partial(self.time_shape, shape))
                stack.remove()

    def attempt(self, contender: Contender, stack: Stack, part: Callable[[Contender, Stack], None]) -> None:
        """A mount that fails is told and counted; the others go on."""
        try:
            part(contender, stack)
        except (BenchmarkError, OSError) as error:
            self.failures.append(f"{contender.name}, {stack.base.name}: {error}")
            progress(self.failures[-1])

    def check(self, stack: Stack) -> None:
        """Every contender shows exactly the merged tree; one that does not is left out from here on."""
        for contender in list(self.contenders):
            try:
                with self.mounted(contender, stack) as (mnt, _):
                    shown = {
                        os.path.relpath(os.path.join(where, name), mnt)
                        for where, _, names in os.walk(mnt)
                        for name in names
                    }
                    right = set(stack.contents)
                    if shown != right:
                        raise BenchmarkError(
                            f"{len(right - shown)} names missing, {len(shown - right)} too many"
                        )
                    for name, data in stack.contents.items():
                        if (mnt / name).read_bytes() != data:
                            raise BenchmarkError(f"{name}: wrong content")
            except (BenchmarkError, OSError) as error:
                self.failures.append(f"{contender.name}, {stack.base.name}: left out of the rest: {error}")
                progress(self.failures[-1])
                self.contenders.remove(contender)

    def time_stats(self, contender: Contender, stack: Stack) -> None:
        for which, what in (("present", "stat"), ("absent", "absent names")):
            count = len(stack.contents)
            with self.mounted(contender, stack) as (mnt, elapsed):
                start = self.measure("start", "start-up to usable", 1, "ms")
                start.seconds.setdefault(contender.name, []).append(elapsed)
                drop_names()
                for how in ("cold", "warm"):
                    measure = self.measure(f"{how}_{which}", f"{how} {what}, {count:,}", count, "us")
                    self.note(measure, contender, partial(self.stats, stack, mnt, which))

    def time_changes(self, contender: Contender, stack: Stack) -> None:
        sizes = self.sizes
        with self.mounted(contender, stack, own_disk=True) as (mnt, _):
            drop_names()
            made = self.measure("create", f"create {sizes.created:,} small files", sizes.created, "us")
            self.note(made, contender, lambda: self.job("create", mnt / "new", sizes.created))
            removed = self.measure("remove", f"remove {sizes.created:,} small files", sizes.created, "us")
            self.note(removed, contender, lambda: self.job("remove", mnt / "new"))
            untarred = self.measure("untar", f"untar {sizes.untarred:,} files", sizes.untarred, "us")
            self.note(untarred, contender, lambda: self.job("untar", mnt / "out", self.scratch / "untar.tar"))

    def time_shape(self, shape: str, contender: Contender, stack: Stack) -> None:
        for which, what in (("present", "stat"), ("absent", "absent names")):
            with self.mounted(contender, stack) as (mnt, _):
                drop_names()
                title = f"{shape}, cold {what}, {stack.count} layer{'s' * (stack.count > 1)}"
                measure = self.measure(f"{shape}_{which}_{stack.count}", title, len(stack.contents), "us")
                self.note(measure, contender, partial(self.stats, stack, mnt, which))


def umount_when_free(mnt: Path) -> None:
    """A daemon may hold its directories for a moment after its own mount is gone."""
    for _ in range(100):
        if subprocess.run(["umount", mnt], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return
        time.sleep(0.05)
    run(["umount", "-l", mnt])


def drop_names() -> None:
    """Makes the next lookups cold: the kernel forgets names and inodes, of the mount and of its layers.

    Blocks stay cached (that is what 3 would drop too): a slow disk would hide the difference."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


def progress(text: str) -> None:
    print(f"benchmarks/run: {text}", file=sys.stderr, flush=True)
