"""The operations that take several steps on disk, over one pair of lower layers."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Callable
from pathlib import Path

from tests.support.stack import Dir, File, Hardlink, Node, Stack, Symlink, Tree

from .harness import Scenario

_libc = ctypes.CDLL(None, use_errno=True)
NOREPLACE, EXCHANGE = 1, 2

BOTTOM: Tree = {
    "big": File(data=b"big" * 50_000, mode=0o640, uid=1000, xattrs={"user.a": b"1"}),
    "holes": File(data=b"end", offset=1 << 20, size=2 << 20),
    "small": File(data=b"small"),
    "link": Symlink(target="small"),
    "fifo": Node(kind=stat.S_IFIFO),
    "deep": Dir(mode=0o2775, gid=1000),
    "deep/er": Dir(xattrs={"user.d": b"d"}),
    "deep/er/file": File(data=b"deep"),
    "deep/er/other": File(data=b"other"),
    "merged": Dir(),
    "merged/below": File(data=b"below"),
    "empty": Dir(),
    "names": Dir(),
    "names/one": File(data=b"shared" * 1000),
    "names/two": Hardlink("names/one"),
    "deep/three": Hardlink("names/one"),
}  # fmt: skip
TOP: Tree = {"merged": Dir(mode=0o700), "merged/above": File(data=b"above")}


def lay_out(stack: Stack) -> None:
    top, bottom = stack.lowers
    stack.write(bottom, BOTTOM)
    stack.write(top, TOP)
    for layer in (top, bottom):
        os.utime(layer, ns=(10**18, 10**18))


def rename(mnt: Path, old: str, new: str, flags: int = 0) -> None:
    if _libc.renameat2(-100, bytes(mnt / old), -100, bytes(mnt / new), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), old)


def append(mnt: Path, name: str) -> None:
    fd = os.open(mnt / name, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, b"appended")
        os.fsync(fd)
    finally:
        os.close(fd)


def create(mnt: Path, name: str) -> None:
    os.close(os.open(mnt / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640))


def create_as_user(mnt: Path, name: str) -> None:
    os.setegid(1000)
    os.seteuid(1000)
    try:
        create(mnt, name)
    finally:
        os.seteuid(0)
        os.setegid(0)


def empty_merged(mnt: Path) -> None:
    os.unlink(mnt / "merged/below")
    os.unlink(mnt / "merged/above")


def fill(mnt: Path) -> None:
    """Some upper objects."""
    os.mkdir(mnt / "made")
    create(mnt, "made/file")
    append(mnt, "made/file")


def made_emptied(mnt: Path) -> None:
    fill(mnt)
    os.unlink(mnt / "made/file")


def made_and_empty_gone(mnt: Path) -> None:
    fill(mnt)
    os.rmdir(mnt / "empty")


def without(name: str) -> Callable[[Path], None]:
    def run(mnt: Path) -> None:
        path = mnt / name
        path.rmdir() if path.is_dir() else path.unlink()

    return run


def moved(old: str, new: str, flags: int = 0) -> Callable[[Path], None]:
    return lambda mnt: rename(mnt, old, new, flags)


SCENARIOS = [
    Scenario("append", lambda m: append(m, "big"), result="big"),
    Scenario("append-holes", lambda m: append(m, "holes"), result="holes"),
    Scenario("append-deep", lambda m: append(m, "deep/er/file"), result="deep/er/file"),
    Scenario("chmod", lambda m: os.chmod(m / "big", 0o600), result="big"),
    Scenario("chmod-no-metacopy", lambda m: os.chmod(m / "big", 0o600), options={"metacopy": False}),
    Scenario("fill-metacopy", lambda m: append(m, "big"), lambda m: os.chmod(m / "big", 0o600), "big"),
    Scenario("truncate", lambda m: os.truncate(m / "big", 10), result="big"),
    Scenario("chown-symlink", lambda m: os.chown(m / "link", 5, 5, follow_symlinks=False)),
    Scenario("chmod-fifo", lambda m: os.chmod(m / "fifo", 0o600)),
    Scenario("setxattr-dir", lambda m: os.setxattr(m / "deep/er", "user.x", b"x"), result="deep/er"),
    Scenario("unlink", without("big"), result="."),
    Scenario("unlink-copied", without("big"), lambda m: append(m, "big"), "."),
    Scenario("unlink-made", without("made/file"), fill, "made"),
    Scenario("rmdir", without("empty"), result="."),
    Scenario("rmdir-merged", without("merged"), empty_merged, "."),
    Scenario(
        "rmdir-made",
        without("made"),
        made_emptied,
        ".",
    ),
    Scenario("create", lambda m: create(m, "deep/er/new"), result="deep/er"),
    Scenario(
        "create-as-user",
        lambda m: create_as_user(m, "merged/new"),
        lambda m: os.chmod(m / "merged", 0o777),
    ),
    Scenario("create-over-whiteout", lambda m: create(m, "big"), without("big"), "."),
    Scenario("mkdir-over-whiteout", lambda m: os.mkdir(m / "empty"), without("empty"), "."),
    Scenario("link", lambda m: os.link(m / "big", m / "deep/big"), result="deep"),
    Scenario("link-over-whiteout", lambda m: os.link(m / "big", m / "small"), without("small"), "."),
    Scenario("links-append", lambda m: append(m, "names/two"), result="names/two"),
    Scenario("links-chmod", lambda m: os.chmod(m / "names/one", 0o600), result="names/one"),
    Scenario("links-unlink", without("deep/three"), result="deep"),
    Scenario("links-rename", moved("deep/three", "three"), result="."),
    Scenario("links-moved", lambda m: append(m, "moved/three"), moved("deep", "moved"), "moved/three"),
    Scenario("rename-file", moved("big", "deep/moved"), result="deep"),
    Scenario("rename-file-over", moved("big", "small"), result="."),
    Scenario("rename-made-over", moved("made/file", "big"), fill, "."),
    Scenario("rename-over-whiteout", moved("big", "small"), without("small"), "."),
    Scenario("rename-dir", moved("deep", "merged/moved"), result="merged"),
    Scenario("rename-merged-dir", moved("merged", "moved"), result="."),
    Scenario("rename-dir-again", moved("moved", "again"), moved("deep", "moved"), "."),
    Scenario("rename-dir-over-dir", moved("deep", "merged"), empty_merged, "."),
    Scenario("rename-made-dir-over", moved("made", "empty"), fill, "."),
    Scenario("rename-dir-over-whiteout", moved("deep", "empty"), without("empty"), "."),
    Scenario(
        "rename-made-dir-over-whiteout",
        moved("made", "empty"),
        made_and_empty_gone,
        ".",
    ),
    Scenario("exchange-files", moved("big", "deep/er/file", EXCHANGE), result="deep/er"),
    Scenario("exchange-file-dir", moved("big", "deep", EXCHANGE), result="."),
    Scenario("exchange-dirs", moved("merged", "deep/er", EXCHANGE), result="deep"),
    Scenario("exchange-made", moved("made", "big", EXCHANGE), fill, "."),
    Scenario("rename-dir-no-redirect", moved("deep", "moved"), options={"redirect_dir": False}, result="."),
    Scenario("file-form-unlink", without("big"), result=".", file_whiteouts=True),
    Scenario(
        "file-form-unlink-copied",
        without("big"),
        lambda m: append(m, "big"),
        ".",
        file_whiteouts=True,
    ),
    Scenario("file-form-rmdir", without("merged"), empty_merged, ".", file_whiteouts=True),
    Scenario("file-form-create", lambda m: create(m, "big"), without("big"), ".", file_whiteouts=True),
    Scenario("file-form-rename", moved("big", "moved"), result=".", file_whiteouts=True),
    Scenario("file-form-rename-dir", moved("deep", "moved"), result=".", file_whiteouts=True),
    Scenario("file-form-exchange", moved("big", "deep/er", EXCHANGE), result="deep", file_whiteouts=True),
]
