"""Making and removing names: mkdir, rmdir, unlink, link, symlink, readlink, mknod; what a name may be."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.stack import Dir, File, Symlink

from .calls import AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_FOLLOW, err, linkat, listing
from .place import OTHER, USER, Place, as_user, compared, only, people, tree

EVERY = [
    "f",
    "d",
    "e",
    "l",
    "ld",
    "lx",
    "loop",
    "h1",
    "fifo",
    "sock",
    "chr",
    "nothing",
    "f/x",
    "nothing/x",
    "d/a",
    "d/sub",
]

CALLS: dict[str, Callable[[str], Any]] = {
    "mkdir": os.mkdir,
    "rmdir": os.rmdir,
    "unlink": os.unlink,
    "readlink": os.readlink,
    "symlink": lambda p: os.symlink("target", p),
    "mkfifo": os.mkfifo,
    "link to": lambda p: os.link(os.path.dirname(p) + "/f2", p),
    "link from": lambda p: os.link(p, os.path.dirname(p.rstrip("/")) + "/new", follow_symlinks=False),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("tail", ["", "/"])
@compared
def test_errors(fs: Place, call: str, tail: str) -> object:
    got = [(name, err(CALLS[call], fs / name + tail)) for name in EVERY]
    return got, fs.names(), fs.names("d") if os.path.exists(fs / "d") else None


@pytest.mark.parametrize("name", [".", "..", "d/.", "d/..", "e/.", "d/sub/.."])
@compared
def test_dot_names(fs: Place, name: str) -> object:
    return [
        err(os.rmdir, fs / name),
        err(os.unlink, fs / name),
        err(os.mkdir, fs / name),
        err(os.rename, fs / name, fs / "new"),
        err(os.rename, fs / "e2", fs / name),
        fs.names(),
    ]


def test_mkdir(fs: Place) -> None:
    os.mkdir(fs / "n", 0o751)
    st = fs.stat("n")
    assert stat.S_ISDIR(st.st_mode) and fs.mode("n") == 0o751
    assert (st.st_uid, st.st_gid) == (0, 0)
    assert fs.names("n") == []
    assert sorted(d.name for d in listing(fs / "n")) == [b".", b".."]
    assert os.stat(fs / "n/..").st_ino == os.stat(fs.path).st_ino


@compared
def test_nlink_of_new_directories(fs: Place) -> object:
    """A directory that lives in one layer has its real count."""
    os.mkdir(fs / "n")
    counts = [fs.stat("n").st_nlink]
    os.mkdir(fs / "n/a")
    os.mkdir(fs / "n/b")
    counts.append(fs.stat("n").st_nlink)
    os.rmdir(fs / "n/a")
    counts.append(fs.stat("n").st_nlink)
    return counts


def test_rmdir(fs: Place) -> None:
    os.rmdir(fs / "e")
    assert "e" not in fs.names() and err(os.stat, fs / "e") == "ENOENT"
    assert err(os.rmdir, fs / "d") == "ENOTEMPTY"
    for name in ("a", "b", "sub/c", "sub/l"):
        os.unlink(fs / f"d/{name}")
    os.rmdir(fs / "d/sub")
    assert fs.names("d") == []
    os.rmdir(fs / "d")
    assert "d" not in fs.names()


@pytest.mark.parametrize("name", ["d", "d2", "e"])
def test_remove_and_make_again_is_empty(fs: Place, name: str) -> None:
    """Nothing of the removed directory may come back."""
    for _ in range(3):
        for at, dirs, files in os.walk(fs / name, topdown=False):
            for f in files:
                os.unlink(f"{at}/{f}")
            for d in dirs:
                (os.unlink if os.path.islink(f"{at}/{d}") else os.rmdir)(f"{at}/{d}")
        os.rmdir(fs / name)
        os.mkdir(fs / name, 0o711)
        assert fs.names(name) == [] and fs.mode(name) == 0o711
        os.mkdir(fs / f"{name}/sub")
        fs.write(f"{name}/a", b"new")
        assert fs.names(name) == ["a", "sub"] and fs.names(f"{name}/sub") == []
        assert fs.read(f"{name}/a") == b"new"


@pytest.mark.parametrize("name", ["f", "l", "lx", "fifo", "sock", "chr", "blk", "h1", "empty", "big"])
def test_unlink_then_make_again(fs: Place, name: str) -> None:
    os.unlink(fs / name)
    assert name not in fs.names()
    assert (
        err(os.lstat, fs / name)
        == err(os.open, fs / name, os.O_RDONLY)
        == err(os.unlink, fs / name)
        == "ENOENT"
    )
    fs.write(name, b"again")
    assert fs.read(name) == b"again" and fs.mode(name) == 0o644 and name in fs.names()
    os.unlink(fs / name)
    os.mkdir(fs / name)
    assert fs.names(name) == []
    os.rmdir(fs / name)
    os.symlink("d", fs / name)
    assert fs.names(name) == ["a", "b", "sub"]


@pytest.mark.parametrize("name", ["f", "l", "fifo", "sock", "chr", "h1", "empty"])
def test_directory_in_place_of(fs: Place, name: str) -> None:
    os.unlink(fs / name)
    os.mkdir(fs / name)
    assert fs.names(name) == []
    fs.write(f"{name}/x", b"1")
    assert fs.names(name) == ["x"]


def test_removing_everything_leaves_nothing(fs: Place) -> None:
    import shutil

    for name in fs.names():
        path = fs / name
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    assert fs.names() == []
    os.rmdir(fs.path)
    assert err(os.stat, fs.path) == "ENOENT"


# --- link ---


@pytest.mark.parametrize("name", ["f", "h1", "fifo", "sock", "chr", "l", "lx", "empty", "d/a", "x"])
@compared
def test_link(fs: Place, name: str) -> object:
    before = fs.stat(name)
    os.link(fs / name, fs / "n", follow_symlinks=False)
    old, new = fs.stat(name), fs.stat("n")
    assert old.st_ino == new.st_ino
    assert (old.st_mode, old.st_uid, old.st_gid, old.st_size, old.st_mtime_ns, old.st_rdev) == (
        before.st_mode, before.st_uid, before.st_gid, before.st_size, before.st_mtime_ns, before.st_rdev,
    )  # fmt: skip
    os.unlink(fs / name)
    return old.st_nlink, new.st_nlink, fs.stat("n").st_nlink, fs.names()


def test_all_names_see_a_write(fs: Place) -> None:
    os.link(fs / "h1", fs / "d/h3")
    fs.append("h2", b"more\n")
    assert fs.read("h1") == fs.read("h2") == fs.read("d/h3") == b"linked\nmore\n"
    assert {fs.stat(n).st_ino for n in ("h1", "h2", "d/h3")} == {fs.stat("h1").st_ino}
    assert {fs.stat(n).st_nlink for n in ("h1", "h2", "d/h3")} == {3}
    os.chmod(fs / "d/h3", 0o600)
    assert fs.mode("h1") == fs.mode("h2") == 0o600


def test_link_follows_only_when_asked(fs: Place) -> None:
    linkat(AT_FDCWD, fs / "l", fs / "n1", AT_SYMLINK_FOLLOW)
    linkat(AT_FDCWD, fs / "l", fs / "n2", 0)
    assert stat.S_ISREG(fs.stat("n1").st_mode) and fs.stat("n1").st_ino == fs.stat("f").st_ino
    assert stat.S_ISLNK(fs.stat("n2").st_mode) and fs.stat("n2").st_ino == fs.stat("l").st_ino


def test_link_by_descriptor(fs: Place) -> None:
    fd = fs.open("f", os.O_PATH)
    linkat(fd, "", fs / "n", AT_EMPTY_PATH)
    assert fs.stat("n").st_ino == fs.stat("f").st_ino and fs.stat("f").st_nlink == 2


def test_a_file_without_names_cannot_be_linked(fs: Place) -> None:
    fd = fs.open("f", os.O_RDONLY)
    os.unlink(fs / "f")
    assert err(linkat, fd, "", fs / "n", AT_EMPTY_PATH) == "ENOENT"


def test_no_links_to_directories_or_across_file_systems(fs: Place) -> None:
    assert err(os.link, fs / "d", fs / "n") == "EPERM"
    assert err(os.link, "/dev/null", fs / "n") == "EXDEV"


# --- symlink ---


@pytest.mark.parametrize(
    "target", [b"x", b"/", b"a/b/../c", b"\xff\xfe\x01", b"t" * 255, b"t/" * 2047 + b"x"]
)
def test_symlink_keeps_its_target(fs: Place, target: bytes) -> None:
    os.symlink(target, fs.raw(b"n"))
    assert os.readlink(fs.raw(b"n")) == target
    st = fs.stat("n")
    assert st.st_size == len(target) and stat.S_IMODE(st.st_mode) == 0o777 and stat.S_ISLNK(st.st_mode)


def test_symlink_limits(fs: Place) -> None:
    assert err(os.symlink, "", fs / "n") == "ENOENT"
    assert err(os.symlink, "t" * 4096, fs / "n") == "ENAMETOOLONG"
    assert "n" not in fs.names()


def test_symlinks_resolve(fs: Place) -> None:
    assert fs.read("l") == b"hello world\n"
    assert fs.read("ld/sub/l") == b"in d/a\n"
    assert err(os.stat, fs / "loop") == "ELOOP" and err(os.open, fs / "loop/x", os.O_RDONLY) == "ELOOP"
    assert err(os.stat, fs / "lx") == "ENOENT"
    os.symlink(fs / "d", fs / "abs")
    assert fs.read("abs/a") == b"in d/a\n"


def test_forty_symlinks_resolve_and_one_more_does_not(fs: Place) -> None:
    os.symlink("f", fs / "s0")
    for i in range(1, 45):
        os.symlink(f"s{i - 1}", fs / f"s{i}")
    assert err(os.stat, fs / "s39") == ""
    assert err(os.stat, fs / "s40") == "ELOOP"


def test_readlink_truncates_to_the_buffer(fs: Place) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    os.symlink("abcdef", fs / "n")
    buf = ctypes.create_string_buffer(b"-" * 8, 8)
    assert libc.readlink(os.fsencode(fs / "n"), buf, 3) == 3 and buf.raw == b"abc-----"


# --- mknod ---


@only("f")
@pytest.mark.parametrize(
    ("kind", "rdev"),
    [
        (stat.S_IFIFO, 0),
        (stat.S_IFSOCK, 0),
        (stat.S_IFREG, 0),
        (stat.S_IFCHR, os.makedev(1, 3)),
        (stat.S_IFCHR, os.makedev(4095, 1048575)),
        (stat.S_IFBLK, os.makedev(7, 1)),
        (stat.S_IFBLK, os.makedev(0, 0)),
    ],
)
def test_mknod(fs: Place, kind: int, rdev: int) -> None:
    os.mknod(fs / "n", kind | 0o640, rdev)
    st = fs.stat("n")
    assert stat.S_IFMT(st.st_mode) == kind and fs.mode("n") == 0o640
    assert (st.st_rdev, st.st_size, st.st_nlink) == (rdev, 0, 1)
    assert err(os.mknod, fs / "n", kind | 0o600, rdev) == "EEXIST"
    os.unlink(fs / "n")
    assert "n" not in fs.names()


def test_whiteout_device_cannot_be_made_by_a_user_of_the_mount(fs: Place) -> None:
    """char 0/0 is a whiteout in an upper directory: through a mount that would be a name that vanishes.

    A plain directory makes it; overlay file systems refuse it (kernel overlayfs: EPERM).
    """
    got = err(os.mknod, fs / "n", stat.S_IFCHR | 0o600, 0)
    assert got == ("" if fs.system == "plain" else "EPERM")


def test_devices_need_privilege(fs: Place) -> None:
    os.mkdir(fs / "w", 0o777)
    os.chmod(fs / "w", 0o777)
    assert as_user(lambda: err(os.mknod, fs / "w/c", stat.S_IFCHR | 0o600, os.makedev(1, 3))) == "EPERM"
    assert as_user(lambda: err(os.mknod, fs / "w/b", stat.S_IFBLK | 0o600, os.makedev(7, 1))) == "EPERM"
    assert as_user(lambda: err(os.mknod, fs / "w/p", stat.S_IFIFO | 0o600)) == ""
    assert as_user(lambda: err(os.mknod, fs / "w/s", stat.S_IFSOCK | 0o600)) == ""


def test_unix_sockets_work(fs: Place) -> None:
    cwd = os.getcwd()
    os.chdir(fs / "e")  # sun_path is short
    try:
        server, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        server.bind("s")
        server.listen()
        assert stat.S_ISSOCK(os.lstat("s").st_mode)
        client.connect("s")
        peer, _ = server.accept()
        client.sendall(b"hi")
        assert peer.recv(10) == b"hi"
        for s in (server, client, peer):
            s.close()
        assert err(socket.socket(socket.AF_UNIX).bind, "s") == "EADDRINUSE"
        assert err(socket.socket(socket.AF_UNIX).connect, "s") == "ECONNREFUSED"
    finally:
        os.chdir(cwd)


# --- permissions and sticky directories ---

TARGETS = ["n", "closed/n", "noexec/n", "open/n", "open/mydir/n", "sticky/n"]
VICTIMS = [
    "f", "closed/f", "noexec/f", "open/f", "open/theirs", "open/mydir/k", "sticky/mine", "sticky/theirs",
    "sticky/theirdir", "sticky/mydir", "e",
]  # fmt: skip


@people
@pytest.mark.parametrize("call", ["mkdir", "symlink", "mkfifo"])
@compared
def test_permission_to_make(fs: Place, call: str) -> object:
    return [(name, as_user(lambda name=name: err(CALLS[call], fs / name))) for name in TARGETS]


@people
@pytest.mark.parametrize("call", ["unlink", "rmdir"])
@pytest.mark.parametrize("uid", [USER, OTHER])
@compared
def test_permission_to_remove(fs: Place, call: str, uid: int) -> object:
    return [(name, as_user(lambda name=name: err(CALLS[call], fs / name), uid)) for name in VICTIMS]


@people
@compared
def test_owner_of_a_sticky_directory_may_remove(fs: Place) -> object:
    os.chown(fs / "sticky", USER, USER)
    return [as_user(lambda n=n: err(os.unlink, fs / f"sticky/{n}")) for n in ("mine", "theirs")], fs.names(
        "sticky"
    )


@people
def test_protected_hardlinks(fs: Place) -> None:
    with open("/proc/sys/fs/protected_hardlinks") as f:
        protected = int(f.read())
    assert as_user(lambda: err(os.link, fs / "open/mine", fs / "open/n1")) == ""
    assert as_user(lambda: err(os.link, fs / "open/theirs", fs / "open/n2")) == ("EPERM" if protected else "")


@people
@compared
def test_search_permission_on_the_way(fs: Place) -> object:
    calls = [os.stat, os.lstat, os.listdir, os.readlink, os.unlink, os.rmdir, os.mkdir, os.mkfifo]
    return as_user(
        lambda: [
            [err(c, fs / n) for c in calls]
            for n in ("closed/f", "closed/nothing", "noexec/f", "noexec/nothing", "closed", "noexec")
        ]
    )


@people
def test_entries_of_a_user_belong_to_the_user(fs: Place) -> None:
    def user() -> None:
        os.mkdir(fs / "open/nd")
        os.symlink("x", fs / "open/nl")
        os.mkfifo(fs / "open/np")

    as_user(user, USER, OTHER)
    for name in ("nd", "nl", "np"):
        st = fs.stat(f"open/{name}")
        assert (st.st_uid, st.st_gid) == (USER, OTHER), name


# --- setgid directories ---


@people
@pytest.mark.parametrize("groups", [(), (OTHER,)], ids=["stranger", "member"])
@compared
def test_setgid_directory(fs: Place, groups: tuple[int, ...]) -> object:
    """Entries take the directory's group, directories also the bit; a stranger cannot make a setgid file."""

    def user() -> None:
        os.umask(0)
        os.close(os.open(fs / "sgid/n", os.O_CREAT | os.O_WRONLY, 0o2775))
        os.mkdir(fs / "sgid/nd", 0o755)
        os.symlink("x", fs / "sgid/nl")
        os.mkfifo(fs / "sgid/np", 0o2770)
        os.mkdir(fs / "sgid/nd/deeper", 0o700)

    as_user(user, USER, USER, groups)
    return [
        (n, oct(fs.stat(f"sgid/{n}").st_mode), fs.stat(f"sgid/{n}").st_gid)
        for n in (*fs.names("sgid"), "nd/deeper")
    ]


