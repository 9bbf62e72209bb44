"""Stacks of directories to mount: lowers, upper, work and mount point, and ways to spread a tree over them.

Makes directories and fills them by hand, as an image builder or an earlier mount would have left them.
Mounts nothing (that is `mounts`) and compares nothing (that is `tree`).

A tree is described once (`Tree`: relative path -> `File`, `Dir`, ...), and `Stack.populate` lays it out in
one of `ARRANGEMENTS`; whatever the arrangement, the merged view must be exactly the described tree.
Everything else that the arrangement writes (older copies, junk behind whiteouts and opaque directories,
entries of another type under the same name) must stay invisible.
"""

from __future__ import annotations

import itertools
import os
import secrets
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "ARRANGEMENTS",
    "OLD_NS",
    "Dir",
    "Entry",
    "File",
    "Hardlink",
    "Node",
    "Stack",
    "Symlink",
    "Tree",
    "fs_type",
    "scratch_root",
    "set_scratch_root",
]

# Times of everything that is laid out: long ago, with odd nanoseconds, so that a lost or rounded time shows.
OLD_NS = 981_173_106_123_456_789

ARRANGEMENTS = ("all-upper", "all-lower", "merged", "deep30")
_LOWERS_OF = {"all-upper": 1, "all-lower": 1, "merged": 3, "deep30": 30}


class Entry:
    """What a name of a `Tree` stands for."""


@dataclass(frozen=True, kw_only=True)
class _Common(Entry):
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = OLD_NS
    xattrs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class File(_Common):
    """A regular file. `size` longer than `data` leaves a hole at the end; `offset` one at the front."""

    data: bytes = b""
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Dir(_Common):
    mode: int = 0o755


@dataclass(frozen=True, kw_only=True)
class Symlink(_Common):
    target: str | bytes = b""
    mode: int = 0o777


@dataclass(frozen=True, kw_only=True)
class Node(_Common):
    """A fifo, socket or device: `kind` is one of the S_IF constants."""

    kind: int = stat.S_IFIFO
    rdev: int = 0


@dataclass(frozen=True)
class Hardlink(Entry):
    """One more name of `to` (a path of the same tree); lands in the layer of its target."""

    to: str | bytes


Tree = Mapping[Any, Entry]  # keys: str or bytes

_scratch: Path | None = None
_numbers = itertools.count(1)


def set_scratch_root(path: Path | None) -> None:
    """The directory under which stacks without a base of their own live; conftest sets one for each
    session.
    """
    global _scratch
    _scratch = path


def fs_type(path: str | os.PathLike[str]) -> str:
    """Type of the file system that holds `path`, as /proc/self/mountinfo calls it ("ext4")."""
    best, kind = "", "?"
    real = os.path.realpath(path)
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            left, _, right = line.partition(" - ")
            point = left.split()[4].encode().decode("unicode_escape")
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):  # a later line covers an earlier one
                best, kind = point, right.split()[0]
    return kind


def scratch_root() -> Path:
    """Where stacks go by default: $LAYERFS_TEST_DIR, else /var/tmp or /tmp, the first that is no tmpfs,
    overlay or FUSE.
    """
    global _scratch
    if _scratch is None:
        candidates = [os.environ.get("LAYERFS_TEST_DIR"), "/var/tmp", tempfile.gettempdir()]
        usable = [c for c in candidates if c and os.access(c, os.W_OK)]
        disk = [c for c in usable if fs_type(c) in ("ext4", "xfs", "btrfs")]
        # Hexadecimal: image tools take a path as a part of a name, and mkdtemp's may begin with "_".
        _scratch = Path((disk or usable)[0]) / f"layerfs-test-{secrets.token_hex(4)}"
        _scratch.mkdir(0o700)
        os.chmod(_scratch, 0o755)
    return _scratch


