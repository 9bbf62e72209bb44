"""What an upper changed against its lowers, found on the layers themselves: no mount, no path but the layers'
roots.

Two merged trees are compared: the one with the upper and the one of the lowers alone. Redirects, opaque
marks, metadata-only copies and both whiteout forms are thereby just ways in which the first tree came about:
a renamed directory is a deletion and an added subtree, an opaque one has its hidden names deleted one by one
(image-spec layer.md: "SHOULD generate layers using explicit whiteout files"). Whatever both trees take from
the same lower directories is never looked at, so the work grows with the upper and not with the image.

Does not write tar (`commit`) and does not merge (`layerfs.stack`).
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from layerfs.oci.member import Kind, Member, display, join
from layerfs.oci.objects import Data, Found, Objects, unreadable
from layerfs.oci.snapshot import Snapshots
from layerfs.overlay import whiteout
from layerfs.stack import Entry, LowerDir, Merged, Stack, lower_directories, merge_directory


class ChangeKind(enum.Enum):
    """As docker diff prints them, and one more."""

    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"
    #: Equal to what lies below, and yet part of the layer: a directory on the way to a change (an unpacker
    #: that keeps layers apart would otherwise make it up), or a file one of whose other names changed.
    CARRIED = "="
    #: A copy that equals what lies below: no part of the layer.
    UNCHANGED = "."
    #: Left out by a pattern, with all below it: no part of the layer, whatever it is.
    EXCLUDED = "-"


class Exclude(Protocol):
    def __call__(self, path: bytes, *, is_dir: bool) -> bool:
        """Whether `path` is to be taken as if it had not been changed."""


@dataclass(slots=True)
class Change:
    """One name that differs, or is carried along. Never changed, as `Member`.

    `member` is what the name is now, hard links included (`Kind.HARDLINK` to a name that came earlier); None
    for a deletion and for what is excluded. `data`: a file's bytes; None for everything else."""

    kind: ChangeKind
    path: bytes
    member: Member | None = None
    data: Data | None = None


@dataclass(frozen=True, slots=True)
class _View:
    """One directory of a merged tree: the directories that make it up. `upper` is None where the upper does
    not have it."""

    upper: LowerDir | None
    lowers: tuple[LowerDir, ...]


def _places(directories: Iterable[LowerDir]) -> list[tuple[int, bytes]]:
    """What tells directories of layers apart; `LowerDir` objects themselves are made anew for each walk."""
    return [(directory.layer.index, directory.path) for directory in directories]


@dataclass(slots=True)
class _Frame:
    """A directory being walked: what is left to do in it, and its own change if that waits for something
    inside to be worth telling."""

    path: bytes
    new: _View
    new_names: Mapping[bytes, Entry]
    #: those of `new_names` that a listing called neither directory nor regular file
    special: Container[bytes]
    base: _View | None
    base_names: Mapping[bytes, Entry]
    todo: Iterator[bytes]
    waiting: Change | None


