"""chmod, chown, utimensat, access, statx, statfs: attributes, who may change them, what changes by itself."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.mounts import why_not_root
from tests.support.stack import OLD_NS, Dir, File

from .calls import (
    AT_EACCESS,
    AT_EMPTY_PATH,
    AT_STATX_FORCE_SYNC,
    AT_SYMLINK_NOFOLLOW,
    STATX_BASIC,
    STATX_BTIME,
    UTIME_NOW,
    UTIME_OMIT,
    err,
    faccessat2,
    fallocate,
    statx,
    utimensat,
)
from .place import OTHER, USER, Place, as_user, compared, forked, only, people, tree

NAMES = ["f", "d", "e", "fifo", "sock", "chr", "suid", "big"]


# --- chmod ---


@only(*NAMES, "l", "h1", "h2")
@pytest.mark.parametrize("mode", [0o000, 0o777, 0o640, 0o4711, 0o2711, 0o1777, 0o7777])
@pytest.mark.parametrize("linked", [False, True], ids=["", "linked"])
def test_chmod(fs: Place, mode: int, linked: bool) -> None:
    for name in ["h1"] if linked else NAMES:
        before = fs.stat(name)
        os.chmod(fs / name, mode)
        after = fs.stat(name)
        assert fs.mode(name) == mode and stat.S_IFMT(after.st_mode) == stat.S_IFMT(before.st_mode), name
        assert after.st_mtime_ns == before.st_mtime_ns and after.st_ino == before.st_ino, name
        assert after.st_ctime_ns > before.st_ctime_ns, name


def test_chmod_through_symlink_and_descriptor(fs: Place) -> None:
    os.chmod(fs / "l", 0o611)
    assert fs.mode("f") == 0o611 and fs.mode("l") == 0o777
    fd = fs.open("f", os.O_RDONLY)
    os.fchmod(fd, 0o622)
    assert fs.mode("f") == 0o622 and stat.S_IMODE(os.fstat(fd).st_mode) == 0o622
    os.unlink(fs / "f")
    os.fchmod(fd, 0o633)
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o633


def test_chmod_shows_under_every_name(fs: Place) -> None:
    os.chmod(fs / "h1", 0o612)
    assert fs.mode("h2") == 0o612 and fs.stat("h2").st_ino == fs.stat("h1").st_ino


def test_chmod_keeps_content_and_holes(fs: Place) -> None:
    for name in ("big", "sparse"):
        blocks, data = fs.stat(name).st_blocks, fs.read(name)
        os.chmod(fs / name, 0o600)
        assert fs.read(name) == data
        os.chmod(fs / name, 0o640)
        with open(fs / name, "r+b") as f:
            f.write(b"")
        assert fs.read(name) == data and fs.stat(name).st_blocks <= blocks + 16


@people
@pytest.mark.parametrize("uid", [USER, OTHER])
@compared
def test_permission_to_chmod(fs: Place, uid: int) -> object:
    names = [
        "f",
        "open/f",
        "open/mine",
        "open/theirs",
        "open/mydir",
        "sticky/mine",
        "closed/f",
        "nothing",
        "f/x",
    ]
    return [(n, as_user(lambda n=n: err(os.chmod, fs / n, 0o600), uid)) for n in names], fs.mode("open/mine")


@people
@compared
def test_setgid_by_a_stranger_to_the_group_is_dropped(fs: Place) -> object:
    os.chown(fs / "open/mine", USER, OTHER)
    os.chown(fs / "open/mydir", USER, OTHER)
    found = []
    for groups in ((), (OTHER,)):
        for name in ("open/mine", "open/mydir"):
            found.append(as_user(lambda name=name: err(os.chmod, fs / name, 0o2755), USER, USER, groups))
            found.append(oct(fs.mode(name)))
    return found


# --- chown ---


@only(*NAMES, "l", "h1", "h2")
@pytest.mark.parametrize(("uid", "gid"), [(1, 2), (-1, 3), (4, -1), (-1, -1), (2**32 - 2, 2**31)])
@pytest.mark.parametrize("linked", [False, True], ids=["", "linked"])
def test_chown(fs: Place, uid: int, gid: int, linked: bool) -> None:
    for name in ["h1"] if linked else [*NAMES, "l"]:
        before = fs.stat(name)
        os.lchown(fs / name, uid, gid)
        after = fs.stat(name)
        assert after.st_uid == (before.st_uid if uid == -1 else uid), name
        assert after.st_gid == (before.st_gid if gid == -1 else gid), name
        assert after.st_mtime_ns == before.st_mtime_ns and after.st_ino == before.st_ino, name


def test_chown_of_symlink_and_target(fs: Place) -> None:
    os.chown(fs / "l", 5, 6)
    assert (fs.stat("f").st_uid, fs.stat("l").st_uid) == (5, 0)
    os.lchown(fs / "l", 7, 8)
    assert (fs.stat("f").st_uid, fs.stat("l").st_uid, fs.stat("l").st_gid) == (5, 7, 8)
    assert os.readlink(fs / "l") == "f"


@people
@compared
def test_permission_to_chown(fs: Place) -> object:
    os.chown(fs / "open/mydir/k", USER, USER)
    ways: list[tuple[int, int]] = [(OTHER, -1), (-1, OTHER), (-1, 77), (USER, -1), (-1, -1), (USER, OTHER)]
    return [
        as_user(lambda n=n, w=w: err(os.chown, fs / n, *w), USER, USER, (OTHER,))
        for n in ("open/mine", "open/theirs", "f")
        for w in ways
    ] + [fs.stat("open/mine").st_gid]


@only("open/mine", "open/mydir")
@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6755, 0o2644, 0o6711, 0o6777])
@pytest.mark.parametrize("who", ["root", "owner"])
@compared
def test_chown_clears_setuid(fs: Place, mode: int, who: str) -> object:
    """Of files, not of directories; setgid without group execute meant mandatory locking and stays."""
    found = []
    for name in ("open/mine", "open/mydir"):
        os.chown(fs / name, USER, USER)
        os.chmod(fs / name, mode)
        if who == "root":
            os.chown(fs / name, USER, OTHER)
        else:
            as_user(lambda name=name: os.chown(fs / name, -1, OTHER), USER, USER, (OTHER,))
        found.append(oct(fs.mode(name)))
        os.chmod(fs / name, mode)
        os.chown(fs / name, -1, -1)
        found.append(oct(fs.mode(name)))
    return found


@only("open/mine", "open/theirs", "f")
@people
@pytest.mark.parametrize("mode", [0o644, 0o4755, 0o2755, 0o2644, 0o6711])
@compared
def test_chown_of_nothing(fs: Place, mode: int) -> object:
    """Anybody may who has nothing to take away by it."""
    found = []
    for name in ("open/mine", "open/theirs", "f"):
        for groups in ((), (OTHER,)):
            os.chown(fs / name, USER if name == "open/mine" else 0, OTHER)
            os.chmod(fs / name, mode)
            found.append(as_user(lambda name=name: err(os.chown, fs / name, -1, -1), USER, USER, groups))
            found.append(oct(fs.mode(name)))
    return found


@only("open/mine")
@people
@pytest.mark.parametrize("groups", [(), (OTHER,)])
@compared
def test_chown_takes_setgid_away_from_who_is_not_in_the_group(fs: Place, groups: tuple[int, ...]) -> object:
    os.chown(fs / "open/mine", USER, OTHER)
    os.chmod(fs / "open/mine", 0o2644)
    error = as_user(lambda: err(os.chown, fs / "open/mine", -1, USER), USER, USER, groups)
    return error, oct(fs.mode("open/mine"))


@only("f")
@people
@compared
def test_root_writes_to_what_has_capabilities(fs: Place) -> object:
    """Capabilities go, whoever writes; setuid and setgid stay with who may keep them."""
    os.chmod(fs / "f", 0o6755)
    os.setxattr(fs / "f", "security.capability", bytes.fromhex("01000002 0020") + bytes(14))
    _write(fs / "f")
    return oct(fs.mode("f")), os.listxattr(fs / "f")


# --- setuid and setgid go when the file is written ---


def _write(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)


def _ftruncate(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.ftruncate(fd, 3)
    os.close(fd)


def _append(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"x")
    os.close(fd)


def _empty_write(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"")
    os.close(fd)


def _fallocate(path: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        fallocate(fd, 0, 0, 100)
    finally:
        os.close(fd)


CLEARERS: dict[str, Callable[[str], Any]] = {
    "write": _write,
    "append": _append,
    "empty write": _empty_write,
    "truncate": lambda p: os.truncate(p, 2),
    "ftruncate": _ftruncate,
    "O_TRUNC": lambda p: os.close(os.open(p, os.O_WRONLY | os.O_TRUNC)),
    "open only": lambda p: os.close(os.open(p, os.O_RDWR)),
    "fallocate": _fallocate,
}


@only("open/f")
@pytest.mark.parametrize("how", CLEARERS)
@pytest.mark.parametrize("who", ["user", "root"])
@compared
def test_writing_clears_setuid(fs: Place, how: str, who: str) -> object:
    if who == "root" and (reason := why_not_root()):
        pytest.skip(reason)
    found = []
    for mode in (0o6777, 0o4777, 0o2755 | 0o022, 0o1777):
        os.chmod(fs / "open/f", mode)
        if who == "root":  # CAP_FSETID keeps the bits
            CLEARERS[how](fs / "open/f")
        else:
            as_user(lambda: CLEARERS[how](fs / "open/f"))
        found.append(oct(fs.mode("open/f")))
    return found


@people
@compared
def test_writing_clears_setgid_without_group_execute(fs: Place) -> object:
    """Only when the writer is not a member of the group: the file's mode alone does not tell."""
    os.chown(fs / "open/f", 0, OTHER)
    found = []
    for gid in (USER, OTHER):
        os.chmod(fs / "open/f", 0o2766)
        as_user(lambda: _write(fs / "open/f"), USER, gid)
        found.append(oct(fs.mode("open/f")))
    return found


