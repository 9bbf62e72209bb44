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
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from layerfs.errors import LayerError
from layerfs.fdutil import OwnedFd, at_path, openat2
from layerfs.oci.member import Kind, Member, display, join
from layerfs.overlay import whiteout
from layerfs.overlay.names import shown
from layerfs.stack import (
    Entry,
    LowerDir,
    Merged,
    Stack,
    data_source,
    lower_directories,
    merge_directory,
    read_marks,
)
from layerfs.stack.layer import INSIDE

#: Labels that the machine puts on every file, and ACLs that only a server can interpret: they are of this
#: place, not of the image.
_OF_THIS_MACHINE = ("security.selinux", "security.ima", "security.evm", "system.nfs4_acl")
_COMPARE = 1 << 20

_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIR,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
}


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


@dataclass(frozen=True, slots=True)
class Source:
    """Where the bytes of a file are."""

    home: LowerDir
    name: bytes


@dataclass(frozen=True, slots=True)
class Change:
    """One name that differs, or is carried along.

    `member` is what the name is now, hard links included (`Kind.HARDLINK` to a name that came earlier); None
    for a deletion. `source`: where a file's data are; None for everything else."""

    kind: ChangeKind
    path: bytes
    member: Member | None = None
    source: Source | None = None


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
class _Object:
    """One object of a merged tree, described as a member under its path; `stat` is its own, `source` set for
    files."""

    member: Member
    stat: os.stat_result
    source: Source | None


@dataclass(slots=True)
class _Frame:
    """A directory being walked: what is left to do in it, and its own change if that waits for something
    inside to be worth telling."""

    path: bytes
    new: _View
    new_names: Mapping[bytes, Entry]
    base: _View | None
    base_names: Mapping[bytes, Entry]
    todo: Iterator[bytes]
    waiting: Change | None