class Stack:
    """Directories of one mount under `base`: `lowers` (top first), `upper`, `work`, `mnt`.

    `base`: an existing directory (say, a loop mount) in which one new directory for this stack is made;
    None means under `scratch_root()`. `owner`: (uid, gid) that owns every directory of the stack, for
    mounts by ordinary users. `prefix`: xattr prefix of the marks that `populate` writes, "trusted.overlay."
    or "user.overlay.". `writable=False`: no upper, no work.
    """

    def __init__(
        self,
        base: str | os.PathLike[str] | None = None,
        n_lowers: int = 1,
        *,
        name: str = "stack",
        owner: tuple[int, int] | None = None,
        prefix: str = "trusted.overlay.",
        writable: bool = True,
    ) -> None:
        parent = Path(base) if base is not None else scratch_root()
        while True:
            self.dir = parent / f"{name}-{os.getpid()}-{next(_numbers)}"
            try:
                self.dir.mkdir()
                break
            except FileExistsError:
                continue
        self.owner = owner
        self.prefix = prefix
        self.lowers: list[Path] = [self._mkdir(f"lower{i}") for i in range(n_lowers)]
        self.upper: Path | None = self._mkdir("upper") if writable else None
        self.work: Path | None = self._mkdir("work") if writable else None
        self.mnt: Path = self._mkdir("mnt")
        if owner:
            os.chown(self.dir, *owner)

    @classmethod
    def arranged(cls, arrangement: str, base: str | os.PathLike[str] | None = None, **kw: object) -> Stack:
        """A stack with as many lowers as `arrangement` needs, still empty."""
        return cls(base, _LOWERS_OF[arrangement], name=arrangement, **kw)  # type: ignore[arg-type]

    def _mkdir(self, name: str) -> Path:
        path = self.dir / name
        path.mkdir()
        if self.owner:
            os.chown(path, *self.owner)
        return path

    def remove(self) -> None:
        """Delete the stack's directories; a mount still below is left alone and makes this fail."""
        if os.path.ismount(self.mnt):
            raise RuntimeError(f"{self.mnt} is still mounted")
        # Layers of a test may hold tens of thousands of entries; shutil.rmtree takes several times as long.
        subprocess.run(["rm", "-rf", "--one-file-system", self.dir], check=True)

    # --- laying out a tree ------------------------------------------------------------------------

    def populate(self, tree: Tree, arrangement: str, under: str | bytes = b"", *, salt: int = 0) -> None:
        """Lay `tree` out in this stack, below the directory `under` (made where missing; b"" is the root).

        Not to be called while the stack is mounted. May be called again with another `under`. With b"" the
        root directory's own owner, mode and times are left as they are. `salt` moves every entry to other
        layers and forms, so that one tree laid out many times meets many of them.
        """
        spread = _Spread(self, arrangement, os.fsencode(under), salt)
        spread.run({os.fsencode(k): v for k, v in tree.items()})

    def write(self, root: Path, tree: Tree, under: str | bytes = b"") -> None:
        """Lay `tree` out as it is in one directory (a plain directory, or one layer)."""
        writer = _Writer(os.fsencode(root), self.owner)
        start = os.fsencode(under)
        if start:
            writer.dirs(start)
        entries = {os.fsencode(k): v for k, v in tree.items()}
        for path, entry in entries.items():
            writer.make(os.path.join(start, path), entry, start)
        writer.finish()

    def whiteout(self, layer: Path, path: str | bytes) -> None:
        """Hide `path` of the layers below `layer`: char 0/0, or `.wh.NAME` where this process may not
        mknod.
        """
        _Writer(os.fsencode(layer), self.owner).whiteout(os.fsencode(path))

    def opaque(self, layer: Path, path: str | bytes) -> None:
        """Mark the directory `path` of `layer` opaque, in the kernel's form."""
        os.setxattr(os.path.join(os.fsencode(layer), os.fsencode(path)), self.prefix + "opaque", b"y")


