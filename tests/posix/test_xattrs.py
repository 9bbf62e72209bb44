"""Extended attributes: every namespace, flags, limits, permissions; the overlay's own names stay out of
sight."""

from __future__ import annotations

import os

import pytest

from tests.support.stack import Dir, File, Symlink

from .calls import err
from .place import OTHER, USER, Place, as_user, compared, only, people, tree

NAMES = ["f", "d", "e", "h1", "big", "suid", "x"]


def xattrs(path: str) -> dict[str, bytes]:
    return {
        n: os.getxattr(path, n, follow_symlinks=False)
        for n in sorted(os.listxattr(path, follow_symlinks=False))
    }


@only(*NAMES, "h2", "d/a")
@pytest.mark.parametrize("space", ["user", "trusted", "security"])
def test_set_get_list_remove(fs: Place, space: str) -> None:
    attr = f"{space}.layerfs-test"
    for name in NAMES:
        before = xattrs(fs / name)
        content = fs.read(name) if os.path.isfile(fs / name) else b""
        os.setxattr(fs / name, attr, b"one")
        assert xattrs(fs / name) == {**before, attr: b"one"}, name
        os.setxattr(fs / name, attr, b"\0\xff" * 50)
        assert os.getxattr(fs / name, attr) == b"\0\xff" * 50
        os.setxattr(fs / name, attr, b"")
        assert os.getxattr(fs / name, attr) == b""
        if fs.mounted and name == "f" and space == "user":
            fs.mounted.remount()
            assert xattrs(fs / name) == {**before, attr: b""}
        os.removexattr(fs / name, attr)
        assert xattrs(fs / name) == before, name
        assert err(os.getxattr, fs / name, attr) == err(os.removexattr, fs / name, attr) == "ENODATA"
        assert not content or fs.read(name) == content


@pytest.mark.parametrize("name", ["x", "f"])
@compared
def test_create_and_replace(fs: Place, name: str) -> object:
    path = fs / name
    return [
        err(os.setxattr, path, "user.one", b"a", os.XATTR_CREATE),
        err(os.setxattr, path, "user.one", b"b", os.XATTR_REPLACE),
        err(os.setxattr, path, "user.new", b"c", os.XATTR_REPLACE),
        err(os.setxattr, path, "user.new", b"d", os.XATTR_CREATE),
        err(os.setxattr, path, "user.new", b"e", os.XATTR_CREATE | os.XATTR_REPLACE),
        xattrs(path),
    ]


@people
@compared
def test_errors(fs: Place) -> object:
    found = []
    for name in ("f", "d", "l", "lx", "fifo", "sock", "chr", "nothing", "loop", "f/x", "closed"):
        for attr in (
            "user.a",
            "trusted.a",
            "security.a",
            "system.nonsense",
            "nonsense",
            "nonsense.a",
            "user.",
            "",
        ):
            for follow in (True, False):
                calls = [
                    err(os.setxattr, fs / name, attr, b"1", follow_symlinks=follow),
                    err(os.getxattr, fs / name, attr, follow_symlinks=follow),
                    err(os.listxattr, fs / name, follow_symlinks=follow),
                    err(os.removexattr, fs / name, attr, follow_symlinks=follow),
                ]
                found.append((name, attr, follow, calls))
    return found


@compared
def test_limits(fs: Place) -> object:
    path = fs / "f"
    return [
        err(os.setxattr, path, "user." + "n" * 250, b"1"),
        err(os.setxattr, path, "user." + "n" * 251, b"1"),
        err(os.setxattr, path, "user.big", b"v" * 3000),
        err(os.setxattr, path, "user.big", b"v" * 65537),
        len(os.getxattr(path, "user.big")),
        sorted(len(n) for n in os.listxattr(path)),
    ]


def test_buffer_sizes(fs: Place) -> None:
    import ctypes
    import errno

    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(fs / "x")
    buf = ctypes.create_string_buffer(1000)
    assert libc.getxattr(path, b"user.two", None, 0) == 100
    assert libc.getxattr(path, b"user.two", buf, 99) == -1 and ctypes.get_errno() == errno.ERANGE
    assert libc.getxattr(path, b"user.two", buf, 100) == 100
    assert libc.getxattr(path, b"user.two", buf, 1000) == 100
    size = libc.listxattr(path, None, 0)
    assert size == len(b"user.one\0user.two\0")
    assert libc.listxattr(path, buf, size - 1) == -1 and ctypes.get_errno() == errno.ERANGE
    assert libc.listxattr(path, buf, size) == size
    assert sorted(buf.raw[:size].split(b"\0"))[1:] == [b"user.one", b"user.two"]


def test_many(fs: Place) -> None:
    for i in range(60):
        os.setxattr(fs / "f", f"user.number-{i}", b"%d" % i)
    assert xattrs(fs / "f") == {f"user.number-{i}": b"%d" % i for i in range(60)}
    for i in range(0, 60, 2):
        os.removexattr(fs / "f", f"user.number-{i}")
    assert len(os.listxattr(fs / "f")) == 30


def test_through_a_descriptor_and_other_names(fs: Place) -> None:
    fd = fs.open("h1", os.O_RDONLY)
    os.setxattr(fd, "user.a", b"1")
    assert os.getxattr(fs / "h2", "user.a") == b"1"
    os.unlink(fs / "h1")
    os.unlink(fs / "h2")
    os.setxattr(fd, "user.a", b"2")
    assert os.getxattr(fd, "user.a") == b"2" and os.listxattr(fd) == ["user.a"]