class ChangeFinder:
    """Compares a stack's upper with its lowers. `notes` gathers what a layer cannot carry, one line each."""

    def __init__(self, stack: Stack, notes: list[str]) -> None:
        assert stack.upper is not None, "nothing changes without an upper"
        self._stack = stack
        self._upper_root = stack.upper.root
        self._notes = notes
        #: (device, inode) of objects with several names -> the first one that was told
        self._first_names: dict[tuple[int, int], bytes] = {}

    def __iter__(self) -> Iterator[Change]:
        """Changes in the order in which a layer holds them: parents before children, deletions before their
        siblings, else by name.

        Raises LayerError when a layer cannot be read, makes no sense, or changes too much meanwhile."""
        lowers = tuple(layer.root for layer in self._stack.lowers)
        new, base = _View(self._upper_root, lowers), _View(None, lowers)
        waiting = self._root_change(new, base)
        frames: list[_Frame] = []
        pending = self._enter(frames, b"", new, base, waiting)
        yield from pending
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
                raise _unreadable(join(frame.path, name), error) from error

    # --- walking ---

    def _enter(
        self, frames: list[_Frame], path: bytes, new: _View, base: _View | None, own: Change | None
    ) -> Iterator[Change]:
        """Pushes a directory; gives its own change and the deletions in it."""
        new_names = self._load(new).names
        base_names = self._load(base).names if base is not None else {}
        deleted = sorted(base_names.keys() - new_names.keys())
        if base is not None and _places(new.lowers) == _places(base.lowers):
            todo = sorted(name for name, entry in new_names.items() if entry.home is None)
        else:
            todo = sorted(new_names)
        frame = _Frame(path, new, new_names, base, base_names, iter(todo), own)
        frames.append(frame)
        if own is not None and own.kind is not ChangeKind.CARRIED:
            yield from _told(frames)
        if deleted:
            yield from _told(frames)
            for name in deleted:
                yield Change(ChangeKind.DELETED, join(path, name))

    def _visit(self, frames: list[_Frame], frame: _Frame, name: bytes) -> Iterator[Change]:
        path = join(frame.path, name)
        entry = frame.new_names[name]
        base_entry = frame.base_names.get(name)
        new_child = self._child(frame.new, name, entry) if entry.is_dir else None
        base_child = None
        if base_entry is not None and frame.base is not None and base_entry.is_dir:
            base_child = self._child(frame.base, name, base_entry)
        if base_entry is not None and _is_same(entry, base_entry, new_child, base_child):
            return
        try:
            now = self._describe(frame.new, name, entry, path)
        except FileNotFoundError:
            self._notes.append(f"{display(path)}: vanished while it was read")
            if base_entry is not None:
                yield from _told(frames)
                yield Change(ChangeKind.DELETED, path)
            return
        if now is None:
            self._notes.append(f"{display(path)}: a socket, which a layer cannot hold: skipped")
            if base_entry is not None:
                yield from _told(frames)
                yield Change(ChangeKind.DELETED, path)
            return
        then = None
        if base_entry is not None and frame.base is not None:
            then = self._describe(frame.base, name, base_entry, path)
        kind = self._compare(now, then)
        if new_child is not None:
            if kind is ChangeKind.UNCHANGED:
                kind = ChangeKind.CARRIED
            yield from self._enter(frames, path, new_child, base_child, Change(kind, path, now.member))
            return
        if now.stat.st_nlink > 1:
            key = (now.stat.st_dev, now.stat.st_ino)
            first = self._first_names.setdefault(key, path)
            if kind is ChangeKind.UNCHANGED:
                kind = ChangeKind.CARRIED
            if first != path:
                now.member = replace(
                    now.member, kind=Kind.HARDLINK, size=0, target=first, rdev=(0, 0), xattrs={}
                )
                now.source = None
        if kind is not ChangeKind.UNCHANGED:
            yield from _told(frames)
        yield Change(kind, path, now.member, now.source)

    def _root_change(self, new: _View, base: _View) -> Change:
        """The root's own change. Its time alone is no reason to report it: a new upper is always younger than
        its lowers."""
        now = self._describe_root(new)
        if base.lowers:
            then = self._describe_root(base)
            same = now == replace(then, mtime_ns=now.mtime_ns)
            return Change(ChangeKind.CARRIED if same else ChangeKind.CHANGED, b"", now)
        return Change(ChangeKind.CARRIED, b"", now)

    def _describe_root(self, view: _View) -> Member:
        top = view.upper if view.upper is not None else view.lowers[0]
        fd = self._stack.open(top)
        return _member(b"", os.stat(fd.fd), self._xattrs(fd.fd, b"."), b"")

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

    def _describe(self, view: _View, name: bytes, entry: Entry, path: bytes) -> _Object | None:
        """The object under `name`; None for a socket."""
        home = entry.home if entry.home is not None else view.upper
        assert home is not None
        directory = self._stack.open(home)
        st = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
        if stat.S_ISSOCK(st.st_mode):
            return None
        target = os.readlink(name, dir_fd=directory.fd) if stat.S_ISLNK(st.st_mode) else b""
        member = _member(path, st, self._xattrs(directory.fd, name), target)
        source = None
        if member.kind is Kind.FILE:
            source = Source(home, name)
            marks = read_marks(directory.fd, name, self._stack.names, lower=entry.home is not None)
            if marks.metacopy:
                below = entry.home.layer.index if entry.home is not None else -1
                source = Source(*data_source(self._stack, view.lowers, name, marks.redirect, below))
        return _Object(member, st, source)

    @staticmethod
    def _xattrs(directory: int, name: bytes) -> dict[str, bytes]:
        """xattrs as a user of the mount sees them: overlay's own left out, one level of escape taken off."""
        where = at_path(directory, name)
        found: dict[str, bytes] = {}
        try:
            for stored in os.listxattr(where, follow_symlinks=False):
                attribute = shown(stored)
                if attribute is not None and attribute not in _OF_THIS_MACHINE:
                    found[attribute] = os.getxattr(where, stored, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENODATA):
                raise
        return found

    # --- comparing ---

    def _compare(self, now: _Object, then: _Object | None) -> ChangeKind:
        if then is None:
            return ChangeKind.ADDED
        if now.member != then.member:
            return ChangeKind.CHANGED
        if now.source is not None and then.source is not None and not self._same_data(now, then):
            return ChangeKind.CHANGED
        return ChangeKind.UNCHANGED

    def _same_data(self, now: _Object, then: _Object) -> bool:
        assert now.source is not None and then.source is not None
        if _place(now.source) == _place(then.source):
            return True
        left, right = self._open(now.source), self._open(then.source)
        offset = 0
        while offset < now.member.size:
            a = os.pread(left.fd, _COMPARE, offset)
            b = os.pread(right.fd, _COMPARE, offset)
            if a != b or not a:
                return False
            offset += len(a)
        return True

    def open(self, source: Source, path: bytes) -> OwnedFd:
        """A readable descriptor of the data of the file `path`. Raises LayerError."""
        try:
            return self._open(source)
        except OSError as error:
            raise _unreadable(path, error) from error

    def _open(self, source: Source) -> OwnedFd:
        """Does not change the file's access time where we may."""
        directory = self._stack.open(source.home)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = OwnedFd(openat2(directory.fd, source.name, flags | os.O_NOATIME, resolve=INSIDE))
        except PermissionError:
            fd = OwnedFd(openat2(directory.fd, source.name, flags, resolve=INSIDE))
        if not stat.S_ISREG(os.fstat(fd.fd).st_mode):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return fd


def _unreadable(path: bytes, error: OSError) -> LayerError:
    if error.errno == errno.ENOENT:
        return LayerError(f"{display(path)}: vanished while it was read; try again when nobody changes it")
    return LayerError(f"{display(path)}: {error.strerror}", error.errno)


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


def _place(source: Source) -> tuple[int, bytes, bytes]:
    return source.home.layer.index, source.home.path, source.name


def _member(path: bytes, st: os.stat_result, xattrs: dict[str, bytes], target: bytes) -> Member:
    kind = _KINDS[stat.S_IFMT(st.st_mode)]
    return Member(
        path,
        kind,
        stat.S_IMODE(st.st_mode),
        st.st_uid,
        st.st_gid,
        st.st_mtime_ns,
        st.st_size if kind is Kind.FILE else 0,
        target,
        (os.major(st.st_rdev), os.minor(st.st_rdev)) if kind in (Kind.CHAR, Kind.BLOCK) else (0, 0),
        xattrs,
    )


def whiteout_member(path: bytes, seconds: int) -> Member:
    """The member that deletes `path`."""
    directory, _, name = path.rpartition(b"/")
    return Member(join(directory, whiteout.PREFIX + name), Kind.FILE, 0o644, mtime_ns=seconds * 1_000_000_000)