@only("sgid")
@pytest.mark.parametrize("groups", [(), (OTHER,)], ids=["stranger", "member"])
@compared
def test_setgid_of_what_is_made_in_a_setgid_directory(fs: Place, groups: tuple[int, ...]) -> object:
    """Stays when the maker is in the directory's group, if only by a supplementary one (inode(7))."""

    def make() -> None:
        os.umask(0)
        for mode in (0o2755, 0o2644, 0o755):
            os.close(os.open(fs / f"sgid/file{mode:o}", os.O_CREAT | os.O_WRONLY, mode))
            os.mknod(fs / f"sgid/fifo{mode:o}", stat.S_IFIFO | mode)
            os.mkdir(fs / f"sgid/dir{mode:o}", mode)

    as_user(make, USER, USER, groups)
    return [(name, oct(fs.mode(f"sgid/{name}")), fs.stat(f"sgid/{name}").st_gid) for name in fs.names("sgid")]


@people
def test_writing_by_mmap_clears_nothing_and_keeps_data(fs: Place) -> None:
    """The kernel clears at write(2), not at a store through a mapping."""
    import mmap

    os.chmod(fs / "open/f", 0o4666)

    def user() -> None:
        fd = os.open(fs / "open/f", os.O_RDWR)
        with mmap.mmap(fd, 4) as m:
            m[0:2] = b"AN"
        os.close(fd)

    as_user(user)
    assert fs.read("open/f") == b"ANyone\n"


