"""A day's work on a mounted tree that uses every on-disk form of an upper directory. Not tests.

`TREE` is laid out in the lowers by `lay_out`, and as a plain directory by `plain`; `work_in` does the same on
any system, so that any two can be compared.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from tests.support.stack import Dir, File, Hardlink, Node, Stack, Symlink, Tree
from tests.support.tree import Snapshot, snapshot

BIG = bytes(range(256)) * 2000
ACL = bytes.fromhex(
    "0200000001000600ffffffff020006000500000004000400ffffffff10000600ffffffff20000400ffffffff"
)

#: Names that `work_in` changes and leaves where they are: they are the same objects as before, by number.
KEEP_NUMBER = (b"big", b"big-chmod", b"dir", b"dir/f", b"symlink", b"fifo", b"link-a")

__all__ = [
    "ACL",
    "BIG",
    "KEEP_NUMBER",
    "TREE",
    "Node",
    "Symlink",
    "lay_out",
    "look",
    "plain",
    "unique_numbers",
    "work_in",
    "write",
]

TREE: Tree = {
    "dir": Dir(mode=0o750, uid=3, gid=4),
    "dir/f": File(data=b"f", xattrs={"user.a": b"1"}),
    "dir/sub": Dir(),
    "dir/sub/g": File(data=b"g"),
    "dir/sub/deep": Dir(),
    "dir/sub/deep/h": File(data=b"h" * 10_000),
    "moved": Dir(),
    "moved/child": Dir(),
    "moved/child/leaf": File(data=b"leaf"),
    "moved/f": File(data=b"f in moved"),
    "twice": Dir(),
    "twice/f": File(data=b"f in twice"),
    "gone-dir": Dir(),
    "gone-dir/x": File(data=b"x"),
    "opaque": Dir(),
    "opaque/old": File(data=b"old"),
    "swap1": Dir(),
    "swap1/one": File(data=b"one"),
    "swap2": Dir(),
    "swap2/two": File(data=b"two"),
    "file-swap1": File(data=b"file one"),
    "file-swap2": File(data=b"file two"),
    "big": File(data=BIG),
    "big-chmod": File(data=BIG),
    "big-chown-then-write": File(data=BIG),
    "big-renamed": File(data=BIG),
    "big-moved-down": File(data=BIG),
    "big-cut": File(data=BIG),
    "sparse": File(data=b"end", offset=1 << 20),
    "link-a": File(data=b"linked"),
    "link-b": Hardlink("link-a"),
    "dir/link-c": Hardlink("link-a"),
    "chmod-link-a": File(data=BIG),
    "chmod-link-b": Hardlink("chmod-link-a"),
    "unlinked-link-a": File(data=b"unlinked"),
    "unlinked-link-b": Hardlink("unlinked-link-a"),
    "unlinked-link-c": Hardlink("unlinked-link-a"),
    "symlink": Symlink(target="dir/f", uid=7),
    "symlink-moved": Symlink(target="nowhere"),
    "fifo": Node(kind=stat.S_IFIFO),
    "device": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 3)),
    "socket": Node(kind=stat.S_IFSOCK),
    "gone": File(data=b"gone"),
    "back": File(data=b"was here"),
    "untouched": File(data=b"untouched"),
    "setuid": File(data=b"s", mode=0o4755),
    b"\xff odd \n name": File(data=b"odd"),
    "user-file": File(data=b"user", xattrs={"user.b": b"2"}),
}


def lay_out(stack: Stack) -> None:
    """TREE in the bottom lower and, with other attributes of directories, a part of it above."""
    stack.write(stack.lowers[-1], TREE)
    if len(stack.lowers) > 1:
        top = stack.lowers[0]
        stack.write(
            top,
            {
                "dir": Dir(mode=0o750, uid=3, gid=4),
                "dir/from-top": File(data=b"top"),
                "moved": Dir(),
                "moved/from-top": File(data=b"top"),
                "untouched": File(data=b"untouched, newer"),
            },
        )
        stack.write(stack.lowers[-1], {"junk": File(data=b"junk")})
        stack.whiteout(top, "junk")


def plain(stack: Stack) -> None:
    """The merged tree of `lay_out` in the stack's mount point, as a plain directory."""
    stack.write(stack.mnt, dict(TREE))
    os.unlink(stack.mnt / "untouched")
    stack.write(
        stack.mnt,
        {
            "dir/from-top": File(data=b"top"),
            "moved/from-top": File(data=b"top"),
            "untouched": File(data=b"untouched, newer"),
        },
    )


def write(path: Path, data: bytes, at: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, at)
    finally:
        os.close(fd)


