"""Layers on tmpfs, ext4, xfs and btrfs, together and apart; very many layers; odd paths; dropped caches."""

from __future__ import annotations

import errno
import os
import random
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs
from tests.support.stack import Dir, File, Stack
from tests.support.tree import assert_equal, lowers_guard, snapshot

from . import work
from .loops import file_system


@pytest.fixture(autouse=True)
def needs(kernel_overlay: None) -> None:
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def wanted() -> tuple[object, int]:
    """What the work gives on a plain directory, and since when times count as now."""
    began = time.time_ns() - 10**9
    stack = Stack(name="plain")
    work.plain(stack)
    work.work_in(stack.mnt)
    found = work.look(stack.mnt)
    subprocess.run(["rm", "-rf", stack.dir], check=True)
    return found, began


@contextmanager
def stack_on(lower: str, upper: str) -> Iterator[Stack]:
    """A stack whose lowers are on a fresh file system of one kind, upper and work on one of another; "" is
    where tests always are, "same" the lowers' own.
    """
    with ExitStack() as open_:
        low = open_.enter_context(file_system(lower)) if lower else None
        stack = Stack(base=low, n_lowers=2)
        open_.callback(lambda: subprocess.run(["rm", "-rf", stack.dir], check=True))
        if upper != "same":
            up = open_.enter_context(file_system(upper)) if upper else Stack(n_lowers=0).dir
            stack.upper, stack.work = up / "upper", up / "work"
            stack.upper.mkdir()
            stack.work.mkdir()
            stack.upper.chmod(0o755)
        yield stack


@pytest.mark.parametrize(
    "lower,upper",
    [
        ("tmpfs", "same"),
        ("xfs", "same"),
        ("btrfs", "same"),
        ("", "tmpfs"),
        ("", "ext4"),
        ("", "xfs"),
        ("xfs", "btrfs"),
        ("btrfs", "tmpfs"),
    ],
)
def test_layers_on(lower: str, upper: str, wanted: tuple[object, int]) -> None:
    """The work gives what it gives on a plain directory, before and after a remount, and under the kernel."""
    with stack_on(lower, upper) as stack:
        work.lay_out(stack)
        with lowers_guard(stack.lowers):
            with Layerfs(stack) as m:
                before = work.unique_numbers(m.mnt)
                work.work_in(m.mnt)
                live = work.look(m.mnt)
                numbers = work.unique_numbers(m.mnt)
                for name in work.KEEP_NUMBER:
                    assert numbers[name] == before[name], name
                m.remount()
                assert_equal(live, work.look(m.mnt), message="after remount")
                assert work.unique_numbers(m.mnt) == numbers
            assert_equal(
                wanted[0],  # type: ignore[arg-type]
                live,
                recent_ns=wanted[1],
                labels=("plain", "layerfs"),
                message=f"{lower or 'lowers here'}, upper on {upper or 'here'}",
            )
            with KernelOverlay(stack) as kernel:
                assert_equal(live, work.look(kernel.mnt), labels=("layerfs", "kernel"))
        if upper != "same" and stack.upper is not None:
            subprocess.run(["rm", "-rf", stack.upper, stack.work], check=True)  # type: ignore[list-item]


def test_whiteouts_as_files(make_stack: type[Stack], wanted: tuple[object, int]) -> None:
    """An upper on a kernel overlay, where no device 0/0 can be made: whiteouts are `.wh.` files, the rest is
    the same. Then that upper where devices can be made, and both forms stand side by side.
    """
    outer, stack = make_stack(), make_stack(n_lowers=2)
    work.lay_out(stack)
    long_name = "n" * 255
    (stack.lowers[1] / long_name).write_text("long")
    with lowers_guard(stack.lowers):
        with KernelOverlay(outer) as kernel:
            stack.upper, stack.work = kernel.mnt / "upper", kernel.mnt / "work"
            stack.upper.mkdir()
            stack.work.mkdir()
            with Layerfs(stack) as m:
                try:
                    os.unlink(m.mnt / long_name)
                except OSError as error:
                    assert error.errno == errno.ENAMETOOLONG  # no room for `.wh.`, and nothing is done
                    assert (m.mnt / long_name).read_text() == "long"
                    os.rename(m.mnt / "untouched", m.mnt / "untouched-moved")
                    os.rename(m.mnt / "untouched-moved", m.mnt / "untouched")
                gone = not (m.mnt / long_name).exists()
                work.work_in(m.mnt)
                live = work.look(m.mnt)
                numbers = work.unique_numbers(m.mnt)
                m.remount()
                assert_equal(live, work.look(m.mnt), message="after remount")
                assert work.unique_numbers(m.mnt) == numbers
            live.pop(os.fsencode(long_name), None)
            assert_equal(wanted[0], live, recent_ns=wanted[1], labels=("plain", "layerfs"))  # type: ignore[arg-type]
        stack.upper, stack.work = outer.upper / "upper", outer.upper / "work"  # type: ignore[operator]
        with Layerfs(stack) as m:
            if not gone:
                os.unlink(m.mnt / long_name)
            os.rename(m.mnt / "dir", m.mnt / "gone-dir")
            os.mkdir(m.mnt / "dir")
            os.unlink(m.mnt / "untouched")
            (m.mnt / "gone").write_text("again")
            live = work.look(m.mnt)
            m.remount()
            assert_equal(live, work.look(m.mnt), message="after remount, both forms")


