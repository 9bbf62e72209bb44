"""While something takes long, a thousand stats elsewhere are answered before it ends."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.mounts import Layerfs
from tests.support.stack import Stack

from .conftest import (
    MIB,
    Doing,
    copies_under_way,
    elsewhere_in,
    eventually,
    in_fsync,
    real_data,
    thousand_stats,
)
from .valve import Valve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("root")]


def _write_first(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, b"1", 0)
    finally:
        os.close(fd)


def test_a_copy_up(make_stack: type[Stack], big: int, big_files: Callable[[int], Path]) -> None:
    stack = make_stack()
    stack.lowers = [big_files(big)]
    with Layerfs(stack) as mount:
        copy = Doing(lambda: _write_first(mount.mnt / "big"))
        assert eventually(lambda: copies_under_way(stack) or copy.ended)
        assert not copy.ended, "the copy has not begun"
        thousand_stats(mount.mnt)
        assert not copy.ended, "the stats waited for the copy-up"
        copy.result()
        assert stack.upper is not None
        assert (stack.upper / "big").stat().st_size == big


def test_fifty_copy_ups(make_stack: type[Stack]) -> None:
    stack = make_stack()
    size, count = 24 * MIB, 50
    for number in range(count):
        real_data(stack.lowers[0] / f"file{number}", size)
    elsewhere_in(stack.lowers[0])
    with Layerfs(stack) as mount:

        def one(number: int) -> Callable[[], None]:
            return lambda: _write_first(mount.mnt / f"file{number}")

        copies = [Doing(one(number)) for number in range(count)]
        assert eventually(lambda: copies_under_way(stack))
        thousand_stats(mount.mnt)
        assert not all(copy.ended for copy in copies), "the stats waited for the copy-ups"
        for copy in copies:
            copy.result()
    assert stack.upper is not None
    assert {(stack.upper / f"file{n}").stat().st_blocks * 512 >= size for n in range(count)} == {True}


def test_an_fsync(make_stack: type[Stack], valve: Valve) -> None:
    """On a disk that stands still until the stats are through."""
    stack = make_stack(valve.dir)
    lower = make_stack()
    stack.lowers = lower.lowers
    elsewhere_in(lower.lowers[0])
    with Layerfs(stack) as mount:
        with open(mount.mnt / "dirty", "wb", buffering=0) as file:
            block = os.urandom(MIB)
            for _ in range(64):
                file.write(block)
            valve.shut()
            sync = Doing(lambda: os.fsync(file.fileno()))
            try:
                assert eventually(lambda: in_fsync(mount) or sync.ended)
                thousand_stats(mount.mnt)
                assert not sync.ended
            finally:
                valve.open()
            sync.result()


def test_a_copy_up_on_a_disk_that_stands_still(make_stack: type[Stack], valve: Valve) -> None:
    stack = make_stack(valve.dir)
    lower = make_stack()
    stack.lowers = lower.lowers
    elsewhere_in(lower.lowers[0])
    real_data(lower.lowers[0] / "file", 32 * MIB)
    with Layerfs(stack) as mount:
        valve.shut()
        copies = [Doing(lambda: _write_first(mount.mnt / "file")) for _ in range(3)]
        try:
            assert eventually(lambda: in_fsync(mount) or any(copy.ended for copy in copies))
            thousand_stats(mount.mnt)
            assert not any(copy.ended for copy in copies)
        finally:
            valve.open()
        for copy in copies:
            copy.result()


@pytest.fixture(scope="module")
def hundred_thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layer = tmp_path_factory.mktemp("many")
    (layer / "many").mkdir()
    fd = os.open(layer / "many", os.O_RDONLY)
    for number in range(100_000):
        os.mknod(f"name{number:06}", 0o100644, dir_fd=fd)
    os.close(fd)
    elsewhere_in(layer)
    return layer


@pytest.mark.parametrize("how", ["list", "first lookup"])
def test_a_listing(make_stack: type[Stack], hundred_thousand: Path, how: str) -> None:
    stack = make_stack()
    stack.lowers = [hundred_thousand]
    # The gate lists the whole directory in the time of a few hundred stats, a reply's worth at a time.
    with Layerfs(stack, "gate=off") as mount:

        def look() -> int:
            if how == "list":
                return len(os.listdir(mount.mnt / "many"))
            return 100_000 if os.path.exists(mount.mnt / "many" / "name099999") else 0

        if how == "first lookup":
            # The first touch merges all names, too; it is quick, so what is asserted is only that both end.
            first = Doing(look)
            thousand_stats(mount.mnt)
            assert first.result() == 100_000
            return
        with os.scandir(mount.mnt / "many") as entries:
            next(entries)
            rest = Doing(lambda: sum(1 for _ in entries))
            thousand_stats(mount.mnt)
            assert not rest.ended, "the stats waited for the listing"
            assert rest.result() == 99_999
