"""Runs one example of the model tests: random layers, the same operations on a mount and on a plain
directory, and every comparison that must then hold.

Several independent cases share one set of layers and one mount, each in a directory of its own: a mount
costs more than the operations of a case. A failing example is shortened to one case by Hypothesis.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.mounts import KernelOverlay, Mounted
from tests.support.stack import Stack
from tests.support.tree import Snapshot, assert_equal, differences, lowers_guard, snapshot

from . import layers
from .ops import OPEN_FLAGS, Op, Runner

MAX_LAYERS = 4


@dataclass(frozen=True)
class Case:
    """Layers (top first) and what is done on them, inside one directory of the mount."""

    layers: tuple[layers.Layer, ...]
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Quirks:
    """What a system is known to do otherwise; none of them for layerfs unless the design lists it.

    `kernel`: kernel overlayfs, which
      - keeps the lower data in a read-only descriptor opened before copy-up (documented);
      - cannot change a removed lower object through a descriptor, for it cannot copy it up any more;
      - answers ENODATA to the removal of an ACL that is not there.
    `loose_mtime`: mtimes are not compared (kernel overlayfs with metacopy moves a file's mtime when a
    descriptor for writing makes it copy the data up later).
    `umask`: the umask while operations run. Not 0 only where a default ACL takes its place (known gap).
    `stable_ino`: inode numbers survive copy-up and remount.

    `ctimes` is no quirk but one more law: an operation moves the ctime of those objects whose ctime it moves
    in a plain directory, and of no others. It looks at everything after every operation, as root.
    """

    kernel: bool = False
    loose_mtime: bool = False
    umask: int = 0
    stable_ino: bool = True
    ctimes: bool = False


@dataclass
class Example:
    """The directories of one example: a stack whose lowers hold all cases, and the plain directory
    beside it.
    """

    cases: tuple[Case, ...]
    base: Path
    for_kernel: bool = True  # kernel overlayfs will be asked about these layers too
    user_marks: bool = False  # overlay's xattrs are user.overlay.*, as without privilege
    stack: Stack = field(init=False)
    plain: Path = field(init=False)

    def __post_init__(self) -> None:
        count = max((len(case.layers) for case in self.cases), default=1)
        self.stack = Stack(self.base, count, name="model")
        self.plain = self.stack.dir / "plain"
        self.plain.mkdir()
        for number, case in enumerate(self.cases):
            for index, layer in enumerate(case.layers):
                root = self.stack.lowers[index] / f"c{number}"
                root.mkdir()
                layers.build(layer, str(root), index + 1)
                os.utime(root, ns=(layers.OLD_NS, layers.OLD_NS + index))
        for lower in self.stack.lowers:
            # The kernel looks for whiteouts that are xattrs only below a root that is marked.
            if any(layers.opaque_mark(here) == b"x" for here, _, _ in os.walk(lower)):
                os.setxattr(lower, layers.OPAQUE, b"x")
            os.utime(lower, ns=(layers.OLD_NS, layers.OLD_NS))
        lowers = [str(lower) for lower in self.stack.lowers]
        layers.flatten(lowers, str(self.plain), for_kernel=self.for_kernel)
        if self.user_marks:
            for path in lowers:
                layers.turn_marks_over(path)
        assert self.stack.upper is not None
        for top in (self.plain, self.stack.upper):
            os.utime(top, ns=(layers.OLD_NS, layers.OLD_NS))


def run_ops(
    example: Example, mnt: Path, since_ns: int, quirks: Quirks, ops_of: Callable[[Case], tuple[Op, ...]]
) -> list[tuple[Runner, Runner]]:
    """The operations of every case on the plain directory and on `mnt`, compared one by one.

    Returns the runners, whose descriptors are still open, for the caller to close.
    """
    pairs: list[tuple[Runner, Runner]] = []
    umask = os.umask(quirks.umask)
    try:
        for number, case in enumerate(example.cases):
            since = 0 if quirks.loose_mtime else since_ns
            plain = Runner(str(example.plain / f"c{number}"), since)
            other = Runner(str(mnt / f"c{number}"), since)
            pairs.append((plain, other))
            try:
                _run_case(number, ops_of(case), plain, other, quirks)
            finally:
                plain._su(0)
    except BaseException:
        close_all(pairs)
        raise
    finally:
        os.umask(umask)
    return pairs


def _run_case(number: int, ops: tuple[Op, ...], plain: Runner, other: Runner, quirks: Quirks) -> None:
    trace: list[str] = []
    ctimes = Ctimes(plain.root, other.root) if quirks.ctimes else None
    for op in ops:
        if ctimes is not None and op.kind == "su":
            continue
        if quirks.kernel and plain.holds_orphan(op):
            continue
        expected = plain.run(op)
        if op.kind == "su":
            continue  # both runners are this process
        got = other.run(op)
        if op.kind in ("create_at", "mkdir_at") and expected is None and got is None:
            expected = got = "made"
        trace.append(f"{op!r} -> {shown(expected)}")
        if expected == got or (quirks.kernel and _of_the_kernel(op, plain, expected, got)):
            if ctimes is not None and (wrong := ctimes.wrong()):
                told = "\n  ".join([*trace, *wrong])
                raise AssertionError(f"c{number}: {op.kind} and ctimes:\n  {told}")
            continue
        trace[-1] += f"   <-- got {shown(got)}"
        raise AssertionError(f"c{number}: {op.kind} differs from a plain directory:\n  " + "\n  ".join(trace))


def _of_the_kernel(op: Op, plain: Runner, expected: Any, got: Any) -> bool:
    if op.kind in ("read", "map_read"):
        return OPEN_FLAGS[plain.modes[op.args[0]]] & os.O_ACCMODE == os.O_RDONLY
    return op.kind == "removexattr" and (expected, got) == (None, "ENODATA")


def shown(value: Any) -> str:
    if isinstance(value, bytes) and len(value) > 40:
        return f"{value[:40]!r}... ({len(value)} bytes)"
    return repr(value)


def close_all(pairs: list[tuple[Runner, Runner]]) -> None:
    for pair in pairs:
        for runner in pair:
            runner.close()


# --- inode numbers ---


class _Timestamp(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_int64), ("nsec", ctypes.c_uint32), ("_pad", ctypes.c_int32)]


class _Statx(ctypes.Structure):
    _fields_ = [
        ("mask", ctypes.c_uint32), ("_blksize", ctypes.c_uint32), ("_attributes", ctypes.c_uint64),
        ("_nlink", ctypes.c_uint32), ("_uid", ctypes.c_uint32), ("_gid", ctypes.c_uint32),
        ("_mode", ctypes.c_uint16), ("_pad", ctypes.c_uint16), ("ino", ctypes.c_uint64),
        ("_size", ctypes.c_uint64), ("_blocks", ctypes.c_uint64), ("_attributes_mask", ctypes.c_uint64),
        ("_atime", _Timestamp), ("btime", _Timestamp), ("_rest", ctypes.c_uint8 * 160),
    ]  # fmt: skip


_libc = ctypes.CDLL(None, use_errno=True)


def identity(path: bytes) -> tuple[int, int]:
    """What tells an object of the plain directory from every other there ever was: inode and time of
    birth.
    """
    buf = _Statx()
    if _libc.statx(-100, path, 0x100, 0x800 | 0x100, ctypes.byref(buf)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return buf.ino, buf.btime.sec * 10**9 + buf.btime.nsec


def numbers(plain: Path, mnt: Path, names: Snapshot) -> dict[tuple[int, int], int]:
    """Inode number in the mount of each object of the plain directory. Asserts that d_ino and st_ino
    agree.
    """
    result: dict[tuple[int, int], int] = {}
    dirs = [b"."] + [name for name, entry in names.items() if entry.type == "dir" and name != b"."]
    for name in dirs:
        with os.scandir(os.path.join(bytes(mnt), name)) as found:
            for entry in found:
                ino = entry.inode()
                path = os.path.normpath(os.path.join(name, entry.name))
                real = os.lstat(os.path.join(bytes(mnt), path)).st_ino
                assert ino == real, f"{path!r}: readdir says inode {ino}, stat {real}"
                result[identity(os.path.join(bytes(plain), path))] = real
    return result


def assert_numbers(before: dict[tuple[int, int], int], after: dict[tuple[int, int], int], when: str) -> None:
    both = before.keys() & after.keys()
    moved = sorted((before[key], after[key]) for key in both if before[key] != after[key])
    assert not moved, f"inode numbers changed {when}: {moved}"
    owners: dict[int, tuple[int, int]] = {}
    for key, ino in after.items():
        assert owners.setdefault(ino, key) == key, f"inode number {ino} stands for two objects {when}"


class Ctimes:
    """Whose ctime an operation moved, in the plain directory and in the mount."""

    def __init__(self, plain: str, other: str) -> None:
        self.plain, self.other = os.fsencode(plain), os.fsencode(other)
        self.before = self._look()

    def _look(self) -> dict[bytes, tuple[tuple[int, int], int, int]]:
        """Name -> what object it is, its ctime in the plain directory and in the mount."""
        seen = {}
        for here, dirs, files in os.walk(self.plain):
            for name in [b"", *dirs, *files]:
                path = os.path.join(here, name)
                rel = os.path.relpath(path, self.plain)
                with contextlib.suppress(FileNotFoundError):  # comparing trees is done elsewhere
                    theirs = os.lstat(os.path.join(self.other, rel)).st_ctime_ns
                    seen[rel] = (identity(path), os.lstat(path).st_ctime_ns, theirs)
        return seen

    def wrong(self) -> list[str]:
        """What moved in one and not in the other since the last call."""
        before, self.before = self.before, self._look()
        lines = []
        for name in before.keys() & self.before.keys():
            (was, plain_then, other_then), (now, plain_now, other_now) = before[name], self.before[name]
            if was == now and (plain_then != plain_now) != (other_then != other_now):
                who = "the plain directory" if plain_then != plain_now else "the mount"
                lines.append(f"the ctime of {os.fsdecode(name)!r} moved in {who} only")
        return lines


# --- the comparisons ---


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say in a failure where in the example it was."""
    try:
        yield
    except (AssertionError, OSError, RuntimeError) as exc:
        exc.add_note(f"({what})")
        raise


