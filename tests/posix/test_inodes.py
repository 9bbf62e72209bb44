"""Inode numbers: unique, the same before and after copy-up and after remount; link counts; hard links across
copy-up."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any

import pytest

from tests.support import mounts
from tests.support.stack import Dir, File, Hardlink, Node, Stack, Symlink

from .calls import RENAME_EXCHANGE, err, renameat2
from .place import Place, compared, tree


def every(fs: Place, name: str = ".") -> dict[str, os.stat_result]:
    found = {}
    for at, dirs, files in os.walk(fs / name):
        for n in dirs + files:
            found[os.path.relpath(f"{at}/{n}", fs.path)] = os.lstat(f"{at}/{n}")
    return found


def test_unique(fs: Place) -> None:
    objects = every(fs)
    groups: dict[tuple[int, int], set[str]] = {}
    for name, st in objects.items():
        groups.setdefault((st.st_dev, st.st_ino), set()).add(name)
    shared = [g for g in groups.values() if len(g) > 1]
    assert shared == [{"h1", "h2"}]
    assert len({st.st_dev for st in objects.values()}) == 1
    assert all(st.st_ino != 0 for st in objects.values())


def test_unique_over_the_whole_mount(fs: Place) -> None:
    """All test directories of this file at once: they lie in every layer."""
    seen: dict[int, str] = {}
    top = os.path.dirname(fs.path)
    for at, dirs, files in os.walk(top):
        for n in dirs + files:
            st = os.lstat(f"{at}/{n}")
            if stat.S_ISDIR(st.st_mode) or st.st_nlink == 1:
                assert st.st_ino not in seen, (seen[st.st_ino], f"{at}/{n}")
                seen[st.st_ino] = f"{at}/{n}"


CHANGES: dict[str, Callable[[Place, str], Any]] = {
    "chown": lambda fs, n: os.lchown(fs / n, 1, 1),
    "chmod": lambda fs, n: os.path.islink(fs / n) or os.chmod(fs / n, 0o700),
    "utime": lambda fs, n: os.utime(fs / n, ns=(1, 2), follow_symlinks=False),
    "setxattr": lambda fs, n: os.setxattr(fs / n, "trusted.a", b"1", follow_symlinks=False),
    "open for writing": lambda fs, n: os.path.isfile(fs / n) and fs.append(n, b""),
    "write": lambda fs, n: os.path.isfile(fs / n) and fs.append(n, b"x"),
    "link": lambda fs, n: os.path.isdir(fs / n) or os.link(fs / n, fs / f"{n}-link", follow_symlinks=False),
    "rename": lambda fs, n: (os.rename(fs / n, fs / "tmp"), os.rename(fs / "tmp", fs / n)),
    "change below": lambda fs, n: (
        os.path.isdir(fs / n) and not os.path.islink(fs / n) and fs.write(f"{n}/new", b"")
    ),
}
KINDS = [
    "f",
    "d",
    "e",
    "l",
    "lx",
    "fifo",
    "sock",
    "chr",
    "blk",
    "empty",
    "big",
    "x",
    "d/a",
    "d/sub",
    "suid",
]


@pytest.mark.parametrize("change", CHANGES)
def test_stable_across_copy_up(fs: Place, change: str) -> None:
    before = {n: fs.stat(n).st_ino for n in KINDS}
    for name in KINDS:
        CHANGES[change](fs, name)
        assert fs.stat(name).st_ino == before[name], name
    assert {n: fs.stat(n).st_ino for n in KINDS} == before


@pytest.mark.parametrize("change", ["nothing", "chown", "write", "link", "rename", "change below"])
def test_stable_across_remount(fs: Place, change: str) -> None:
    before = {n: fs.stat(n).st_ino for n in KINDS}
    if change != "nothing":
        for name in KINDS:
            CHANGES[change](fs, name)
    if fs.mounted:
        fs.mounted.remount()
    assert {n: fs.stat(n).st_ino for n in KINDS} == before


def test_new_objects_are_stable_across_remount(fs: Place) -> None:
    fs.write("nf", b"x")
    os.mkdir(fs / "nd")
    os.symlink("x", fs / "nl")
    os.mkfifo(fs / "np")
    os.mkdir(fs / "d/n")
    names = ["nf", "nd", "nl", "np", "d/n", "d", "."]
    before = {n: fs.stat(n).st_ino for n in names}
    if fs.mounted:
        fs.mounted.remount()
    assert {n: fs.stat(n).st_ino for n in names} == before


def test_moved_objects_keep_theirs_after_remount(fs: Place) -> None:
    before = {n: fs.stat(n).st_ino for n in ("f", "d", "d/a", "d/sub", "l", "fifo")}
    os.rename(fs / "f", fs / "d/f")
    os.rename(fs / "l", fs / "d/l")
    os.rename(fs / "fifo", fs / "d/sub/fifo")
    os.rename(fs / "d", fs / "e/d")
    after = ["e/d/f", "e/d", "e/d/a", "e/d/sub", "e/d/l", "e/d/sub/fifo"]
    for _ in range(2):
        assert [fs.stat(n).st_ino for n in after] == list(before.values())
        if fs.mounted:
            fs.mounted.remount()


def test_a_new_object_never_takes_a_living_number(fs: Place) -> None:
    """ext4 gives a freed inode number to the next file at once."""
    held = fs.open("f", os.O_RDONLY)
    os.unlink(fs / "f")
    old = os.fstat(held).st_ino
    for i in range(20):
        fs.write(f"n{i}", b"")
    numbers = [fs.stat(f"n{i}").st_ino for i in range(20)]
    assert len(set(numbers)) == 20 and old not in numbers
    assert not set(numbers) & {st.st_ino for n, st in every(fs).items() if n[0] != "n"}


# --- link counts ---


@compared
def test_link_counts(fs: Place) -> object:
    found = [[fs.stat("h1").st_nlink]]
    os.link(fs / "h1", fs / "h3")
    found.append([fs.stat(n).st_nlink for n in ("h1", "h2", "h3")])
    os.unlink(fs / "h1")
    found.append([fs.stat(n).st_nlink for n in ("h2", "h3")])
    os.rename(fs / "f", fs / "h2")
    found.append([fs.stat(n).st_nlink for n in ("h2", "h3")])
    if fs.mounted:
        fs.mounted.remount()
    found.append([fs.stat(n).st_nlink for n in ("h2", "h3")])
    return found


LINKS = {
    "a": File(data=b"content"),
    "d": Dir(),
    "d/b": Hardlink("a"),
    "d/e": Dir(),
    "d/e/c": Hardlink("a"),
    "l": Symlink(target="a"),
    "l2": Hardlink("l"),
    "p": Node(kind=stat.S_IFIFO),
    "p2": Hardlink("p"),
}
NAMES = ["a", "d/b", "d/e/c"]


@tree(LINKS)
@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("change", ["write", "chmod", "chown", "truncate", "setxattr", "utime", "link"])
def test_all_names_stay_linked(fs: Place, first: str, change: str) -> None:
    ino = fs.stat(first).st_ino
    {
        "write": lambda: fs.append(first, b"+"),
        "chmod": lambda: os.chmod(fs / first, 0o600),
        "chown": lambda: os.chown(fs / first, 1, 1),
        "truncate": lambda: os.truncate(fs / first, 3),
        "setxattr": lambda: os.setxattr(fs / first, "user.a", b"1"),
        "utime": lambda: os.utime(fs / first, ns=(1, 2)),
        "link": lambda: os.link(fs / first, fs / "d4"),
    }[change]()
    names = [*NAMES, "d4"] if change == "link" else NAMES
    for again in range(2):
        stats = [fs.stat(n) for n in names]
        assert {(st.st_ino, st.st_nlink) for st in stats} == {(ino, len(names))}
        assert len({(st.st_mode, st.st_uid, st.st_size, st.st_mtime_ns) for st in stats}) == 1
        assert len({fs.read(n) for n in names}) == 1
        assert len({tuple(os.listxattr(fs / n)) for n in names}) == 1
        if fs.mounted and not again and first == "d/b":
            fs.mounted.remount()
    fs.append(names[-1], b"END")
    assert {fs.read(n)[-3:] for n in names} == {b"END"}


@tree(LINKS)
def test_unlink_and_rename_of_linked_names(fs: Place) -> None:
    os.unlink(fs / "d/b")
    assert {fs.stat(n).st_nlink for n in ("a", "d/e/c")} == {2}
    os.rename(fs / "d/e", fs / "moved")
    fs.append("moved/c", b"+")
    assert fs.read("a") == b"content+" and fs.stat("a").st_ino == fs.stat("moved/c").st_ino
    os.rename(fs / "a", fs / "d/b")
    assert fs.read("d/b") == b"content+" and fs.stat("d/b").st_nlink == 2
    os.unlink(fs / "moved/c")
    assert fs.stat("d/b").st_nlink == 1
    if fs.mounted:
        fs.mounted.remount()
    assert (fs.stat("d/b").st_nlink, fs.read("d/b")) == (1, b"content+")


@tree(LINKS)
def test_linked_specials(fs: Place) -> None:
    os.lchown(fs / "l", 5, 5)
    os.chmod(fs / "p2", 0o600)
    for a, b in (("l", "l2"), ("p", "p2")):
        x, y = fs.stat(a), fs.stat(b)
        assert (x.st_ino, x.st_nlink, x.st_uid, x.st_mode) == (y.st_ino, y.st_nlink, y.st_uid, y.st_mode)
        assert x.st_nlink == 2
    assert os.readlink(fs / "l2") == "a"


@tree(LINKS)
def test_exchange_of_linked_names(fs: Place) -> None:
    ino = fs.stat("a").st_ino
    fs.write("n", b"other")
    renameat2(fs / "a", fs / "n", RENAME_EXCHANGE)
    assert fs.read("a") == b"other" and fs.stat("n").st_ino == ino and fs.stat("n").st_nlink == 3
    assert err(renameat2, fs / "n", fs / "d/b", RENAME_EXCHANGE) == ""
    assert {fs.stat(x).st_ino for x in ("n", "d/b", "d/e/c")} == {ino}


@tree(LINKS)
def test_open_descriptor_while_all_names_are_copied_up(fs: Place) -> None:
    fd = fs.open("a", os.O_RDONLY)
    other = fs.open("d/b", os.O_RDONLY)
    fs.append("d/e/c", b"+")
    assert os.pread(fd, 20, 0) == os.pread(other, 20, 0) == b"content+"
    assert os.fstat(fd).st_nlink == os.fstat(other).st_nlink == 3


@tree({"m": Dir(), "m/0": File(data=b"x"), **{f"m/{i}": Hardlink("m/0") for i in range(1, 200)}})
def test_two_hundred_names(fs: Place) -> None:
    fs.append("m/77", b"y")
    assert {fs.read(f"m/{i}") for i in range(200)} == {b"xy"}
    assert {fs.stat(f"m/{i}").st_nlink for i in range(200)} == {200}
    for i in range(100):
        os.unlink(fs / f"m/{i}")
    assert {fs.stat(f"m/{i}").st_nlink for i in range(100, 200)} == {100}


@pytest.mark.parametrize("system", ["kernel", "layerfs"])
def test_link_counts_of_directories(system: str, kernel_overlay: None, make_stack: type[Stack]) -> None:
    """Of a merged directory 1, as everything that walks trees takes for "unknown"; else the real count."""
    stack = make_stack(n_lowers=2)
    for lower in stack.lowers:
        stack.write(lower, {"merged": Dir(), f"merged/{lower.name}": Dir()})
    stack.write(stack.lowers[1], {"single": Dir(), "single/a": Dir(), "single/b": Dir(), "single/f": File()})
    assert stack.upper
    stack.write(stack.upper, {"own": Dir(), "own/a": Dir()})
    m = mounts.KernelOverlay(stack) if system == "kernel" else mounts.Layerfs(stack)
    with m:
        counts = {n: os.stat(m.mnt / n).st_nlink for n in ("merged", "single", "single/a", "own")}
        assert counts == {"merged": 1, "single": 4, "single/a": 2, "own": 3}
        os.chmod(m.mnt / "single", 0o700)
        os.mkdir(m.mnt / "own/b")
        os.rmdir(m.mnt / "own/a")
        assert os.stat(m.mnt / "single").st_nlink == 1, "copied up, it is merged"
        assert os.stat(m.mnt / "own").st_nlink == 3
