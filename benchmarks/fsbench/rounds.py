"""Runs groups of jobs: every contender once in every round, in turning order, so that what else the machine
does falls on all alike. Checks what each mount shows before anything is timed. Prints only progress, to
stderr."""

from __future__ import annotations

import itertools
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .commands import BenchmarkError, run
from .contenders import Contender
from .groups.group import Group
from .measures import Measures, Sizes
from .place import Place, mounted
from .requests import RequestCounter
from .stacks import MAKERS, Stack, mixed

_SOURCE = Path(__file__).with_name("many.c")


class Bench:
    """One run. `measures`, `failures`, `left_out` and `skipped` hold what came of it.

    The first contender is the one that the others are compared with. When `seconds` have passed, what is left
    gets one round."""

    def __init__(
        self,
        contenders: Sequence[Contender],
        sizes: Sizes,
        scratch: Path,
        counter: RequestCounter | None = None,
        seconds: float = float("inf"),
    ) -> None:
        self.contenders = list(contenders)
        self.sizes = sizes
        self.scratch = scratch
        self.many = scratch / "many"
        self.measures: Measures = {}
        self.left_out: dict[str, str] = {}  # contenders that cannot be mounted here at all, and why
        self.skipped: dict[str, str] = {}  # groups that cannot be run here, and why
        self.failures: list[str] = []
        self._counter = counter
        self._end = time.monotonic() + seconds
        self._group = ""  # its name
        self._number = 0  # of the round
        self._mounts = itertools.count()

    @contextmanager
    def place(self, contender: Contender, stack: Stack, *, own_disk: bool = False) -> Iterator[Place]:
        base = self.scratch / f"mount{next(self._mounts)}"
        with mounted(contender, stack, base, own_disk=own_disk) as (mnt, start_up):
            yield Place(
                contender, stack, mnt, start_up, self.measures, self._group, self._number, self._counter
            )

    def run(self, groups: Sequence[Group]) -> None:
        run(["gcc", "-O2", "-o", self.many, _SOURCE])
        self._try()
        ready = [group for group in groups if self._prepared(group)]
        names = dict.fromkeys(name for group in ready for name in group.stacks(self.sizes))
        for name in names:
            progress(f"making the stack '{name}'")
            try:
                stack = self._make(name, ready)
            except (BenchmarkError, OSError) as error:
                self._skip(f"all on the stack '{name}'", error)
                continue
            stack.write_lists()
            with stack.sealed():
                right = self._right(stack)
                for group in ready:
                    if name in group.stacks(self.sizes):
                        self._rounds(group, stack, right)
            shutil.rmtree(stack.base)

    def _try(self) -> None:
        """Who cannot be mounted at all, with his options, is left out. Without the first one nothing can be
        compared."""
        stack = mixed(self.scratch / "tried", 2, 100)
        base, *_ = self.contenders
        for contender in list(self.contenders):
            try:
                with self.place(contender, stack):
                    pass
            except (BenchmarkError, OSError) as error:
                if contender is base:
                    raise BenchmarkError(f"{base.name}: {error}") from None
                self.left_out[contender.name] = str(error)
                progress(f"without {contender.name}: {error}")
                self.contenders.remove(contender)
        shutil.rmtree(stack.base)

    def _prepared(self, group: Group) -> bool:
        try:
            group.prepare(self.scratch, self.sizes)
        except (BenchmarkError, OSError) as error:
            self._skip(group.name, error)
            return False
        return True

    def _skip(self, what: str, error: Exception) -> None:
        self.skipped[what] = str(error)
        progress(f"skipped: {what}: {error}")

    def _make(self, name: str, groups: Sequence[Group]) -> Stack:
        base = self.scratch / name.replace(" ", "-")
        for group in groups:
            if name in group.stacks(self.sizes) and (made := group.make(base, self.sizes)):
                return made
        kind, _, number = name.partition(" ")
        return MAKERS[kind](base, self.sizes, int(number or 0))

    def _right(self, stack: Stack) -> list[Contender]:
        """Those who show exactly the merged tree."""
        return [one for one in self.contenders if self._attempt(one, stack, self._check, "left out")]

    def _check(self, contender: Contender, stack: Stack) -> None:
        with self.place(contender, stack) as place:
            stack.check(place.mnt)

    def _rounds(self, group: Group, stack: Stack, right: Sequence[Contender]) -> None:
        self._group = group.name
        began, rounds = time.monotonic(), group.rounds(self.sizes)
        for self._number in range(rounds):
            if self._number and time.monotonic() > self._end:
                progress(f"{group.name}, '{stack.base.name}': no more rounds, the time is over")
                break
            progress(f"{group.name}, '{stack.base.name}': round {self._number + 1} of {rounds}")
            shift = self._number % max(1, len(right))
            for contender in [*right[shift:], *right[:shift]]:
                self._attempt(contender, stack, lambda one, on: group.take(self, one, on), group.name)
        self._number = 0
        progress(f"{group.name}, '{stack.base.name}': {time.monotonic() - began:.0f} s")

    def _attempt(
        self, contender: Contender, stack: Stack, part: Callable[[Contender, Stack], None], what: str
    ) -> bool:
        """A mount that fails is told and counted; the others go on."""
        try:
            part(contender, stack)
        except (BenchmarkError, OSError) as error:
            failure = f"{contender.name}, {stack.base.name}, {what}: {error}"
            if failure not in self.failures:
                self.failures.append(failure)
            progress(failure)
            return False
        return True


def progress(text: str) -> None:
    print(f"benchmarks/run: {text}", file=sys.stderr, flush=True)