def against_plain(
    example: Example,
    system: Callable[[Stack], Mounted],
    quirks: Quirks,
    *,
    kernel_options: tuple[str, ...] = (),
) -> None:
    """The main law: operations on `system` and on the plain directory give the same results and equal
    trees, still so after a remount; and kernel overlayfs, with each of `kernel_options`, shows what was
    left as the same tree.
    """
    since_ns = time.time_ns() - 10**9
    with lowers_guard([str(lower) for lower in example.stack.lowers]):
        with system(example.stack) as mounted:
            with step("before any operation"):
                names = snapshot(mounted.mnt)
                assert_equal(snapshot(example.plain), names, labels=("plain", mounted.name))
                first = numbers(example.plain, mounted.mnt, names)
                assert_numbers(first, first, "before any operation")
            pairs = run_ops(example, mounted.mnt, since_ns, quirks, lambda case: case.ops)
            try:
                with step("after the operations, descriptors open"):
                    _equal_plain(example, mounted, since_ns, quirks)
            finally:
                close_all(pairs)
            with step("after the operations"):
                seen = _equal_plain(example, mounted, since_ns, quirks)
                second = numbers(example.plain, mounted.mnt, seen)
                if quirks.stable_ino:
                    assert_numbers(first, second, "by the operations")
            mounted.remount()
            with step("after a remount"):
                again = snapshot(mounted.mnt)
                assert_equal(seen, again, labels=("before", "after remount"))
                _equal_plain(example, mounted, since_ns, quirks)
                if quirks.stable_ino:
                    assert_numbers(second, numbers(example.plain, mounted.mnt, again), "by a remount")
        assert_work_is_clean(example.stack)
        for options in kernel_options:
            with step(f"under kernel overlayfs, {options}"), KernelOverlay(example.stack, options) as kernel:
                assert_equal(seen, snapshot(kernel.mnt), labels=("system", "kernel overlayfs"))
                assert_holes(example, kernel)
        if kernel_options:
            with step("remounted after kernel overlayfs"), system(example.stack) as mounted:
                assert_equal(seen, snapshot(mounted.mnt), labels=("before", "after kernel overlayfs"))


