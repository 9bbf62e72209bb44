"""A small stack with one object of every kind, programs that work on it, and the laws that hold for every
order of their steps.

The law: what the operations answer, and the tree they leave, is what they answer and leave when they are
carried out one after another in some order, an order in which no operation that had ended comes after one
that began later. When all is done, every lookup agrees with a tree loaded anew from the same directories,
nodes are left only for what is still looked up, and the work directory is empty.
"""

from __future__ import annotations

import errno
import gc
import itertools
import os
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from layerfs.gate import Name, NoGate
from layerfs.ids import ROOT, NodeId
from layerfs.overlay.names import TRUSTED, USER, XattrNames
from layerfs.stack import Stack
from layerfs.upper.upper import Upper
from layerfs.vfs.vfs import Attributes, Caller, Change, New, Vfs

from .scheduler import Scheduler, boundary, explore

NAMES = XattrNames(TRUSTED if os.geteuid() == 0 else USER)
_OLD = 981_173_106_123_456_789


class Person(Caller):
    """A caller that can be sent a signal."""

    __slots__ = ("signalled",)

    def __init__(self) -> None:
        super().__init__(os.geteuid(), os.getegid(), 0)
        object.__setattr__(self, "signalled", False)

    def interrupted(self) -> bool:
        return bool(self.signalled)


# -- the stack -------------------------------------------------------------------------------------


def _file(path: Path, data: str, mode: int = 0o644) -> None:
    path.write_text(data)
    path.chmod(mode)


def _age(top: Path) -> None:
    for directory, _, names in os.walk(top, topdown=False):
        for name in [*names, "."]:
            os.utime(os.path.join(directory, name), ns=(_OLD, _OLD), follow_symlinks=False)


class Place:
    """Lower layers made once, and fresh upper directories for every run."""

    def __init__(self) -> None:
        base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.base = Path(tempfile.mkdtemp(prefix="layerfs-order-", dir=base))
        self._number = itertools.count()
        top, bottom = self.lowers = [self.base / "top", self.base / "bottom"]
        for layer in self.lowers:
            (layer / "d").mkdir(parents=True)
            (layer / "e").mkdir()
        _file(bottom / "d/low", "low in the bottom")
        _file(bottom / "d/metal", "data of a file that has attributes only above")
        _file(bottom / "d/data", "data of a file with two names that has attributes only above")
        _file(bottom / "d/both", "both, below")
        _file(top / "d/both", "both, on top")
        _file(bottom / "d/over", "over, below")
        _file(bottom / "d/hard1", "two names")
        os.link(bottom / "d/hard1", bottom / "e/hard2")
        _file(bottom / "d/solo", "one name is hidden")
        os.link(bottom / "d/solo", bottom / "e/ghost")
        (bottom / "e/.wh.nothing").touch()
        (top / "e/.wh.ghost").touch()
        os.symlink("low", bottom / "d/link")
        (bottom / "d/void").mkdir()
        for layer, name in ((bottom, "x"), (bottom, "y"), (top, "y")):
            (layer / "d/sub").mkdir(exist_ok=True)
            _file(layer / "d/sub" / name, f"{name} of {layer.name}")
        (bottom / "d/tree/deep").mkdir(parents=True)
        _file(bottom / "d/tree/deep/z", "z")
        _file(bottom / "d/tree/t", "t")
        (bottom / "d/mixed").mkdir()
        _file(bottom / "d/mixed/m", "m")
        for layer in self.lowers:
            _age(layer)
        self.born = time.time_ns()
        self._marks = self._look()

    def _look(self) -> list[tuple[str, int, int]]:
        found = []
        for layer in self.lowers:
            for path in sorted(layer.rglob("*")):
                st = path.lstat()
                found.append((str(path), st.st_ctime_ns, st.st_mtime_ns))
        return found

    def fresh(self) -> tuple[str, str]:
        here = self.base / f"run{next(self._number)}"
        upper, work = here / "upper", here / "work"
        upper.mkdir(parents=True)
        work.mkdir()
        (upper / "d").mkdir()
        _file(upper / "d/up", "up")
        _file(upper / "d/over", "over, in the upper")
        (upper / "d/udir").mkdir()
        (upper / "d/mixed").mkdir()
        _file(upper / "d/mixed/n", "n")
        _file(upper / "d/metal", "")
        os.truncate(upper / "d/metal", (self.lowers[1] / "d/metal").stat().st_size)
        os.setxattr(upper / "d/metal", NAMES.metacopy, b"")
        # Kernel overlayfs leaves such a file after ln, chmod.
        _file(upper / "d/twice", "")
        os.truncate(upper / "d/twice", (self.lowers[1] / "d/data").stat().st_size)
        os.setxattr(upper / "d/twice", NAMES.metacopy, b"")
        os.setxattr(upper / "d/twice", NAMES.redirect, b"/d/data")
        os.link(upper / "d/twice", upper / "d/twice2")
        _age(upper)
        return str(upper), str(work)

    def drop(self, upper: str) -> None:
        shutil.rmtree(os.path.dirname(upper))

    def close(self) -> None:
        assert self._look() == self._marks, "a lower layer was changed"
        shutil.rmtree(self.base)


