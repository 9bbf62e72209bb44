"""Orders that need three requests, a signal, a full disk or no redirects."""

from __future__ import annotations

import errno
import functools
import importlib
import itertools
import os
import random
import types
from collections.abc import Iterator
from typing import Any

import pytest

from layerfs.fdutil import RENAME_EXCHANGE
from layerfs.ids import ROOT

from . import test_orders as orders
from .scheduler import Scheduler, explore
from .test_orders import (
    ABSENT,
    IDS,
    chmod,
    cold,
    create,
    link,
    listing,
    lookup,
    on,
    rename,
    rmdir,
    truncate,
    unlink,
    warm,
    write,
)
from .world import Outcome, Place, Program, Steps, World, a_place, check, play


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


def inside(*path: str) -> Any:
    """`inside("tree", "deep")` gives programs on names in d/tree/deep, which is looked up first."""

    def wrap(then: Any) -> Program:
        async def program(steps: Steps) -> None:
            here = IDS["d"]
            for name in path:
                found = await steps.lookup(here, name)
                if found is None:
                    return
                here = found.ino
            await then(steps, here)

        return program

    return wrap


# -- hard links: three requests at the names of one file -------------------------------------------


def other_name(then: str) -> Program:
    """Something with e/hard2, the second name of d/hard1."""

    async def program(steps: Steps) -> None:
        found = await steps.lookup(IDS["e"], "hard2")
        if found is None:
            return
        if then == "unlink":
            await steps.unlink(IDS["e"], "hard2")
        elif then == "rename":
            await steps.rename(IDS["e"], "hard2", IDS["d"], ABSENT)
        elif then == "chmod":
            await steps.chmod(found.ino, 0o600)
        elif then == "open":
            handle = await steps.open(found.ino, os.O_RDWR)
            if handle is not None:
                await steps.write(handle, b"NEW")
        elif then == "getattr":
            await steps.getattr(found.ino)

    return program


@pytest.mark.parametrize("second", ["unlink", "rename", "chmod", "open", "getattr"])
@pytest.mark.parametrize("first", ["unlink", "chmod", "write", "truncate", "exchange", "other-over", "link"])
def test_two_names_of_one_file(place: Place, first: str, second: str) -> None:
    programs = [orders.file_writers("hard1")[first], other_name(second)]
    check(place, programs, prepare=[cold, warm("hard1")], limit=12, at_random=4)


@pytest.mark.parametrize("moved", ["rename", "exchange"])
def test_a_directory_of_links_moves(place: Place, moved: str) -> None:
    """The index of hard links is made while a directory that holds one moves."""

    async def move(steps: Steps) -> None:
        if moved == "rename":
            await steps.rename(ROOT, "e", IDS["d"], ABSENT)
        else:
            await steps.rename(ROOT, "e", IDS["d"], "tree", RENAME_EXCHANGE)

    for program in (chmod("hard1"), unlink("hard1"), lookup("solo"), write("hard1")):
        check(place, [program, move], prepare=[cold], limit=12, at_random=4)


@pytest.mark.parametrize(
    "three", [("unlink", "chmod"), ("write", "unlink"), ("other-over", "chmod"), ("away", "write")]
)
@pytest.mark.parametrize("name", ["low", "metal", "solo", "hard1"])
def test_three_at_once(place: Place, name: str, three: tuple[str, str]) -> None:
    both = orders.file_writers(name)
    check(place, [lookup(name), both[three[0]], both[three[1]]], prepare=[cold], limit=25, at_random=8)


# -- listing while names come and go ---------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        unlink("low"),
        rename("low", ABSENT),
        rename("up", "low"),
        create(ABSENT),
        write("metal"),
        chmod("sub"),
        rmdir("void"),
    ],
    ids=["unlink", "rename", "over", "create", "write", "chmod", "rmdir"],
)
def test_listing(place: Place, change: Program) -> None:
    check(
        place,
        [listing("d", "low", "metal", "new", "sub", "up", "void"), change],
        prepare=[cold],
        limit=15,
        at_random=4,
    )


# -- no redirects: a directory moves only when all of it is in the upper ---------------------------


