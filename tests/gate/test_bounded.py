"""However many names a walk meets, only about so many are kept (`max_names=`), and what was dropped is there
again when it is asked for."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from layerfs.fuse.bounded import Bounded
from layerfs.fuse.counters import Counters
from layerfs.gate import NoGate
from tests.support import mounts
from tests.support.mounts import Layerfs
from tests.support.processes import eventually
from tests.support.stack import Stack
from tests.support.tree import assert_equal, lowers_guard, snapshot

live = pytest.mark.skipif(bool(mounts.why_no_layerfs()), reason=str(mounts.why_no_layerfs()))

DIRECTORIES, EACH, MOST = 60, 100, 500


@pytest.fixture
def wide(make_stack: type[Stack]) -> Stack:
    """Directories that lie in one lower, in two, and in two and the upper."""
    stack = make_stack(n_lowers=2)
    assert stack.upper is not None
    layers = [*stack.lowers, stack.upper]
    for directory in range(DIRECTORIES):
        for number in range(EACH):
            layer = layers[number % (directory % 3 + 1)]
            (layer / f"d{directory}").mkdir(exist_ok=True)
            (layer / f"d{directory}" / f"f{number}").write_text(f"{directory} {number}")
    return stack


def names(mount: Layerfs) -> int:
    return int(mount.statistics()["gate"]["entries"])


@live
@pytest.mark.usefixtures("root")
def test_a_walk_keeps_about_so_many_names(wide: Stack) -> None:
    with lowers_guard(wide.lowers), Layerfs(wide, f"gate=on,max_names={MOST}") as mount:
        first = snapshot(mount.mnt)
        assert len(first) > DIRECTORIES * EACH
        assert eventually(lambda: names(mount) <= MOST, every=0.1), mount.statistics()["gate"]
        assert mount.statistics()["nodes"] <= MOST
        assert_equal(first, snapshot(mount.mnt))


@live
@pytest.mark.usefixtures("root")
def test_what_is_in_use_stays(wide: Stack) -> None:
    """Open files, a listing that was begun, a directory that somebody is in, a file that is mapped."""
    with Layerfs(wide, f"gate=on,max_names={MOST}") as mount:
        inside = os.open(mount.mnt / "d1", os.O_PATH)
        listed = os.scandir(mount.mnt / "d2")
        begun = [next(listed).name]
        with open(mount.mnt / "d3/f1", "r+") as file:
            file.write("changed ")
            file.flush()
            for _ in range(2):
                snapshot(mount.mnt)
                assert eventually(lambda: names(mount) <= MOST + 2 * EACH, every=0.1)
            file.write("twice")
        assert (mount.mnt / "d3/f1").read_text() == "changed twice"
        begun += [entry.name for entry in listed]
        assert sorted(begun) == sorted(f"f{number}" for number in range(EACH))
        os.mkdir("new", dir_fd=inside)
        os.close(inside)
        assert (mount.mnt / "d1/new").is_dir()


@live
@pytest.mark.usefixtures("root")
def test_changes_are_read_again(wide: Stack) -> None:
    """What was made, removed, renamed and copied up shows after its directory was dropped."""
    with Layerfs(wide, f"gate=on,max_names={MOST}") as mount:
        numbers = {}
        for directory in range(DIRECTORIES):
            at = mount.mnt / f"d{directory}"
            os.unlink(at / "f0")
            os.rename(at / "f1", at / "renamed")
            (at / "made").write_text("made")
            with open(at / "f2", "a") as file:
                file.write(" more")
            os.chmod(at / "f3", 0o600)
            numbers[directory] = [os.stat(at / name).st_ino for name in ("renamed", "made", "f2", "f3", "f4")]
        changed = snapshot(mount.mnt)
        assert eventually(lambda: names(mount) <= MOST, every=0.1)
        for directory in range(DIRECTORIES):
            at = mount.mnt / f"d{directory}"
            assert not (at / "f0").exists() and not (at / "f1").exists()
            assert (at / "f2").read_text() == f"{directory} 2 more"
            found = [os.stat(at / name).st_ino for name in ("renamed", "made", "f2", "f3", "f4")]
            assert found == numbers[directory]
        assert_equal(changed, snapshot(mount.mnt))
        mount.remount()
        assert_equal(changed, snapshot(mount.mnt))


@live
@pytest.mark.usefixtures("root")
def test_listings_of_a_read_only_mount(wide: Stack) -> None:
    """Directories are opened there without asking, and the kernel keeps listings by offset: part of one is
    read before its directory was dropped and the rest after."""
    wide.upper = wide.work = None
    with Layerfs(wide, f"gate=on,max_names={MOST}") as mount:
        whole = sorted(os.listdir(mount.mnt / "d2"))
        mount_again = [os.scandir(mount.mnt / "d2") for _ in range(3)]
        begun = [[next(each).name] for each in mount_again]
        first = snapshot(mount.mnt)
        assert eventually(lambda: names(mount) <= MOST + EACH, every=0.1)
        for part, rest in zip(begun, mount_again, strict=True):
            assert sorted(part + [entry.name for entry in rest]) == whole
        assert_equal(first, snapshot(mount.mnt))


@live
@pytest.mark.usefixtures("root")
def test_what_cannot_be_dropped_is_borne(make_stack: type[Stack]) -> None:
    """A directory of more names than there may be, which somebody has open: the others need not go for it,
    again and again."""
    stack = make_stack()
    for directory, count in (("big", 2 * MOST), ("small", 50)):
        (stack.lowers[0] / directory).mkdir()
        for number in range(count):
            (stack.lowers[0] / directory / f"f{number}").touch()
    with Layerfs(stack, f"gate=on,max_names={MOST}") as mount, os.scandir(mount.mnt / "big") as listed:
        next(listed)

        def asked() -> int:
            """Names that had to be asked for, when all of `small` is looked at twice."""
            before = mount.statistics()["requests"]["lookup"]
            for _ in range(2):
                for number in range(50):
                    os.stat(mount.mnt / f"small/f{number}")
            after = mount.statistics()["requests"]["lookup"]
            return sum(after[who] - before[who] for who in ("native", "python"))

        assert eventually(lambda: asked() == 0, every=0.1)
        assert names(mount) > MOST


class TooMany:
    """Two names too many, of which one can be dropped each time."""

    def __init__(self) -> None:
        self.left = 2
        self.tree = self
        self.asked = 0

    @property
    def too_many(self) -> bool:
        return self.left > 0

    def to_forget(self) -> list[int]:
        self.asked += 1
        return [7]

    def drop(self) -> int:
        self.left -= 1
        return 1

    def bear(self) -> bool:
        return self.too_many


class OldKernel(NoGate):
    """Before 6.18. (No mount can be made to have one.)"""

    def prune(self, nodes: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.trio
async def test_a_kernel_that_cannot_be_asked() -> None:
    """It is asked once; what it forgets by itself is dropped all the same. And nothing is while requests are
    under way."""
    unload, counters = TooMany(), Counters()
    bounded = Bounded(unload, OldKernel(), counters)  # type: ignore[arg-type]
    counters.begin()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bounded.run)
        unload.grown()  # type: ignore[attr-defined]
        with trio.move_on_after(0.1):
            await trio.sleep_forever()
        assert unload.left == 2
        counters.answered("lookup", counters.begin())
        assert unload.left == 2
        counters.answered("lookup", 0)
        while unload.left:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert unload.asked == 1