# -- one run ---------------------------------------------------------------------------------------


class KnowingGate(NoGate):
    """Keeps what `vfs` publishes, to see that it is retracted in time."""

    def __init__(self) -> None:
        self.facts: dict[NodeId, set[bytes]] = {}
        self.unsure: dict[NodeId, set[bytes]] = {}

    def publish_directory(self, directory: NodeId, names: Mapping[bytes, Name], plain: object) -> None:
        self.facts[directory] = set(names)
        self.unsure[directory] = set()

    def retract_name(self, directory: NodeId, name: bytes) -> None:
        self.unsure.setdefault(directory, set()).add(name)

    def vanish_name(self, directory: NodeId, name: bytes) -> None:
        self.retract_name(directory, name)

    def retract_directory(self, directory: NodeId) -> None:
        self.facts.pop(directory, None)

    def forget(self, node: NodeId) -> None:
        self.facts.pop(node, None)

    def check(self, vfs: Vfs) -> None:
        for id, names in self.facts.items():
            directory = vfs.tree.nodes.get(id)
            if directory is None or directory.merged is None:  # type: ignore[attr-defined]
                continue
            wrong = names.symmetric_difference(directory.merged.names) - self.unsure[id]  # type: ignore[attr-defined]
            assert not wrong, f"{directory}: the gate still holds old knowledge of {wrong}"


@dataclass(frozen=True)
class Done:
    """One operation as it went: when it began and ended, and what came of it."""

    task: int
    number: int
    what: str
    began: int
    ended: int
    answer: object


