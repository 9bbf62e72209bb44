"""Random cases for the model tests, dense enough to meet the interesting parts of an overlay.

Drawn from a seed with a rough idea of what exists at each moment, so that most operations find what they
need and some do not. Operations drawn one by one by Hypothesis mostly miss (ENOENT), and its mutations repeat
them; so it draws only the seed, and for each item and operation whether to keep it: enough for it to shorten
what fails.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence

from hypothesis import strategies as st

from . import layers
from .layers import ATTRS, CONTENTS, NAMES, TARGETS, Item, Layer
from .machine import Case
from .ops import (
    EXCHANGE,
    IDS,
    MODES,
    NOREPLACE,
    OFFSETS,
    OPEN_FLAGS,
    SIZES,
    SLOTS,
    TIMES,
    VALUES,
    WEIGHTS,
    XATTRS,
    Op,
)

DEPTH = 4  # directories below directories
ITEMS = (11, 7, 6, 6)  # of the bottom layer, and of those above it


class Sketch:
    """What is believed to exist: path -> kind. Never asked of a real file system, so it may be wrong."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.tree: dict[str, str] = {}

    def remove(self, path: str) -> None:
        for known in [p for p in self.tree if p == path or p.startswith(path + "/")]:
            del self.tree[known]

    def add(self, path: str, kind: str) -> None:
        parent = os.path.dirname(path)
        if parent and self.tree.get(parent) != "dir":
            self.add(parent, "dir")
        if not (kind == "dir" and self.tree.get(path) == "dir"):
            self.remove(path)
        self.tree[path] = kind

    def move(self, old: str, new: str) -> None:
        moved = {p: k for p, k in self.tree.items() if p == old or p.startswith(old + "/")}
        self.remove(old)
        self.remove(new)
        for path, kind in moved.items():
            self.tree[new + path[len(old) :]] = kind

    def swap(self, one: str, two: str) -> None:
        aside = "\0"
        self.move(one, aside)
        self.move(two, one)
        self.move(aside, two)

    def dirs(self) -> list[str]:
        return ["", *(p for p, kind in self.tree.items() if kind == "dir" and p.count("/") < DEPTH - 1)]

    def some(self, *kinds: str) -> str:
        """Mostly a path of one of these kinds, or any that exists, seldom anything else."""
        chance = self.rng.random()
        fitting = [p for p, kind in self.tree.items() if not kinds or kind in kinds]
        if fitting and chance < 0.85:
            return self.rng.choice(fitting)
        if self.tree and chance < 0.92:
            return self.rng.choice(list(self.tree))
        return self.fresh()

    def fresh(self) -> str:
        """Mostly a name that does not exist, in a directory that does."""
        path = ""
        for _ in range(4):
            path = f"{self.rng.choice(self.dirs())}/{self.rng.choice(NAMES)}".lstrip("/")
            if path not in self.tree or self.rng.random() < 0.1:
                break
        return path


def draw_layers(rng: random.Random, dialect: str, links: bool = True) -> tuple[list[list[Item]], Sketch]:
    """Layers, top first, with or without hard links in them, and what they look like merged."""
    sketch = Sketch(rng)
    stack: list[list[Item]] = []
    for index in range(rng.choice((1, 2, 2, 3, 3, 4))):
        own: list[Item] = []
        taken: set[str] = set()
        for _ in range(ITEMS[index]):
            item = _draw_item(rng, dialect, index, own, sketch)
            if item.path in taken or (item.kind == "link" and not links):
                continue
            taken.add(item.path)
            own.append(item)
            if item.kind == "whiteout":
                sketch.remove(item.path)
            elif item.kind == "dir":
                if item.opaque:
                    sketch.remove(item.path)
                sketch.add(item.path, "dir")
            else:
                sketch.add(item.path, "file" if item.kind == "link" else item.kind)
        stack.insert(0, own)
    return stack, sketch


