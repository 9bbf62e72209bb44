"""How many requests a warm tree still costs, and who answers them: counted by the mount (`layerfs stat`)."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.posix.calls import err
from tests.posix.place import as_user
from tests.support import mounts
from tests.support.mounts import Layerfs
from tests.support.stack import Stack

pytestmark = pytest.mark.skipif(bool(mounts.why_no_layerfs()), reason=str(mounts.why_no_layerfs()))

DIRECTORIES = [f"d{number}" for number in range(10)]
FILES = [f"{directory}/f{number}" for directory in DIRECTORIES for number in range(90)]
LINKS = [f"{directory}/l{number}" for directory in DIRECTORIES for number in range(10)]


@pytest.fixture
def mounted(make_stack: type[Stack]) -> Iterator[Layerfs]:
    stack = make_stack(n_lowers=2)
    for at, directory in enumerate(DIRECTORIES):
        (stack.lowers[at % 2] / directory).mkdir()
    for name in FILES:
        (stack.lowers[int(name[1]) % 2] / name).write_text("content")
    for name in LINKS:
        (stack.lowers[int(name[1]) % 2] / name).symlink_to("f0")
    with Layerfs(stack, "gate=on") as mount:
        yield mount


def counts(mount: Layerfs) -> dict[tuple[str, str], int]:
    requests = mount.statistics()["requests"]
    return {(kind, who): each[who] for kind, each in requests.items() for who in ("native", "python")}


def undisturbed(once: Callable[[], dict[tuple[str, str], int]]) -> dict[tuple[str, str], int]:
    """What `once` counts while the kernel's caches on this machine are neither dropped nor reclaimed."""
    for _ in range(40):
        before = _drops()
        found = once()
        if _drops() == before:
            return found
        time.sleep(0.25)
    raise AssertionError("somebody drops the kernel's caches all the time")


def _drops() -> list[str]:
    with open("/proc/vmstat") as file:
        return [line for line in file if line.startswith(("drop_", "pgsteal_", "slabs_scanned"))]


def caused(mount: Layerfs, work: Callable[[], object]) -> dict[tuple[str, str], int]:
    """The requests of `work` on a warm tree, without those of asking for them and without FORGET."""

    def warm() -> dict[tuple[str, str], int]:
        work()
        work()  # the first listing has the kernel ask for the directory's access time
        return _caused_once(mount, work)

    return undisturbed(warm)


def _caused_once(mount: Layerfs, work: Callable[[], object]) -> dict[tuple[str, str], int]:
    counts(mount)  # makes the kernel know what asking needs
    before = counts(mount)
    asking = {key: now - before.get(key, 0) for key, now in counts(mount).items()}
    before = counts(mount)
    work()
    after = counts(mount)
    all_of_it = {key: now - before.get(key, 0) - asking.get(key, 0) for key, now in after.items()}
    return {key: count for key, count in all_of_it.items() if count and key[0] != "forget"}


def test_a_warm_tree(mounted: Layerfs) -> None:
    m = mounted.mnt

    def look() -> None:
        for name in FILES + LINKS:
            os.lstat(m / name)

    def follow() -> None:
        for name in LINKS:
            os.readlink(m / name)

    def ask() -> None:
        for name in FILES:
            assert os.access(m / name, os.R_OK)

    def read() -> None:
        for name in FILES:
            fd = os.open(m / name, os.O_RDONLY)
            assert os.read(fd, 100) == b"content"
            os.close(fd)

    def listing() -> None:
        for name in DIRECTORIES:
            assert len(os.listdir(m / name)) == 100

    def xattrs() -> None:
        for name in FILES:
            assert os.listxattr(m / name) == []

    assert caused(mounted, look) == {}
    assert caused(mounted, follow) == {}
    assert caused(mounted, ask) == {}
    assert caused(mounted, read) == {}
    listed = caused(mounted, listing)
    assert listed.pop(("opendir", "native")) == len(DIRECTORIES)
    # The kernel may keep listings of a read-only mount alone; having listed, it asks for the access time.
    assert listed.pop(("readdirplus", "native")) <= 2 * len(DIRECTORIES)
    assert set(listed) <= {("releasedir", "native"), ("getattr", "native")}
    assert caused(mounted, xattrs) == {("listxattr", "native"): len(FILES)}