class ChangeFinder:
    """Compares a stack's upper with its lowers."""

    def __init__(
        self,
        stack: Stack,
        notes: list[str],
        *,
        whole: bool = False,
        keep_unchanged: bool = False,
        exclude: Exclude | None = None,
        with_data: bool = False,
        snapshots: Snapshots | None = None,
    ) -> None:
        """`notes` gathers what a layer cannot carry, one line each.

        `whole`: compares with nothing instead, so that everything in the merged tree is ADDED; then there
        need not be an upper. `keep_unchanged`: copies that equal what lies below are CARRIED. `with_data`:
        the bytes of files will be read; `snapshots`: of the upper's through this."""
        assert whole or stack.upper is not None, "nothing changes without an upper"
        self._stack = stack
        self._notes = notes
        self._whole = whole
        self._keep = keep_unchanged
        self._exclude = exclude
        self._objects = Objects(stack, snapshots)
        self._wanted: Callable[[os.stat_result], bool] | None = self._is_new if with_data else None
        #: (device, inode) of objects with several names -> the first one that was told
        self._first_names: dict[tuple[int, int], Member] = {}

    def __iter__(self) -> Iterator[Change]:
        """Changes in the order in which a layer holds them: parents before children, deletions before their
        siblings, else by name.

        Raises LayerError when a layer cannot be read, makes no sense, or changes too much meanwhile."""
        lowers = tuple(layer.root for layer in self._stack.lowers)
        upper = self._stack.upper
        new = _View(upper.root if upper is not None else None, lowers)
        base = None if self._whole else _View(None, lowers)
        frames: list[_Frame] = []
        yield from self._enter(frames, b"", new, base, self._root_change(new, base))
        # An explicit stack: a tree may be deeper than Python's.
        while frames:
            frame = frames[-1]
            name = next(frame.todo, None)
            if name is None:
                frames.pop()
                continue
            try:
                yield from self._visit(frames, frame, name)
            except OSError as error:
                raise unreadable(join(frame.path, name), error) from error

    # --- walking ---

    def _enter(
        self, frames: list[_Frame], path: bytes, new: _View, base: _View | None, own: Change | None
    ) -> Iterator[Change]:
        """Pushes a directory; gives its own change and the deletions in it."""
        merged = self._load(new)
        new_names = merged.names
        base_names = self._load(base).names if base is not None else {}
        deleted = sorted(base_names.keys() - new_names.keys())
        if base is not None and _places(new.lowers) == _places(base.lowers):
            todo = sorted(name for name, entry in new_names.items() if entry.home is None)
        else:
            todo = sorted(new_names)
        frame = _Frame(path, new, new_names, merged.special, base, base_names, iter(todo), own)
        frames.append(frame)
        if own is not None and (own.kind is not ChangeKind.CARRIED or (self._keep and new.upper is not None)):
            yield from _told(frames)
        for name in deleted:
            gone = join(path, name)
            if self._is_excluded(gone, base_names[name].is_dir):
                yield Change(ChangeKind.EXCLUDED, gone)
            else:
                yield from _told(frames)
                yield Change(ChangeKind.DELETED, gone)

    def _visit(self, frames: list[_Frame], frame: _Frame, name: bytes) -> Iterable[Change]:
        """What there is to tell of one name in the innermost directory."""
        entry = frame.new_names[name]
        if entry.is_dir or name in frame.base_names or frame.waiting is not None:
            return self._compare_name(frames, frame, name)
        # Most names of most uppers: new, and so are all the directories above.
        path = join(frame.path, name)
        if self._is_excluded(path, is_dir=False):
            return (Change(ChangeKind.EXCLUDED, path),)
        now = self._look(frame, name, entry, path)
        return () if now is None else (self._told_as(ChangeKind.ADDED, path, now),)

    def _compare_name(self, frames: list[_Frame], frame: _Frame, name: bytes) -> Iterator[Change]:
        path = join(frame.path, name)
        entry = frame.new_names[name]
        base_entry = frame.base_names.get(name)
        new_child = self._child(frame.new, name, entry) if entry.is_dir else None
        base_child = None
        if base_entry is not None and frame.base is not None and base_entry.is_dir:
            base_child = self._child(frame.base, name, base_entry)
        if base_entry is not None and _is_same(entry, base_entry, new_child, base_child):
            return
        if self._is_excluded(path, entry.is_dir):
            yield Change(ChangeKind.EXCLUDED, path)
            return
        now = self._look(frame, name, entry, path)
        if now is None:
            if base_entry is not None:
                yield from _told(frames)
                yield Change(ChangeKind.DELETED, path)
            return
        then = None
        if base_entry is not None and frame.base is not None:
            then = self._describe(frame.base, name, base_entry, path)
        kind = _compare(now, then)
        if kind is ChangeKind.UNCHANGED and (new_child is not None or self._keep or now.stat.st_nlink > 1):
            kind = ChangeKind.CARRIED
        if new_child is not None:
            yield from self._enter(frames, path, new_child, base_child, Change(kind, path, now.member))
            return
        if kind is not ChangeKind.UNCHANGED:
            yield from _told(frames)
        yield self._told_as(kind, path, now)

    def _look(self, frame: _Frame, name: bytes, entry: Entry, path: bytes) -> Found | None:
        """What is there now; None, noted, for what a layer cannot hold."""
        regular = not entry.is_dir and name not in frame.special
        try:
            now = self._describe(frame.new, name, entry, path, self._wanted, regular=regular)
        except FileNotFoundError:
            self._notes.append(f"{display(path)}: vanished while it was read")
            return None
        if now is None:
            self._notes.append(f"{display(path)}: a socket, which a layer cannot hold: skipped")
        return now

    def _told_as(self, kind: ChangeKind, path: bytes, now: Found) -> Change:
        """The change of what is no directory."""
        member, data = now.member, now.data
        if now.stat.st_nlink > 1:
            first = self._first_names.setdefault(_identity(now.stat), member)
            if first is not member:
                # Attributes of the first name: it is one object, and may have been changed since.
                member = replace(
                    first, name=path, kind=Kind.HARDLINK, size=0, target=first.name, rdev=(0, 0), xattrs={}
                )
                data = None
        return Change(kind, path, member, data)

    def _is_excluded(self, path: bytes, is_dir: bool) -> bool:
        return self._exclude is not None and self._exclude(path, is_dir=is_dir)

    def _is_new(self, st: os.stat_result) -> bool:
        """Whether the bytes of an object will be asked for: not those of a further name."""
        return st.st_nlink == 1 or _identity(st) not in self._first_names

    def _root_change(self, new: _View, base: _View | None) -> Change:
        """The root's own change. Its time alone is no reason to report it: a new upper is always younger than
        its lowers."""
        now = self._describe_root(new)
        if base is None:
            return Change(ChangeKind.ADDED, b"", now)
        if base.lowers:
            then = self._describe_root(base)
            same = now == replace(then, mtime_ns=now.mtime_ns)
            return Change(ChangeKind.CARRIED if same else ChangeKind.CHANGED, b"", now)
        return Change(ChangeKind.CARRIED, b"", now)

    def _describe_root(self, view: _View) -> Member:
        return self._objects.describe_root(view.upper if view.upper is not None else view.lowers[0])

    # --- the merged trees ---

    def _load(self, view: _View) -> Merged:
        opened = [(part, self._stack.open(part)) for part in view.lowers]
        upper = self._stack.open(view.upper) if view.upper is not None else None
        return merge_directory(upper, opened, self._stack.names)

    def _child(self, view: _View, name: bytes, entry: Entry) -> _View:
        in_upper = entry.home is None
        assert view.upper is not None or not in_upper
        upper = view.upper.child(name) if in_upper and view.upper is not None else None
        parent = self._stack.open(view.upper) if in_upper and view.upper is not None else None
        return _View(upper, lower_directories(self._stack, view.lowers, name, entry.lowers, parent))

    def _describe(
        self,
        view: _View,
        name: bytes,
        entry: Entry,
        path: bytes,
        wanted: Callable[[os.stat_result], bool] | None = None,
        *,
        regular: bool = False,
    ) -> Found | None:
        """The object under `name`; None for a socket."""
        home = entry.home if entry.home is not None else view.upper
        assert home is not None
        return self._objects.describe(home, name, path, view.lowers, wanted, regular=regular)