class World:
    """One run: a mounted-like Vfs over a fresh upper, and what the programs in it did."""

    def __init__(
        self,
        place: Place,
        scheduler: Scheduler,
        *,
        redirect_dir: bool = True,
        file_whiteouts: bool = False,
    ) -> None:
        self.place = place
        self.scheduler = scheduler
        self.options = {"redirect_dir": redirect_dir}
        self._file_whiteouts = file_whiteouts
        self.upper_path, self.work_path = place.fresh()
        self.gate = KnowingGate()
        self.vfs = self._open(self.gate)
        #: what a kernel would hold: node -> lookups
        self.lookups: dict[int, int] = {}
        self.handles: list[int] = []
        self.done: list[Done] = []

    def _open(self, gate: KnowingGate | None) -> Vfs:
        stack = Stack([str(layer) for layer in self.place.lowers], self.upper_path, NAMES)
        assert stack.upper is not None
        upper = Upper(stack.upper, self.work_path, NAMES, volatile=False)
        if self._file_whiteouts:  # as where mknod is not allowed
            upper.ability = replace(upper.ability, whiteouts="file")
        return Vfs(stack, upper, self.scheduler, gate=gate, **self.options)  # type: ignore[arg-type]

    def _close(self, vfs: Vfs) -> None:
        vfs.stack.pool.clear()
        assert vfs.upper is not None
        work = vfs.upper.work
        owned = [work.fd, work.base, work.state, work._lock]
        owned += [layer.fd for layer in (*vfs.stack.lowers, vfs.stack.upper) if layer is not None]
        for each in owned:
            each.close()

    # -- what programs are made of -----------------------------------------------------------------

    def program(self, task: int, steps: Callable[[Steps], Awaitable[None]]) -> Steps:
        made = Steps(self, task)
        entry = self.scheduler.spawn(f"task {task}", steps(made))  # type: ignore[arg-type]
        entry.may_time_out = made.person.interrupted
        self.scheduler.advance(entry)  # to its first operation: no choice is lost by it
        return made

    def attributes(self, found: Attributes) -> tuple[object, ...]:
        st = found.st
        number = found.ino if found.ino >> 48 else "upper"
        shown: list[object] = [oct(st.st_mode), number]
        if stat.S_ISDIR(st.st_mode):
            return tuple(shown)
        times = ("old" if t < self.place.born else "now" for t in (st.st_mtime_ns, found.ctime_ns))
        size = st.st_size
        return (*shown, found.nlink, size, *times)

    def looked_up(self, found: Attributes) -> None:
        self.lookups[found.ino] = self.lookups.get(found.ino, 0) + 1

    # -- the laws at the end -----------------------------------------------------------------------

    def finish(self) -> dict[str, object]:
        """Checks the laws of one run; returns the tree it left."""
        quiet = Scheduler([], atomic=True)
        with quiet.installed():
            self.scheduler = quiet
            for handle in self.handles:
                self.vfs.files.release(handle)
            now = self._tree(self.vfs)
            self.gate.check(self.vfs)
            for id, count in self.lookups.items():
                assert self.vfs.tree.nodes[NodeId(id)].lookups == count, (
                    f"lookup count of {self.vfs.tree.nodes[NodeId(id)]}"
                )
            for id, count in self.lookups.items():
                self.vfs.forget(id, count)
            left = {node for id, node in self.vfs.tree.nodes.items() if id != ROOT}
            assert not left, f"nodes that nobody knows are kept: {[(n, n.lookups, n.users) for n in left]}"
            assert self.vfs.tree.root.users == 0
            work = os.listdir(f"{self.work_path}/work")
            whiteout = self.vfs.upper._whiteout if self.vfs.upper is not None else None
            strays = [name for name in work if os.fsencode(name) != whiteout]
            assert not strays, f"left in the work directory: {strays}"
            assert not [name for name in os.listdir(f"{self.work_path}/layerfs") if name.startswith("links")]
            self._close(self.vfs)
            self.vfs = again = self._open(None)
            anew = self._tree(again)
            self._close(again)
        assert now == anew, f"the tree changed by being mounted again:\n{_difference(now, anew)}"
        self.place.drop(self.upper_path)
        return {path: seen[1:] if isinstance(seen, tuple) else seen for path, seen in now.items()}

    def _tree(self, vfs: Vfs) -> dict[str, object]:
        """path -> (exact part, comparable part...) of everything in the merged tree."""
        seen: dict[str, object] = {}

        async def walk(id: int, path: str) -> None:
            handle = await vfs.opendir(id)
            await vfs.rewind(handle)
            for name in sorted(vfs.listing(handle).names):
                here = f"{path}/{name.decode()}"
                try:
                    found = await vfs.lookup(id, name)
                except OSError as error:
                    seen[here] = errno.errorcode[error.errno or 0]
                    continue
                assert found is not None, f"{here} is listed and cannot be looked up"
                exact = (
                    (found.ino, found.st.st_mtime_ns) if not stat.S_ISDIR(found.st.st_mode) else (found.ino,)
                )
                attributes = self.attributes(found)
                content: object = None
                if stat.S_ISDIR(found.st.st_mode):
                    await walk(found.ino, here)
                elif stat.S_ISLNK(found.st.st_mode):
                    content = await vfs.readlink(found.ino)
                else:
                    open_file = await vfs.open(found.ino, os.O_RDONLY, Person())
                    content = bytes(await vfs.files.read(open_file.id, 0, 1000))
                    vfs.files.release(open_file.id)
                # ctime is not compared: a copy-up's shows again after a remount
                seen[here] = (
                    exact,
                    *attributes[:-1],
                    content,
                    tuple(await vfs.listxattr(found.ino, Person())),
                )
                vfs.forget(found.ino, 1)
            vfs.files.release_directory(handle)

        self.scheduler.spawn("walk", walk(ROOT, ""))
        self.scheduler.run()
        return seen


def _difference(one: dict[str, object], two: dict[str, object]) -> str:
    lines = []
    for path in sorted({*one, *two}):
        if one.get(path) != two.get(path):
            lines.append(f"  {path}:\n    live   {one.get(path)}\n    anew   {two.get(path)}")
    return "\n".join(lines)