class _Writer:
    """Makes entries in one directory tree; directory times are set by `finish`, when nothing more changes
    them.
    """

    def __init__(self, root: bytes, owner: tuple[int, int] | None) -> None:
        self.root = root
        self.owner = owner
        self._times: dict[bytes, int] = {}
        # Of directories, likewise for `finish`: a default ACL must not reach what is put into them here.
        self._xattrs: dict[bytes, Mapping[str, bytes]] = {}
        self._known: set[bytes] = set()

    def abs(self, path: bytes) -> bytes:
        return os.path.join(self.root, path)

    def dirs(self, path: bytes) -> None:
        """mkdir -p, with plain attributes."""
        if not path or path in self._known:
            return
        self.dirs(os.path.dirname(path))
        try:
            os.mkdir(self.abs(path))
        except FileExistsError:
            pass
        else:
            os.chmod(self.abs(path), 0o755)
            if self.owner:
                os.chown(self.abs(path), *self.owner)
            self._times.setdefault(path, OLD_NS)
        self._known.add(path)

    def make(self, path: bytes, entry: Entry, start: bytes = b"") -> None:
        self.dirs(os.path.dirname(path))
        full = self.abs(path)
        if isinstance(entry, Hardlink):
            os.link(self.abs(os.path.join(start, os.fsencode(entry.to))), full, follow_symlinks=False)
            return
        assert isinstance(entry, _Common)
        if isinstance(entry, Dir):
            self.dirs(path)
            self._times[path] = entry.mtime_ns
        elif isinstance(entry, File):
            fd = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                if entry.data:
                    os.pwrite(fd, entry.data, entry.offset)
                if entry.size is not None:
                    os.ftruncate(fd, entry.size)
            finally:
                os.close(fd)
        elif isinstance(entry, Symlink):
            os.symlink(os.fsencode(entry.target), full)
        elif isinstance(entry, Node):
            os.mknod(full, entry.kind | 0o600, entry.rdev)
        uid, gid = self.owner if self.owner and (entry.uid, entry.gid) == (0, 0) else (entry.uid, entry.gid)
        if os.geteuid() == 0:
            os.chown(full, uid, gid, follow_symlinks=False)
        if not isinstance(entry, Symlink):
            os.chmod(full, entry.mode)
        if isinstance(entry, Dir):
            self._xattrs[path] = entry.xattrs
        else:
            self._set_xattrs(full, entry.xattrs)
            os.utime(full, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)

    def whiteout(self, path: bytes) -> None:
        self.dirs(os.path.dirname(path))
        try:
            os.mknod(self.abs(path), stat.S_IFCHR, 0)
        except PermissionError:
            head, name = os.path.split(path)
            os.close(os.open(self.abs(os.path.join(head, b".wh." + name)), os.O_CREAT | os.O_WRONLY, 0o644))

    @staticmethod
    def _set_xattrs(full: bytes, xattrs: Mapping[str, bytes]) -> None:
        for name, value in xattrs.items():
            os.setxattr(full, name, value, follow_symlinks=False)

    def finish(self) -> None:
        for path, xattrs in self._xattrs.items():
            self._set_xattrs(self.abs(path), xattrs)
        self._xattrs.clear()
        for path in sorted(self._times, key=len, reverse=True):
            ns = self._times[path]
            os.utime(self.abs(path), ns=(ns, ns))
        self._times.clear()


