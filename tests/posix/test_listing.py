"""Reading directories: d_type, d_ino, `.` and `..`, offsets, listings while names come and go, large
directories."""

from __future__ import annotations

import os
import shutil
import stat

import pytest

from tests.support.stack import Dir, File

from .calls import err, getdents, listing
from .place import Place, compared, tree


def by_name(path: str, size: int = 32768) -> dict[bytes, tuple[int, int]]:
    found = listing(path, size)
    assert len({d.name for d in found}) == len(found), "a name stands twice in one listing"
    return {d.name: (d.ino, d.kind) for d in found}


@pytest.mark.parametrize("touched", [False, True], ids=["fresh", "stat first"])
def test_type_and_inode_agree_with_lstat(fs: Place, touched: bool) -> None:
    for where in (".", "d", "d/sub", "e"):
        if touched:
            for name in fs.names(where):
                fs.stat(f"{where}/{name}")
        for name, (ino, kind) in by_name(fs / where).items():
            st = os.lstat(fs.raw(os.fsencode(where) + b"/" + name))
            assert ino == st.st_ino, (where, name)
            assert kind in (0, stat.S_IFMT(st.st_mode) >> 12), (where, name)


def test_inode_in_listing_after_changes(fs: Place) -> None:
    for name in ("f", "d/a", "x", "h1"):
        fs.append(name, b"!")
    os.chmod(fs / "f2", 0o600)
    os.rename(fs / "big", fs / "d/big")
    os.rename(fs / "d2", fs / "d/d2")
    os.unlink(fs / "d/b")
    fs.write("d/b", b"new")
    for where in (".", "d", "d/d2"):
        for name, (ino, _) in by_name(fs / where).items():
            assert ino == os.lstat(fs.raw(os.fsencode(where) + b"/" + name)).st_ino, (where, name)


def test_dot_and_dot_dot(fs: Place) -> None:
    for where in (".", "d", "d/sub", "e"):
        found = by_name(fs / where)
        assert found[b"."][0] == os.stat(fs / where).st_ino
        assert found[b".."][0] == os.stat(fs / f"{where}/..").st_ino
        assert found[b"."][1] in (0, 4) and found[b".."][1] in (0, 4)


@pytest.mark.parametrize("size", [64, 300, 1 << 20])
def test_buffer_sizes(fs: Place, size: int) -> None:
    assert sorted(by_name(fs.path, size)) == sorted([b".", b"..", *map(os.fsencode, fs.names())])


def test_buffer_too_small(fs: Place) -> None:
    fd = fs.open("d", os.O_RDONLY)
    assert err(getdents, fd, 10) == "EINVAL"
    found = 0
    while part := getdents(fd):
        found += len(part)
    assert found == 5


@compared
def test_listing_errors(fs: Place) -> object:
    fd = fs.open("f", os.O_RDONLY)
    path = fs.open("d", os.O_PATH)
    return err(getdents, fd), err(getdents, path), err(os.listdir, fs / "f"), err(os.listdir, fs / "nothing")


def test_rewind_sees_changes(fs: Place) -> None:
    fd = fs.open("d", os.O_RDONLY)

    def names() -> list[bytes]:
        os.lseek(fd, 0, os.SEEK_SET)
        found = []
        while part := getdents(fd):
            found += [d.name for d in part]
        return sorted(found)

    assert names() == [b".", b"..", b"a", b"b", b"sub"]
    fs.write("d/n", b"")
    os.unlink(fs / "d/a")
    assert names() == [b".", b"..", b"b", b"n", b"sub"]
    os.rename(fs / "d/n", fs / "d/m")
    os.mkdir(fs / "d/a")
    assert names() == [b".", b"..", b"a", b"b", b"m", b"sub"]


def test_a_removed_directory_lists_empty(fs: Place) -> None:
    fd = fs.open("e", os.O_RDONLY)
    os.rmdir(fs / "e")
    assert err(getdents, fd) in ("", "ENOENT")
    assert err(os.open, "x", os.O_CREAT | os.O_WRONLY, dir_fd=fd) == "ENOENT"


MANY = 300


