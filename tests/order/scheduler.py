"""A stand-in for trio that stops at every await and lets a chooser say who runs next; and the search through
all such choices.

Everything that `layerfs.vfs` takes from trio is here with trio's contract (where it may let others run, it
does), so a run is decided by the sequence of choices alone and can be played again. Knows nothing of file
systems.

Work for a thread is done at a moment of the chooser's choice, its result is delivered at another; copy-ups
also stop at each of their on-disk steps (`layerfs.upper.steps`), as a real thread could be anywhere when the
event loop goes on.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from layerfs.upper import steps
from layerfs.vfs import copyup, files, links, tree

_MODULES = (copyup, files, links, tree)
#: A run that takes more steps goes round in circles.
_MANY = 5000


class _Suspend:
    """What a coroutine hands to the scheduler: when it may go on, and whether it stands between two
    operations.
    """

    def __init__(self, ready: Callable[[], bool] = lambda: True, boundary: bool = False) -> None:
        self.ready = ready
        self.boundary = boundary

    def __await__(self) -> Generator[_Suspend, None, None]:
        yield self


class _TimedOut(BaseException):
    pass


@dataclass(eq=False)
class Task:
    name: str
    coroutine: Coroutine[Any, Any, Any]
    background: bool = False
    suspend: _Suspend = field(default_factory=lambda: _Suspend(boundary=True))
    done: bool = False
    #: depth of `move_on_after` blocks it stands in
    scopes: int = 0
    #: whether its time may run out now: only worth a choice when something then goes another way
    may_time_out: Callable[[], bool] = lambda: False


@dataclass
class Choice:
    """One decision: how many ways there were, and how many switches away from a task that could go on had
    been made before.
    """

    taken: int
    ways: int
    switches: int
    current_can: bool


class Stuck(AssertionError):
    """Nobody can go on, or they go round in circles."""


class Scheduler:
    def __init__(
        self,
        choices: list[int],
        *,
        atomic: bool = False,
        random_source: random.Random | None = None,
        order: Sequence[int] = (),
    ) -> None:
        """Follows `choices`, then goes on with the same task as long as it can (or at random). `atomic`:
        operations are not parted; `order` then says whose operation comes next.
        """
        self.order = list(reversed(order))
        self.choices = choices
        self.atomic = atomic
        self.random = random_source
        self.trace: list[Choice] = []
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self.clock = 0
        self._switches = 0

    def spawn(self, name: str, coroutine: Coroutine[Any, Any, Any], *, background: bool = False) -> Task:
        task = Task(name, coroutine, background)
        if background:
            task.suspend = _Suspend()
        self.tasks.append(task)
        return task

    def run(self) -> None:
        """Until all tasks have ended. Raises Stuck, and whatever a task raises."""
        while any(not task.done for task in self.tasks):
            self.clock += 1
            if self.clock > _MANY:
                raise Stuck(
                    f"still running after {_MANY} steps: {[t.name for t in self.tasks if not t.done]}"
                )
            self._step(self._choose())

    def _able(self) -> list[Task]:
        able = [
            t for t in self.tasks if not t.done and (t.suspend.ready() or (t.scopes and t.may_time_out()))
        ]
        if self.atomic:
            inside = [t for t in able if t.background] or [t for t in able if not t.suspend.boundary]
            able = inside or able
        if not able:
            raise Stuck(f"deadlock: {[t.name for t in self.tasks if not t.done]} wait for each other")
        if self.current in able:
            able.remove(self.current)
            able.insert(0, self.current)
        return able

    def _choose(self) -> Task:
        able = self._able()
        if self.order and all(task.suspend.boundary for task in able):
            while self.order:
                task = self.tasks[self.order.pop()]
                if task in able:
                    return task
        if len(able) == 1:
            return able[0]
        taken = 0
        if len(self.trace) < len(self.choices):
            taken = self.choices[len(self.trace)]
        elif self.random is not None:
            taken = self.random.randrange(len(able))
        current_can = able[0] is self.current
        self.trace.append(Choice(taken, len(able), self._switches, current_can))
        if taken and current_can:
            self._switches += 1
        return able[taken]

    def advance(self, task: Task) -> None:
        """Lets a task that was just made come to its first stop."""
        self._step(task)
        self.current = None

    def _step(self, task: Task) -> None:
        self.current = task
        try:
            if task.suspend.ready():
                task.suspend = task.coroutine.send(None)
            else:
                task.suspend = task.coroutine.throw(_TimedOut())
        except StopIteration:
            task.done = True

    # -- what vfs takes from trio ------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts this scheduler in the place of trio in layerfs.vfs; every directory is then read "in a
        thread".
        """
        with pytest.MonkeyPatch.context() as patch:
            for module in _MODULES:
                patch.setattr(module, "trio", self._trio())
            patch.setattr(tree, "_THREAD_ABOVE", -1)
            patch.setattr(steps, "hook", _Worker.pause)
            yield

    def _trio(self) -> Any:
        scheduler = self

        class Event:
            def __init__(self) -> None:
                self._set = False

            def set(self) -> None:
                self._set = True

            def is_set(self) -> bool:
                return self._set

            async def wait(self) -> None:
                await _Suspend(self.is_set)

        class Lock:
            def __init__(self) -> None:
                self._free = True

            async def __aenter__(self) -> None:
                await _Suspend(lambda: self._free)
                self._free = False

            async def __aexit__(self, *_: object) -> None:
                self._free = True

        class CapacityLimiter:
            def __init__(self, tokens: int) -> None:
                pass

        class MoveOnAfter:
            def __init__(self, seconds: float) -> None:
                pass

            def __enter__(self) -> None:
                assert scheduler.current is not None
                self.task = scheduler.current
                self.task.scopes += 1

            def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
                self.task.scopes -= 1
                return kind is _TimedOut

        class Trio:
            class to_thread:
                run_sync = staticmethod(_run_sync)

            class lowlevel:
                checkpoint = staticmethod(_checkpoint)

        for each in (Event, Lock, CapacityLimiter):
            setattr(Trio, each.__name__, each)
        Trio.move_on_after = MoveOnAfter  # type: ignore[attr-defined]
        return Trio

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: object) -> None:
        """The scheduler is the nursery, too."""
        self.spawn(function.__name__, function(*arguments), background=True)