class _Spread:
    """One `populate` call. Layers are counted here from the bottom: 0 is the lowest lower, the last one is
    on top.

    Directories take turns in three forms:
      merged   present in every layer, their entries spread over all of them;
      single   present, with everything below, in one layer only (over a junk *file* of that name further
      down);
      opaque   marked opaque in the top layer but one, holding junk in the layers below.
    Files take turns in having an older copy, or a junk directory, under the same name further down.
    Each merged directory also has a junk file and a junk directory hidden by whiteouts.
    """

    def __init__(self, stack: Stack, arrangement: str, under: bytes, salt: int) -> None:
        self.under = under
        self.salt = salt
        if arrangement in ("all-lower", "all-upper"):
            one = stack.upper if arrangement == "all-upper" else stack.lowers[-1]
            roots = [one]
        else:
            roots = list(reversed(stack.lowers))
            if arrangement == "merged":
                roots.append(stack.upper)
        assert all(roots), f"{arrangement} needs an upper directory"
        self.prefix = stack.prefix
        self.layers = [_Writer(os.fsencode(r), stack.owner) for r in roots if r]
        self.top = len(self.layers) - 1
        # Range of layers (lowest, highest) in which the entries of a directory may lie.
        self.room: dict[bytes, tuple[int, int]] = {}
        self.home: dict[bytes, int] = {}
        # Directories that must reach through every layer: all names of a hard link lie in the one of its
        # target.
        self.open: set[bytes] = set()

    def run(self, tree: Mapping[bytes, Entry]) -> None:
        whole = {b"": Dir(), **tree} if self.under else dict(tree)
        if not self.under:
            self.room[b""] = (0, self.top)
        for path, entry in whole.items():
            if isinstance(entry, Hardlink):
                for name in (path, os.fsencode(entry.to)):
                    while name:
                        name = os.path.dirname(name)
                        self.open.add(name)
        for number, (path, entry) in enumerate(whole.items(), self.salt):
            if path:
                self._parents(os.path.dirname(path))
            if isinstance(entry, Dir):
                self._dir(path, entry, number)
            elif isinstance(entry, Hardlink):
                layer = self.home[os.fsencode(entry.to)]
                self.layers[layer].make(self._at(path), entry, self.under)
            else:
                self._leaf(path, entry, number)
        for writer in self.layers:
            writer.finish()

    def _at(self, path: bytes) -> bytes:
        return os.path.join(self.under, path) if path else self.under

    def _parents(self, path: bytes) -> None:
        if path not in self.room:
            self._parents(os.path.dirname(path))
            self._dir(path, Dir(), self.salt)

    def _dir(self, path: bytes, entry: Dir, number: int) -> None:
        assert path not in self.room or not path, f"{path!r} must stand before its entries in the tree"
        low, high = self.room[os.path.dirname(path)] if path else (0, self.top)
        at = self._at(path)
        form = number % 3 if high - low >= 2 and path not in {b"", *self.open} else 0
        if form == 1:  # single, one layer above the bottom of what is allowed
            layer = low + 1 + number % (high - low)
            self.layers[layer].make(at, entry)
            self.layers[low].make(at, File(data=b"junk: a file below a directory"))
            self.room[path] = (layer, layer)
            return
        self.room[path] = (low, high)
        for layer in range(low, high + 1):
            # In many layers, but not all of thirty: making and removing them would be most of a test's time.
            if low < layer < high - 1 and (layer + number) % 5 and high > 5:
                continue
            # Only the top one's attributes may show.
            self.layers[layer].make(at, entry if layer == high else Dir(mode=0o700, mtime_ns=OLD_NS - 10**9))
        if form == 2:
            mark = high - 1
            full = self.layers[mark].abs(at)
            os.setxattr(full, self.prefix + "opaque", b"y")
            for layer in range(low, mark, 4):
                self.layers[layer].make(os.path.join(at, b"junk-below-opaque"), File(data=b"junk"))
            self.room[path] = (mark, high)
        elif high > low:
            self.layers[low].make(os.path.join(at, b"junk-file"), File(data=b"junk"))
            self.layers[low].make(os.path.join(at, b"junk-dir", b"inside"), File(data=b"junk"))
            above = low + 1 + number % (high - low)
            self.layers[above].whiteout(os.path.join(at, b"junk-file"))
            self.layers[high].whiteout(os.path.join(at, b"junk-dir"))

    def _leaf(self, path: bytes, entry: Entry, number: int) -> None:
        low, high = self.room[os.path.dirname(path)]
        layer = low + number * 7 % (high - low + 1)
        at = self._at(path)
        self.layers[layer].make(at, entry)
        self.home[path] = layer
        if layer > low:
            if number % 3 == 0:
                self.layers[low].make(
                    at, File(data=b"junk: an older copy", mode=0o600, mtime_ns=OLD_NS - 10**9)
                )
            elif number % 3 == 1:
                self.layers[low].make(os.path.join(at, b"junk-under-a-file"), File(data=b"junk"))


def split_options(options: str | Sequence[str]) -> list[str]:
    """ "a,b=c" or a sequence of options -> list of options."""
    return [o for o in options.split(",") if o] if isinstance(options, str) else list(options)
