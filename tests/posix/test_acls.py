"""POSIX ACLs: setting, checking, the mask in the mode, inheritance from default ACLs, survival of copy-up."""

from __future__ import annotations

import os
import struct

import pytest

from tests.support.stack import Dir, File

from .calls import err
from .place import OTHER, USER, Place, as_user, compared, forked, tree

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
USER_OBJ, A_USER, GROUP_OBJ, A_GROUP, MASK, ALL = 1, 2, 4, 8, 16, 32
NOBODY = 0xFFFFFFFF

Acl = list[tuple[int, int, int]]


def pack(acl: Acl) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, perm, who) for tag, perm, who in acl)


def unpack(data: bytes) -> Acl:
    return [struct.unpack_from("<HHI", data, at) for at in range(4, len(data), 8)]


def acl(owner: int, group: int, other: int, users: dict[int, int] | None = None, mask: int = 7) -> Acl:
    found = [(USER_OBJ, owner, NOBODY), *((A_USER, p, u) for u, p in sorted((users or {}).items()))]
    found.append((GROUP_OBJ, group, NOBODY))
    if users:
        found.append((MASK, mask, NOBODY))
    return [*found, (ALL, other, NOBODY)]


WITH_USER = acl(7, 5, 0, {USER: 6}, mask=7)

TREE = {
    "f": File(data=b"data", mode=0o640),
    "d": Dir(mode=0o750),
    "d/k": File(data=b"k"),
    "open": Dir(mode=0o777),
    "acl": File(data=b"x" * 5000, mode=0o670, xattrs={ACCESS: pack(acl(6, 4, 0, {USER: 6}))}),
    "dir": Dir(mode=0o770, xattrs={DEFAULT: pack(WITH_USER), ACCESS: pack(acl(7, 0, 0, {USER: 7}))}),
    "dir/k": File(data=b"k"),
    "minimal": Dir(mode=0o777, xattrs={DEFAULT: pack(acl(7, 4, 1))}),
}


def get(fs: Place, name: str, which: str = ACCESS) -> Acl | None:
    try:
        return unpack(os.getxattr(fs / name, which))
    except OSError as e:
        return None if e.errno == 61 else [(e.errno or 0, 0, 0)]


def full(fs: Place, name: str) -> object:
    return oct(fs.stat(name).st_mode), get(fs, name), get(fs, name, DEFAULT), sorted(os.listxattr(fs / name))


@tree(TREE)
@compared
def test_laid_out_acls_show(fs: Place) -> object:
    return [full(fs, n) for n in TREE]


@tree(TREE)
@pytest.mark.parametrize("name", ["f", "d"])
@compared
def test_set_changes_the_mode(fs: Place, name: str) -> object:
    found = []
    for a in (WITH_USER, acl(6, 6, 6), acl(0, 0, 0, {USER: 7}, mask=0), acl(7, 7, 7, {1: 1, 2: 2}, mask=5)):
        os.setxattr(fs / name, ACCESS, pack(a))
        found.append(full(fs, name))
    os.removexattr(fs / name, ACCESS)
    return found, full(fs, name)


@tree(TREE)
@compared
def test_chmod_changes_the_mask(fs: Place) -> object:
    found = []
    for mode in (0o777, 0o640, 0o604, 0o000, 0o2750):
        for name in ("acl", "dir"):
            os.chmod(fs / name, mode)
            found.append(full(fs, name))
    return found


@tree({"f": File(mode=0o2770, uid=USER, gid=OTHER), "d": Dir(mode=0o2770, uid=USER, gid=OTHER)})
@pytest.mark.parametrize("groups", [(), (OTHER,)], ids=["stranger", "member"])
@compared
def test_setting_clears_setgid(fs: Place, groups: tuple[int, ...]) -> object:
    """Unless the owner is in the group."""
    for name in ("f", "d"):
        as_user(lambda name=name: os.setxattr(fs / name, ACCESS, pack(WITH_USER)), USER, USER, groups)
    by_owner = full(fs, "f"), full(fs, "d")
    os.chmod(fs / "f", 0o2770)
    os.setxattr(fs / "f", ACCESS, pack(acl(7, 7, 0)))
    return by_owner, full(fs, "f")


@tree(TREE)
@compared
def test_checked(fs: Place) -> object:
    found = []
    for name in ("acl", "f", "dir"):
        found.append(
            as_user(
                lambda name=name: [err(os.open, fs / name, fl) for fl in (os.O_RDONLY, os.O_WRONLY)], USER
            )
        )
        found.append(
            as_user(
                lambda name=name: [err(os.open, fs / name, fl) for fl in (os.O_RDONLY, os.O_WRONLY)], OTHER
            )
        )
    os.setxattr(fs / "f", ACCESS, pack(WITH_USER))
    found.append(as_user(lambda: err(os.open, fs / "f", os.O_RDWR)))
    os.chmod(fs / "f", 0o644)
    found.append(as_user(lambda: err(os.open, fs / "f", os.O_RDWR)))
    os.removexattr(fs / "f", ACCESS)
    found.append(as_user(lambda: err(os.open, fs / "f", os.O_RDONLY)))
    found.append(as_user(lambda: (err(os.listdir, fs / "dir"), err(os.mkdir, fs / "dir/n"))))
    return found


