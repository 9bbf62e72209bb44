"""One table of command lines for fuse-overlayfs and mount.layerfs: the same exit status, the same tree after
the same work, before and after a remount. Where they differ on purpose the table says why.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.processes import eventually
from tests.support.tree import Snapshot, assert_equal, snapshot

from .conftest import Box, helper_command

WRITABLE = "lowerdir={a}:{b},upperdir={u},workdir={w}"


@dataclass(frozen=True)
class Line:
    """One command line, `{NAME}` being a path of the box. `differs`: why the exit status is another one on
    purpose; `ours` is layerfs's then.
    """

    words: str
    differs: str = ""
    ours: int = 0
    #: run in the box instead of /
    inside: bool = False
    #: also as an ordinary user, and mounted a second time
    thorough: bool = False

    def __str__(self) -> str:
        return self.words.replace(WRITABLE, "…")


def options(*more: str) -> str:
    return "-o " + ",".join((WRITABLE, *more)) + " {m}"


LINES = [
    # forms
    Line(options(), thorough=True),
    Line("{m} -o " + WRITABLE, thorough=True),
    Line("-o lowerdir={a}:{b} -o upperdir={u} -o workdir={w} {m}"),
    Line("-o lowerdir={a}:{b} {m}", thorough=True),
    Line("-o lowerdir=l/A:l/B,upperdir=u,workdir=w m", inside=True, thorough=True),
    Line("-o lowerdir=./a:b,upperdir=../BOX/u,workdir=w {m}", inside=True),
    Line("-h"),
    Line("--help"),
    Line("--version"),
    Line("-V"),
    # every option of fuse-overlayfs
    *(
        Line(options(option))
        for option in (
            "volatile",
            "redirect_dir=off",
            "metacopy=on",
            "metacopy=off",
            "timeout=0",
            "timeout=1.5",
            "threaded=0",
            "threaded=1",
            "fsync=0",
            "fsync=1",
            "fast_ino=1",
            "writeback=0",
            "writeback=1",
            "noxattrs=0",
            "noxattrs=1",
            "xattr_permissions=0",
            "static_nlink",
            "noacl",
            "ino32_t",
            "xino=off",
            "xino=auto",
            "auto_unmount",
            "nosuid,nodev,noexec",
            "suid,dev,exec",
            "ro",
            "noatime,nodiratime",
            'context="system_u:object_r:container_file_t:s0"',
            "fsname=image",
            "uidmapping=0:0:4294967294,gidmapping=:0:0:4294967294",
            "squash_to_root",
            "squash_to_uid=7,squash_to_gid=8",
        )
    ),
    # what nobody knows, and known words in forms that nobody knows
    *(
        Line(options(option))
        for option in ("frobnicate", "frob=1", "volatile=1", "static_nlink=1", "noacl=1", "timeout", "fsync")
    ),
    # wrong
    Line(""),
    Line("{m}", thorough=True),
    Line("-o upperdir={u},workdir={w} {m}"),
    Line("-o lowerdir={nope} {m}", thorough=True),
    Line("-o lowerdir={a}:{nope} {m}"),
    Line("-o lowerdir={a/in-a} {m}"),
    Line("-o lowerdir={a},upperdir={nope},workdir={w} {m}"),
    Line("-o lowerdir={a},upperdir={u},workdir={nope} {m}"),
    Line("-o lowerdir={a} {nope}"),
    Line(options("threaded=x"), thorough=True),
    Line(options("fsync=x")),
    Line(options("noxattrs=x")),
    Line(options("xattr_permissions=x")),
    Line(options("xattr_permissions=3")),
    Line(options("plugins=/nope.so")),
    Line(options("uidmapping=0:1")),
    Line(options("uidmapping=a:b:c")),
    Line(options("squash_to_uid=x")),
    Line(options("timeout=x")),
    # on purpose
    Line(options("redirect_dir=on"), "renames of directories need no copy here"),
    Line(options("kernel_cache"), "fuse-overlayfs hands it to libfuse 3, which does not know it"),
    Line(options("splice_read,splice_write,splice_move"), "the same"),
    Line("-o lowerdir={a}:{co\\:lon},upperdir={u},workdir={w} {m}", "escaped as the kernel has it"),
    Line("-o lowerdir={a},upperdir={u} {m}", "UPPER.work is made"),
]


def command_of(kind: str) -> list[str]:
    return ["fuse-overlayfs"] if kind == "fuse-overlayfs" else helper_command()


def use(root: Path) -> list[str]:
    """Does a little of everything; returns what was refused, by errno."""
    refused = []

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            refused.append(f"{name}: {os.strerror(error.errno or 0)}")

    attempt("write", lambda: (root / "in-b").write_text("changed"))
    attempt("create", lambda: (root / "new").write_text("new"))
    attempt("mkdir", (root / "dir").mkdir)
    attempt("symlink", lambda: (root / "dir" / "link").symlink_to("x"))
    attempt("unlink", (root / "in-a").unlink)
    attempt("chmod", lambda: os.chmod(root / "new", 0o640))
    attempt("setxattr", lambda: os.setxattr(root / "new", "user.a", b"1"))
    attempt("getxattr", lambda: os.getxattr(root / "new", "user.a"))
    attempt("listxattr", lambda: os.listxattr(root / "new"))
    for name in ("in-b", "new", "dir/link", "dir"):
        attempt("utime", lambda name=name: os.utime(root / name, (1e9, 1e9), follow_symlinks=False))  # type: ignore[misc]
    return refused


@dataclass
class Outcome:
    status: int
    refused: str = ""
    tree: Snapshot | None = None
    again: Snapshot | None = None


def run(kind: str, line: Line, box: Box) -> Outcome:
    """The command line's outcome in a box that is emptied before."""
    for name in ("a", "b", "u", "w", "m", "l", "co:lon"):
        subprocess.run(["rm", "-rf", box(name)], check=True)
        box.mkdir(name)
    for name in ("a", "b", "co:lon"):
        text = "b" if name == "co:lon" else name
        (box.dir / name / f"in-{text}").write_text(text)
        box.own(box.dir / name / f"in-{text}")
        os.utime(box.dir / name / f"in-{text}", (1e9, 1e9))
    os.symlink("../a", box("l/A"))
    os.symlink("../b", box("l/B"))
    words = line.words.replace("BOX", box.dir.name)
    for name in ("a/in-a", "a", "b", "u", "w", "m", "nope", "co\\:lon"):
        words = words.replace("{" + name + "}", box(name))
    argv = [*command_of(kind), *words.split()]
    cwd = str(box.dir) if line.inside else "/"
    done = box.run(*argv, cwd=cwd)
    outcome = Outcome(done.returncode)
    if not box.mounted():
        assert done.stdout or done.stderr, "says nothing, does nothing"
        return outcome
    outcome.refused = seen(box, lambda: use(box.dir / "m"))
    outcome.tree = look(box)
    unmount(box)
    if line.thorough:
        assert box.run(*argv, cwd=cwd).returncode == 0
        outcome.again = look(box)
        unmount(box)
    return outcome