def _tree_changes() -> dict[str, Program]:
    deep = inside("tree", "deep")

    async def unlink_z(steps: Steps, id: int) -> None:
        await steps.unlink(id, "z")

    async def create_w(steps: Steps, id: int) -> None:
        await steps.create(id, "w")

    async def over_z(steps: Steps, id: int) -> None:
        await steps.create(id, "w")
        await steps.rename(id, "w", id, "z")

    async def out(steps: Steps, id: int) -> None:
        await steps.rename(id, "z", IDS["d"], "zz")

    async def up_in(steps: Steps, id: int) -> None:
        await steps.rename(IDS["d"], "low", id, "low")

    async def directory_in(steps: Steps, id: int) -> None:
        await steps.rename(IDS["d"], "sub", id, "sub")

    async def directory_out(steps: Steps, id: int) -> None:
        await steps.rename(id, "deep", IDS["d"], "deep")

    async def exchange(steps: Steps, id: int) -> None:
        await steps.rename(id, "deep", IDS["d"], "sub", RENAME_EXCHANGE)

    async def write_z(steps: Steps, id: int) -> None:
        found = await steps.lookup(id, "z")
        if found is not None:
            handle = await steps.open(found.ino, os.O_RDWR)
            if handle is not None:
                await steps.write(handle, b"NEW")

    tree = inside("tree")
    return {
        "unlink": deep(unlink_z),
        "create": deep(create_w),
        "over": deep(over_z),
        "out": deep(out),
        "in": deep(up_in),
        "directory-in": deep(directory_in),
        "directory-out": tree(directory_out),
        "exchange": tree(exchange),
        "write": deep(write_z),
    }


@pytest.mark.parametrize("change", _tree_changes())
def test_without_redirects(place: Place, change: str) -> None:
    programs = [rename("tree", ABSENT), _tree_changes()[change]]
    check(place, programs, prepare=[cold], limit=40, at_random=15, redirect_dir=False)


def test_without_redirects_two_directories_change_places(place: Place) -> None:
    programs = [rename("tree", "sub", RENAME_EXCHANGE), rename("sub", "mixed", RENAME_EXCHANGE)]
    check(place, programs, prepare=[cold], limit=25, at_random=5, redirect_dir=False)


# -- descriptors, and what the kernel forgets -------------------------------------------------------


def _reads_twice(name: str) -> Program:
    async def then(steps: Steps, id: int) -> None:
        handle = await steps.open(id, os.O_RDONLY)
        if handle is not None:
            await steps.read(handle)
            await steps.read(handle)

    return on(name, then)


@pytest.mark.parametrize("change", ["write", "truncate", "unlink", "other-over", "exchange", "link"])
@pytest.mark.parametrize("name", ["low", "metal", "hard1", "twice"])
def test_a_descriptor_for_reading_shows_what_is_written(place: Place, name: str, change: str) -> None:
    programs = [_reads_twice(name), orders.file_writers(name)[change]]
    check(place, programs, prepare=[cold], limit=15, at_random=5)


@pytest.mark.parametrize("name", ["low", "metal", "hard1", "twice"])
def test_a_file_that_is_emptied_is_never_seen_as_a_hole(place: Place, name: str) -> None:
    programs = [_reads_twice(name), truncate(name, 0)]
    check(place, programs, prepare=[cold], limit=40, at_random=10)


def test_a_file_changed_through_a_name_it_has_lost_is_changed_under_the_other(place: Place) -> None:
    """`twice` and `twice2` are one file; the second name was never looked up when the first one goes."""

    async def program(steps: Steps) -> None:
        found = await steps.lookup(IDS["d"], "twice")
        assert found is not None
        await steps.unlink(IDS["d"], "twice")
        await steps.truncate(found.ino, 3)
        other = await steps.lookup(IDS["d"], "twice2")
        assert other is not None
        assert (other.ino, other.st.st_size, other.nlink) == (found.ino, 3, 1)

    play(place, [program], [], None, atomic=True, prepare=cold)


def _opens_and_forgets(name: str, flags: int) -> Program:
    async def then(steps: Steps, id: int) -> None:
        handle = await steps.open(id, flags)
        if handle is not None:
            if flags & os.O_ACCMODE != os.O_RDONLY:
                await steps.write(handle, b"W")
            await steps.close(handle)
        await steps.forget(id)
        await steps.lookup(IDS["d"], name)

    return on(name, then)


@pytest.mark.parametrize("change", ["write", "unlink", "chmod", "away", "over-other", "link"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR], ids=["reads", "writes"])
@pytest.mark.parametrize("name", ["low", "metal", "hard1", "solo"])
def test_what_is_forgotten_is_found_again(place: Place, name: str, flags: int, change: str) -> None:
    programs = [_opens_and_forgets(name, flags), orders.file_writers(name)[change]]
    check(place, programs, prepare=[cold], limit=12, at_random=4)


