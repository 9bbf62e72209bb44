"""What a layer takes from those below it, as one more small layer directory, to lie right above its own. The
big directory depends on its tar alone that way, and is shared by every image that has the layer.

A supplement holds the directories that the layer uses without naming them, with their attributes; what hard
links join that the layer does not have; and whiteouts for directories that the layer does not have. Refused
is what `apply` refuses: a way that leads through a symbolic link or a file below, a partner that is not
there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from layerfs.errors import TarError
from layerfs.fdutil import OwnedFd, at_path, fd_path
from layerfs.oci.beneath import DIRECTORY, ROOT, behind_link, below_no_directory, open_beneath
from layerfs.oci.making import ObjectMaker, Parent, clean_acls
from layerfs.oci.marking import Marks
from layerfs.oci.member import OF_THIS_MACHINE, Kind, Member, display, join, member_of, split
from layerfs.oci.tally import Tally
from layerfs.oci.unpack import Leaning
from layerfs.overlay.names import MARKS, TRUSTED, XattrNames
from layerfs.stack import Entry, LowerDir, Stack, lower_directories, merge_directory


def make_supplement(
    directory: int, layer: str, leaning: Leaning, below: Sequence[str], root: Member | None
) -> bool:
    """Fills the empty directory that the descriptor `directory` is of with the supplement of the layer
    directory `layer`, over the layer directories `below` (top first). Returns whether there is anything in
    it. `root`: how the root looks there; None: as the layer has it.

    Raises TarError for a layer that cannot lie upon these, OSError."""
    maker = _Supplement(OwnedFd(os.open(b".", ROOT, dir_fd=directory)), layer, leaning, below)
    try:
        return maker.run(root)
    finally:
        maker.close()


def describe(path: bytes, where: bytes, *, follow: bool) -> Member:
    """The object that the system path `where` leads to, as a member under the name `path`. Raises OSError."""
    st = os.stat(where, follow_symlinks=follow)
    target = os.readlink(where) if stat.S_ISLNK(st.st_mode) else b""
    try:
        present = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        present = []
    xattrs = {
        attribute: os.getxattr(where, attribute, follow_symlinks=follow)
        for attribute in sorted(present)
        if not attribute.startswith((*MARKS, *OF_THIS_MACHINE))
    }
    return member_of(path, st, xattrs, target)


@dataclass(frozen=True, slots=True)
class _Found:
    """An object of a merged tree: where it lies, and for a directory what makes it up."""

    home: LowerDir
    parent: OwnedFd
    name: bytes
    entry: Entry
    lowers: tuple[LowerDir, ...]

    def describe(self, path: bytes) -> Member:
        return describe(path, at_path(self.parent.fd, self.name), follow=False)


class _Tree:
    """Some layer directories, merged."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers
        self._stack = Stack(layers, None, XattrNames(TRUSTED))
        self._merged: dict[tuple[int, bytes], dict[bytes, Entry]] = {}

    def close(self) -> None:
        self._stack.close()

    def walk(self, path: bytes) -> Iterator[tuple[bytes, _Found]]:
        """What stands under each beginning of `path`; ends at what is not there."""
        lowers = tuple(layer.root for layer in self._stack.lowers)
        here = b""
        for name in path.split(b"/"):
            if not lowers:
                return
            here = join(here, name)
            entry = self._names(lowers).get(name)
            if entry is None:
                return
            assert entry.home is not None, "there is no upper"
            inner: tuple[LowerDir, ...] = ()
            if entry.is_dir:
                inner = lower_directories(self._stack, lowers, name, entry.lowers, None)
            yield here, _Found(entry.home, self._stack.open(entry.home), name, entry, inner)
            lowers = inner

    def find(self, path: bytes) -> _Found | None:
        for here, found in self.walk(path):
            if here == path:
                return found
        return None

    def _names(self, lowers: tuple[LowerDir, ...]) -> dict[bytes, Entry]:
        key = (lowers[0].layer.index, lowers[0].path)
        if key not in self._merged:
            opened = [(lower, self._stack.open(lower)) for lower in lowers]
            self._merged[key] = merge_directory(None, opened, self._stack.names).names
        return self._merged[key]

    def other_names(self, found: _Found) -> Iterator[bytes]:
        """Further names of a file in its own layer, hidden ones among them."""
        st = os.stat(found.name, dir_fd=found.parent.fd, follow_symlinks=False)
        if st.st_nlink < 2:
            return
        top = os.fsencode(self.layers[found.home.layer.index])
        for directory, _, names in os.walk(top):
            for name in names:
                each = os.lstat(os.path.join(directory, name))
                if (each.st_dev, each.st_ino) == (st.st_dev, st.st_ino):
                    yield join(directory[len(top) + 1 :], name)


