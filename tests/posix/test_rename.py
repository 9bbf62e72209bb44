"""rename(2) and renameat2(2): every pair of kinds, flags, subtrees, permissions. Never EXDEV inside one
mount."""

from __future__ import annotations

import os
import stat
from typing import Any

import pytest

from tests.support.stack import Dir, Entry, File, Hardlink, Node, Symlink, Tree

from .calls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, err, listing, renameat2
from .place import OTHER, USER, Place, as_user, compared, people, tree

KINDS = ["f", "h1", "d", "e", "l", "ld", "lx", "fifo", "chr", "nothing"]
FLAGS = {"plain": 0, "noreplace": RENAME_NOREPLACE, "exchange": RENAME_EXCHANGE}


def look(fs: Place, names: list[str]) -> Any:
    """What each name is now: kind, size of non-directories, names of directories."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            st = fs.stat(name)
        except OSError as e:
            found[name] = e.errno
            continue
        is_dir = os.path.isdir(fs / name) and not os.path.islink(fs / name)
        found[name] = oct(st.st_mode), sorted(os.listdir(fs / name)) if is_dir else st.st_size
    return found


def _kind(kind: str, at: str) -> Tree:
    """An entry of that kind at that path; "nothing" is none."""
    made: dict[str, Tree] = {
        "f": {at: File(data=b"content of " + at.encode())},
        "h1": {at: File(data=b"linked"), f"{at}-other": Hardlink(at)},
        "d": {at: Dir(mode=0o711), f"{at}/a": File(data=b"in it")},
        "e": {at: Dir(mode=0o700)},
        "l": {at: Symlink(target="f")},
        "ld": {at: Symlink(target="d")},
        "lx": {at: Symlink(target="nowhere")},
        "fifo": {at: Node(kind=stat.S_IFIFO)},
        "chr": {at: Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 3))},
        "nothing": {},
    }
    return made[kind]


PAIRS: dict[str | bytes, Entry] = {}
for _old in KINDS:
    for _new in KINDS:
        PAIRS |= {
            f"{_old}-{_new}": Dir(),
            **_kind(_old, f"{_old}-{_new}/old"),
            **_kind(_new, f"{_old}-{_new}/new"),
        }


@pytest.mark.parametrize("how", FLAGS)
@tree(PAIRS)
@compared
def test_every_pair(fs: Place, how: str) -> object:
    """Every kind onto every kind, each pair in a directory of its own."""
    found: dict[str, Any] = {}
    for pair in (f"{old}-{new}" for old in KINDS for new in KINDS):
        a, b = f"{pair}/old", f"{pair}/new"
        found[pair] = err(renameat2, fs / a, fs / b, FLAGS[how]), look(fs, [a, b]), fs.names(pair)
    return found


@compared
def test_rename_keeps_everything(fs: Place) -> object:
    found = []
    for name in ("f", "big", "empty", "sparse", "l", "fifo", "sock", "chr", "suid", "x", "h1", "d", "e"):
        before = fs.stat(name)
        os.rename(fs / name, fs / "moved")
        after = fs.stat("moved")
        keep = ("st_mode", "st_uid", "st_gid", "st_rdev", "st_mtime_ns")
        assert [getattr(before, k) for k in keep] == [getattr(after, k) for k in keep], name
        assert before.st_ino == after.st_ino, name
        xattrs = os.listxattr(fs / "moved", follow_symlinks=False)
        found.append(
            (name, sorted(xattrs), fs.names("moved") if name in "de" else (after.st_size, after.st_nlink))
        )
        os.rename(fs / "moved", fs / name)
    return found, fs.names()


TREE: Tree = {
    "d": Dir(mode=0o751),
    "d/a": File(data=b"a"),
    "d/s": Dir(),
    "d/s/b": File(data=b"b"),
    "d/s/t": Dir(),
    "d/s/t/c": File(data=b"c"),
    "d/l": Symlink(target="s/t/c"),
    "o": Dir(),
    "o/k": File(data=b"k"),
    "p": Dir(),
    "f": File(data=b"f"),
}


def whole(fs: Place, name: str = ".") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for at, dirs, files in os.walk(fs / name):
        for n in sorted(dirs):
            found.append((os.path.relpath(f"{at}/{n}", fs.path), "dir"))
        for n in sorted(files):
            p = f"{at}/{n}"
            rel = os.path.relpath(p, fs.path)
            found.append((rel, os.readlink(p) if os.path.islink(p) else fs.read(rel)))
    return sorted(found)


@tree(TREE)
@compared
def test_directory_moves_with_everything_below(fs: Place) -> object:
    os.rename(fs / "d", fs / "o/moved")
    first = whole(fs)
    os.rename(fs / "o/moved/s", fs / "p/s2")
    os.rename(fs / "o", fs / "p/s2/o")
    return first, whole(fs)


@tree(TREE)
@compared
def test_directory_moved_away_and_made_again(fs: Place) -> object:
    os.rename(fs / "d", fs / "d2")
    os.mkdir(fs / "d")
    fs.write("d/a", b"other")
    first = whole(fs)
    os.rename(fs / "d2/s", fs / "d/s")
    os.rename(fs / "d", fs / "d3")
    return first, whole(fs)


@tree(TREE)
@compared
def test_many_renames_of_one_directory(fs: Place) -> object:
    at = "d"
    for i in range(20):
        to = f"o/x{i}" if i % 2 else f"x{i}"
        os.rename(fs / at, fs / to)
        fs.write(f"{to}/n{i}", b"%d" % i)
        at = to
    os.rename(fs / at, fs / "d")
    return whole(fs)


@tree(TREE)
@compared
def test_changes_below_a_moved_directory(fs: Place) -> object:
    os.rename(fs / "d", fs / "m")
    fs.append("m/a", b"+")
    os.unlink(fs / "m/s/b")
    fs.write("m/s/b2", b"new")
    os.rename(fs / "m/s/t/c", fs / "c")
    os.rmdir(fs / "m/s/t")
    os.mkdir(fs / "m/s/t")
    os.rename(fs / "f", fs / "m/s/t/f")
    return whole(fs)


@tree(TREE)
@compared
def test_moved_survives_remount(fs: Place) -> object:
    os.rename(fs / "d", fs / "o/m")
    os.rename(fs / "o/m/s", fs / "s")
    os.rename(fs / "f", fs / "o/m/f")
    os.rename(fs / "o", fs / "d")
    if fs.mounted:
        fs.mounted.remount()
    return whole(fs)


@tree(TREE)
@compared
def test_exchange_of_directories_survives_remount(fs: Place) -> object:
    renameat2(fs / "d", fs / "o", RENAME_EXCHANGE)
    renameat2(fs / "o/s", fs / "f", RENAME_EXCHANGE)
    before = whole(fs)
    if fs.mounted:
        fs.mounted.remount()
    assert whole(fs) == before
    return before


@tree(TREE)
@compared
def test_exchange_between_parent_levels(fs: Place) -> object:
    found = [
        err(renameat2, fs / "d", fs / "d/s", RENAME_EXCHANGE),
        err(renameat2, fs / "d/s/t", fs / "d", RENAME_EXCHANGE),
        err(renameat2, fs / "d/s/t", fs / "o/k", RENAME_EXCHANGE),
        err(renameat2, fs / "d/a", fs / "p", RENAME_EXCHANGE),
        err(renameat2, fs / "f", fs / "f", RENAME_EXCHANGE),
        err(renameat2, fs / "f", fs / "nothing", RENAME_EXCHANGE),
        err(renameat2, fs / "nothing", fs / "f", RENAME_EXCHANGE),
    ]
    return found, whole(fs)


@tree(TREE)
@compared
def test_into_itself(fs: Place) -> object:
    pairs = [
        ("d", "d/x"),
        ("d", "d/s/x"),
        ("d", "d/s"),
        ("d/s", "d"),
        ("d/s/t", "d"),
        ("d", "d"),
        ("d/s", "d/s/t/x"),
        ("f", "f"),
    ]
    return [(a, b, err(os.rename, fs / a, fs / b)) for a, b in pairs], whole(fs)


@tree(TREE)
@compared
def test_trailing_slashes(fs: Place) -> object:
    pairs = [("f", "n/"), ("f/", "n"), ("d/", "n"), ("n", "m/"), ("p", "o/"), ("p/", "q/"), ("f", "q/")]
    return [(a, b, err(os.rename, fs / a, fs / b)) for a, b in pairs], whole(fs)


@tree(TREE)
def test_onto_a_directory_that_only_looks_full(fs: Place) -> None:
    """A directory emptied through the mount may be replaced, whatever its layers still hold."""
    assert err(os.rename, fs / "p", fs / "o") == "ENOTEMPTY"
    os.unlink(fs / "o/k")
    os.rename(fs / "d", fs / "o")
    assert fs.names("o") == ["a", "l", "s"] and fs.read("o/s/b") == b"b"
    assert fs.names() == ["f", "o", "p"]
    assert fs.mode("o") == 0o751


@tree(TREE)
def test_emptied_directory_moves_empty(fs: Place) -> None:
    os.unlink(fs / "o/k")
    os.rename(fs / "o", fs / "q")
    assert fs.names("q") == [] and "o" not in fs.names()
    os.mkdir(fs / "o")
    assert fs.names("o") == []
    os.rmdir(fs / "q")
    assert fs.names() == ["d", "f", "o", "p"]


def test_invalid_flags(fs: Place) -> None:
    assert err(renameat2, fs / "f", fs / "n", RENAME_NOREPLACE | RENAME_EXCHANGE) == "EINVAL"
    assert err(renameat2, fs / "f", fs / "n", 1 << 10) == "EINVAL"
    assert err(renameat2, fs / "f", fs / "n", RENAME_EXCHANGE | RENAME_WHITEOUT) == "EINVAL"
    assert fs.names().count("n") == 0 and fs.read("f") == b"hello world\n"


def test_across_file_systems(fs: Place) -> None:
    assert err(os.rename, "/dev/null", fs / "n") == "EXDEV"
    assert err(os.rename, fs / "f", "/dev/layerfs-test-n") == "EXDEV"
    assert fs.read("f") == b"hello world\n"


def test_two_names_of_one_file(fs: Place) -> None:
    """POSIX: when both are links to the same file, nothing happens."""
    os.rename(fs / "h1", fs / "h2")
    assert "h1" in fs.names() and "h2" in fs.names()
    assert fs.stat("h1").st_nlink == 2
    assert err(renameat2, fs / "h1", fs / "h2", RENAME_NOREPLACE) == "EEXIST"


def test_replacing_a_name_drops_its_link_count(fs: Place) -> None:
    fd = fs.open("h1", os.O_RDONLY)
    os.rename(fs / "f", fs / "h1")
    assert fs.read("h1") == b"hello world\n" and fs.read("h2") == b"linked\n"
    assert fs.stat("h2").st_nlink == 1 and os.fstat(fd).st_nlink == 1
    assert os.read(fd, 100) == b"linked\n"


def test_replaced_file_lives_on_in_its_descriptor(fs: Place) -> None:
    fd = fs.open("f", os.O_RDWR)
    os.rename(fs / "f2", fs / "f")
    assert os.fstat(fd).st_nlink == 0
    os.write(fd, b"HELLO")
    assert os.pread(fd, 100, 0) == b"HELLO world\n" and fs.read("f") == b"second\n"


def test_dot_dot_follows_a_moved_directory(fs: Place) -> None:
    fd = fs.open("d/sub", os.O_RDONLY)
    os.rename(fs / "d/sub", fs / "e/sub")
    assert os.stat("..", dir_fd=fd).st_ino == fs.stat("e").st_ino
    assert sorted(d.ino for d in listing(fs / "e/sub") if d.name == b"..") == [fs.stat("e").st_ino]
    os.rename(fs / "e", fs / "d/e")
    assert os.stat("../..", dir_fd=fd).st_ino == fs.stat("d").st_ino


def test_open_directory_keeps_working_after_its_move(fs: Place) -> None:
    fd = fs.open("d", os.O_RDONLY)
    os.rename(fs / "d", fs / "e/d")
    assert sorted(os.listdir(fd)) == ["a", "b", "sub"]
    os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.unlink("a", dir_fd=fd)
    assert fs.names("e/d") == ["b", "new", "sub"]
    assert os.readlink(f"/proc/self/fd/{fd}") == fs / "e/d"


@people
@pytest.mark.parametrize("uid", [USER, OTHER])
@compared
def test_permission(fs: Place, uid: int) -> object:
    pairs = [
        ("f", "n"), ("f", "open/n"), ("open/f", "n"), ("open/f", "open/n1"), ("open/theirs", "open/n2"),
        ("sticky/mine", "sticky/n1"), ("sticky/theirs", "open/n3"), ("open/mine", "sticky/theirs"),
        ("closed/f", "open/n4"),
        ("open/mydir", "sticky/n5"), ("sticky/mydir", "open/n6"), ("sticky/theirdir", "open/n7"),
        ("noexec/f", "open/n8"),
        ("open/n1", "closed/n"), ("e", "open/n9"), ("d", "open/n10"),
    ]  # fmt: skip
    return [
        (a, b, as_user(lambda a=a, b=b: err(os.rename, fs / a, fs / b), uid)) for a, b in pairs
    ], fs.names("open")


@people
@compared
def test_moving_anothers_directory_needs_write_on_it(fs: Place) -> object:
    """Changing `..` of a directory needs write permission on the directory itself; renaming in place does
    not."""
    os.mkdir(fs / "open/sub", 0o777)
    os.chmod(fs / "open/sub", 0o777)
    os.mkdir(fs / "open/roots", 0o755)
    return as_user(
        lambda: [
            err(os.rename, fs / "open/roots", fs / "open/sub/r"),
            err(os.rename, fs / "open/roots", fs / "open/r"),
        ]
    )


@pytest.mark.parametrize("flags", [0, RENAME_NOREPLACE])
def test_long_names(fs: Place, flags: int) -> None:
    name = "n" * 255
    renameat2(fs / "d", fs / name, flags)
    renameat2(fs / name, fs / ("m" * 255), flags)
    renameat2(fs / ("m" * 255), fs / f"e/{name}", flags)
    assert fs.names(f"e/{name}") == ["a", "b", "sub"]
    if fs.mounted:
        fs.mounted.remount()
    assert fs.names(f"e/{name}") == ["a", "b", "sub"]
    assert fs.read(f"e/{name}/sub/c") == b"deep\n"


@tree({f"{n}{i}": File(data=b"%d" % i) for n in "ab" for i in range(8)})
def test_swap_by_three_renames(fs: Place) -> None:
    for i in range(8):
        os.rename(fs / f"a{i}", fs / "tmp")
        os.rename(fs / f"b{(i + 1) % 8}", fs / f"a{i}")
        os.rename(fs / "tmp", fs / f"b{(i + 1) % 8}")
    assert [fs.read(f"a{i}") for i in range(8)] == [b"%d" % ((i + 1) % 8) for i in range(8)]
    assert len(fs.names()) == 16


def test_save_as_editors_do(fs: Place) -> None:
    for i in range(5):
        fs.write("f.tmp", b"version %d" % i)
        os.chmod(fs / "f.tmp", fs.mode("f"))
        os.rename(fs / "f.tmp", fs / "f")
        assert fs.read("f") == b"version %d" % i
    os.rename(fs / "f", fs / "f~")
    fs.write("f", b"new")
    assert (fs.read("f"), fs.read("f~")) == (b"new", b"version 4")