@tree(TREE)
@compared
def test_groups_are_checked(fs: Place) -> object:
    a = [
        (USER_OBJ, 7, NOBODY),
        (GROUP_OBJ, 0, NOBODY),
        (A_GROUP, 4, OTHER),
        (MASK, 7, NOBODY),
        (ALL, 0, NOBODY),
    ]
    os.setxattr(fs / "f", ACCESS, pack(a))
    return [
        as_user(lambda: [err(os.open, fs / "f", fl) for fl in (os.O_RDONLY, os.O_WRONLY)], USER, gid, groups)
        for gid, groups in ((OTHER, ()), (USER, (OTHER,)), (USER, ()))
    ]


@tree(TREE)
@pytest.mark.parametrize("where", ["dir", "minimal"])
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@compared
def test_inheritance(fs: Place, where: str, mask: int) -> object:
    """A default ACL takes the umask's place."""

    def child() -> None:
        os.umask(mask)
        os.close(os.open(fs / f"{where}/file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.close(os.open(fs / f"{where}/tight", os.O_CREAT | os.O_WRONLY, 0o600))
        os.mkdir(fs / f"{where}/sub", 0o777)
        os.mkdir(fs / f"{where}/sub/sub", 0o700)
        os.mkfifo(fs / f"{where}/fifo", 0o666)
        os.symlink("x", fs / f"{where}/link")

    forked(child)
    return [full(fs, f"{where}/{n}") for n in ("file", "tight", "sub", "sub/sub", "fifo")], fs.mode(
        f"{where}/link"
    )


@tree(TREE)
@compared
def test_inherited_with_umask_zero(fs: Place) -> object:
    """Inheritance alone, without a umask that could be applied twice."""

    def child() -> None:
        os.umask(0)
        os.close(os.open(fs / "dir/file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(fs / "dir/sub", 0o777)
        os.mkfifo(fs / "dir/fifo", 0o644)

    forked(child)
    return [full(fs, f"dir/{n}") for n in ("file", "sub", "fifo")]


@tree(TREE)
@compared
def test_default_acl_set_through_the_mount(fs: Place) -> object:
    os.setxattr(fs / "d", DEFAULT, pack(WITH_USER))
    found = [full(fs, "d")]

    def child() -> None:
        os.umask(0)
        os.mkdir(fs / "d/sub")
        fs.write("d/n", b"")

    forked(child)
    found += [full(fs, "d/sub"), full(fs, "d/n"), full(fs, "d/k")]
    os.removexattr(fs / "d", DEFAULT)
    return [*found, full(fs, "d"), err(os.removexattr, fs / "d", DEFAULT)]


@tree(TREE)
@compared
def test_acl_errors(fs: Place) -> object:
    good = pack(WITH_USER)
    return [
        err(os.setxattr, fs / "f", DEFAULT, good),
        err(os.setxattr, fs / "f", ACCESS, b"nonsense"),
        err(os.setxattr, fs / "f", ACCESS, b""),
        err(os.setxattr, fs / "f", ACCESS, pack(WITH_USER[:2])),
        err(os.setxattr, fs / "f", ACCESS, pack(list(reversed(WITH_USER)))),
        err(os.setxattr, fs / "f", ACCESS, good[:-3]),
        err(os.setxattr, fs / "f", ACCESS, b"\1\0\0\0" + good[4:]),
        err(os.setxattr, fs / "d", DEFAULT, pack(WITH_USER[:1])),
        err(os.getxattr, fs / "f", ACCESS),
        as_user(lambda: err(os.setxattr, fs / "f", ACCESS, good)),
        full(fs, "f"),
        full(fs, "d"),
    ]


@tree(TREE)
@pytest.mark.parametrize("how", ["write", "chown", "utime", "rename", "link", "setxattr", "remount"])
@compared
def test_survive_copy_up(fs: Place, how: str) -> object:
    for name in ("acl", "dir"):
        path = fs / name
        if how == "write":
            fs.append("acl", b"more") if name == "acl" else fs.write("dir/new", b"")
        elif how == "chown":
            os.chown(path, 1, 1)
        elif how == "utime":
            os.utime(path)
        elif how == "rename":
            os.rename(path, fs / "tmp")
            os.rename(fs / "tmp", path)
        elif how == "link" and name == "acl":
            os.link(path, fs / "acl2")
        elif how == "setxattr":
            os.setxattr(path, "user.a", b"1")
        elif how == "remount":
            os.chmod(path, 0o750)
            if fs.mounted:
                fs.mounted.remount()
    return [full(fs, n) for n in ("acl", "dir")]


@tree(TREE)
@compared
def test_getfacl_and_cp(fs: Place) -> object:
    import subprocess

    subprocess.run(["cp", "-a", fs / "acl", fs / "copy"], check=True)
    subprocess.run(["cp", "-a", fs / "dir", fs / "dircopy"], check=True)
    return full(fs, "copy"), full(fs, "dircopy"), full(fs, "dircopy/k")