class Steps:
    """The operations of one program; each is one request of a kernel that has looked up what it names."""

    def __init__(self, world: World, task: int) -> None:
        self.world = world
        self.vfs = world.vfs
        self.task = task
        self.person = Person()
        self._numbers = itertools.count()

    async def _do(
        self, what: str, call: Awaitable[Any], answer: Callable[[Any], object] = lambda _: "done"
    ) -> Any:
        await boundary()
        began, number = self.world.scheduler.clock, next(self._numbers)
        result: Any = None
        try:
            result = await call
            said = answer(result)
        except OSError as error:
            said = errno.errorcode[error.errno or 0]
        self.world.done.append(Done(self.task, number, what, began, self.world.scheduler.clock, said))
        return result

    def _changed(self, found: Attributes) -> object:
        """A change that waited for a copy-up may be seen before it is answered, and more may follow; its
        answer then shows the newest.
        """
        newest = self.vfs.getattr(found.ino)
        try:
            newest.send(None)  # type: ignore[attr-defined]
        except StopIteration as done:
            assert self.world.attributes(found) == self.world.attributes(done.value), "a stale answer"
        else:
            raise AssertionError("what is in the upper needs no waiting")
        return "done"

    def _found(self, found: Attributes | None) -> object:
        if found is None:
            return "absent"
        self.world.looked_up(found)
        return self.world.attributes(found)

    async def lookup(self, parent: int, name: str) -> Attributes | None:
        found: Attributes | None = await self._do(
            f"lookup {name}", self.vfs.lookup(parent, name.encode()), self._found
        )
        return found

    async def getattr(self, id: int) -> None:
        await self._do("getattr", self.vfs.getattr(id), self.world.attributes)

    async def list(self, parent: int, only: Collection[str]) -> None:
        """readdirplus: the names at one moment, then a lookup for each (of `only`, to keep the orders
        few).
        """

        async def names() -> list[bytes]:
            handle = await self.vfs.opendir(parent)
            await self.vfs.rewind(handle)
            found = sorted(self.vfs.listing(handle).names)
            self.vfs.files.release_directory(handle)
            return found

        for name in await self._do("list", names(), tuple) or ():
            if name.decode() in only:
                await self.lookup(parent, name.decode())

    async def unlink(self, parent: int, name: str) -> None:
        await self._do(f"unlink {name}", self.vfs.unlink(parent, name.encode(), self.person))

    async def rmdir(self, parent: int, name: str) -> None:
        await self._do(f"rmdir {name}", self.vfs.rmdir(parent, name.encode(), self.person))

    async def rename(self, parent: int, name: str, new_parent: int, new: str, flags: int = 0) -> None:
        call = self.vfs.rename(parent, name.encode(), new_parent, new.encode(), flags, self.person)
        await self._do(f"rename {name} {new} {flags}", call)

    async def create(self, parent: int, name: str) -> None:
        def made(result: tuple[Any, Attributes]) -> object:
            self.world.handles.append(result[0].id)
            return self._found(result[1])

        call = self.vfs.create(parent, name.encode(), 0o644 | stat.S_IFREG, os.O_RDWR, self.person)
        await self._do(f"create {name}", call, made)

    async def mkdir(self, parent: int, name: str) -> None:
        call = self.vfs.make(parent, name.encode(), New(0o755 | stat.S_IFDIR), self.person)
        await self._do(f"mkdir {name}", call, self._found)

    async def link(self, id: int, parent: int, name: str) -> None:
        def made(found: Attributes) -> object:
            self._found(found)
            return self._changed(found)

        await self._do(f"link {name}", self.vfs.link(id, parent, name.encode(), self.person), made)

    async def open(self, id: int, flags: int) -> Any:
        def opened(handle: Any) -> object:
            self.world.handles.append(handle.id)
            return "opened"

        return await self._do(f"open {flags:o}", self.vfs.open(id, flags, self.person), opened)

    async def read(self, handle: Any) -> None:
        await self._do("read", self.vfs.files.read(handle.id, 0, 1000), bytes)

    async def write(self, handle: Any, data: bytes) -> None:
        await self._do("write", self.vfs.files.write(handle.id, 0, data))

    async def chmod(self, id: int, mode: int) -> None:
        await self._do("chmod", self.vfs.setattr(id, Change(mode=mode), self.person), self._changed)

    async def truncate(self, id: int, size: int) -> None:
        await self._do("truncate", self.vfs.setattr(id, Change(size=size), self.person), self._changed)

    async def setxattr(self, id: int, name: str, value: bytes) -> None:
        await self._do("setxattr", self.vfs.setxattr(id, name.encode(), value, self.person))

    async def forget(self, id: int, count: int = 1) -> None:
        """The kernel drops what it was told by lookups."""

        async def forgets() -> None:
            self.world.lookups[id] -= count
            if not self.world.lookups[id]:
                del self.world.lookups[id]
            self.vfs.forget(id, count)

        await self._do("forget", forgets())

    async def close(self, handle: Any) -> None:

        async def closes() -> None:
            self.world.handles.remove(handle.id)
            self.vfs.files.release(handle.id)

        await self._do("close", closes())

    async def signal(self, other: Steps) -> None:
        """A signal reaches the caller of `other`."""
        await boundary()
        object.__setattr__(other.person, "signalled", True)


