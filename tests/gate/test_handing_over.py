"""Objects that change hands between Python and the gate: node ids, lookup counts, attributes and places in
listings go with them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.support import mounts
from tests.support.mounts import Layerfs
from tests.support.stack import Stack

pytestmark = [
    pytest.mark.usefixtures("root"),
    pytest.mark.skipif(bool(mounts.why_no_layerfs()), reason=str(mounts.why_no_layerfs())),
]


def test_a_lower_directory_that_is_seen_twice(make_stack: type[Stack]) -> None:
    stack = make_stack()
    (stack.lowers[0] / "real").mkdir()
    for number in range(5):
        (stack.lowers[0] / f"real/f{number}").write_text(str(number))
    for name in ("one", "two"):
        (stack.upper / name).mkdir()
        os.setxattr(stack.upper / name, "trusted.overlay.redirect", b"/real")
    with Layerfs(stack, "gate=on") as mount:
        for number in range(5):
            for name in ("one", "two"):
                path = f"{mount.mnt}/{name}/f{number}"
                id = os.stat(path).st_ino
                with open(path) as file:
                    assert file.read() == str(number)
                assert os.stat(path).st_ino == id


def test_lookups_of_names_for_which_a_listing_had_no_room(make_stack: type[Stack]) -> None:
    stack = make_stack()
    (stack.lowers[0] / "d").mkdir()
    for number in range(1000):
        path = stack.lowers[0] / f"d/f{number}"
        path.touch()
        os.setxattr(path, "user.some", b"")
    with Layerfs(stack, "gate=on") as mount:
        directory = f"{mount.mnt}/d"
        for name in os.listdir(directory):
            os.listxattr(f"{directory}/{name}")  # Python's from now on
        with open(f"{directory}/new", "x"):
            pass  # what the kernel knows of the listing is worth nothing
        os.listdir(directory)
        for _ in range(40):
            with open("/proc/sys/vm/drop_caches", "w") as file:
                file.write("2")
            if mount.known() <= 2:
                break
            time.sleep(0.25)
        assert mount.known() <= 2


def test_link_count_of_what_no_longer_merges(make_stack: type[Stack]) -> None:
    stack = make_stack()
    (stack.lowers[0] / "d/sub/below").mkdir(parents=True)
    with Layerfs(stack, "gate=on,redirect_dir=off") as mount:
        with open(f"{mount.mnt}/d/sub/new", "x"):
            assert os.stat(f"{mount.mnt}/d/sub").st_nlink == 1
        os.rename(f"{mount.mnt}/d", f"{mount.mnt}/e")
        os.listdir(f"{mount.mnt}/e/sub")  # the kernel asks for the attributes again
        assert os.stat(f"{mount.mnt}/e/sub").st_nlink == 3


def test_a_listing_ends_though_each_name_is_renamed(make_stack: type[Stack]) -> None:
    """As xfstests generic/736."""
    stack = make_stack()
    for name in ("merged", "upper"):
        (stack.lowers[0] / name).mkdir()
    for number in range(1000):
        (stack.lowers[0] / f"merged/f{number:04}").touch()
    with Layerfs(stack, "gate=on") as mount:
        for number in range(1000):
            (mount.mnt / f"upper/f{number:04}").touch()
        for name in ("merged", "upper"):
            seen = []
            with os.scandir(mount.mnt / name) as entries:
                for entry in entries:
                    seen.append(entry.name)
                    assert len(seen) <= 2000, "it never ends"
                    os.rename(entry.path, mount.mnt / name / f"renamed-{len(seen):04}")
            assert {each for each in seen if each.startswith("f")} == {f"f{n:04}" for n in range(1000)}
            assert len(os.listdir(mount.mnt / name)) == 1000


@pytest.mark.parametrize("change", [os.unlink, lambda path: os.rename(path, path + "-new")])
def test_a_listing_goes_on_in_large_steps_while_names_change(
    make_stack: type[Stack], change: Callable[[str], None]
) -> None:
    stack = make_stack()
    (stack.lowers[0] / "d").mkdir()
    for number in range(1000):
        (stack.lowers[0] / f"d/f{number}").touch()
    with Layerfs(stack, "gate=on") as mount:
        with os.scandir(mount.mnt / "d") as entries:
            for entry in entries:
                change(entry.path)
        listed = mount.statistics()["requests"]["readdirplus"]
        assert listed["native"] + listed["python"] < 100