def _compare(now: Found, then: Found | None) -> ChangeKind:
    """Attributes first, the size of files among them: bytes are read only when all else is the same."""
    if then is None:
        return ChangeKind.ADDED
    if now.member != then.member:
        return ChangeKind.CHANGED
    if now.data is not None and then.data is not None and not now.data.equals(then.data, now.member.size):
        return ChangeKind.CHANGED
    return ChangeKind.UNCHANGED


def _identity(st: os.stat_result) -> tuple[int, int]:
    return st.st_dev, st.st_ino


def _told(frames: list[_Frame]) -> Iterator[Change]:
    """Gives the directories on the way that have waited, outermost first."""
    # Frames below the first one that still waits have been told already: a directory is told after its
    # parent.
    start = len(frames)
    while start and frames[start - 1].waiting is not None:
        start -= 1
    for frame in frames[start:]:
        change, frame.waiting = frame.waiting, None
        assert change is not None
        yield change


def _is_same(entry: Entry, base: Entry, new_child: _View | None, base_child: _View | None) -> bool:
    """Both trees have the very same object of a lower layer here, with everything below it."""
    if entry.home is None or base.home is None or entry.is_dir != base.is_dir:
        return False
    if _places((entry.home,)) != _places((base.home,)):
        return False
    return new_child is None or (
        base_child is not None and _places(new_child.lowers) == _places(base_child.lowers)
    )


def whiteout_member(path: bytes, seconds: int) -> Member:
    """The member that deletes `path`."""
    directory, _, name = path.rpartition(b"/")
    return Member(join(directory, whiteout.PREFIX + name), Kind.FILE, 0o644, mtime_ns=seconds * 1_000_000_000)