def test_upper_unmounted_while_mounted(make_stack: type[Stack]) -> None:
    """`umount -l` of the upper's file system: the mount goes on, and ends cleanly."""
    stack = make_stack(n_lowers=2)
    work.lay_out(stack)
    base = stack.dir / "tmpfs"
    base.mkdir()
    mounts.mount("none", base, "tmpfs")
    stack.upper, stack.work = base / "upper", base / "work"
    stack.upper.mkdir()
    stack.work.mkdir()
    keep = os.open(stack.upper, os.O_RDONLY)
    try:
        with Layerfs(stack) as m:
            (m.mnt / "before").write_text("before")
            mounts.umount(base, mounts.MNT_DETACH)
            work.work_in(m.mnt)
            assert (m.mnt / "before").read_text() == "before"
            names = set(os.listdir(m.mnt))
        assert "before" in names and {"before", "arrived"} <= set(os.listdir(keep))
    finally:
        os.close(keep)


def test_lowers_on_several_file_systems(make_stack: type[Stack]) -> None:
    """Same inode numbers in several lowers, merged directories over all, hard links within each."""
    with ExitStack() as open_:
        stack = make_stack(n_lowers=0)
        for number in range(4):
            root = open_.enter_context(file_system("tmpfs")) / "layer"
            root.mkdir()
            stack.write(
                root,
                {
                    "d": Dir(),
                    f"d/f{number}": File(data=str(number).encode()),
                    "same": File(data=str(number).encode()),
                    f"only{number}": Dir(),
                    f"only{number}/f": File(data=str(number).encode()),
                },
            )
            os.link(root / "d" / f"f{number}", root / f"link{number}")
            stack.lowers.append(root)
        with Layerfs(stack) as m:
            numbers = work.unique_numbers(m.mnt)
            fds = [os.open(m.mnt / f"only{n}" / "f", os.O_RDONLY) for n in range(4)]
            assert [os.read(fd, 9) for fd in fds] == [b"0", b"1", b"2", b"3"]
            for fd in fds:
                os.close(fd)
            for n in range(4):
                with open(m.mnt / f"link{n}", "ab") as file:
                    file.write(b"+")
                assert (m.mnt / "d" / f"f{n}").read_text() == f"{n}+"
            os.rename(m.mnt / "d", m.mnt / "e")
            assert sorted(os.listdir(m.mnt / "e")) == [f"f{n}" for n in range(4)]
            live = work.look(m.mnt)
            again = work.unique_numbers(m.mnt)
            assert {(b"d" + n[1:] if n[:1] == b"e" else n): i for n, i in again.items()} == numbers
        with KernelOverlay(stack) as kernel:
            assert_equal(live, work.look(kernel.mnt), labels=("layerfs", "kernel"))


def test_five_hundred_lowers(make_stack: type[Stack]) -> None:
    """A name in each, a directory through all, a whiteout in every third: as under the kernel."""
    stack = make_stack(n_lowers=500)
    for number, lower in enumerate(stack.lowers):
        (lower / "d").mkdir()
        (lower / "d" / f"f{number}").write_text(str(number))
        (lower / f"top{number}").write_text(str(number))
        (lower / "same").write_text(str(number))
        if number % 3 == 0 and number + 1 < 500:
            os.mknod(lower / "d" / f"f{number + 1}", 0o020000, 0)
    with Layerfs(stack) as m:
        before = snapshot(m.mnt)
        assert (m.mnt / "same").read_text() == "0" and len(os.listdir(m.mnt)) == 502
        assert sorted(os.listdir(m.mnt / "d")) == sorted(f"f{n}" for n in range(500) if n % 3 != 1)
        with open(m.mnt / "d" / "f498", "a") as file:
            file.write("+")
        os.unlink(m.mnt / "d" / "f0")
        os.rename(m.mnt / "d", m.mnt / "e")
        assert (m.mnt / "e" / "f498").read_text() == "498+"
        after = snapshot(m.mnt)
        assert before != after
    with KernelOverlay(stack) as kernel:
        assert_equal(after, snapshot(kernel.mnt), labels=("layerfs", "kernel"))


