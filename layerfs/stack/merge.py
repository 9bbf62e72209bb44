"""Merging: the names of one directory out of all the layers that hold it, read once.

The rule (overlayfs.rst "Merging", "whiteouts and opaque directories"; image-spec layer.md "Whiteouts"), from
the top layer down: the first layer that holds a name decides what it is; a directory collects the directories
of that name further down until something else, a whiteout or an opaque mark stops it. A whiteout hides the
layers *below* its own: a file beside its own `.wh.` is seen.

Cost: one listing a layer, and one lstat for each entry that could be a whiteout device. No attributes are
read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from layerfs.fdutil import OwnedFd, lgetxattr
from layerfs.overlay import whiteout
from layerfs.overlay.names import XattrNames, has_marks
from layerfs.stack.layer import LowerDir


class Entry:
    """What one name in a merged directory is. Kept for every name of a loaded directory, so it is small.

    Invariant: `home is None` exactly when the object is in the upper; test_merge.py::test_entry_home."""

    __slots__ = ("home", "is_dir", "lower", "lowers", "node", "real")

    def __init__(self, home: LowerDir | None, real: int, is_dir: bool) -> None:
        #: directory of the lower layer that holds the object, None for the upper
        self.home = home
        #: inode number on the layer's own file system
        self.real = real
        self.is_dir = is_dir
        #: some lower layer shows this name: removing it from the upper needs a whiteout
        self.lower = home is not None
        #: for a directory: the lower directories that hold a directory of this name, top first (`home`
        #: included)
        self.lowers: tuple[LowerDir, ...] = (home,) if is_dir and home is not None else ()
        #: the live node, owned by `vfs`
        self.node: object | None = None

    def __repr__(self) -> str:
        return f"<Entry {'dir' if self.is_dir else 'file'} in {self.home or 'upper'}>"


@dataclass(slots=True)
class Merged:
    names: dict[bytes, Entry] = field(default_factory=dict)
    #: names under which the upper itself holds a whiteout: the object there (a device) …
    devices: set[bytes] = field(default_factory=set)
    #: … or a `.wh.` file beside it
    marks: set[bytes] = field(default_factory=set)
    #: names of what its directory's listing called neither a directory nor a regular file
    special: set[bytes] = field(default_factory=set)

    def hides(self, name: bytes) -> bool:
        """Whether the upper holds a whiteout of `name`: then lowers have it."""
        return name in self.devices or name in self.marks


def merge_directory(
    upper: OwnedFd | None,
    lowers: Sequence[tuple[LowerDir, OwnedFd]],
    names: XattrNames,
) -> Merged:
    """Merges one directory. `upper` is a descriptor of its upper directory; `lowers` the lower ones, top
    first, already cut at the first opaque one. Blocks; may run in a thread. Raises OSError when a layer
    cannot be read (never a partial result).
    """
    merged = Merged()
    closed: set[bytes] = set()
    sources: list[tuple[LowerDir | None, OwnedFd]] = list(lowers)
    if upper is not None:
        sources.insert(0, (None, upper))
    last = len(sources) - 1
    for position, (home, fd) in enumerate(sources):
        hidden = merged if home is None else Merged()
        opaque = _merge_layer(merged, closed, hidden, home, fd, names, looks_for_x=position < last)
        if opaque:
            break
        closed |= hidden.devices
        closed |= hidden.marks
    return merged


def _merge_layer(
    merged: Merged,
    closed: set[bytes],
    hidden: Merged,
    home: LowerDir | None,
    directory: OwnedFd,
    names: XattrNames,
    looks_for_x: bool,
) -> bool:
    """Adds one layer's names; puts what it whites out into `hidden`. Returns whether it holds the OCI opaque
    mark.
    """
    opaque = False
    into = merged.names
    with OwnedDir(directory) as listing:
        x_form = looks_for_x and _has_xwhiteouts(listing.fd, names)
        with os.scandir(listing.fd) as entries:
            for item in entries:
                name = os.fsencode(item.name)
                if name.startswith(whiteout.PREFIX):
                    if name == whiteout.OPAQUE_NAME:
                        opaque = True
                    elif (target := whiteout.hidden_name(name)) is not None:
                        hidden.marks.add(target)
                    continue
                is_dir = item.is_dir(follow_symlinks=False)
                is_file = False
                if not is_dir:
                    is_file = item.is_file(follow_symlinks=False)
                    if is_file:
                        if x_form and _is_xattr_whiteout(listing.fd, name, item, names):
                            hidden.devices.add(name)
                            continue
                    elif not item.is_symlink() and whiteout.is_whiteout_device(
                        item.stat(follow_symlinks=False)
                    ):
                        hidden.devices.add(name)
                        continue
                if name in closed:
                    continue
                entry = into.get(name)
                if entry is None:
                    into[name] = Entry(home, item.inode(), is_dir)
                    if not is_dir and not is_file:
                        merged.special.add(name)
                    continue
                entry.lower = True
                if entry.is_dir:
                    if is_dir:
                        assert home is not None, "only the first source is the upper"
                        entry.lowers += (home,)
                    else:
                        closed.add(name)
    return opaque


def _has_xwhiteouts(fd: int, names: XattrNames) -> bool:
    try:
        present = os.listxattr(fd)
        return (
            has_marks(present)
            and names.opaque in present
            and os.getxattr(fd, names.opaque) == whiteout.XWHITEOUTS
        )
    except OSError:
        return False


def _is_xattr_whiteout(fd: int, name: bytes, item: os.DirEntry[str], names: XattrNames) -> bool:
    if item.stat(follow_symlinks=False).st_size != 0:
        return False
    try:
        lgetxattr(fd, name, names.whiteout)
    except OSError:
        return False
    return True


class OwnedDir:
    """A readable descriptor of the directory behind an O_PATH one, without touching its access time where we
    may.
    """

    __slots__ = ("_fd", "fd")

    def __init__(self, directory: OwnedFd) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            fd = os.open(b".", flags | os.O_NOATIME, dir_fd=directory.fd)
        except PermissionError:
            fd = os.open(b".", flags, dir_fd=directory.fd)
        self._fd = OwnedFd(fd)
        self.fd = fd

    def __enter__(self) -> OwnedDir:
        return self

    def __exit__(self, *_: object) -> None:
        self._fd.close()
