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
from collections.abc import Iterator
from dataclasses import dataclass

from layerfs.errors import LayerError, LayerfsError, TarError
from layerfs.fdutil import OwnedFd, fd_path
from layerfs.ids import DiffId
from layerfs.oci.beneath import ROOT, behind_link, below_no_directory, remove, subdirectory
from layerfs.oci.building import Builder, OpenParent, refusal
from layerfs.oci.known import OBJECT, Known, Made
from layerfs.oci.making import clean_acls
from layerfs.oci.marking import Marks
from layerfs.oci.member import Kind, Member, display, join, split
from layerfs.oci.progress import Progress
from layerfs.oci.streams import LayerSource
from layerfs.oci.tarreader import TarReader
from layerfs.oci.told import reader

#: Bytes of names in a `Leaning`. A member with a name of 4 KiB can imply 2,000 directories with 4 MiB of
#: names.
MAX_LEANING = 32 << 20


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


class _Unpacker(Builder):
    """`run` fills in what the layer leaves to others."""

    _replaces = False

    def __init__(self, root: OwnedFd) -> None:
        super().__init__(root, 0)
        clean_acls(fd_path(root.fd))
        self._marks = Marks.probe(root)
        self._temporary = b".layerfs-unpack-" + secrets.token_hex(12).encode()
        self.root_named = False
        self.opaque_root = False
        self.leaning = Leaning()

    def _has_default_acl(self, directory: OwnedFd) -> bool:
        return False  # attributes of directories come at the end

    # --- making: nothing is here but what this layer made ---

    def _put(self, parent: OpenParent, name: bytes, member: Member, reader: TarReader) -> Known:
        if member.kind is Kind.HARDLINK and (partner := self._partner_below(member)) is not None:
            before = parent.known.children.get(name)
            if before is not None and before.is_own:
                self._replace(parent, name, member.name)
            return _missing(partner)
        try:
            self._make(parent, name, member, reader)
        except FileExistsError:
            self._make(parent, self._temporary, member, reader)
            self._replace(parent, name, member.name)
            os.rename(self._temporary, name, src_dir_fd=parent.fd.fd, dst_dir_fd=parent.fd.fd)
        return OBJECT

    def _replace(self, parent: OpenParent, name: bytes, path: bytes) -> None:
        """Takes away what this layer made under the name before."""
        self._forget(path)
        remove(parent.fd, name)

    def _partner_below(self, member: Member) -> bytes | None:
        """The partner of a hard link where that is in a layer below. Raises TarError when it is nowhere."""
        target = member.target
        known = self._known.find(target)
        if known is not None and known.missing is not None:
            return known.missing
        wanted = f"hard link {display(member.name)} to {display(target)}"
        kind = self._kind_of(target, wanted)
        if kind is not None:
            return None  # here, or an error for who makes it
        if not self._shows(target):
            raise TarError(f"{wanted}: that is not there")
        return target

    def _put_directory(self, parent: OpenParent, name: bytes, member: Member) -> None:
        known = parent.known.children.get(name)
        replaces = known is not None and (known.hidden or known.missing is not None)
        try:
            os.mkdir(name, 0o700, dir_fd=parent.fd.fd)
        except FileExistsError:
            if subdirectory(parent.fd, name) is None:
                os.unlink(name, dir_fd=parent.fd.fd)
                os.mkdir(name, 0o700, dir_fd=parent.fd.fd)
                replaces = True
        if replaces:
            known = parent.known.child(name)
            known.missing = None
            known.replace()

    def _open_parent(self, path: bytes, member: bytes) -> OpenParent:
        known = self._known
        for part in path.split(b"/") if path else ():
            below = known.children.get(part)
            if below is None:
                break
            if below.missing is not None:
                raise below_no_directory(f"member {display(member)}")
            known = below
        return super()._open_parent(path, member)

    def _made_implied(self, known: Known) -> None:
        if known.hidden:
            known.replace()

    # --- hiding ---

    def _hide(self, directory: bytes, name: bytes, member: bytes) -> None:
        path = join(directory, name)
        if not self._may_hide_in(directory, member) or not self._shows(path):
            return
        known = self._known.find(path)
        if known is None or not known.is_own:
            self._known.at(path).hidden = True
        elif known.is_own_directory:
            known.replace()

    def _hide_all(self, directory: bytes, member: bytes) -> None:
        if not self._may_hide_in(directory, member):
            return
        known = self._known.find(directory)
        if (known is not None and known.is_own_directory) or self._shows(directory):
            self._known.at(directory).emptied = True

    def _may_hide_in(self, directory: bytes, member: bytes) -> bool:
        """Whether a whiteout in `directory` means anything. Raises TarError behind a symbolic link."""
        what = f"member {display(member)}"
        kind = self._kind_of(directory, what)
        if kind is not Kind.FILE:
            return True
        above, name = split(directory)
        known = self._known.find(above)
        if known is not None and known.is_own_directory:
            _raise_if_link(self._open(above), name, what)
        return False

    def _shows(self, path: bytes) -> bool:
        """Whether what the layers below have under `path` is still there, as far as whiteouts go."""
        known = self._known
        for part in path.split(b"/") if path else ():
            if known.emptied:
                return False
            below = known.children.get(part)
            if below is None:
                return True
            if below.hidden:
                return False
            known = below
        return True

    def _kind_of(self, path: bytes, what: str) -> Kind | None:
        """What this layer has under `path`: DIR, None for nothing, FILE for everything else, also above.

        Raises TarError behind a symbolic link."""
        known = self._known
        parts = path.split(b"/") if path else []
        for number, part in enumerate(parts, 1):
            below = known.children.get(part)
            if below is None or not below.is_own:
                return None
            if not below.is_own_directory:
                if number < len(parts):
                    _raise_if_link(self._open(b"/".join(parts[: number - 1])), part, what)
                return Kind.FILE
            known = below
        return Kind.DIR

    # --- at the end ---

    def _give_up(self) -> None:
        """All of it is thrown away."""

    def _finish_directories(self) -> None:
        self._write_marks()
        self.root_named = self._known.member is not None
        if not self.root_named:
            self._known.member = Member(b"", Kind.DIR, 0o755, os.geteuid(), os.getegid(), 0)
        super()._finish_directories()

    def _write_marks(self) -> None:
        self.opaque_root = self._known.emptied
        implied: list[bytes] = []
        links: list[tuple[bytes, bytes]] = []
        whiteouts: list[bytes] = []
        opaque: list[bytes] = []
        held = 0
        for place, name, known in self._all_known():
            if known is OBJECT:
                continue
            path = join(place.path, name)
            before = len(implied) + len(links) + len(whiteouts) + len(opaque)
            if known.missing is not None:
                links.append((path, known.missing))
            if place.reached:
                has = place.inside(name, known).has
                if known.made is Made.IMPLIED and not known.hidden:
                    implied.append(path)
                if known.emptied and has is Kind.DIR:
                    self._marks.make_opaque(self._open(path))
                elif known.emptied and has is None and not known.hidden:
                    opaque.append(path)
                if known.hidden and not known.is_own:
                    if place.has is Kind.DIR:
                        self._marks.hide(self._open(place.path), name)
                    elif place.has is None:
                        whiteouts.append(path)
            added = len(implied) + len(links) + len(whiteouts) + len(opaque) - before
            held += added * (len(path) + len(known.missing or b""))
            if held > MAX_LEANING:
                raise TarError(
                    "the layer is refused: names of which only the layers below can tell more take more than "
                    f"{MAX_LEANING >> 20} MiB"
                )
        self.leaning = Leaning(
            tuple(sorted(implied)), tuple(sorted(links)), tuple(sorted(whiteouts)), tuple(sorted(opaque))
        )

    def _all_known(self) -> Iterator[tuple[_Place, bytes, Known]]:
        """Every name of which something is known, in its directory."""
        root = _Place(b"", Kind.DIR, not self._known.emptied)
        levels = [(root, iter(self._known.children.items()))]
        while levels:
            place, children = levels[-1]
            name, known = next(children, (b"", None))
            if known is None:
                levels.pop()
                continue
            yield place, name, known
            if known.children:
                levels.append((place.inside(name, known), iter(known.children.items())))


@dataclass(frozen=True, slots=True)
class _Place:
    """A directory. `has`: what the layer has there, as `_Unpacker._kind_of` says it. `reached`: names of
    layers below are seen in it."""

    path: bytes
    has: Kind | None
    reached: bool

    def inside(self, name: bytes, known: Known) -> _Place:
        has = self.has
        if has is Kind.DIR:
            has = (Kind.DIR if known.is_own_directory else Kind.FILE) if known.is_own else None
        return _Place(join(self.path, name), has, self.reached and not known.hidden and not known.emptied)


def _missing(partner: bytes) -> Known:
    """What is known of a hard link to `partner` of a layer below."""
    known = Known()
    known.made = Made.OBJECT
    known.missing = partner
    return known


def _raise_if_link(directory: OwnedFd, name: bytes, what: str) -> None:
    """Raises TarError when `name` is a symbolic link."""
    try:
        mode = os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return  # a hard link whose partner is below
    if stat.S_ISLNK(mode):
        raise behind_link(what)