def test_a_thousand_lowers(make_stack: type[Stack]) -> None:
    """More than the kernel's own limit."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2048:
        pytest.skip("too few descriptors allowed")
    stack = make_stack(n_lowers=1000)
    for number, lower in enumerate(stack.lowers):
        (lower / f"f{number}").write_text(str(number))
    with Layerfs(stack) as m:
        assert len(os.listdir(m.mnt)) == 1000
        assert all((m.mnt / f"f{n}").read_text() == str(n) for n in (0, 1, 499, 998, 999))
        os.unlink(m.mnt / "f999")
        m.remount()
        assert len(os.listdir(m.mnt)) == 999


ODD = [
    "a:b",
    "a,b",
    "a\\b",
    "a\\:b,c\\",
    "new\nline",
    "tab\tspace here",
    "-dash",
    "quote\"and'",
    "\udcff\udcfe bytes",
    "ümlaut",
    "%s%n",
    "$(touch x)`y`",
    "trailing ",
    "[]*?",
    "comma,upperdir=",
    "colon::double",
]


@pytest.mark.parametrize("way", ["arguments", "options"])
def test_odd_names_in_layer_paths(make_stack: type[Stack], way: str) -> None:
    """Through --lower and friends, and escaped in -o lowerdir= as kernel overlayfs takes them."""
    stack = make_stack(n_lowers=0)
    for number, name in enumerate(ODD):
        lower = stack.dir / name
        lower.mkdir()
        (lower / f"f{number}").write_text(str(number))
        stack.lowers.append(lower)
    for attribute in ("upper", "work", "mnt"):
        path = stack.dir / f"{attribute} :,\\ \n\udcff"
        path.mkdir()
        setattr(stack, attribute, path)
    m = Layerfs(stack)
    if way == "options":

        def escape(path: object) -> str:
            return str(path).replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")

        lowers = ":".join(escape(lower) for lower in stack.lowers)
        options = f"lowerdir={lowers},upperdir={escape(stack.upper)},workdir={escape(stack.work)}"
        command = [*mounts.layerfs_command(), "mount", "-o", options, str(stack.mnt)]
        m.command = lambda: list(command)  # type: ignore[method-assign]
    with m:
        assert sorted(os.listdir(m.mnt)) == sorted(f"f{n}" for n in range(len(ODD)))
        assert m.info()["lowers"] == len(ODD)
        for number, lower in enumerate(stack.lowers):
            assert os.getxattr(m.mnt, f"layerfs.lower.{number}") == os.fsencode(os.path.realpath(lower))
        os.unlink(m.mnt / "f0")
        (m.mnt / "new").write_text("x")
        done = m.run(*mounts.layerfs_command(), "diff", m.mnt)
        assert done.returncode == 0 and {"D /f0", "A /new"} <= set(done.stdout.splitlines()), done
    assert (Path(stack.upper or "") / "new").read_text() == "x"
    for attribute in ("upper", "work"):  # the kernel takes escapes out of these two paths
        setattr(stack, attribute, Path(getattr(stack, attribute)).rename(stack.dir / attribute / "plain"))
    with KernelOverlay(stack) as kernel:
        assert sorted(os.listdir(kernel.mnt)) == sorted(["new", *(f"f{n}" for n in range(1, len(ODD)))])


# --- memory pressure ------------------------------------------------------------------------------


@contextmanager
def caches_dropped() -> Iterator[None]:
    """The kernel forgets dentries, inodes and clean pages, over and over."""
    stop = threading.Event()

    def drop() -> None:
        while not stop.is_set():
            with open("/proc/sys/vm/drop_caches", "w") as file:
                file.write("3")

    thread = threading.Thread(target=drop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_while_caches_are_dropped(make_stack: type[Stack], wanted: tuple[object, int]) -> None:
    """The work, as ever; open descriptors, hard links and unlinked files keep meaning what they meant."""
    began = time.time_ns() - 10**9
    stack = make_stack(n_lowers=2)
    work.lay_out(stack)
    with lowers_guard(stack.lowers), Layerfs(stack) as m, caches_dropped():
        names = ("big", "link-b", "dir/sub/g", "gone", "moved")
        held = {name: os.open(m.mnt / name, os.O_RDONLY) for name in names}
        before = work.unique_numbers(m.mnt)
        work.work_in(m.mnt)
        assert os.pread(held["big"], 7, 5000) == b"changed"
        assert os.pread(held["link-b"], 6, 0) == b"LINKED"
        assert os.read(held["gone"], 9) == b"gone" and os.fstat(held["gone"]).st_nlink == 0
        assert sorted(os.listdir(held["moved"])) == sorted(os.listdir(m.mnt / "arrived"))
        for fd in held.values():
            os.close(fd)
        after = work.unique_numbers(m.mnt)
        for name in (b"big", b"dir", b"dir/f", b"symlink", b"link-a", b"fifo"):
            assert after[name] == before[name]
        live = work.look(m.mnt)
    recent = min(began, wanted[1])
    assert_equal(wanted[0], live, recent_ns=recent, labels=("plain", "layerfs"))  # type: ignore[arg-type]


def pressure(make_stack: type[Stack], rounds: int) -> None:
    """A worker keeps a record of what it wrote, in files that come and go, and finds nothing else. Ever."""
    stack = make_stack(n_lowers=3)
    model: dict[str, bytes] = {}
    for number in range(300):
        name = f"d{number % 7}/f{number}"
        (stack.lowers[number % 3] / f"d{number % 7}").mkdir(exist_ok=True)
        model[name] = os.urandom(100) + str(number).encode()
        (stack.lowers[number % 3] / name).write_bytes(model[name])
    with lowers_guard(stack.lowers), Layerfs(stack) as m, caches_dropped():
        chance = random.Random(11)
        for _ in range(rounds):
            name = chance.choice(sorted(model))
            path = m.mnt / name
            assert path.read_bytes() == model[name]
            match chance.randrange(6):
                case 0:
                    with open(path, "ab") as file:
                        file.write(b"+")
                    model[name] += b"+"
                case 1:
                    os.chmod(path, 0o600)
                case 2:
                    other = f"d{chance.randrange(7)}/g{len(model)}-{chance.random()}"
                    os.rename(path, m.mnt / other)
                    model[other] = model.pop(name)
                    assert not path.exists()
                case 3:
                    os.unlink(path)
                    del model[name]
                    assert not path.exists()
                case 4:
                    new = f"d{chance.randrange(7)}/n{chance.random()}"
                    model[new] = os.urandom(50)
                    (m.mnt / new).write_bytes(model[new])
                case 5:
                    listed = {f"{p.parent.name}/{p.name}" for p in m.mnt.glob("d*/*")}
                    assert listed == set(model)
        assert {n: (m.mnt / n).read_bytes() for n in model} == model
        m.remount()
        assert {n: (m.mnt / n).read_bytes() for n in model} == model
        assert {f"{p.parent.name}/{p.name}" for p in m.mnt.glob("d*/*")} == set(model)


def test_memory_pressure(make_stack: type[Stack]) -> None:
    pressure(make_stack, 100)


@pytest.mark.long
def test_memory_pressure_for_long(make_stack: type[Stack]) -> None:
    pressure(make_stack, 1500)


def test_few_descriptors(make_stack: type[Stack]) -> None:
    """With a low limit of open files the mount still walks wide trees and holds files open up to it."""
    stack = make_stack(n_lowers=2)
    for number in range(400):
        (stack.lowers[number % 2] / f"d{number}").mkdir()
        (stack.lowers[number % 2] / f"d{number}" / "f").write_text(str(number))
    m = Layerfs(stack)
    command = ["sh", "-c", 'ulimit -n 128; exec "$@"', "sh", *m.command()]
    m.command = lambda: list(command)  # type: ignore[method-assign]
    with m:
        assert sum(1 for p in m.mnt.glob("*/f") if p.read_text() == p.parent.name[1:]) == 400
        for number in range(400):
            (m.mnt / f"d{number}" / "new").write_text("x")
        assert len(list(m.mnt.glob("*/new"))) == 400
        fds: list[int] = []
        try:
            for number in range(120):
                try:
                    fds.append(os.open(m.mnt / f"d{number}" / "f", os.O_RDONLY))
                except OSError as error:
                    assert error.errno in (23, 24), error  # ENFILE, EMFILE: the daemon's
        finally:
            for fd in fds:
                os.close(fd)
        assert (m.mnt / "d7" / "f").read_text() == "7"
