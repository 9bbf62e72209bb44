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
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

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


@dataclass(slots=True)
class _Directory:
    """A merged directory. `names` are read when one is asked for; `inside`: what was found in it so far."""

    lowers: tuple[LowerDir, ...]
    names: dict[bytes, Entry] | None = None
    inside: dict[bytes, _Found] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Found:
    """An object of a merged tree: where it lies, and for a directory what makes it up."""

    home: LowerDir
    name: bytes
    entry: Entry
    directory: _Directory | None


@dataclass(slots=True)
class _Shared:
    """An object of the layers below that hard links join. `partners`: the names by which they join it."""

    found: _Found
    links: list[bytes] = field(default_factory=list)
    partners: list[bytes] = field(default_factory=list)


#: An object of a layer: its index, device and inode number.
_Identity = tuple[int, int, int]


class _Tree:
    """Some layer directories, merged. Each step of a way is taken once: many ways have the same beginning."""

    def __init__(self, layers: Sequence[str]) -> None:
        self._layers = layers
        self._stack = Stack(layers, None, XattrNames(TRUSTED))
        self.root = _Directory(tuple(layer.root for layer in self._stack.lowers))

    def close(self) -> None:
        self._stack.close()

    def look(self, directory: _Directory, name: bytes) -> _Found | None:
        """What is under `name` in `directory`."""
        found = directory.inside.get(name)
        if found is not None or not directory.lowers:
            return found
        if directory.names is None:
            opened = [(lower, self._stack.open(lower)) for lower in directory.lowers]
            directory.names = merge_directory(None, opened, self._stack.names).names
        entry = directory.names.get(name)
        if entry is None:
            return None
        assert entry.home is not None, "there is no upper"
        inner = None
        if entry.is_dir:
            inner = _Directory(lower_directories(self._stack, directory.lowers, name, entry.lowers, None))
        found = directory.inside[name] = _Found(entry.home, name, entry, inner)
        return found

    def find(self, path: bytes) -> _Found | None:
        found: _Found | None = None
        directory: _Directory | None = self.root
        for name in path.split(b"/"):
            if directory is None:
                return None
            found = self.look(directory, name)
            if found is None:
                return None
            directory = found.directory
        return found

    def parent(self, found: _Found) -> OwnedFd:
        """The directory in which an object lies."""
        return self._stack.open(found.home)

    def stat(self, found: _Found) -> os.stat_result:
        return os.stat(found.name, dir_fd=self.parent(found).fd, follow_symlinks=False)

    def describe(self, found: _Found, path: bytes) -> Member:
        return describe(path, at_path(self.parent(found).fd, found.name), follow=False)

    def other_names(self, wanted: Collection[_Identity]) -> dict[_Identity, list[bytes]]:
        """All names of some objects in their own layers, hidden ones among them. A layer is walked once."""
        names: dict[_Identity, list[bytes]] = {each: [] for each in wanted}
        for index in sorted({index for index, _, _ in wanted}):
            inodes = {inode for layer, _, inode in wanted if layer == index}
            top = OwnedFd(os.open(self._layers[index], ROOT))
            todo = [b""]
            while todo:
                path = todo.pop()
                fd = open_beneath(top.fd, path or b".", DIRECTORY)
                with os.scandir(fd.fd) as entries:
                    for entry in entries:
                        name = os.fsencode(entry.name)
                        if entry.is_dir(follow_symlinks=False):
                            todo.append(join(path, name))
                        elif entry.inode() in inodes:
                            st = os.stat(name, dir_fd=fd.fd, follow_symlinks=False)
                            found = names.get((index, st.st_dev, st.st_ino))
                            if found is not None:
                                found.append(join(path, name))
        return names


