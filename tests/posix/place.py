"""The directory a conformance function works in, and what it may ask of it; the standard tree that it holds.

Knows how to act as another user and how to run a function over the oracle. Expects nothing itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pickle
import shutil
import stat
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tests.support.mounts import Mounted
from tests.support.stack import Dir, Entry, File, Hardlink, Node, Stack, Symlink, Tree, scratch_root

#: Set by --file-system: where plain directories for comparison are made.
ORACLE_BASE = "LAYERFS_TEST_ORACLES"
USER = 65534
OTHER = 1234

BIG = bytes(range(256)) * 1200  # 300 KiB, not a multiple of a page's content

# Every kind of entry, in every state that tests ask for. Names are used by the tests.
STANDARD: Tree = {
    "f": File(data=b"hello world\n"),
    "f2": File(data=b"second\n", mode=0o640),
    "big": File(data=BIG),
    "empty": File(),
    "sparse": File(data=b"end", offset=1 << 20, size=3 << 20),
    "d": Dir(),
    "d/a": File(data=b"in d/a\n"),
    "d/b": File(data=b"in d/b\n"),
    "d/sub": Dir(mode=0o750),
    "d/sub/c": File(data=b"deep\n"),
    "d/sub/l": Symlink(target="../a"),
    "d2": Dir(),
    "d2/k": File(data=b"in d2/k\n"),
    "e": Dir(),
    "e2": Dir(),
    "l": Symlink(target="f"),
    "ld": Symlink(target="d"),
    "lx": Symlink(target="nowhere"),
    "loop": Symlink(target="loop"),
    "h1": File(data=b"linked\n"),
    "h2": Hardlink("h1"),
    "fifo": Node(kind=stat.S_IFIFO),
    "sock": Node(kind=stat.S_IFSOCK),
    "chr": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 3), mode=0o666),
    "blk": Node(kind=stat.S_IFBLK, rdev=os.makedev(7, 99), mode=0o600),
    "suid": File(data=b"#!/bin/sh\n", mode=0o6755),
    "x": File(data=b"with xattrs\n", xattrs={"user.one": b"1", "user.two": b"2" * 100}),
}

# What tests of permissions need besides.
PEOPLE: Tree = {
    **STANDARD,
    "open": Dir(mode=0o777),
    "open/f": File(data=b"anyone\n", mode=0o666),
    "open/mine": File(data=b"mine\n", mode=0o644, uid=USER, gid=USER),
    "open/theirs": File(data=b"theirs\n", mode=0o600, uid=OTHER, gid=OTHER),
    "open/mydir": Dir(mode=0o755, uid=USER, gid=USER),
    "open/mydir/k": File(data=b"k\n", mode=0o644, uid=USER, gid=USER),
    "sticky": Dir(mode=0o1777),
    "sticky/mine": File(data=b"mine\n", uid=USER, gid=USER),
    "sticky/theirs": File(data=b"theirs\n", mode=0o666, uid=OTHER, gid=OTHER),
    "sticky/mydir": Dir(uid=USER, gid=USER),
    "sticky/theirdir": Dir(uid=OTHER, gid=OTHER, mode=0o777),
    "sgid": Dir(mode=0o2777, gid=OTHER),
    "sgid/f": File(data=b"s\n", gid=OTHER),
    "closed": Dir(mode=0o700),
    "closed/f": File(data=b"hidden\n", mode=0o666),
    "noexec": Dir(mode=0o744),
    "noexec/f": File(data=b"listed\n", mode=0o666),
}


class Place:
    """A directory full of a known tree on some system. `fs / "name"` is the path of a name in it."""

    def __init__(self, path: str, system: str, arrangement: str, mounted: Mounted | None, tree: Tree) -> None:
        self.path = path
        self.system = system
        self.arrangement = arrangement
        self.mounted = mounted
        self.tree = tree
        self._fds: list[int] = []

    def __truediv__(self, name: str) -> str:
        return f"{self.path}/{name}"

    def raw(self, name: bytes) -> bytes:
        return os.fsencode(self.path) + b"/" + name

    def read(self, name: str) -> bytes:
        with open(self / name, "rb") as f:
            return f.read()

    def write(self, name: str, data: bytes) -> None:
        with open(self / name, "wb") as f:
            f.write(data)

    def append(self, name: str, data: bytes) -> None:
        with open(self / name, "ab") as f:
            f.write(data)

    def stat(self, name: str) -> os.stat_result:
        return os.lstat(self / name)

    def mode(self, name: str) -> int:
        return stat.S_IMODE(self.stat(name).st_mode)

    def names(self, name: str = ".") -> list[str]:
        return sorted(os.listdir(self / name))

    def open(self, name: str, flags: int, mode: int = 0o644) -> int:
        """A descriptor that is closed when the test ends, unless the test did it."""
        fd = os.open(self / name, flags, mode)
        self._fds.append(fd)
        return fd

    def close(self, fd: int) -> None:
        self._fds.remove(fd)
        os.close(fd)

    def release(self) -> None:
        for fd in self._fds:
            try:
                os.close(fd)
            except OSError:
                pass
        self._fds.clear()


def forked(func: Callable[[], Any], *, uid: int = 0, gid: int = 0, groups: Iterable[int] = ()) -> Any:
    """Run `func` in a forked child, as that user when `uid` is not 0; its result or exception comes back."""
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            os.close(r)
            if uid or gid or groups:
                os.setgroups(list(groups))
                os.setresgid(gid, gid, gid)
                os.setresuid(uid, uid, uid)
            try:
                answer = (True, func())
            except BaseException as e:
                answer = (False, (e if isinstance(e, OSError) else AssertionError(traceback.format_exc())))
            with os.fdopen(w, "wb") as f:
                pickle.dump(answer, f)
        except BaseException:
            code = 1
        finally:
            os._exit(code)
    os.close(w)
    with os.fdopen(r, "rb") as f:
        data = f.read()
    _, status = os.waitpid(pid, 0)
    if not data:
        raise AssertionError(f"child ended with status {status}")
    good, value = pickle.loads(data)
    if not good:
        raise value
    return value


def possible(contents: Tree) -> Tree:
    """What of a tree this process may make: an ordinary user makes no devices, trusted or security xattrs."""
    if os.geteuid() == 0:
        return contents
    found: dict[Any, Entry] = {}
    for name, entry in contents.items():
        if isinstance(entry, Node) and entry.kind in (stat.S_IFCHR, stat.S_IFBLK):
            continue
        if isinstance(entry, File | Dir | Symlink):
            mine = {k: v for k, v in entry.xattrs.items() if k.startswith(("user.", "system."))}
            entry = dataclasses.replace(entry, xattrs=mine)
        found[name] = entry
    return found


def as_user(
    func: Callable[[], Any], uid: int = USER, gid: int | None = None, groups: Iterable[int] = ()
) -> Any:
    """Run `func` as an ordinary user in a forked child."""
    return forked(func, uid=uid, gid=uid if gid is None else gid, groups=groups)


def tree(entries: Tree, *, standard: bool = False) -> Callable[[Any], Any]:
    """The tree that this test's directory holds, instead of `STANDARD`, or after it."""

    def mark(func: Any) -> Any:
        func.tree = {**STANDARD, **entries} if standard else entries
        return func

    return mark