class _Supplement:
    def __init__(self, root: OwnedFd, layer: str, leaning: Leaning, below: Sequence[str]) -> None:
        self._root = root
        clean_acls(fd_path(root.fd))
        self._layer = OwnedFd(os.open(layer, ROOT))
        self._leaning = leaning
        self._implied = frozenset(leaning.implied)
        self._below = _Tree(below)
        self._all = _Tree((layer, *below))
        self._marks = Marks.probe(root)
        self._maker = ObjectMaker(Tally())
        #: what was made here so far; attributes come at the end
        self._directories: dict[bytes, Member] = {}
        self._objects = 0

    def close(self) -> None:
        self._below.close()
        self._all.close()

    def run(self, root: Member | None) -> bool:
        for path in self._leaning.implied:
            if self._directory_below(path) is not None:
                self._make_directory(path)
        for path in self._leaning.opaque:
            if self._directory_below(path) is not None:
                self._marks.make_opaque(self._make_directory(path).fd)
        for path in self._leaning.whiteouts:
            directory, name = split(path)
            # A whiteout of nothing would be listed by kernel overlayfs.
            if self._directory_below(directory) is not None and self._below.find(path) is not None:
                self._marks.hide(self._make_directory(directory).fd, name)
        for partner in dict.fromkeys(partner for _, partner in self._leaning.links):
            self._join(partner, [name for name, other in self._leaning.links if other == partner])
        self._directories[b""] = root or describe(b"", fd_path(self._layer.fd), follow=True)
        for path in sorted(self._directories, reverse=True):
            fd = open_beneath(self._root.fd, path or b".", DIRECTORY)
            self._maker.set_attributes(fd_path(fd.fd), self._directories[path], follow=True, clean=True)
        return len(self._directories) > 1 or self._objects > 0

    def _directory_below(self, path: bytes) -> _Found | None:
        """The directory `path` of the layers below; None where they have none that the layer could mean.

        Raises TarError where something else is there that the layer does not replace."""
        for here, found in self._below.walk(path):
            if found.entry.is_dir:
                if here == path:
                    return found
                continue
            implied = here in self._implied
            if not implied and self._in_layer(here) is not None:
                return None
            if stat.S_ISLNK(os.stat(found.name, dir_fd=found.parent.fd, follow_symlinks=False).st_mode):
                raise behind_link(f"what the layer has in {display(path)}")
            if implied:
                raise below_no_directory(f"what the layer has in {display(path)}")
            return None
        return None

    def _in_layer(self, path: bytes) -> Member | None:
        """What the layer itself has under `path`."""
        directory, name = split(path)
        try:
            fd = open_beneath(self._layer.fd, directory or b".", DIRECTORY)
            return describe(path, at_path(fd.fd, name), follow=False)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _make_directory(self, path: bytes) -> Parent:
        """The directory `path` here, with those above it."""
        here = b""
        fd = self._root
        for name in path.split(b"/") if path else ():
            here = join(here, name)
            if here not in self._directories:
                own = self._in_layer(here)
                found = self._directory_below(here) if own is None or here in self._implied else None
                os.mkdir(name, 0o700, dir_fd=fd.fd)
                if found is not None:
                    self._directories[here] = found.describe(here)
                else:
                    assert own is not None, "nothing is made in what nobody has"
                    self._directories[here] = own
            fd = open_beneath(fd.fd, name, DIRECTORY)
        return Parent(path, fd, has_default_acl=False)

    def _join(self, partner: bytes, names: list[bytes]) -> None:
        """Makes hard links to `partner` of the layers below: a copy, under all names that it has then."""
        what = f"hard link {display(names[0])} to {display(partner)}"
        directory = split(partner)[0]
        found = self._below.find(partner)
        if found is None or (directory and self._directory_below(directory) is None):
            if directory:
                self._directory_below(directory)
            raise TarError(f"{what}: that is not there")
        if found.entry.is_dir:
            raise TarError(f"{what}: that is a directory")
        wanted = [*names]
        for name in (partner, *self._below.other_names(found)):
            if name not in wanted and self._is_seen(name, found):
                wanted.append(name)
        first, *others = wanted
        self._copy(first, found)
        for name in others:
            parent = self._make_directory(split(name)[0])
            link = Member(name, Kind.HARDLINK, target=first)
            self._maker.hard_link(self._root, parent, split(name)[1], link)

    def _is_seen(self, name: bytes, found: _Found) -> bool:
        """Whether `name` is that very object below, and the layer lets it be seen."""
        leaning = self._leaning
        for hidden in (*leaning.whiteouts, *leaning.opaque, *(link for link, _ in leaning.links)):
            if name == hidden or name.startswith(hidden + b"/"):
                return False
        seen = self._all.find(name)
        return (
            seen is not None
            and seen.home.layer.index == found.home.layer.index + 1
            and seen.entry.real == found.entry.real
        )

    def _copy(self, path: bytes, found: _Found) -> None:
        directory, name = split(path)
        parent = self._make_directory(directory)
        member = replace(found.describe(path), name=path)
        self._objects += 1
        if member.kind is Kind.FILE:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            source = open_beneath(found.parent.fd, found.name, flags)
            self._maker.file(parent, name, member, _FileData(source))
        else:
            self._maker.special(parent, name, member)


class _FileData:
    def __init__(self, fd: OwnedFd) -> None:
        self._fd = fd

    def read(self, size: int) -> bytes:
        return os.read(self._fd.fd, size)
