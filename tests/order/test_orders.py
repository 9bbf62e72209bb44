"""Readers and writers of the same names, in every order: no answer and no tree that no order of whole
operations gives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from layerfs.fdutil import RENAME_EXCHANGE, RENAME_NOREPLACE
from layerfs.ids import ROOT

from .world import Place, Program, Steps, a_place, check

IDS: dict[str, int] = {}

FILES = ("low", "both", "over", "up", "metal", "hard1", "solo", "link", "twice")
DIRECTORIES = ("void", "sub", "tree", "mixed", "udir")
ABSENT = "new"


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


async def cold(steps: Steps) -> None:
    """Only the directories are known, not what is in them."""
    for name in ("d", "e"):
        found = await steps.lookup(ROOT, name)
        assert found is not None
        IDS[name] = found.ino


def warm(*names: str) -> Program:
    async def prepare(steps: Steps) -> None:
        await cold(steps)
        for name in names:
            await steps.lookup(IDS["d"], name)

    return prepare


def on(name: str, then: Callable[[Steps, int], object]) -> Program:
    """Looks `name` up, as a kernel does first, then does `then` with its node."""

    async def program(steps: Steps) -> None:
        found = await steps.lookup(IDS["d"], name)
        if found is not None:
            await then(steps, found.ino)  # type: ignore[misc]

    return program


def lookup(name: str) -> Program:
    async def program(steps: Steps) -> None:
        await steps.lookup(IDS["d"], name)

    return program


def look_twice(name: str, other: str) -> Program:
    async def program(steps: Steps) -> None:
        await steps.lookup(IDS["d"], name)
        await steps.lookup(IDS["d"], other)
        await steps.lookup(IDS["d"], name)

    return program


def listing(directory: str, *only: str) -> Program:
    async def program(steps: Steps) -> None:
        await steps.list(IDS[directory], only)

    return program


def unlink(name: str) -> Program:
    return on(name, lambda steps, _: steps.unlink(IDS["d"], name))


def rmdir(name: str) -> Program:
    return on(name, lambda steps, _: steps.rmdir(IDS["d"], name))


def rename(name: str, new: str, flags: int = 0, parent: str = "d") -> Program:
    async def then(steps: Steps, _: int) -> None:
        await steps.lookup(IDS[parent], new)
        await steps.rename(IDS["d"], name, IDS[parent], new, flags)

    return on(name, then)


def link(name: str, new: str, parent: str = "d") -> Program:
    return on(name, lambda steps, id: steps.link(id, IDS[parent], new))


def chmod(name: str) -> Program:
    return on(name, lambda steps, id: steps.chmod(id, 0o600))


def truncate(name: str, size: int) -> Program:
    return on(name, lambda steps, id: steps.truncate(id, size))


def write(name: str) -> Program:
    async def then(steps: Steps, id: int) -> None:
        handle = await steps.open(id, os.O_RDWR)
        if handle is not None:
            await steps.write(handle, b"WRITTEN")

    return on(name, then)


def read_after(name: str) -> Program:
    async def then(steps: Steps, id: int) -> None:
        handle = await steps.open(id, os.O_RDONLY)
        if handle is not None:
            await steps.getattr(id)
            await steps.read(handle)

    return on(name, then)


def create(name: str) -> Program:
    async def program(steps: Steps) -> None:
        await steps.lookup(IDS["d"], name)
        await steps.create(IDS["d"], name)

    return program


def mkdir(name: str) -> Program:
    async def program(steps: Steps) -> None:
        await steps.mkdir(IDS["d"], name)

    return program


def writers(name: str) -> dict[str, Program]:
    """What can be done to a name of a file."""
    other = "up" if name != "up" else "low"
    return {
        "unlink": unlink(name),
        "away": rename(name, ABSENT),
        "elsewhere": rename(name, ABSENT, parent="e"),
        "over-other": rename(name, other),
        "other-over": rename(other, name),
        "exchange": rename(name, other, RENAME_EXCHANGE),
        "noreplace": rename(other, name, RENAME_NOREPLACE),
        "link": link(name, ABSENT),
        "chmod": chmod(name),
        "truncate": truncate(name, 3),
        "write": write(name),
    }


def file_writers(name: str) -> dict[str, Program]:
    found = writers(name)
    if name == "link":  # a symbolic link has no data
        del found["truncate"], found["write"]
    return found


def directory_writers(name: str) -> dict[str, Program]:
    return {
        "rmdir": rmdir(name),
        "away": rename(name, ABSENT),
        "elsewhere": rename(name, ABSENT, parent="e"),
        "over-empty": rename(name, "void" if name != "void" else "udir"),
        "exchange": rename(name, "up", RENAME_EXCHANGE),
        "chmod": chmod(name),
    }


READERS = {"lookup": lookup, "read": read_after}
#: Their pairs of writers are tried by every run of the suite, those of the other names by the long one.
OFTEN = ("low", "metal", "hard1")

_PAIRS = [
    pytest.param(name, reader, writer, id=f"{name}-{reader}-{writer}")
    for name in FILES
    for reader in READERS
    for writer in file_writers(name)
    if not (name == "link" and reader == "read")
]
_DIRECTORY_PAIRS = [
    pytest.param(name, writer, id=f"{name}-{writer}")
    for name in DIRECTORIES
    for writer in directory_writers(name)
]


@pytest.mark.parametrize("name, reader, writer", _PAIRS)
def test_reader_and_writer(place: Place, name: str, reader: str, writer: str) -> None:
    programs = [READERS[reader](name), file_writers(name)[writer]]
    check(place, programs, prepare=[cold, warm(name)], limit=8, at_random=2)


@pytest.mark.parametrize("name, writer", _DIRECTORY_PAIRS)
def test_reader_and_writer_of_directories(place: Place, name: str, writer: str) -> None:
    change = directory_writers(name)[writer]
    check(
        place, [look_twice(name, ABSENT), change], prepare=[cold, warm(name, ABSENT)], limit=12, at_random=2
    )


_TWO = [
    pytest.param(name, one, two, id=f"{name}-{one}-{two}", marks=() if name in OFTEN else pytest.mark.long)
    for name in FILES
    for number, one in enumerate(file_writers(name))
    for two in list(file_writers(name))[number:]
]


@pytest.mark.parametrize("name, one, two", _TWO)
def test_two_writers(place: Place, name: str, one: str, two: str) -> None:
    both = file_writers(name)
    check(place, [both[one], both[two]], prepare=[cold, warm(name)], limit=6, at_random=2)