def steps(mnt: Path, *, exchange: bool = True, whole_links: bool = True) -> list[Callable[[], object]]:
    """`whole_links=False` leaves out what the kernel does in its own way with index=off: changes to some
    names of a hard-linked file.
    """
    p = mnt

    def opaque() -> None:
        os.unlink(p / "opaque" / "old")
        os.rmdir(p / "opaque")
        os.mkdir(p / "opaque", 0o700)
        (p / "opaque" / "new").write_text("new")

    def swap() -> None:
        from layerfs.fdutil import RENAME_EXCHANGE, renameat2

        for one, two in ((b"swap1", b"swap2"), (b"file-swap1", b"file-swap2")):
            renameat2(
                -100,
                os.path.join(os.fsencode(p), one),
                -100,
                os.path.join(os.fsencode(p), two),
                RENAME_EXCHANGE,
            )

    todo: list[Callable[[], object]] = [
        lambda: (p / "dir" / "new").write_text("new"),
        lambda: write(p / "dir" / "f", b"F"),
        lambda: os.unlink(p / "dir" / "sub" / "g"),
        lambda: os.setxattr(p / "dir", "user.dir", b"xattr"),
        lambda: os.setxattr(p / "dir" / "sub", "system.posix_acl_default", ACL),
        lambda: os.rename(p / "moved", p / "arrived"),
        lambda: os.rename(p / "arrived" / "child", p / "child-out"),
        lambda: (p / "child-out" / "more").write_text("more"),
        lambda: os.mkdir(p / "moved"),
        lambda: (p / "moved" / "f").write_text("another f"),
        lambda: os.rename(p / "twice", p / "twice-1"),
        lambda: os.rename(p / "twice-1", p / "dir" / "twice-2"),
        lambda: os.unlink(p / "gone-dir" / "x"),
        lambda: os.rmdir(p / "gone-dir"),
        opaque,
        lambda: write(p / "big", b"changed", 5000),
        lambda: os.chmod(p / "big-chmod", 0o600),
        lambda: os.chown(p / "big-chown-then-write", 8, 9),
        lambda: write(p / "big-chown-then-write", b"later", 100_000),
        lambda: os.rename(p / "big-renamed", p / "big-new-name"),
        lambda: os.chmod(p / "big-moved-down", 0o640),
        lambda: os.rename(p / "big-moved-down", p / "dir" / "sub" / "deep" / "big-here"),
        lambda: os.truncate(p / "big-cut", 12345),
        lambda: write(p / "sparse", b"middle", 1 << 19),
        lambda: os.chown(p / "symlink", 11, 12, follow_symlinks=False),
        lambda: os.rename(p / "symlink-moved", p / "dir" / "symlink-here"),
        lambda: os.chmod(p / "fifo", 0o600),
        lambda: os.rename(p / "device", p / "device-moved"),
        lambda: os.chown(p / "socket", 1, 1),
        lambda: os.unlink(p / "gone"),
        lambda: os.unlink(p / "back"),
        lambda: (p / "back").write_text("back again"),
        lambda: os.chown(p / "setuid", 5, 5),
        lambda: os.rename(os.fsencode(p) + b"/\xff odd \n name", os.fsencode(p) + b"/dir/\xfe"),
        lambda: os.setxattr(p / "user-file", "user.c", b"3"),
        lambda: os.setxattr(p / "user-file", "system.posix_acl_access", ACL),
        lambda: os.link(p / "big", p / "big-linked"),
        lambda: os.link(p / "dir" / "new", p / "new-linked"),
        lambda: os.symlink("new-target", p / "new-symlink"),
        lambda: os.mkfifo(p / "new-fifo"),
    ]
    if exchange:
        todo.append(swap)
    if whole_links:
        todo += [
            lambda: write(p / "link-a", b"LINKED"),
            lambda: os.chmod(p / "chmod-link-b", 0o604),
            lambda: os.unlink(p / "unlinked-link-b"),
        ]
    return todo


def work_in(mnt: Path, **how: bool) -> None:
    for step in steps(mnt, **how):
        step()


def look(mnt: Path) -> Snapshot:
    # xfs lists ACLs a second time, under the names that it stores them by.
    return snapshot(mnt, hide_xattr=lambda name: name.startswith(b"trusted.SGI_ACL_"))


def unique_numbers(mnt: Path) -> dict[bytes, int]:
    """Inode numbers by name; asserts that each number is one object's, and readdir's are stat's."""
    tree = snapshot(mnt, content=False)
    seen: dict[int, frozenset[bytes]] = {}
    for name, entry in tree.items():
        assert seen.setdefault(entry.ino, entry.names) == entry.names, f"{name!r} shares its number"
    for directory in [b""] + [name for name, e in tree.items() if e.type == "dir" and name != b"."]:
        with os.scandir(os.path.join(os.fsencode(mnt), directory)) as entries:
            for item in entries:
                path = os.path.join(directory, item.name) if directory else item.name
                assert item.inode() == tree[path].ino, f"readdir and stat differ on {path!r}"
    return {name: entry.ino for name, entry in tree.items()}