@people
def test_write_drops_file_capabilities(fs: Place) -> None:
    cap = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x20\x00\x00" + b"\x00" * 8
    for name in ("open/f", "f"):
        os.setxattr(fs / name, "security.capability", cap)
        assert os.getxattr(fs / name, "security.capability") == cap
        fs.append(name, b"x")
        assert err(os.getxattr, fs / name, "security.capability") == "ENODATA"
    os.setxattr(fs / "f", "security.capability", cap)
    os.chown(fs / "f", 1, 1)
    assert err(os.getxattr, fs / "f", "security.capability") == "ENODATA"


# --- times by hand ---

ODD = (1_234_567_890, 123_456_789)
TIMES = [0, 1, -1, -(2**31), 2**31 - 1, 2**31, 2**32 + 5, 15_000_000_000]


def test_utimensat(fs: Place) -> None:
    for name in [*NAMES, "l"]:
        utimensat(fs / name, (1, 999_999_999), ODD, AT_SYMLINK_NOFOLLOW)
        st = fs.stat(name)
        assert st.st_mtime_ns == ODD[0] * 10**9 + ODD[1], name
        assert st.st_atime_ns == 1_999_999_999, name
        assert st.st_ctime_ns > OLD_NS + 10**18 / 2, name


@tree({f"{kind}{t}": Dir() if kind == "d" else File() for kind in "fd" for t in TIMES})
@compared
def test_range_of_times(fs: Place) -> object:
    names = [f"{kind}{t}" for kind in "fd" for t in TIMES]
    for name in names:
        seconds = int(name[1:])
        utimensat(fs / name, (seconds, 7), (seconds, 987_654_321))
    before = [fs.stat(n).st_mtime_ns for n in names]
    if fs.mounted:
        fs.mounted.remount()
    return before, [fs.stat(n).st_mtime_ns for n in names]