@pytest.mark.parametrize("change", ["away", "elsewhere", "chmod", "exchange"])
@pytest.mark.parametrize("name", ["sub", "mixed", "tree"])
def test_a_forgotten_directory_is_found_again(place: Place, name: str, change: str) -> None:
    async def program(steps: Steps) -> None:
        for where in ("d", "d", "e"):
            found = await steps.lookup(IDS[where], name if where == "d" else ABSENT)
            if found is not None:
                await steps.list(found.ino, ())
                await steps.forget(found.ino)

    check(place, [program, orders.directory_writers(name)[change]], prepare=[cold], limit=15, at_random=5)


# -- two writers of directories -------------------------------------------------------------------


def _directory_changes() -> dict[str, Program]:
    async def into_sub(steps: Steps, id: int) -> None:
        await steps.rename(IDS["d"], "tree", id, "tree")

    async def into_tree(steps: Steps, id: int) -> None:
        await steps.rename(IDS["d"], "sub", id, "sub")

    async def make_inside(steps: Steps, id: int) -> None:
        await steps.create(id, "inside")

    async def make_directory_inside(steps: Steps, id: int) -> None:
        await steps.mkdir(id, "inside")

    async def move_inside(steps: Steps, id: int) -> None:
        await steps.rename(IDS["d"], "low", id, "low")

    async def empty(steps: Steps, id: int) -> None:
        for name in ("m", "n"):
            await steps.lookup(id, name)
            await steps.unlink(id, name)
        await steps.rmdir(IDS["d"], "mixed")

    return {
        "tree-into-sub": inside("sub")(into_sub),
        "sub-into-tree": inside("tree")(into_tree),
        "make-in-void": inside("void")(make_inside),
        "mkdir-in-void": inside("void")(make_directory_inside),
        "move-into-void": inside("void")(move_inside),
        "rmdir-void": rmdir("void"),
        "udir-over-void": rename("udir", "void"),
        "sub-over-void": rename("sub", "void"),
        "void-away": rename("void", ABSENT),
        "tree-void-exchange": rename("tree", "void", RENAME_EXCHANGE),
        "empty-mixed": inside("mixed")(empty),
        "mkdir-mixed": orders.mkdir("mixed"),
        "mixed-over-void": rename("mixed", "void"),
        "chmod-void": chmod("void"),
    }


@pytest.mark.parametrize(
    "redirect_dir",
    [pytest.param(True, id="redirects"), pytest.param(False, id="no-redirects", marks=pytest.mark.long)],
)
@pytest.mark.parametrize("one, two", list(itertools.combinations(_directory_changes(), 2)))
def test_two_writers_of_directories(place: Place, one: str, two: str, redirect_dir: bool) -> None:
    changes = _directory_changes()
    programs = [changes[one], changes[two]]
    check(place, programs, prepare=[cold], limit=6, at_random=2, redirect_dir=redirect_dir)


# -- whiteouts as `.wh.` files --------------------------------------------------------------------


@pytest.mark.parametrize("redirect_dir", [True, False], ids=["redirects", "no-redirects"])
@pytest.mark.parametrize("name", ["low", "over", "up", "sub", "void", "mixed"])
def test_file_whiteouts(place: Place, name: str, redirect_dir: bool) -> None:
    """Each change alone, and each followed by each other one: every two steps of a name's life."""
    if name in orders.DIRECTORIES:
        changes = orders.directory_writers(name) | {"again": orders.mkdir(name)}
    else:
        changes = orders.file_writers(name) | {"again": create(name)}
    for one, two in itertools.permutations(changes, 2):

        async def both(steps: Steps, one: str = one, two: str = two) -> None:
            await changes[one](steps)
            await changes[two](steps)

        forms = [
            play(place, [both], [], None, atomic=True, prepare=cold, redirect_dir=redirect_dir, **form)[2]
            for form in ({}, {"file_whiteouts": True})
        ]
        assert forms[0] == forms[1], f"{one}, {two}: {_unlike(forms[0].tree, forms[1].tree)}"


@pytest.mark.parametrize("two", ["unlink", "away", "over-other", "other-over", "exchange", "write"])
@pytest.mark.parametrize("one", ["unlink", "other-over", "exchange"])
def test_file_whiteouts_in_every_order(place: Place, one: str, two: str) -> None:
    both = orders.file_writers("low")
    check(place, [both[one], both[two]], prepare=[cold], limit=8, at_random=3, file_whiteouts=True)


# -- a name that is used again while its old file is copied ----------------------------------------


