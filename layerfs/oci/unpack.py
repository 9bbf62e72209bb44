"""Unpacks a layer tarball into a directory of its own, to be a lower layer of mounts. Whiteouts and opaque
marks are kept, in a form that layerfs reads and, made by root, kernel overlayfs too. Does not look at other
layers: what only they can tell is listed (`Leaning`), and `supplement` makes it good.

The law: to merge the directories of layers, each with its supplement, is to apply the layers one after the
other (tests/oci/test_unpack.py). What follows from it beside the plain translation of whiteouts:

* A directory that stands beside its own whiteout, or takes the place of something else of the same layer, is
  opaque: what was below is gone.
* Nothing hides twice: no whiteouts inside what is hidden anyway. Kernel overlayfs would list them.
* An opaque root has no form on disk: the result says so, and who stacks the layers stops there.
* A directory that holds nothing but whiteouts and is not named is not made: below there may be none.

The same distrust as in `apply` (`building`), but nothing needs to be undone: who gave the directory throws it
away when unpacking fails.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field

from layerfs.errors import LayerError, LayerfsError, TarError
from layerfs.fdutil import OwnedFd, fd_path
from layerfs.ids import DiffId
from layerfs.oci.beneath import ROOT, behind_link, below_no_directory, remove, subdirectory
from layerfs.oci.building import Builder, drop_tree, refusal
from layerfs.oci.making import Parent, clean_acls
from layerfs.oci.marking import Marks
from layerfs.oci.member import Kind, Member, display, join, split
from layerfs.oci.progress import Progress
from layerfs.oci.streams import LayerSource
from layerfs.oci.tarreader import TarReader
from layerfs.oci.told import reader


@dataclass(frozen=True, slots=True)
class Leaning:
    """What a layer takes from those below it."""

    #: directories used without being named: attributes come from below
    implied: tuple[bytes, ...] = ()
    #: (name, partner) of hard links whose partner is below
    links: tuple[tuple[bytes, bytes], ...] = ()
    #: names to hide, and directories to empty, in directories that the layer does not have
    whiteouts: tuple[bytes, ...] = ()
    opaque: tuple[bytes, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.implied or self.links or self.whiteouts or self.opaque)


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A layer that was unpacked. `root_named`: it says how the root looks; `opaque_root`: it hides all layers
    below; `diff_id` is of the tar that was read."""

    diff_id: DiffId
    members: int
    root_named: bool
    opaque_root: bool
    leaning: Leaning
    notes: tuple[str, ...] = ()


def unpack_layer(source: LayerSource, directory: int, progress: Progress | None = None) -> Unpacked:
    """Unpacks the layer that `source` (made with `digests`) gives into the empty directory that the
    descriptor `directory` is of.

    Raises TarError for a bad layer, LayerError with the errno where the file system refuses. The directory
    holds a part of the layer then."""
    unpacker = _Unpacker(OwnedFd(os.open(b".", ROOT, dir_fd=directory)))
    with contextlib.closing(unpacker):
        try:
            result = unpacker.run(reader(source, progress))
        except LayerfsError:
            raise
        except OSError as error:
            raise LayerError(f"the layer cannot be unpacked: {refusal(error)}", error.errno) from error
        source.drain()
        return Unpacked(
            source.diff_id(),
            result.members,
            unpacker.root_named,
            unpacker.opaque_root,
            unpacker.leaning,
            tuple(result.notes),
        )


@dataclass(slots=True)
class _Hiding:
    """What a layer hides of those below, so far. Marks are written at the end, when it is known what else the
    layer has."""

    #: names whose object below is gone, with all below it
    names: set[bytes] = field(default_factory=set)
    #: directories that lose all that is below
    emptied: set[bytes] = field(default_factory=set)

    def shows(self, path: bytes) -> bool:
        """Whether what the layers below have under `path` is still there, as far as whiteouts go."""
        if not self.names and not self.emptied:
            return True
        return path not in self.names and not any(
            above in self.emptied or above in self.names for above in _above(path)
        )

    def forget(self, path: bytes) -> None:
        drop_tree(self.names, path)
        drop_tree(self.emptied, path)

    def replace(self, path: bytes) -> None:
        """The directory `path` of this layer has nothing to do with what is below."""
        self.names.add(path)
        self.emptied.add(path)