def test_utime_now_and_omit(fs: Place) -> None:
    before = fs.stat("f")
    utimensat(fs / "f", (0, UTIME_OMIT), (0, UTIME_OMIT))
    assert fs.stat("f").st_mtime_ns == before.st_mtime_ns
    utimensat(fs / "f", (5, 5), (0, UTIME_OMIT))
    st = fs.stat("f")
    assert (st.st_atime_ns, st.st_mtime_ns) == (5_000_000_005, before.st_mtime_ns)
    now = time.time()
    utimensat(fs / "f", (0, UTIME_OMIT), (0, UTIME_NOW))
    st = fs.stat("f")
    assert st.st_atime_ns == 5_000_000_005 and abs(st.st_mtime - now) < 60
    utimensat(fs / "f", (0, UTIME_NOW), (6, 6))
    st = fs.stat("f")
    assert st.st_mtime_ns == 6_000_000_006 and abs(st.st_atime - now) < 60


def test_utime_errors(fs: Place) -> None:
    assert err(utimensat, fs / "f", (0, 10**9), (0, 0)) == "EINVAL"
    assert err(utimensat, fs / "nothing", (0, 0), (0, 0)) == "ENOENT"
    assert err(utimensat, fs / "f/x", (0, 0), (0, 0)) == "ENOTDIR"
    assert fs.stat("f").st_mtime_ns == OLD_NS


@people
@compared
def test_permission_to_set_times(fs: Place) -> object:
    """To now: owner or write permission. To a value, or one to now: owner only."""
    now, omit = (0, UTIME_NOW), (0, UTIME_OMIT)
    ways = [(now, now), ((5, 5), (5, 5)), (now, (5, 5)), ((5, 5), omit), (omit, now), (omit, omit)]
    return [
        [as_user(lambda n=n, w=w: err(utimensat, fs / n, *w)) for w in ways]
        for n in ("open/f", "open/mine", "open/theirs", "f", "closed/f")
    ]


# --- access ---


@people
@pytest.mark.parametrize("uid", [0, USER, OTHER])
@compared
def test_access(fs: Place, uid: int) -> object:
    def ask() -> object:
        return [
            (n, m, f, err(faccessat2, fs / n, m, f))
            for n in (
                "f",
                "f2",
                "d",
                "closed",
                "noexec",
                "noexec/f",
                "open/mine",
                "open/theirs",
                "suid",
                "lx",
                "nothing",
            )
            for m in (os.F_OK, os.R_OK, os.W_OK, os.X_OK, 7)
            for f in (0, AT_EACCESS, AT_SYMLINK_NOFOLLOW)
        ]

    os.chmod(fs / "f2", 0o000)
    return forked(ask, uid=uid, gid=uid)