TREE = {
    "f": File(
        data=b"x" * 9000, xattrs={"user.a": b"1", "trusted.b": b"\0\1", "security.c": b"3", "user.empty": b""}
    ),
    "d": Dir(xattrs={"user.a": b"1", "trusted.b": b"2"}),
    "l": Symlink(target="f", xattrs={"trusted.on-link": b"4", "security.l": b"5"}),
}


@tree(TREE)
@pytest.mark.parametrize("how", ["nothing", "chmod", "chown", "write", "link", "rename", "utime"])
@compared
def test_survive_copy_up(fs: Place, how: str) -> object:
    for name in ("f", "d", "l"):
        path = fs / name
        if how == "chmod" and name != "l":
            os.chmod(path, 0o700)
        elif how == "chown":
            os.lchown(path, 1, 1)
        elif how == "write" and name == "f":
            fs.append(name, b"y")
        elif how == "link" and name != "d":
            os.link(path, fs / f"{name}2", follow_symlinks=False)
        elif how == "rename":
            os.rename(path, fs / "tmp")
            os.rename(fs / "tmp", path)
        elif how == "utime":
            os.utime(path, ns=(1, 2), follow_symlinks=False)
    return [xattrs(fs / name) for name in fs.names()]


@tree(TREE)
@compared
def test_symlinks_carry_their_own(fs: Place) -> object:
    os.setxattr(fs / "l", "trusted.new", b"n", follow_symlinks=False)
    return (
        xattrs(fs / "l"),
        xattrs(fs / "f"),
        os.readlink(fs / "l"),
        err(os.setxattr, fs / "l", "user.x", b"", follow_symlinks=False),
    )


@people
@pytest.mark.parametrize(
    "name",
    ["f", "open/f", "open/mine", "open/theirs", "open", "open/mydir", "sticky", "sticky/theirs", "closed/f"],
)
@compared
def test_permission(fs: Place, name: str) -> object:
    for attr in ("user.a", "trusted.a", "security.a"):
        os.setxattr(fs / name, attr, b"1")
    return as_user(
        lambda: [
            (
                a,
                err(os.getxattr, fs / name, a),
                err(os.setxattr, fs / name, a, b"2"),
                err(os.removexattr, fs / name, a),
            )
            for a in ("user.a", "user.b", "trusted.a", "security.a", "security.capability")
        ]
    ), sorted(os.listxattr(fs / name))


@people
def test_trusted_is_hidden_from_users(fs: Place) -> None:
    os.setxattr(fs / "open/f", "trusted.a", b"1")
    os.setxattr(fs / "open/f", "user.a", b"1")
    assert as_user(lambda: os.listxattr(fs / "open/f")) == ["user.a"]
    assert as_user(lambda: err(os.getxattr, fs / "open/f", "trusted.a")) == "ENODATA"


# --- the overlay's own names ---


@pytest.mark.parametrize("name", ["f", "d", "e", "h1", "l", "fifo", "."])
def test_nothing_of_the_overlay_is_listed(fs: Place, name: str) -> None:
    before = sorted(os.listxattr(fs / name, follow_symlinks=False))
    if name != ".":
        os.lchown(fs / name, 1, 1)
        os.rename(fs / name, fs / "moved")
        os.rename(fs / "moved", fs / name)
    after = sorted(os.listxattr(fs / name, follow_symlinks=False))
    assert after == before and not [n for n in after if "overlay" in n]


@pytest.mark.parametrize("name", ["f", "d"])
@pytest.mark.parametrize(
    "attr", ["opaque", "redirect", "metacopy", "origin", "whiteout", "nonsense", "overlay.opaque"]
)
@compared
def test_names_like_the_overlays_own_are_ordinary(fs: Place, name: str, attr: str) -> object:
    """Through the mount they neither steer the mount nor vanish: they are escaped (kernel:
    trusted.overlay.overlay.X)."""
    full = f"trusted.overlay.{attr}"
    found: list[object] = [err(os.getxattr, fs / name, full), err(os.setxattr, fs / name, full, b"y")]
    found += [xattrs(fs / name), err(os.getxattr, fs / name, full)]
    os.chmod(fs / name, 0o700)
    found += [xattrs(fs / name), fs.names("d"), fs.read("f")]
    found += [err(os.removexattr, fs / name, full), xattrs(fs / name)]
    return found


@compared
def test_names_like_the_overlays_own_survive_remount(fs: Place) -> object:
    attrs = [
        "opaque",
        "redirect",
        "metacopy",
        "origin",
        "whiteout",
        "nlink",
        "impure",
        "nonsense",
        "overlay.opaque",
    ]
    for name in ("f", "d"):
        for attr in attrs:
            os.setxattr(fs / name, f"trusted.overlay.{attr}", b"y")
    if fs.mounted:
        fs.mounted.remount()
    found = [xattrs(fs / "f"), xattrs(fs / "d"), fs.names("d"), fs.read("f")]
    for name in ("f", "d"):
        for attr in attrs:
            os.removexattr(fs / name, f"trusted.overlay.{attr}")
    return found, xattrs(fs / "f"), xattrs(fs / "d"), fs.names("d"), fs.read("f")


@people
@compared
def test_user_namespace_needs_read_or_write(fs: Place) -> object:
    os.chmod(fs / "open/f", 0o004)
    os.setxattr(fs / "open/f", "user.a", b"1")
    os.chown(fs / "open/f", OTHER, OTHER)
    found = [
        as_user(
            lambda: (
                err(os.getxattr, fs / "open/f", "user.a"),
                err(os.setxattr, fs / "open/f", "user.a", b""),
            )
        )
    ]
    os.chmod(fs / "open/f", 0o002)
    found += [
        as_user(
            lambda: (
                err(os.getxattr, fs / "open/f", "user.a"),
                err(os.setxattr, fs / "open/f", "user.a", b""),
            ),
            USER,
        )
    ]
    return found