@people
@compared
def test_setgid_directory_as_root(fs: Place) -> object:
    os.close(os.open(fs / "sgid/n", os.O_CREAT | os.O_WRONLY, 0o2775))
    os.mkdir(fs / "sgid/nd", 0o755)
    return [(n, oct(fs.stat(f"sgid/{n}").st_mode), fs.stat(f"sgid/{n}").st_gid) for n in fs.names("sgid")]


# --- what a name may be ---

RAW = [
    b"\xff\xfe\x80", b"\xc3\xa4", b"a\xcc\x88", b"new\nline", b"tab\t", b" ", b"  x ", b"-rf", b"*",
    b"a:b,c=d\\e", b"\x01\x02", b"\x7f", b"...", b"..x", b".hidden", b"x" * 255,
    b"\xf0\x9f\x98\x80" * 63, b"con", b'"quoted"', b"%s%n",
]  # fmt: skip


@tree({**{name: File(data=name) for name in RAW}, b"d-\xff": Dir(), b"d-\xff/\xfe": File(data=b"deep")})
def test_raw_byte_names(fs: Place) -> None:
    here = os.fsencode(fs.path)
    assert sorted(os.listdir(here)) == sorted([*RAW, b"d-\xff"])
    for name in RAW:
        with open(fs.raw(name), "r+b") as f:
            assert f.read() == name
            f.write(b"+")
        os.rename(fs.raw(name), fs.raw(b"moved"))
        os.rename(fs.raw(b"moved"), fs.raw(name))
    assert sorted(os.listdir(here)) == sorted([*RAW, b"d-\xff"])
    assert os.listdir(fs.raw(b"d-\xff")) == [b"\xfe"]
    for name in RAW:
        os.unlink(fs.raw(name))
    assert os.listdir(here) == [b"d-\xff"]


