"""Three requests drawn from all that the other modules know, in orders drawn at random."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from . import test_corners as corners
from . import test_orders as orders
from .world import Place, Program, a_place, check


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with a_place() as made:
        yield made


def _pool() -> dict[str, Program]:
    pool: dict[str, Program] = {}
    for name in orders.FILES:
        pool |= {f"{what} {name}": program for what, program in orders.file_writers(name).items()}
        pool[f"lookup {name}"] = orders.lookup(name)
        pool[f"create {name}"] = orders.create(name)
    for name in orders.DIRECTORIES:
        pool |= {f"{what} {name}": program for what, program in orders.directory_writers(name).items()}
        pool[f"mkdir {name}"] = orders.mkdir(name)
    pool |= {f"tree {what}": program for what, program in corners._tree_changes().items()}
    pool |= corners._directory_changes()
    for what in ("unlink", "rename", "chmod", "open", "getattr"):
        pool[f"hard2 {what}"] = corners.other_name(what)
    return pool


#: LAYERFS_ORDER_SEEDS=FIRST:COUNT runs others, for a longer hunt.
_first, _, _count = os.environ.get("LAYERFS_ORDER_SEEDS", "0:25").partition(":")


@pytest.mark.parametrize("seed", range(int(_first), int(_first) + int(_count)))
def test_three_of_all(place: Place, seed: int) -> None:
    source = random.Random(seed)
    pool = _pool()
    names = sorted(pool)
    # Two of them mostly have to do with the same thing, or they would rarely meet.
    one = source.choice(names)
    near = [name for name in names if name.split()[-1] == one.split()[-1]]
    chosen = [one, source.choice(near), source.choice(names)]
    print("programs:", chosen)
    check(
        place,
        [pool[name] for name in chosen],
        prepare=[source.choice([orders.cold, orders.warm("low", "tree", "hard1")])],
        switches=5,
        limit=10,
        at_random=8,
        redirect_dir=source.random() < 0.6,
        file_whiteouts=source.random() < 0.2,
    )
