"""Whoever changes names and lists them sees what he did, whatever others do in the same directory meanwhile.

Readers that began long ago and read on are among them: the kernel, if it keeps listings, puts what they get
into those of others."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.mounts import Layerfs
from tests.support.processes import spawn
from tests.support.stack import Stack

pytestmark = pytest.mark.skipif(bool(mounts.why_no_layerfs()), reason=str(mounts.why_no_layerfs()))

LOWER = 1500
WORKERS = 5
SECONDS = 6


def work(directory: Path, number: int) -> None:
    chance = random.Random(number)
    mine: set[str] = set()
    begun = []
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        what, name = chance.random(), f"w{number}-{chance.randrange(40)}"
        if what < 0.3:
            if name in mine:
                os.unlink(directory / name)
                mine.discard(name)
            else:
                (directory / name).touch()
                mine.add(name)
        elif what < 0.4 and mine:
            old = chance.choice(sorted(mine))
            os.rename(directory / old, directory / name)
            mine.discard(old)
            mine.add(name)
        elif what < 0.6:
            listing = os.scandir(directory)
            for _ in range(chance.randrange(1200)):
                next(listing, None)
            begun.append(listing)
        elif what < 0.8 and begun:
            with begun.pop(chance.randrange(len(begun))) as listing:
                list(listing)
        else:
            found = os.listdir(directory)
            assert len(found) == len(set(found)), "a name twice"
            assert {each for each in found if each.startswith(f"w{number}-")} == mine
            assert sum(each.startswith("f") for each in found) == LOWER
    for listing in begun:
        listing.close()


@pytest.mark.slow
def test_listings_while_names_change(make_stack: type[Stack]) -> None:
    stack = make_stack()
    (stack.lowers[0] / "d").mkdir()
    for number in range(LOWER):
        (stack.lowers[0] / f"d/f{number}").touch()
    with Layerfs(stack, "gate=on") as mount:
        workers = [spawn(lambda number=number: work(mount.mnt / "d", number)) for number in range(WORKERS)]
        assert [os.waitpid(worker, 0)[1] for worker in workers] == [0] * WORKERS