# -- laws over runs --------------------------------------------------------------------------------

Program = Callable[[Steps], Awaitable[None]]


@dataclass(frozen=True)
class Outcome:
    answers: tuple[tuple[tuple[str, object], ...], ...]
    tree: tuple[tuple[str, object], ...]


def play(
    place: Place,
    programs: list[Program],
    choices: list[int],
    source: random.Random | None,
    *,
    atomic: bool = False,
    prepare: Program | None = None,
    order: Sequence[int] = (),
    **options: bool,
) -> tuple[Scheduler, World, Outcome]:
    before = Scheduler([], atomic=True)
    with before.installed():
        world = World(place, before, **options)
        if prepare is not None:
            world.program(-1, prepare)
            before.run()
        world.done.clear()
    scheduler = Scheduler(choices, atomic=atomic, random_source=source, order=order)
    world.scheduler = scheduler
    if world.vfs._writing is not None:
        world.vfs._writing.copyup.nursery = scheduler  # type: ignore[assignment]
    with scheduler.installed():
        for number, program in enumerate(programs):
            world.program(number, program)
        scheduler.run()
    tree = world.finish()
    answers = tuple(
        tuple((each.what, each.answer) for each in world.done if each.task == number)
        for number in range(len(programs))
    )
    if next(_runs) % 200 == 0:
        gc.collect()
    return scheduler, world, Outcome(answers, tuple(sorted(tree.items())))


_runs = itertools.count(1)


def explain(world: World, outcome: Outcome, possible: Iterable[Outcome]) -> str:
    lines = ["answers or tree of this run fit no order of the operations", "as it went:"]
    for each in sorted(world.done, key=lambda done: done.began):
        lines.append(f"  {each.began:4}-{each.ended:4} task {each.task}: {each.what} -> {each.answer}")
    lines.append("orders give:")
    for other in list(dict.fromkeys(possible))[:6]:
        for number, answers in enumerate(other.answers):
            lines += [f"  task {number}: {what} -> {answer}" for what, answer in answers]
        different = [
            f"    {a} instead of {b}" for a, b in zip(other.tree, outcome.tree, strict=False) if a != b
        ]
        lines += [*different[:3], "  --"]
    return "\n".join(lines)


@contextmanager
def a_place() -> Any:
    place = Place()
    try:
        yield place
    finally:
        place.close()


def check(
    place: Place,
    programs: list[Program],
    *,
    prepare: Sequence[Program],
    switches: int = 3,
    limit: int = 40,
    at_random: int = 10,
    **options: bool,
) -> int:
    """Tries the orders of `programs`, after each of the preparations, and holds each to the laws; returns
    how many runs there were.
    """
    known: dict[tuple[int, ...], Outcome] = {}

    def one_by_one(order: tuple[int, ...]) -> Outcome:
        if order not in known:
            known[order] = play(
                place, programs, [], None, atomic=True, prepare=prepare[0], order=order, **options
            )[2]
        return known[order]

    def together(start: Program, choices: list[int], source: random.Random | None) -> Scheduler:
        scheduler, world, outcome = play(place, programs, choices, source, prepare=start, **options)
        possible = itertools.islice(orders(world.done), _ORDERS)
        if not any(one_by_one(order) == outcome for order in possible):
            raise AssertionError(explain(world, outcome, map(one_by_one, orders(world.done))))
        return scheduler

    runs = 0
    for start in prepare:
        runs += explore(partial(together, start), switches=switches, limit=limit, at_random=at_random)
    return runs


#: More orders than this are not tried for one run.
_ORDERS = 1000


def orders(done: list[Done]) -> Iterator[tuple[int, ...]]:
    """Whose operation comes when: all orders in which no operation that had ended comes after one that began
    later, the likely ones first.
    """
    # By end, of course: what ends first mostly took effect first.
    yield from _extend((), sorted(done, key=lambda each: each.ended))


def _extend(so_far: tuple[int, ...], left: list[Done]) -> Iterator[tuple[int, ...]]:
    if not left:
        yield so_far
    for each in left:
        earlier = (other for other in left if other is not each)
        if not any(
            other.ended < each.began or (other.task == each.task and other.number < each.number)
            for other in earlier
        ):
            yield from _extend((*so_far, each.task), [other for other in left if other is not each])