def test_the_copy_takes_nothing_from_a_new_file_of_its_name(place: Place) -> None:
    async def again(steps: Steps) -> None:
        await steps.lookup(IDS["d"], "metal")
        await steps.unlink(IDS["d"], "metal")
        await steps.create(IDS["d"], "metal")
        found = await steps.lookup(IDS["d"], "metal")
        assert found is not None
        await steps.setxattr(found.ino, "user.of-the-new", b"1")

    async def write_and_list(steps: Steps, id: int) -> None:
        await steps.open(id, os.O_RDWR)
        await steps._do("listxattr", steps.vfs.listxattr(id, steps.person), tuple)

    check(place, [on("metal", write_and_list), again], prepare=[warm("metal")], limit=60, at_random=30)


# -- signals ---------------------------------------------------------------------------------------


def _with_signals(
    place: Place, workers: list[Program], hit: list[int], *, limit: int, at_random: int, **options: bool
) -> set[str]:
    """Runs `workers` and for each of `hit` one who sends it a signal. A worker's operation ends as it does
    without any, or with EINTR as if
    it had not been begun. Returns the answers seen."""
    allowed: dict[frozenset[int], set[Outcome]] = {}
    seen: set[str] = set()

    def without(missing: frozenset[int]) -> set[Outcome]:
        if missing not in allowed:
            found = allowed[missing] = set()

            def run(choices: list[int], source: random.Random | None) -> Scheduler:
                kept = [w if n not in missing else nothing for n, w in enumerate(workers)]
                scheduler, _, outcome = play(
                    place, kept, choices, source, atomic=True, prepare=cold, **options
                )
                found.add(outcome)
                return scheduler

            explore(run, switches=100, limit=200)
        return allowed[missing]

    async def nothing(steps: Steps) -> None:
        pass

    def run(choices: list[int], source: random.Random | None) -> Scheduler:
        made: dict[int, Steps] = {}

        def kept(number: int, worker: Program) -> Program:
            async def program(steps: Steps) -> None:
                made[number] = steps
                await worker(steps)

            return program

        def sender(number: int) -> Program:
            async def program(steps: Steps) -> None:
                await steps.signal(made[number])

            return program

        programs = [kept(n, w) for n, w in enumerate(workers)] + [sender(n) for n in hit]
        scheduler, world, outcome = play(place, programs, choices, source, prepare=cold, **options)
        answers = outcome.answers[: len(workers)]
        missing = frozenset(n for n, each in enumerate(answers) if any(a == "EINTR" for _, a in each))
        seen.update(str(a) for each in answers for _, a in each)
        assert missing <= set(hit), "only who got a signal may be interrupted"

        def changing(answers: Any, tree: Any) -> Any:
            # lookups stand before the operation that counts
            return tuple(
                tuple(a for a in each if not a[0].startswith("lookup")) if n not in missing else ()
                for n, each in enumerate(answers)
            ), tree

        possible = {changing(o.answers, o.tree) for o in without(missing)}
        assert changing(answers, outcome.tree) in possible, (answers, missing, world.done)
        return scheduler

    explore(run, switches=4, limit=limit, at_random=at_random)
    return seen


def _cut(size: int, name: str = "low") -> Program:
    return on(name, lambda steps, id: steps.truncate(id, size))


def _open(name: str = "low") -> Program:
    return on(name, lambda steps, id: steps.open(id, os.O_RDWR))


@pytest.mark.parametrize("name", ["low", "metal", "hard1", "twice"])
def test_a_signal_ends_waiting_and_leaves_nothing(place: Place, name: str) -> None:
    assert "EINTR" in _with_signals(place, [_open(name)], [0], limit=60, at_random=20)


@pytest.mark.parametrize("other", ["open", "cut"])
@pytest.mark.parametrize("name", ["low", "metal", "twice"])
def test_one_of_two_waiters_is_interrupted(place: Place, name: str, other: str) -> None:
    """The other one gets what he asked for, whoever began the copy and however much of it was to be
    copied.
    """
    second = _open(name) if other == "open" else _cut(5, name)
    for hit in ([0], [1], [0, 1]):
        assert "EINTR" in _with_signals(place, [_open(name), second], hit, limit=60, at_random=30)


def test_waiters_of_different_sizes(place: Place) -> None:
    assert "EINTR" in _with_signals(place, [_cut(0), _cut(4)], [0], limit=60, at_random=30)


def test_who_changes_attributes_can_be_interrupted_too(place: Place) -> None:
    assert "EINTR" in _with_signals(place, [_open(), chmod("low")], [1], limit=60, at_random=30)