@people
def test_access_uses_the_real_uid(fs: Place) -> None:
    """setuid program asking for its caller: real uid 65534, effective 0."""

    def ask() -> tuple[str, str]:
        os.setresuid(USER, 0, 0)
        return err(faccessat2, fs / "open/theirs", os.R_OK, 0), err(
            faccessat2, fs / "open/theirs", os.R_OK, AT_EACCESS
        )

    assert forked(ask) == ("EACCES", "")


# --- stat, statx, statfs ---


def test_statx_agrees_with_stat(fs: Place) -> None:
    for name in ("f", "d", "l", "h1", "sparse", "chr", "fifo"):
        a, b = fs.stat(name), statx(fs / name, AT_SYMLINK_NOFOLLOW)
        assert b.mask & STATX_BASIC == STATX_BASIC
        assert (b.mode, b.uid, b.gid, b.ino, b.size, b.nlink) == (
            a.st_mode, a.st_uid, a.st_gid, a.st_ino, a.st_size, a.st_nlink,
        )  # fmt: skip
        assert (b.mtime_ns, b.ctime_ns) == (a.st_mtime_ns, a.st_ctime_ns)
        c = statx(fs / name, AT_SYMLINK_NOFOLLOW | AT_STATX_FORCE_SYNC)
        assert (c.mode, c.size, c.mtime_ns) == (b.mode, b.size, b.mtime_ns)


def test_statx_of_a_descriptor(fs: Place) -> None:
    fd = fs.open("f", os.O_RDONLY)
    assert statx("", AT_EMPTY_PATH, dirfd=fd).ino == fs.stat("f").st_ino


def test_birth_time(fs: Place) -> None:
    """Of a new file: when it was made, and it stays."""
    before = time.time_ns() - 10**9
    fs.write("n", b"x")
    first = statx(fs / "n")
    assert first.mask & STATX_BTIME and before < first.btime_ns
    os.utime(fs / "n", ns=(5, 5))
    fs.append("n", b"y")
    assert statx(fs / "n").btime_ns == first.btime_ns


def test_statfs(fs: Place) -> None:
    a = os.statvfs(fs.path)
    assert a.f_bsize > 0 and a.f_blocks > 0 and a.f_bfree <= a.f_blocks and a.f_namemax == 255
    assert a.f_files > 0
    fd = fs.open("f", os.O_RDONLY)
    b = os.fstatvfs(fd)
    assert (a.f_blocks, a.f_files, a.f_namemax, a.f_bsize) == (b.f_blocks, b.f_files, b.f_namemax, b.f_bsize)
    assert err(os.statvfs, fs / "nothing") == "ENOENT"


def test_st_blocks_and_blksize_are_sane(fs: Place) -> None:
    assert fs.stat("big").st_blocks * 512 >= 200 * 1024
    assert fs.stat("sparse").st_blocks * 512 < 1 << 20
    assert fs.stat("f").st_blksize in (512, 1024, 4096, 65536, 131072, 1 << 20)
    for name in ("f", "d", "l"):
        assert fs.stat(name).st_dev == os.stat(fs.path).st_dev


def test_size_follows_writes(fs: Place) -> None:
    fd = fs.open("f", os.O_RDWR)
    for n in (0, 5, 100_000, 1 << 33):
        os.ftruncate(fd, n)
        assert os.fstat(fd).st_size == fs.stat("f").st_size == n
    os.pwrite(fd, b"x", 1 << 34)
    assert fs.stat("f").st_size == (1 << 34) + 1


@tree(
    {
        f"{i}": File(data=b"x" * i, mode=m, uid=u, gid=u + 1)
        for i, (m, u) in enumerate([(0o600, 1), (0o4755, 2)])
    }
)
def test_owner_and_mode_survive_copy_up(fs: Place) -> None:
    for name, mode, uid in (("0", 0o600, 1), ("1", 0o4755, 2)):
        os.utime(fs / name, ns=(1, 2))
        st = fs.stat(name)
        assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid) == (mode, uid, uid + 1)