@contextlib.contextmanager
def oracle(contents: Tree, base: str | None = None) -> Iterator[Place]:
    """A fresh plain directory that holds `contents`; in `base`, or where tests are without --file-system:
    what a plain directory does is what it does on ext4.
    """
    base = base or os.environ.get(ORACLE_BASE) or str(scratch_root())
    root = tempfile.mkdtemp(prefix="oracle-", dir=base)
    os.chmod(root, 0o755)
    stack = Stack(root, 0, writable=False)
    stack.write(stack.mnt, possible(contents), "o")
    place = Place(str(stack.mnt / "o"), "plain", "", None, contents)
    try:
        yield place
    finally:
        place.release()
        subprocess.run(["chmod", "-R", "u+rwX", root], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(root)


def compared(func: Callable[..., Any]) -> Callable[..., None]:
    """The function's result must be what it is on a plain directory."""

    @functools.wraps(func)
    def test(fs: Place, **kw: Any) -> None:
        with oracle(fs.tree) as plain:
            want = func(plain, **kw)
        got = func(fs, **kw)
        assert got == want  # left: here; right: on a plain directory

    return test


people = tree(PEOPLE)


def only(*names: str) -> Callable[[Any], Any]:
    """Just these of `PEOPLE`, with the directories above them: for functions with many parameters."""
    wanted = {name[:at] for name in names for at in range(1, len(name) + 1) if name[at : at + 1] in ("", "/")}
    return tree({k: v for k, v in PEOPLE.items() if k in wanted})