@only("e", "e2")
@pytest.mark.parametrize("name", RAW)
def test_new_raw_byte_name(fs: Place, name: bytes) -> None:
    with open(fs.raw(b"e/" + name), "wb") as f:
        f.write(b"1")
    assert os.listdir(fs.raw(b"e")) == [name]
    os.mkdir(fs.raw(b"e2/" + name))
    assert os.listdir(fs.raw(b"e2")) == [name]


LONG = "n" * 256
LONG_CALLS: dict[str, Callable[[str, str], Any]] = {
    "open": lambda p, q: os.open(p, os.O_RDONLY),
    "create": lambda p, q: os.open(p, os.O_RDONLY | os.O_CREAT),
    "stat": lambda p, q: os.stat(p),
    "mkdir": lambda p, q: os.mkdir(p),
    "rmdir": lambda p, q: os.rmdir(p),
    "unlink": lambda p, q: os.unlink(p),
    "symlink": lambda p, q: os.symlink("x", p),
    "readlink": lambda p, q: os.readlink(p),
    "mknod": lambda p, q: os.mknod(p, 0o644),
    "link": lambda p, q: os.link(q, p),
    "rename to": lambda p, q: os.rename(q, p),
    "rename from": os.rename,
    "truncate": lambda p, q: os.truncate(p, 0),
    "chmod": lambda p, q: os.chmod(p, 0),
    "chown": lambda p, q: os.chown(p, 0, 0),
    "utime": lambda p, q: os.utime(p),
    "access": lambda p, q: os.stat(p),
    "listxattr": lambda p, q: os.listxattr(p),
    "statvfs": lambda p, q: os.statvfs(p),
    "below": lambda p, q: os.stat(p + "/x"),
}