def _draw_item(rng: random.Random, dialect: str, index: int, own: Sequence[Item], sketch: Sketch) -> Item:
    kinds = ["dir"] * 4 + ["file"] * 7 + ["symlink", "fifo", "char", "socket"]
    linkable = [i.path for i in own if i.kind not in ("dir", "whiteout")]
    if linkable:
        kinds += ["link"] * 4
    if index:
        kinds += ["whiteout"] * 4
    kind = rng.choice(kinds)
    attr = rng.choice((0, rng.randrange(len(ATTRS))))
    existing = index > 0 and rng.random() < 0.5
    if kind == "whiteout":
        forms = {"kernel": ("kernel",), "xattr": ("kernel", "xattr"), "oci": ("kernel", "wh", "xattr")}
        return Item(sketch.some(), kind, form=rng.choice(forms[dialect]))
    if kind == "dir":
        opaque = rng.random() < 0.2
        form = rng.choice(("kernel", "wh")) if opaque and dialect == "oci" else "kernel"
        path = sketch.some("dir") if existing else sketch.fresh()
        return Item(path, kind, attr=attr, opaque=opaque, form=form)
    path = sketch.some() if existing else sketch.fresh()
    if kind == "link":
        return Item(path, kind, to=rng.choice(linkable))
    if kind == "symlink":
        return Item(path, kind, attr=attr, to=rng.choice(TARGETS))
    if kind == "file":
        return Item(path, kind, attr=attr, data=rng.randrange(len(CONTENTS)))
    return Item(path, kind, attr=attr)


class _OpSource:
    def __init__(self, rng: random.Random, sketch: Sketch) -> None:
        self.rng = rng
        self.sketch = sketch
        self.slots: list[str] = [""] * SLOTS  # kind of what is open there
        self.kinds = [kind for kind, weight in WEIGHTS.items() for _ in range(weight)]

    def draw(self) -> Op:
        kind = self.rng.choice(self.kinds)
        if kind in _BY_SLOT and not any(self.slots) and self.rng.random() < 0.9:
            kind = "open"
        return Op(kind, getattr(self, f"_{kind}", self._other)(kind))

    def _slot(self, *kinds: str) -> int:
        fitting = [n for n, kind in enumerate(self.slots) if kind and (not kinds or kind in kinds)]
        return self.rng.choice(fitting) if fitting else self.rng.randrange(SLOTS)

    def _open(self, kind: str) -> tuple[object, ...]:
        rng, slot = self.rng, self.rng.randrange(SLOTS)
        flags = rng.choice(tuple(OPEN_FLAGS))
        path = (
            self.sketch.some("dir") if flags == "d" else self.sketch.some("file", "file", "symlink", "fifo")
        )
        if flags in ("c", "x", "ct", "ca", "C") and rng.random() < 0.5:
            path = self.sketch.fresh()
            self.sketch.add(path, "file")
        self.slots[slot] = self.sketch.tree.get(path, "")
        return slot, path, flags, rng.choice(MODES)

    def _opendir(self, kind: str) -> tuple[object, ...]:
        slot = self.rng.randrange(SLOTS)
        self.slots[slot] = "dir"
        return slot, self.rng.choice(self.sketch.dirs())

    def _close(self, kind: str) -> tuple[object, ...]:
        slot = self._slot()
        self.slots[slot] = ""
        return (slot,)

    def _reopen(self, kind: str) -> tuple[object, ...]:
        old, slot = self._slot("file"), self.rng.randrange(SLOTS)
        self.slots[slot] = self.slots[old]
        return slot, old, self.rng.choice(("r", "r+", "a", "t"))

    def _rename(self, kind: str) -> tuple[object, ...]:
        rng = self.rng
        flags = rng.choice((0, 0, 0, 0, NOREPLACE, EXCHANGE, EXCHANGE))
        old = self.sketch.some(*rng.choice((("dir",), ("file",), ())))
        if flags == EXCHANGE or (flags == 0 and rng.random() < 0.4):
            same = self.sketch.tree.get(old)
            new = self.sketch.some(same) if same and rng.random() < 0.7 else self.sketch.some()
        else:
            new = self.sketch.fresh()
        if (
            old in self.sketch.tree
            and not f"{new}/".startswith(f"{old}/")
            and not f"{old}/".startswith(f"{new}/")
        ):
            if flags == EXCHANGE and new in self.sketch.tree:
                self.sketch.swap(old, new)
            elif flags == 0 or new not in self.sketch.tree:
                self.sketch.move(old, new)
        return old, new, flags

    def _made(self, path: str, kind: str) -> str:
        if path not in self.sketch.tree:
            self.sketch.add(path, kind)
        return path

    def _other(self, kind: str) -> tuple[object, ...]:
        rng, sketch = self.rng, self.sketch
        slot, path = self._slot("file"), sketch.some()
        mode, size, offset, seed = (
            rng.choice(MODES),
            rng.choice(SIZES),
            rng.choice(OFFSETS),
            rng.randrange(10),
        )
        xattr, value, follow = rng.choice(XATTRS), rng.randrange(len(VALUES)), rng.random() < 0.5
        who, when, name = (rng.choice(IDS), rng.choice(IDS)), rng.choice(TIMES), rng.choice(NAMES)
        match kind:
            case "read":
                return slot, offset, size
            case "write":
                return slot, rng.choice((None, offset)), size, seed
            case "ftruncate":
                return slot, size
            case "fstat" | "fsync" | "flistxattr":
                return (self._slot(),)
            case "fchmod":
                return self._slot(), mode
            case "fchown":
                return self._slot(), *who
            case "futimens":
                return self._slot(), when
            case "fsetxattr":
                return self._slot(), xattr, value
            case "fgetxattr":
                return self._slot(), xattr
            case "map_read":
                return slot, offset
            case "map_write":
                return slot, offset, seed
            case "create_at" | "mkdir_at" | "stat_at":
                return self._slot("dir"), name
            case "listdir_at":
                return (self._slot("dir"),)
            case "read_file":
                return (sketch.some("file", "symlink"),)
            case "write_file":
                flags = rng.choice(tuple(OPEN_FLAGS))
                path = sketch.some("file", "symlink") if flags not in ("x", "C") else sketch.fresh()
                return self._made(path, "file"), flags, size, seed
            case "truncate":
                return sketch.some("file", "symlink"), size
            case "mkdir":
                return self._made(sketch.fresh(), "dir"), mode
            case "rmdir":
                path = sketch.some("dir")
                if not any(p.startswith(path + "/") for p in sketch.tree):
                    sketch.remove(path)
                return (path,)
            case "unlink":
                path = sketch.some("file", "symlink", "fifo", "char", "socket")
                if sketch.tree.get(path) != "dir":
                    sketch.remove(path)
                return (path,)
            case "rmtree":
                path = sketch.some("dir")
                sketch.remove(path)
                return (path,)
            case "link":
                old = sketch.some("file", "symlink", "fifo", "char")
                return old, self._made(sketch.fresh(), sketch.tree.get(old, "file"))
            case "symlink":
                return rng.choice(TARGETS), self._made(sketch.fresh(), "symlink")
            case "mknod":
                what = rng.choice(("fifo", "char", "block", "socket", "file"))
                return self._made(sketch.fresh(), what), what, mode
            case "chmod":
                return path, mode
            case "chown":
                return path, *who, follow
            case "utimens":
                return path, when, follow
            case "touch" | "stat" | "lstat":
                return (path,)
            case "setxattr":
                return path, xattr, value, follow
            case "removexattr" | "getxattr":
                return path, xattr, follow
            case "listxattr":
                return path, follow
            case "listdir":
                return (rng.choice(sketch.dirs()),)
            case "readlink":
                return (sketch.some("symlink"),)
            case "access":
                return path, rng.choice((os.R_OK, os.W_OK, os.X_OK))
            case "su":
                return (rng.choice((0, 0, 0, 1, 2)),)
        raise AssertionError(kind)