class _Supplement:
    def __init__(self, root: OwnedFd, layer: str, leaning: Leaning, below: Sequence[str]) -> None:
        self._root = root
        clean_acls(fd_path(root.fd))
        self._layer = OwnedFd(os.open(layer, ROOT))
        self._leaning = leaning
        self._implied = frozenset(leaning.implied)
        self._hidden = {*leaning.whiteouts, *leaning.opaque, *(name for name, _ in leaning.links)}
        self._below = _Tree(below)
        self._all = _Tree((layer, *below))
        self._marks = Marks.probe(root)
        self._maker = ObjectMaker(Tally())
        #: directories below on the way to the one that was looked for last: they come in order, and a name of
        #: 4 KiB may imply 2,000 of them
        self._way: list[tuple[bytes, _Found]] = []
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
        self._join_all()
        self._directories[b""] = root or describe(b"", fd_path(self._layer.fd), follow=True)
        for path in sorted(self._directories, reverse=True):
            fd = open_beneath(self._root.fd, path or b".", DIRECTORY)
            self._maker.set_attributes(fd_path(fd.fd), self._directories[path], follow=True, clean=True)
        return len(self._directories) > 1 or self._objects > 0

    def _directory_below(self, path: bytes) -> _Found | None:
        """The directory `path` of the layers below; None where they have none that the layer could mean.

        Raises TarError where something else is there that the layer does not replace."""
        way = self._way
        while way and path != way[-1][0] and not path.startswith(way[-1][0] + b"/"):
            way.pop()
        here, found = way[-1] if way else (b"", None)
        directory = self._below.root if found is None else found.directory
        rest = path[len(here) :].removeprefix(b"/")
        for name in rest.split(b"/") if rest else ():
            assert directory is not None, "it ends at whatever is none"
            found = self._below.look(directory, name)
            if found is None:
                return None
            here = join(here, name)
            directory = found.directory
            if directory is not None:
                way.append((here, found))
                continue
            implied = here in self._implied
            if not implied and self._in_layer(here) is not None:
                return None
            if stat.S_ISLNK(self._below.stat(found).st_mode):
                raise behind_link(f"what the layer has in {display(path)}")
            if implied:
                raise below_no_directory(f"what the layer has in {display(path)}")
            return None
        return found

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
        missing: list[bytes] = []
        here = path
        while here and here not in self._directories:
            here, name = split(here)
            missing.append(name)
        fd = open_beneath(self._root.fd, here, DIRECTORY) if here else self._root
        while missing:
            name = missing.pop()
            here = join(here, name)
            own = self._in_layer(here)
            found = self._directory_below(here) if own is None or here in self._implied else None
            os.mkdir(name, 0o700, dir_fd=fd.fd)
            if found is not None:
                self._directories[here] = self._below.describe(found, here)
            else:
                assert own is not None, "nothing is made in what nobody has"
                self._directories[here] = own
            fd = open_beneath(fd.fd, name, DIRECTORY)
        return Parent(path, fd, has_default_acl=False)

    # --- hard links ---

    def _join_all(self) -> None:
        """Makes what hard links join in the layers below: one copy of each object, under all names that it
        has then."""
        links: dict[bytes, list[bytes]] = {}
        for name, partner in self._leaning.links:
            links.setdefault(partner, []).append(name)
        objects: dict[_Identity, _Shared] = {}
        several = set()
        for partner, names in links.items():
            found = self._partner(partner, f"hard link {display(names[0])} to {display(partner)}")
            st = self._below.stat(found)
            identity = (found.home.layer.index, st.st_dev, st.st_ino)
            shared = objects.setdefault(identity, _Shared(found))
            shared.links += names
            shared.partners.append(partner)
            if st.st_nlink > 1:
                several.add(identity)
        others = self._below.other_names(several)
        for identity, shared in objects.items():
            self._join(shared, others.get(identity, []))

    def _partner(self, partner: bytes, what: str) -> _Found:
        """What hard links to `partner` join. Raises TarError."""
        directory = split(partner)[0]
        found = self._below.find(partner)
        if found is None or (directory and self._directory_below(directory) is None):
            if directory:
                self._directory_below(directory)
            raise TarError(f"{what}: that is not there")
        if found.entry.is_dir:
            raise TarError(f"{what}: that is a directory")
        return found

    def _join(self, shared: _Shared, others: Iterable[bytes]) -> None:
        """Makes a copy of an object, under all names that it has then."""
        wanted = dict.fromkeys(shared.links)
        for name in (*shared.partners, *others):
            if name not in wanted and self._is_seen(name, shared.found):
                wanted[name] = None
        first, *more = wanted
        self._copy(first, shared.found)
        for name in more:
            parent = self._make_directory(split(name)[0])
            link = Member(name, Kind.HARDLINK, target=first)
            self._maker.hard_link(self._root, parent, split(name)[1], link)

    def _is_seen(self, name: bytes, found: _Found) -> bool:
        """Whether `name` is that very object below, and the layer lets it be seen."""
        at = 0
        while at >= 0:
            at = name.find(b"/", at + 1)
            if (name if at < 0 else name[:at]) in self._hidden:
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
        member = self._below.describe(found, path)
        self._objects += 1
        if member.kind is Kind.FILE:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            source = open_beneath(self._below.parent(found).fd, found.name, flags)
            self._maker.file(parent, name, member, _FileData(source))
        else:
            self._maker.special(parent, name, member)


class _FileData:
    def __init__(self, fd: OwnedFd) -> None:
        self._fd = fd

    def read(self, size: int) -> bytes:
        return os.read(self._fd.fd, size)