def after_kernel(
    example: Example,
    system: Callable[[Stack], Mounted],
    options: str,
    ops_of: Callable[[Case], tuple[Op, ...]],
) -> None:
    """The reverse: what operations on kernel overlayfs leave behind is shown the same by `system`, which
    then goes on with `ops_of` like a plain directory, and kernel overlayfs takes it back.
    """
    since_ns = time.time_ns() - 10**9
    with lowers_guard([str(lower) for lower in example.stack.lowers]):
        with KernelOverlay(example.stack, options) as kernel:
            quirks = Quirks(kernel=True, loose_mtime=True)
            close_all(run_ops(example, kernel.mnt, since_ns, quirks, lambda case: case.ops))
            left = _equal_plain(example, kernel, since_ns, quirks)
        with system(example.stack) as mounted:
            with step("an upper left by kernel overlayfs"):
                assert_equal(left, snapshot(mounted.mnt), labels=("kernel overlayfs", mounted.name))
            quirks = Quirks(loose_mtime=True)
            close_all(run_ops(example, mounted.mnt, since_ns, quirks, ops_of))
            with step("operations on an upper left by kernel overlayfs"):
                seen = _equal_plain(example, mounted, since_ns, quirks)
        with step("back under kernel overlayfs"), KernelOverlay(example.stack, options) as kernel:
            assert_equal(seen, snapshot(kernel.mnt), labels=("system", "kernel overlayfs"))


def _equal_plain(example: Example, mounted: Mounted, since_ns: int, quirks: Quirks) -> Snapshot:
    seen = snapshot(mounted.mnt)
    ignore = ["mtime_ns"] if quirks.loose_mtime else []
    plain = snapshot(example.plain)
    assert_equal(plain, seen, ignore=ignore, recent_ns=since_ns, labels=("plain", mounted.name))
    return seen


def assert_holes(example: Example, kernel: KernelOverlay) -> None:
    """Files that were copied up have the holes they had.

    Asked through the kernel: lseek on a FUSE mount tells nothing of holes without the gate.
    """
    os.sync()
    plain, seen = snapshot(example.plain, holes=True), snapshot(kernel.mnt, holes=True)
    wrong = [line for line in differences(plain, seen, labels=("plain", "upper")) if ": extents:" in line]
    assert not wrong, "\n  ".join(["holes differ:", *wrong])


def assert_work_is_clean(stack: Stack) -> None:
    """Nothing half-made is left in the work directory. The shared whiteout may stay for the next mount."""
    assert stack.work is not None
    scratch = stack.work / "work"
    left = [p for p in scratch.iterdir() if p.lstat().st_rdev or not p.is_char_device()]
    assert not left, f"left in the work directory: {left}"