_BY_SLOT = frozenset(
    (
        *("close", "read", "write", "ftruncate", "fstat", "fsync", "fchmod", "fchown", "futimens", "reopen"),
        *("fsetxattr", "fgetxattr", "flistxattr", "map_read", "map_write"),
        *("create_at", "mkdir_at", "stat_at", "listdir_at"),
    )
)


def draw_ops(rng: random.Random, sketch: Sketch, count: int) -> list[Op]:
    source = _OpSource(rng, sketch)
    return [source.draw() for _ in range(count)]


def draw_case(seed: int, dialect: str, count: int, links: bool = True) -> Case:
    rng = random.Random(seed)
    stack, sketch = draw_layers(rng, dialect, links)
    return Case(tuple(map(tuple, stack)), tuple(draw_ops(rng, sketch, count)))


_keep = st.sampled_from((False, *[True] * 31))


@st.composite
def cases(
    draw: st.DrawFn, dialect: str, count: int = 4, ops: int = 30, links: bool = True
) -> tuple[Case, ...]:
    """`count` independent cases, shortened by leaving items, operations, layers and cases out."""
    seed = draw(st.integers(0, 1 << 48))
    made = []
    for number in range(count):
        whole = draw_case(seed * count + number, dialect, ops, links)
        if not draw(_keep):
            continue
        stack = [tuple(item for item in layer if draw(_keep)) for layer in whole.layers if draw(_keep)]
        made.append(Case(tuple(stack) or ((),), tuple(op for op in whole.ops if draw(_keep))))
    return tuple(made)


@st.composite
def more_ops(draw: st.DrawFn, count: int) -> tuple[Op, ...]:
    """Operations for after a case, on names that it may have left."""
    rng = random.Random(draw(st.integers(0, 1 << 48)))
    _, sketch = draw_layers(rng, "kernel")
    return tuple(op for op in draw_ops(rng, sketch, count) if draw(_keep))


__all__ = ["Layer", "cases", "draw_case", "layers", "more_ops"]