@tree({"m": Dir(), **{f"m/{i:04}": File() for i in range(MANY)}})
def test_every_offset_continues_where_it_was(fs: Place) -> None:
    """telldir and seekdir: going back to d_off of an entry gives exactly what followed it."""
    fd = fs.open("m", os.O_RDONLY)
    whole = []
    while part := getdents(fd, 1000):
        whole += part
    assert len(whole) == MANY + 2
    for i in (0, 1, 2, 50, 151, MANY, MANY + 1):
        os.lseek(fd, whole[i].off, os.SEEK_SET)
        rest = []
        while part := getdents(fd, 1000):
            rest += part
        assert [d.name for d in rest] == [d.name for d in whole[i + 1 :]], i


@tree({"m": Dir(), **{f"m/{i:04}": File() for i in range(MANY)}})
def test_offsets_survive_removal_and_creation(fs: Place) -> None:
    """Entries that stay are returned once and only once, whatever happens to the others."""
    fd = fs.open("m", os.O_RDONLY)
    seen = [d.name for d in getdents(fd, 1000)]
    gone = [n for n in seen if n not in (b".", b"..")]
    for name in gone:
        os.unlink(fs.raw(b"m/" + name))
    for i in range(100):
        fs.write(f"m/new{i}", b"")
    rest = []
    while part := getdents(fd, 1000):
        rest += [d.name for d in part]
    assert not set(rest) & set(gone)
    old = [n for n in rest if not n.startswith(b"new") and n not in (b".", b"..")]
    assert sorted(old) == sorted({b"%04d" % i for i in range(MANY)} - set(gone))
    assert len(set(rest)) == len(rest)


@tree({"m": Dir(), **{f"m/{i:04}": File() for i in range(MANY)}})
def test_two_listings_at_once(fs: Place) -> None:
    a, b = fs.open("m", os.O_RDONLY), fs.open("m", os.O_RDONLY)
    left, right = [], []
    while True:
        p, q = getdents(a, 500), getdents(b, 900)
        left += [d.name for d in p]
        right += [d.name for d in q]
        if not p and not q:
            break
    assert sorted(left) == sorted(right) and len(left) == MANY + 2


@tree({"m": Dir(), **{f"m/{i:04}": File() for i in range(MANY)}})
def test_remove_while_listing_loses_none(fs: Place) -> None:
    fd = fs.open("m", os.O_RDONLY)
    while part := getdents(fd, 400):
        for d in part:
            if d.name not in (b".", b".."):
                os.unlink(d.name, dir_fd=fd)
    assert os.listdir(fs / "m") == []
    os.rmdir(fs / "m")


TWENTY_THOUSAND = 20_000


@tree({"m": Dir(), **{f"m/name-{i:05}": File() for i in range(TWENTY_THOUSAND)}})
def test_twenty_thousand_names(fs: Place) -> None:
    """All are listed once; `rm -r` that lists while it removes leaves none."""
    found = [d.name for d in listing(fs / "m")]
    assert len(found) == len(set(found)) == TWENTY_THOUSAND + 2
    for i in range(0, TWENTY_THOUSAND, 1000):
        os.rename(fs / f"m/name-{i:05}", fs / f"m/moved-{i:05}")
    assert len(os.listdir(fs / "m")) == TWENTY_THOUSAND
    shutil.rmtree(fs / "m")
    assert not os.path.exists(fs / "m")


@pytest.mark.parametrize("tool", ["rm -r", "find -delete"])
@tree({"m": Dir(), **{f"m/{i % 7}/{i:04}": File() for i in range(1000)}})
def test_real_tools_remove_everything(fs: Place, tool: str) -> None:
    import subprocess

    command = ["rm", "-r", fs / "m"] if tool == "rm -r" else ["find", fs / "m", "-delete"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert fs.names() == []


def test_scandir_types(fs: Place) -> None:
    for e in os.scandir(fs.path):
        st = os.lstat(e.path)
        assert e.is_dir(follow_symlinks=False) == stat.S_ISDIR(st.st_mode)
        assert e.is_symlink() == stat.S_ISLNK(st.st_mode)
        assert e.inode() == st.st_ino


@tree({"m": Dir()})
def test_directory_grows_and_shrinks(fs: Place) -> None:
    for i in range(500):
        fs.write(f"m/{i}", b"")
        if i % 100 == 0:
            assert len(fs.names("m")) == i + 1
    for i in range(0, 500, 2):
        os.unlink(fs / f"m/{i}")
    assert fs.names("m") == sorted(str(i) for i in range(1, 500, 2))