class _Unpacker(Builder):
    """`run` fills in what the layer leaves to others."""

    _replaces = False

    def __init__(self, root: OwnedFd) -> None:
        super().__init__(root, 0)
        clean_acls(fd_path(root.fd))
        self._marks = Marks.probe(root)
        self._hiding = _Hiding()
        self._missing: dict[bytes, bytes] = {}
        self._temporary = b".layerfs-unpack-" + secrets.token_hex(12).encode()
        self.root_named = False
        self.opaque_root = False
        self.leaning = Leaning()

    def _has_default_acl(self, directory: OwnedFd) -> bool:
        return False  # attributes of directories come at the end

    # --- making: nothing is here but what this layer made ---

    def _put(self, parent: Parent, name: bytes, member: Member, reader: TarReader) -> None:
        if member.kind is Kind.HARDLINK and self._is_below(member):
            if name in self._own[parent.path]:
                self._replace(parent, name, member.name)
            self._missing[member.name] = self._missing.get(member.target, member.target)
            return
        try:
            self._make(parent, name, member, reader)
        except FileExistsError:
            self._make(parent, self._temporary, member, reader)
            self._replace(parent, name, member.name)
            os.rename(self._temporary, name, src_dir_fd=parent.fd.fd, dst_dir_fd=parent.fd.fd)
        if self._missing:
            self._missing.pop(member.name, None)

    def _replace(self, parent: Parent, name: bytes, path: bytes) -> None:
        """Takes away what this layer made under the name before."""
        self._forget(path)
        self._hiding.forget(path)
        inside = path + b"/"
        for gone in [each for each in self._missing if each.startswith(inside)]:
            del self._missing[gone]
        remove(parent.fd, name)

    def _is_below(self, member: Member) -> bool:
        """Whether the partner of a hard link is in a layer below. Raises TarError when it is nowhere."""
        target = member.target
        if target in self._missing:
            return True
        wanted = f"hard link {display(member.name)} to {display(target)}"
        kind = self._kind_of(target, wanted)
        if kind is not None:
            return False  # here, or an error for who makes it
        if not self._hiding.shows(target):
            raise TarError(f"{wanted}: that is not there")
        return True

    def _put_directory(self, parent: Parent, name: bytes, member: Member) -> None:
        path = member.name
        try:
            os.mkdir(name, 0o700, dir_fd=parent.fd.fd)
            if self._missing.pop(path, None) is not None:
                self._hiding.replace(path)
        except FileExistsError:
            if subdirectory(parent.fd, name) is None:
                os.unlink(name, dir_fd=parent.fd.fd)
                os.mkdir(name, 0o700, dir_fd=parent.fd.fd)
                self._hiding.replace(path)
        if path in self._hiding.names:
            self._hiding.replace(path)

    def _open_parent(self, path: bytes, member: bytes) -> Parent:
        if self._missing:
            for here in (*_above(path), path):
                if here in self._missing:
                    raise below_no_directory(f"member {display(member)}")
        return super()._open_parent(path, member)

    def _made_implied(self, path: bytes) -> None:
        if path in self._hiding.names:
            self._hiding.replace(path)

    # --- hiding ---

    def _hide(self, directory: bytes, name: bytes, member: bytes) -> None:
        path = join(directory, name)
        if not self._may_hide_in(directory, member) or not self._hiding.shows(path):
            return
        if self._is_own_directory(path):
            self._hiding.replace(path)
        else:
            self._hiding.names.add(path)

    def _hide_all(self, directory: bytes, member: bytes) -> None:
        if self._may_hide_in(directory, member) and (
            self._hiding.shows(directory) or self._is_own_directory(directory)
        ):
            self._hiding.emptied.add(directory)

    def _may_hide_in(self, directory: bytes, member: bytes) -> bool:
        """Whether a whiteout in `directory` means anything. Raises TarError behind a symbolic link."""
        what = f"member {display(member)}"
        kind = self._kind_of(directory, what)
        above, name = split(directory)
        if kind is Kind.FILE and self._is_own_directory(above):
            _raise_if_link(self._open(above), name, what)
        return kind is not Kind.FILE

    def _is_own_directory(self, path: bytes) -> bool:
        return not path or path in self._directories or path in self._implied

    def _kind_of(self, path: bytes, what: str) -> Kind | None:
        """What this layer has under `path`: DIR, None for nothing, FILE for everything else, also above.

        Raises TarError behind a symbolic link."""
        for here in (*_above(path), path):
            if self._is_own_directory(here):
                continue
            directory, name = split(here)
            if name not in self._own.get(directory, ()):
                return None
            if here != path:
                _raise_if_link(self._open(directory), name, what)
            return Kind.FILE
        return Kind.DIR

    # --- at the end ---

    def _give_up(self) -> None:
        """All of it is thrown away."""

    def _finish_directories(self) -> None:
        self._write_marks()
        self.root_named = b"" in self._directories
        if not self.root_named:
            self._directories[b""] = Member(b"", Kind.DIR, 0o755, os.geteuid(), os.getegid(), 0)
        super()._finish_directories()

    def _write_marks(self) -> None:
        hiding = self._hiding
        self.opaque_root = b"" in hiding.emptied
        loose = [path for path in hiding.emptied if self._is_loose(path) and hiding.shows(path)]
        for path in sorted(hiding.emptied - {b""}):
            if self._is_own_directory(path) and _reaches(hiding, split(path)[0]):
                self._marks.make_opaque(self._open(path))
        whiteouts = []
        for path in sorted(hiding.names):
            directory, name = split(path)
            if name in self._own.get(directory, ()) or not _reaches(hiding, directory):
                continue
            if self._is_own_directory(directory):
                self._marks.hide(self._open(directory), name)
            elif self._is_loose(directory):
                whiteouts.append(path)
        self.leaning = Leaning(
            tuple(path for path in sorted(self._implied) if hiding.shows(path)),
            tuple(sorted(self._missing.items())),
            tuple(whiteouts),
            tuple(sorted(loose)),
        )

    def _is_loose(self, path: bytes) -> bool:
        """Whether this layer has nothing under `path`, nor anything in the way to it."""
        try:
            return self._kind_of(path, "a whiteout") is None
        except TarError:
            return False  # behind a link, which came later


def _raise_if_link(directory: OwnedFd, name: bytes, what: str) -> None:
    """Raises TarError when `name` is a symbolic link."""
    try:
        mode = os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return  # a hard link whose partner is below
    if stat.S_ISLNK(mode):
        raise behind_link(what)


def _reaches(hiding: _Hiding, directory: bytes) -> bool:
    """Whether names of layers below are seen in `directory`."""
    return directory not in hiding.emptied and hiding.shows(directory)


def _above(path: bytes) -> Iterable[bytes]:
    """The directories above `path`, the root first."""
    if path:
        yield b""
        at = path.find(b"/")
        while at >= 0:
            yield path[:at]
            at = path.find(b"/", at + 1)