def test_a_warm_tree_that_is_read_only(mounted: Layerfs) -> None:
    mounted.options.append("ro")
    mounted.remount()
    m = mounted.mnt

    def use() -> None:
        for directory in DIRECTORIES:
            assert len(os.listdir(m / directory)) == 100
        for name in FILES:
            os.lstat(m / name)
            assert os.access(m / name, os.R_OK)
            with open(m / name, "rb", buffering=0) as file:
                assert file.read(100) == b"content"
        for name in LINKS:
            os.readlink(m / name)

    # Python asks of every file that it opens whether it is a terminal.
    assert set(caused(mounted, use)) <= {("ioctl", "native")}


def test_a_cold_tree(mounted: Layerfs) -> None:
    """Python is asked once for each directory, whatever is in it."""

    def fresh() -> dict[tuple[str, str], int]:
        mounted.remount()
        return _caused_once(mounted, lambda: [os.lstat(mounted.mnt / name) for name in FILES + LINKS])

    cold = undisturbed(fresh)
    python = {kind: count for (kind, who), count in cold.items() if who == "python"}
    assert set(python) == {"lookup"}
    assert python["lookup"] <= len(DIRECTORIES) + 1
    assert cold["lookup", "native"] >= len(FILES + LINKS) - len(DIRECTORIES)


def test_absent_names(mounted: Layerfs) -> None:
    numbers = itertools.count()

    def look() -> None:
        number = next(numbers)
        for directory in DIRECTORIES:
            for at in range(50):
                assert not os.path.lexists(mounted.mnt / directory / f"no{number}-{at}")

    assert caused(mounted, look) == {("lookup", "native"): 500}
    same = [mounted.mnt / f"{directory}/none" for directory in DIRECTORIES]
    assert caused(mounted, lambda: [os.path.lexists(name) for name in same]) == {}


def test_small_files_are_made(mounted: Layerfs) -> None:
    """CREATE alone is Python's."""
    os.mkdir(mounted.mnt / "new")
    numbers = itertools.count()

    def create() -> None:
        number = next(numbers)
        for at in range(100):
            fd = os.open(mounted.mnt / f"new/f{number}-{at}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(fd, b"x" * 100)
            os.close(fd)

    made = caused(mounted, create)
    python = {kind: count for (kind, who), count in made.items() if who == "python"}
    assert python == {"create": 100}
    assert made["write", "native"] == 100


def test_large_files_are_written(mounted: Layerfs) -> None:
    """In requests of 1 MiB, none of which Python sees."""
    data = os.urandom(4 << 20)
    numbers = itertools.count()

    def write() -> None:
        name = mounted.mnt / f"large{next(numbers)}"
        name.write_bytes(data)
        assert name.read_bytes() == data

    made = caused(mounted, write)
    assert {who: count for (kind, who), count in made.items() if kind == "write"} == {"native": 4}


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("options", ["allow_root", "allow_root,noacl", "allow_root,noacl,ro"])
def test_allow_root_keeps_others_out(make_stack: type[Stack], options: str) -> None:
    """By libfuse, which must see each request: so there is no gate, and nothing is opened without asking."""
    stack = make_stack()
    (stack.lowers[0] / "file").write_text("content")
    (stack.lowers[0] / "file").chmod(0o666)
    with Layerfs(stack, options) as mount:
        # What is known to the kernel by now, and open, is nobody else's.
        assert (mount.mnt / "file").read_text() == "content" and os.listdir(mount.mnt) == ["file"]
        with open(mount.mnt / "file") as held:
            ways: list[Callable[[], object]] = [
                lambda: os.open(mount.mnt / "file", os.O_RDONLY),
                lambda: os.open(mount.mnt / "file", os.O_WRONLY),
                lambda: os.listdir(mount.mnt),
                lambda: os.stat(mount.mnt / "absent"),
                lambda: os.open(f"/proc/self/fd/{held.fileno()}", os.O_RDONLY),
            ]
            for way in ways:
                # (To write to a read-only mount the kernel refuses itself.)
                assert as_user(lambda way=way: err(way), 65534, 65534) in ("EACCES", "EROFS")
