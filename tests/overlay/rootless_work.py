"""What somebody without privilege does on a tree, run by test_rootless in his situation. Not tests.

`python -m tests.overlay.rootless_work DIRECTORY OWNERS`: works below DIRECTORY, then writes what was refused
and the tree as it is seen there to stdout, pickled. OWNERS: `owners` when there are other ids to give files
to.
"""

from __future__ import annotations

import os
import pickle
import stat
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.stack import Dir, File, Hardlink, Symlink, Tree
from tests.support.tree import snapshot

BIG = b"big" * 50_000
TREE: Tree = {
    "f": File(data=b"f"),
    "gone": File(data=b"gone"),
    "big": File(data=BIG),
    "big2": File(data=BIG),
    "link": Symlink(target="f"),
    "hard1": File(data=b"hard"),
    "hard2": Hardlink("hard1"),
    "dir": Dir(),
    "dir/a": File(data=b"a"),
    "dir/sub": Dir(),
    "dir/sub/b": File(data=b"b"),
    "opaque": Dir(),
    "opaque/old": File(data=b"old"),
    "empty": Dir(),
    "setgid": Dir(mode=0o2775),
}


def steps(p: Path, *, owners: bool) -> list[Callable[[], object]]:
    def opaque() -> None:
        os.unlink(p / "opaque/old")
        os.rmdir(p / "opaque")
        os.mkdir(p / "opaque", 0o700)
        (p / "opaque/new").write_text("new")

    todo: list[Callable[[], object]] = [
        lambda: (p / "f").write_text("changed"),
        lambda: os.unlink(p / "gone"),
        lambda: os.chmod(p / "big", 0o600),
        lambda: os.rename(p / "big2", p / "dir/big3"),
        lambda: os.rename(p / "dir", p / "moved"),
        lambda: (p / "moved/sub/c").write_text("c"),
        lambda: os.unlink(p / "moved/sub/b"),
        opaque,
        lambda: os.rmdir(p / "empty"),
        lambda: os.rename(p / "link", p / "link2"),
        lambda: (p / "hard1").write_text("both"),
        lambda: os.mkfifo(p / "fifo"),
        lambda: (p / "setgid/inside").write_text("x"),
        lambda: os.setxattr(p / "f", "user.a", b"1"),
        lambda: os.setxattr(p / "f", "trusted.a", b"1"),
        lambda: os.mknod(p / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3)),
        lambda: os.chown(p / "f", 12345678, 12345678),
    ]
    if owners:
        todo += [
            lambda: os.chown(p / "moved/a", 5, 6),
            lambda: os.chown(p / "moved", 7, 8),
            lambda: os.chown(p / "link2", 9, 9, follow_symlinks=False),
            lambda: os.chmod(p / "moved/a", 0o4755),
        ]
    return todo


def main() -> None:
    root = Path(sys.argv[1])
    os.umask(0o022)
    refused = []
    for number, step in enumerate(steps(root, owners=sys.argv[2] == "owners")):
        try:
            step()
        except OSError as error:
            refused.append((number, error.errno))
    pickle.dump((refused, snapshot(root)), sys.stdout.buffer)


if __name__ == "__main__":
    main()