# -- faults ----------------------------------------------------------------------------------------

#: Calls that may find no room, by the module that makes them.
_GROWING = {
    "layerfs.upper.copyup": ("os.open", "os.mkdir", "os.symlink", "os.mknod", "os.setxattr", "copy_data"),
    "layerfs.upper.upper": (
        "os.mknod",
        "os.link",
        "os.setxattr",
        "os.open",
        "os.rename",
        "renameat2",
        "lsetxattr",
    ),
    "layerfs.upper.journal": ("os.open", "os.write", "os.rename"),
    "layerfs.vfs.copyup": ("os.link",),
    "layerfs.vfs.namespace": ("os.mkdir", "os.symlink", "os.mknod", "os.link", "os.setxattr"),
    "layerfs.vfs.rename": ("os.rename", "renameat2"),
}


class _Full:
    """The disk: from the `nth` growing call on (or only then) there is no room."""

    def __init__(self, nth: int, *, stays: bool) -> None:
        self.left = nth
        self.stays = stays
        self.met = False

    def call(self, real: Any, *arguments: Any, **more: Any) -> Any:
        if real is os.open and not arguments[1] & os.O_CREAT:
            return real(*arguments, **more)
        self.left -= 1
        if self.left == -1 or (self.left < 0 and self.stays):
            self.met = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **more)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for module_name, calls in _GROWING.items():
            module = importlib.import_module(module_name)
            full_os = types.SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
            for call in calls:
                if call.startswith("os."):
                    setattr(full_os, call[3:], functools.partial(self.call, getattr(os, call[3:])))
                else:
                    patch.setattr(module, call, functools.partial(self.call, getattr(module, call)))
            if hasattr(module, "os"):
                patch.setattr(module, "os", full_os)


WORKERS = {
    "write": write("low"),
    "truncate": truncate("low", 3),
    "chmod": chmod("low"),
    "chmod-metacopy": write("metal"),
    "chmod-link": chmod("link"),
    "chmod-directory": chmod("tree"),
    "away": rename("low", ABSENT),
    "over": rename("up", "low"),
    "exchange": rename("low", "up", RENAME_EXCHANGE),
    "directory-away": rename("tree", ABSENT, parent="e"),
    "directory-over": rename("udir", "void"),
    "directory-exchange": rename("sub", "udir", RENAME_EXCHANGE),
    "unlink": unlink("low"),
    "unlink-upper": unlink("over"),
    "rmdir": rmdir("void"),
    "link": link("low", ABSENT, parent="e"),
    "create": create(ABSENT),
    "hard-unlink": unlink("hard1"),
    "hard-chmod": chmod("hard1"),
    "hard-write": write("hard1"),
    "hard-over": rename("up", "hard1"),
}


@pytest.mark.parametrize("redirect_dir", [True, False], ids=["redirects", "no-redirects"])
@pytest.mark.parametrize("stays", [False, True], ids=["once", "stays"])
@pytest.mark.parametrize("worker", WORKERS)
def test_a_full_disk_changes_nothing(place: Place, worker: str, stays: bool, redirect_dir: bool) -> None:
    """Whichever call finds no room: the caller is told, the tree is as it was, and nothing is left in the
    work directory.
    """
    untouched = play(place, [], [], None, atomic=True, prepare=cold, redirect_dir=redirect_dir)[2].tree
    succeeded = play(
        place, [WORKERS[worker]], [], None, atomic=True, prepare=cold, redirect_dir=redirect_dir
    )[2].tree
    for nth in range(60):
        full = _Full(nth, stays=stays)
        before = Scheduler([], atomic=True)
        with before.installed():
            world = World(place, before, redirect_dir=redirect_dir)
            world.program(-1, cold)
            before.run()
            with pytest.MonkeyPatch.context() as patch:
                full.install(patch)
                world.program(0, WORKERS[worker])
                before.run()
        answers = [each.answer for each in world.done if each.task == 0]
        tree = tuple(sorted(world.finish().items()))
        if "ENOSPC" in answers:
            assert tree == untouched or "opened" in answers, (
                f"failure of call {nth} left something: {_unlike(untouched, tree)}"
            )
        else:
            assert tree == succeeded, (
                f"half a success in spite of the failure of call {nth}: {_unlike(succeeded, tree)}"
            )
        if not full.met:
            return
    raise AssertionError("more calls than can be counted")


def _unlike(one: Any, two: Any) -> str:
    return "\n".join(f"{a}\n{b}" for a, b in zip(one, two, strict=False) if a != b)
