"""Several layers as one tree, in memory: the rules of applying layers, by members alone. Opens no file and
unpacks nothing, so owners, devices and xattrs need no privilege. `join` reads layers and writes the one.

Law: to apply what a `FlatTree` gives is to apply its layers one after the other, on every directory on which
that can be done at all (tests/oci/test_flatten.py). Two kinds of trees:

* whole: nothing lies below. There are no whiteouts left.
* open: unknown layers stay below. Whiteouts and opaque marks are kept where they can still hide something,
  and directories that the layers use without naming them (*implied*) take their attributes from below.

Two things about an open tree depend on what is below, and no tarball can say "whichever it is":

* a hard link to a name below, where that name is hidden or replaced by a later layer (`LayerError`);
* an implied directory that ends up empty: it has to be there, but if it is named then it loses the
  attributes that it has below. `below`, a whole tree of what lies below, decides; without one it is left out
  with a note.

Source: image-spec layer.md, "Applying Changesets", "Whiteouts".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

from layerfs.errors import LayerError, TarError
from layerfs.oci.beneath import behind_link, below_no_directory
from layerfs.oci.member import Kind, Mark, Member, display, join, split
from layerfs.oci.packed import MAX_HELD, NAME_COST, PackedObjects, Place
from layerfs.oci.plan import check_names, is_whiteout_device
from layerfs.oci.tally import Tally
from layerfs.overlay import whiteout
from layerfs.overlay.names import MARKS

_DIRECTORY_COST = 400
#: `_Directory.record`: attributes come from below.
_FROM_BELOW = -1
#: The layer in which a name was made by no layer.
_NO_LAYER = -1
MAX_LAYERS = 1 << 16


class _Directory:
    """A directory by what the layers say of it.

    `children`: name -> a directory, `object << 16 | layer that made the name`, or None for a whiteout (only
    in directories that are not opaque)."""

    __slots__ = ("children", "filled", "layer", "made", "named", "opaque", "pruned", "record")

    def __init__(self, opaque: bool, record: int) -> None:
        self.children: dict[bytes, _Directory | int | None] = {}
        #: nothing shows through from below
        self.opaque = opaque
        #: index of its attributes, or _FROM_BELOW
        self.record = record
        #: False: there are only whiteouts here, the directory itself may not be there at all
        self.made = False
        #: the last layer that named, used or implied it: whiteouts of that layer do not hide it
        self.layer = _NO_LAYER
        self.named = _NO_LAYER
        #: the last layer that hid all below it: doing it again changes nothing
        self.pruned = _NO_LAYER
        #: something in it brings it into being; known when members come out
        self.filled = False


class FlatTree:
    """Layers are put in lowest first: `begin_layer`, `add` for each member, in the order of the tarball.

    `whole`: nothing lies below. `marks_ns`: time of whiteouts. `tally` gathers what is dropped, as when a
    layer is applied: AUFS's book-keeping, devices 0/0, xattrs that would steer a merge. Directories that are
    implied and new get time 0, whatever the day, as in the layer cache."""

    def __init__(self, tally: Tally, *, whole: bool, marks_ns: int = 0, max_held: int = MAX_HELD) -> None:
        self._tally = tally
        self._whole = whole
        self._layer = _NO_LAYER
        self._objects = PackedObjects(max_held)
        #: objects with several names
        self._shared: set[int] = set()
        self._marks_ns = marks_ns
        self._implied = self._objects.add(Member(b"", Kind.DIR, 0o755), Place(0, 0))
        self._root = _Directory(whole, _FROM_BELOW)
        self._root.made = True
        #: the directory that members are being put in, and its path
        self._here: tuple[bytes, _Directory] | None = None

    def begin_layer(self) -> None:
        self._layer += 1
        self._here = None
        if self._layer >= MAX_LAYERS:
            raise LayerError(f"more than {MAX_LAYERS} layers")

    # --- members in ---

    def add(self, member: Member, offset: int = 0) -> bool:
        """Takes one member, whose data are at `offset` of the current layer's tar; False when the layer had
        this name before (the last one counts).

        Raises TarError for what cannot be applied, as `apply` does, LayerError when all of it is too much."""
        assert self._layer != _NO_LAYER, "no layer was begun"
        mark, hidden = check_names(member)
        directory, name = split(member.name)
        if mark is Mark.AUFS:
            self._tally.add("book-keeping of AUFS: ignored", member.name)
            return True
        if mark is not Mark.ENTRY:
            found = self._find_to_hide(directory, member.name)
            if found is not None and mark is Mark.OPAQUE:
                self._prune(found)
            elif found is not None:
                self._hide(found, hidden)
            return True
        if is_whiteout_device(member):
            self._tally.add("a character device 0/0, which would be a whiteout: dropped", member.name)
            return True
        if not member.name:
            new = self._root.named != self._layer
            self._root.record = self._record(member, offset)
            self._root.named = self._layer
            return new
        parent = self._enter(directory, f"member {display(member.name)}")
        if member.kind is Kind.DIR:
            return self._add_directory(parent, name, member, offset)
        before = parent.children.get(name)
        if isinstance(before, _Directory):
            new = before.layer != self._layer
        else:
            new = before is None or before & 0xFFFF != self._layer
        number = self._partner(member) if member.kind is Kind.HARDLINK else self._record(member, offset)
        self._objects.hold(NAME_COST + len(name))
        parent.children[name] = number << 16 | self._layer
        return new

    def _add_directory(self, parent: _Directory, name: bytes, member: Member, offset: int) -> bool:
        before = parent.children.get(name)
        record = self._record(member, offset)
        if isinstance(before, _Directory):
            new = before.named != self._layer
            child = before
            child.record = record
        else:
            new = before is None or before & 0xFFFF != self._layer
            # Whatever is replaced, a whiteout too, hides what is below it.
            child = self._new_directory(parent, name, parent.opaque or name in parent.children, record)
        child.made = True
        child.layer = child.named = self._layer
        return new

    def _new_directory(self, parent: _Directory, name: bytes, opaque: bool, record: int) -> _Directory:
        self._objects.hold(_DIRECTORY_COST + len(name))
        child = parent.children[name] = _Directory(opaque, record)
        return child

    def _enter(self, path: bytes, what: str) -> _Directory:
        """The directory `path`, made where the layer implies it. Raises TarError when something else is
        there."""
        if self._here is not None and self._here[0] == path:
            return self._here[1]
        here = self._root
        for part in path.split(b"/") if path else ():
            child = here.children.get(part)
            if isinstance(child, int):
                raise self._in_the_way(child, what)
            if child is None:
                opaque = here.opaque or part in here.children
                child = self._new_directory(here, part, opaque, self._implied if opaque else _FROM_BELOW)
            child.made = True
            child.layer = self._layer
            here = child
        self._here = (path, here)
        return here

    def _partner(self, member: Member) -> int:
        """The object that a hard link joins."""
        wanted = f"hard link {display(member.name)} to {display(member.target)}"
        directory, name = split(member.target)
        here: _Directory | None = self._root
        for part in directory.split(b"/") if directory else ():
            assert here is not None
            child = here.children.get(part)
            if isinstance(child, int):
                raise self._in_the_way(child, wanted)
            if child is None and (here.opaque or part in here.children):
                raise TarError(f"{wanted}: that is not there")
            here = child
            if here is None:
                break  # what is here is all from below
        found = here.children.get(name) if here is not None else None
        if isinstance(found, int):
            number = found >> 16
            self._shared.add(number)
            return number
        if found is not None and found.made:
            raise TarError(f"{wanted}: that is a directory")
        if here is not None and found is None and (here.opaque or name in here.children):
            raise TarError(f"{wanted}: that is not there")
        return self._record(member, 0)

    def _record(self, member: Member, offset: int) -> int:
        return self._objects.add(without_steering(member, self._tally), Place(self._layer, offset))

    def _in_the_way(self, child: int, what: str) -> TarError:
        if self._objects.kind(child >> 16) is Kind.SYMLINK:
            return behind_link(what)
        return below_no_directory(what)

    # --- whiteouts ---

    def _find_to_hide(self, path: bytes, member: bytes) -> _Directory | None:
        """The directory in which a whiteout stands; None when it has nothing to hide."""
        here = self._root
        for part in path.split(b"/") if path else ():
            child = here.children.get(part)
            if isinstance(child, int):
                if self._objects.kind(child >> 16) is Kind.SYMLINK:
                    raise self._in_the_way(child, f"member {display(member)}")
                return None
            if child is None:
                if here.opaque or part in here.children:
                    return None
                child = self._new_directory(here, part, False, _FROM_BELOW)
            here = child
        return here

    def _hide(self, directory: _Directory, name: bytes) -> None:
        """Removes what the layers below have under the name, and nothing of this layer."""
        child = directory.children.get(name)
        if isinstance(child, _Directory):
            if child.layer == self._layer:
                self._hide_attributes(child)
                self._prune(child)
                return
            self._here = None
        elif child is not None and child & 0xFFFF == self._layer:
            return
        if directory.opaque:
            directory.children.pop(name, None)
        else:
            self._objects.hold(NAME_COST + len(name))
            directory.children[name] = None

    def _prune(self, directory: _Directory) -> None:
        """Removes everything below `directory` that this layer did not make."""
        self._here = None
        todo = [directory]
        while todo:
            here = todo.pop()
            here.opaque = True
            if here.pruned == self._layer:
                continue
            here.pruned = self._layer
            kept: dict[bytes, _Directory | int | None] = {}
            for name, child in here.children.items():
                if isinstance(child, _Directory):
                    if child.layer == self._layer:
                        self._hide_attributes(child)
                        kept[name] = child
                        todo.append(child)
                elif child is not None and child & 0xFFFF == self._layer:
                    kept[name] = child
            here.children = kept

    def _hide_attributes(self, directory: _Directory) -> None:
        """What a layer hides has no attributes to give to a directory that the layer implies."""
        if directory.named != self._layer:
            directory.record = self._implied

    # --- members out ---

    def find(self, path: bytes) -> Member | None:
        """What is under `path`, with its attributes; None when they are not known, or nothing is there."""
        here: _Directory | int | None = self._root
        for part in path.split(b"/") if path else ():
            if not isinstance(here, _Directory):
                return None
            here = here.children.get(part)
        if here is None:
            return None
        number = here.record if isinstance(here, _Directory) else here >> 16
        return self._objects.get(number, path)[0] if number != _FROM_BELOW else None

    @property
    def names_root(self) -> bool:
        """Whether a layer says what attributes the root has."""
        return self._root.record != _FROM_BELOW

    def members(self, below: Callable[[], FlatTree] | None = None) -> Iterator[tuple[Member, Place | None]]:
        """The one layer: each directory before what is in it, its opaque mark and whiteouts first, then names
        in the order of their bytes; with the place of a file's data. No name comes twice.

        `below` is asked at most once, and only where it matters. Raises LayerError for a hard link that
        cannot be kept."""
        known: FlatTree | None = None
        first_names: dict[int, bytes] = {}
        self._find_filled()
        #: what is left to do in each directory, and its path
        levels: list[tuple[Iterator[bytes], _Directory, bytes]] = []

        def enter(directory: _Directory, path: bytes, hidden: bool) -> Iterator[tuple[Member, Place | None]]:
            nonlocal known
            if directory.record != _FROM_BELOW:
                yield self._objects.get(directory.record, path)
            elif directory.made and path and not directory.filled:
                known = known or (below() if below is not None else None)
                if known is None:
                    reason = "an empty directory that no layer names: left out, the layers below must have it"
                    self._tally.add(reason, path)
                elif (found := known.find(path)) is None or found.kind is not Kind.DIR:
                    yield self._objects.get(self._implied, path)
            if directory.opaque and not hidden:
                yield _mark(path, whiteout.OPAQUE_NAME, self._marks_ns), None
            for name in sorted(name for name, child in directory.children.items() if child is None):
                yield _mark(path, whiteout.PREFIX + name, self._marks_ns), None
            names = sorted(name for name, child in directory.children.items() if child is not None)
            levels.append((iter(names), directory, path))

        yield from enter(self._root, b"", self._whole)
        while levels:
            names, directory, path = levels[-1]
            name = next(names, None)
            if name is None:
                levels.pop()
                continue
            child = directory.children[name]
            here = join(path, name)
            if isinstance(child, _Directory):
                yield from enter(child, here, directory.opaque)
                continue
            assert child is not None
            number = child >> 16
            member, place = self._objects.get(number, here)
            if member.kind is Kind.HARDLINK:
                self._need_from_below(member)
                member = as_link(member, member.name, member.target)
            elif number in self._shared and (first := first_names.setdefault(number, here)) != here:
                member, place = as_link(member, here, first), None
            yield member, place

    def _find_filled(self) -> None:
        found = [self._root]
        for directory in found:
            found.extend(child for child in directory.children.values() if isinstance(child, _Directory))
        for directory in reversed(found):
            directory.filled = any(
                isinstance(child, int)
                or (isinstance(child, _Directory) and (child.filled or child.record != _FROM_BELOW))
                for child in directory.children.values()
            )

    def _need_from_below(self, member: Member) -> None:
        """Raises LayerError unless the name that a hard link joins is still the one below."""
        here = self._root
        for part in member.target.split(b"/"):
            child = here.children.get(part)
            if child is None and not here.opaque and part not in here.children:
                return
            if not isinstance(child, _Directory):
                break
            here = child
        else:
            if not here.made:
                return
        what = f"hard link {display(member.name)} to {display(member.target)}"
        raise LayerError(f"{what}: that lies below the layers, which hide it later; begin with a lower layer")


def without_steering(member: Member, tally: Tally) -> Member:
    """`member` without the xattrs that would steer a merge, each told to `tally`."""
    if not any(attribute.startswith(MARKS) for attribute in member.xattrs):
        return member
    xattrs = {}
    for attribute, value in member.xattrs.items():
        if attribute.startswith(MARKS):
            tally.add(f"xattr {display(os.fsencode(attribute))} would steer a merge: dropped", member.name)
        else:
            xattrs[attribute] = value
    return replace(member, xattrs=xattrs)


def as_link(member: Member, name: bytes, target: bytes) -> Member:
    """The object `member` under one more name. It repeats the attributes: containers/storage sets them."""
    return replace(member, name=name, kind=Kind.HARDLINK, size=0, target=target, rdev=(0, 0), xattrs={})


def _mark(directory: bytes, name: bytes, time_ns: int) -> Member:
    return Member(join(directory, name), Kind.FILE, mtime_ns=time_ns)