async def _checkpoint() -> None:
    await _Suspend()


async def boundary() -> None:
    """Between two operations of a task."""
    await _Suspend(boundary=True)


async def _run_sync(function: Callable[..., Any], *arguments: object, limiter: object = None) -> Any:
    await _Suspend()
    if getattr(function, "func", None) not in (copyup.copyup.make, copyup.copyup.fill):
        try:
            return function(*arguments)
        finally:
            await _Suspend()
    worker = _Worker(lambda: function(*arguments))
    while not worker.go_on():
        await _Suspend()
    await _Suspend()
    return worker.result()


class _Worker(threading.Thread):
    """A real thread that runs only between `go_on` and its next `pause`, while everything else stands
    still.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._finished = False
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        self._go.acquire()
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        self._finished = True
        self._stopped.release()

    def go_on(self) -> bool:
        """Runs to the next step; True when the work is done."""
        if self.ident is None:
            self.start()
        self._go.release()
        self._stopped.acquire()
        return self._finished

    @staticmethod
    def pause(name: str) -> None:
        thread = threading.current_thread()
        if isinstance(thread, _Worker):
            thread._stopped.release()
            thread._go.acquire()

    def result(self) -> Any:
        self.join()
        if self._error is not None:
            raise self._error
        return self._result


# -- the search ------------------------------------------------------------------------------------


def explore(
    run: Callable[[list[int], random.Random | None], Scheduler],
    *,
    switches: int,
    limit: int,
    at_random: int = 0,
) -> int:
    """Calls `run(choices, None)` for every sequence of choices with at most `switches` forced changes of
    task, at most `limit` of them
    in an order that spreads them, then `at_random` random ones. Returns how many runs there were.

    `run` makes everything anew, follows the choices and returns the scheduler."""
    source = random.Random(20261123)
    pending: list[list[int]] = [[]]
    runs = 0
    while pending and runs < limit:
        position = source.randrange(len(pending))
        pending[position], pending[-1] = pending[-1], pending[position]
        choices = pending.pop()
        trace = run(choices, None).trace
        runs += 1
        for index in range(len(choices), len(trace)):
            choice = trace[index]
            if choice.switches + choice.current_can > switches:
                continue
            so_far = [each.taken for each in trace[:index]]
            pending.extend([*so_far, other] for other in range(1, choice.ways))
    for number in range(at_random if pending else 0):
        run([], random.Random(number))
        runs += 1
    return runs