def seen(box: Box, what: Callable[[], list[str]]) -> str:
    """`what` as the box's user, whose mount it is."""
    read, write = os.pipe()

    def ask() -> bool:
        os.write(write, "\n".join(what()).encode())
        return True

    assert box.as_user(ask)
    os.close(write)
    with open(read) as answer:
        return answer.read()


def look(box: Box) -> Snapshot:
    import pickle

    read, write = os.pipe()

    def ask() -> bool:
        os.write(write, pickle.dumps(snapshot(box("m"))))
        return True

    assert box.as_user(ask)
    os.close(write)
    with open(read, "rb") as answer:
        found: Snapshot = pickle.load(answer)
    return found


def unmount(box: Box) -> None:
    assert box.run("fusermount3", "-u", box("m")).returncode == 0
    assert eventually(lambda: not box.mounted() and not box.daemons())


@pytest.mark.parametrize("line", LINES, ids=str)
def test_same(root_box: Box, line: Line) -> None:
    compare(root_box, line)


@pytest.mark.parametrize("line", [line for line in LINES if line.thorough], ids=str)
def test_same_for_an_ordinary_user(user_box: Box, line: Line) -> None:
    compare(user_box, line)


def compare(box: Box, line: Line) -> None:
    if reason := mounts.why_no_fuse_overlayfs():
        pytest.skip(reason)
    theirs = run("fuse-overlayfs", line, box)
    ours = run("mount.layerfs", line, box)
    if line.differs:
        assert (ours.status, theirs.status) == (line.ours, 1 - line.ours)
        return
    assert (ours.status, ours.refused) == (theirs.status, theirs.refused)
    assert (ours.tree is None) == (theirs.tree is None)
    if ours.tree is not None and theirs.tree is not None:
        labels = ("fuse-overlayfs", "layerfs")
        # The root's times are those of making the box.
        for tree in (theirs.tree, ours.tree, theirs.again, ours.again):
            if tree is not None:
                del tree[b"."]
        assert_equal(theirs.tree, ours.tree, labels=labels)
        if line.thorough:
            assert theirs.again is not None and ours.again is not None
            assert_equal(theirs.again, ours.again, labels=labels, message="mounted again")