@only("f")
@pytest.mark.parametrize("call", LONG_CALLS)
def test_name_too_long(fs: Place, call: str) -> None:
    assert err(LONG_CALLS[call], fs / LONG, fs / "f") == "ENAMETOOLONG"
    assert err(LONG_CALLS[call], fs / ("x/" * 2100 + "y"), fs / "f") == "ENAMETOOLONG"
    assert LONG not in fs.names() and "f" in fs.names()


NAME_CALLS = {k: v for k, v in LONG_CALLS.items() if k != "below"}


@only("f", "f2", "l", "fifo", "sock", "chr", "empty", "h1", "lx", "loop")
@pytest.mark.parametrize("call", NAME_CALLS)
@compared
def test_not_a_directory_on_the_way(fs: Place, call: str) -> object:
    found = []
    for name in (
        "f/x",
        "l/x",
        "fifo/x",
        "sock/x",
        "chr/x",
        "empty/x",
        "h1/x/y",
        "nothing/x",
        "lx/x",
        "loop/x",
    ):
        try:
            NAME_CALLS[call](fs / name, fs / "f2")
            found.append("")
        except OSError as e:
            found.append(errno.errorcode[e.errno or 0])
    return found


@tree({"a": Dir(), "a/b": Dir(), "a/b/c": Dir(), "a/b/c/f": File(data=b"x"), "s": Symlink(target="a/b")})
def test_dot_dot_is_the_parent_by_way_of_the_symlink(fs: Place) -> None:
    assert fs.names("s/..") == ["b"]
    assert fs.names("a/b/c/../..") == ["b"]
    fd = fs.open("s/c", os.O_RDONLY)
    assert os.stat("..", dir_fd=fd).st_ino == fs.stat("a/b").st_ino


def test_deep_paths(fs: Place) -> None:
    cwd = os.getcwd()
    os.chdir(fs / "e")
    try:
        for _ in range(100):
            os.mkdir("d" * 100)
            os.chdir("d" * 100)
        with open("f", "w") as f:
            f.write("deep")
        with open("f") as f:
            assert f.read() == "deep"
        os.unlink("f")
        for _ in range(100):
            os.chdir("..")
            os.rmdir("d" * 100)
    finally:
        os.chdir(cwd)
    assert fs.names("e") == []


def test_working_directory_removed(fs: Place) -> None:
    cwd = os.getcwd()
    os.chdir(fs / "e")
    try:
        os.rmdir(fs / "e")
        assert err(os.getcwd) == "ENOENT"
        assert os.listdir(".") == []
        assert err(os.open, "x", os.O_CREAT | os.O_WRONLY) == "ENOENT"
        assert err(os.mkdir, "x") == "ENOENT"
        os.mkdir(fs / "e")
        assert err(os.open, "x", os.O_CREAT | os.O_WRONLY) == "ENOENT"
    finally:
        os.chdir(cwd)
    assert fs.names("e") == []
