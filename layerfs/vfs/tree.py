"""The merged tree as it is now: nodes, directories loaded on first touch, numbers, attributes. Changes
nothing on disk.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import trio

from layerfs.fdutil import OwnedFd, at_path, birth_time, fd_path, is_open_for_writing
from layerfs.gate import Gate, NoGate, Plain
from layerfs.ids import ROOT, Ino, NodeId, RealIno
from layerfs.inodes import numbers
from layerfs.overlay import origin as origin_codec
from layerfs.overlay.owners import Owners
from layerfs.stack import (
    Entry,
    Layer,
    LowerDir,
    Merged,
    Stack,
    data_source,
    lower_directories,
    merge_directory,
    own_redirect,
)
from layerfs.upper.upper import Upper
from layerfs.upper.work import Parked, Pin
from layerfs.vfs.node import Directory, File, Node

if TYPE_CHECKING:
    from layerfs.vfs.links import LinkIndex

#: A directory whose listings together are larger than this (bytes of st_size) is read in a thread. 32 KiB are
#: about 1,000 names.
_THREAD_ABOVE = 32 << 10
NAME_MAX = 255
#: Bytes of a path that one system call takes, and of a link's target.
PATH_MAX = 4096


def fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


@dataclass(slots=True)
class Attributes:
    """What stat shows. `st` is the real object's; the other fields are used in place of its own."""

    st: os.stat_result
    uid: int
    gid: int
    ino: int
    nlink: int
    ctime_ns: int
    blocks: int
    #: they may change and nobody tells
    fleeting: bool = False


class _InUse:
    """As a context: a node stays though its caller awaits."""

    __slots__ = ("_node", "_tree")

    def __init__(self, tree: Tree, node: Node) -> None:
        self._tree = tree
        self._node = node

    def __enter__(self) -> None:
        self._node.users += 1

    def __exit__(self, *_: object) -> None:
        self._node.users -= 1
        self._tree.release(self._node)


class Tree:
    def __init__(
        self,
        stack: Stack,
        upper: Upper | None,
        owners: Owners | None = None,
        gate: Gate | None = None,
        *,
        most_pins: int | None = None,
    ) -> None:
        self.stack = stack
        #: None: owners are shown as they are stored
        self.owners = owners or None
        #: None when the mount is read-only (`stack.upper` may be there all the same)
        self.upper = upper
        self.gate: Gate = gate if gate is not None else NoGate()
        self.nodes: dict[NodeId, Node] = {}
        self.links: LinkIndex | None = None
        #: real inode number in the upper -> (real ctime after a copy-up, ctime to show as long as it has not
        #: moved)
        self.shown_ctimes: dict[int, tuple[int, int]] = {}
        #: told when attributes that the kernel keeps were changed by something other than its own requests
        self.attributes_moved: Callable[[NodeId], None] = lambda id: None
        #: told when names were loaded
        self.grown: Callable[[], None] = lambda: None
        #: told when the names of a directory were dropped
        self.unloaded: Callable[[Directory], None] = lambda directory: None
        #: told when a file's node goes
        self.let_go_of_files: Callable[[Node], None] = lambda node: None
        #: directories whose attributes changed since `tell_changed`
        self._changed: set[Directory] = set()
        #: how many nodes are kept reachable by a descriptor (`Node.pin`), and how many may be (None: all)
        self.pins = 0
        self.most_pins = most_pins
        #: raised when a directory moves (see `links`)
        self.moves = 0
        self._temporary = 0
        self._uuids: list[bytes | None] | None = None
        self._load_limiter = trio.CapacityLimiter(4)
        self.root = self._make_root()

    # -- nodes ------------------------------------------------------------------------------------

    def _make_root(self) -> Directory:
        root = Directory(ROOT, None, b"")
        root.lookups = 1
        root.lowers = tuple(layer.root for layer in self.stack.lowers)
        root.lower_path = b"" if root.lowers else None
        root.in_upper = self.stack.upper is not None
        root.home = root.lowers[0] if root.lowers else None
        self.nodes[ROOT] = root
        return root

    def node(self, id: int) -> Node:
        """Raises OSError(ESTALE) for a node the kernel should not know."""
        node = self.nodes.get(NodeId(id))
        return node if node is not None else self._from_gate(NodeId(id))

    def _from_gate(self, id: NodeId) -> Node:
        """The node of an object that the kernel has got from the gate. Raises OSError."""
        place = self.gate.whereabouts(id)
        if place is None:
            fail(errno.ESTALE)
        directory, name = place
        parent = self.directory(directory)
        assert parent.merged is not None, "its names were published"
        return self.child(parent, name, parent.merged.names[name])

    def directory(self, id: int) -> Directory:
        node = self.node(id)
        if not isinstance(node, Directory):
            fail(errno.ENOTDIR)
        return node

    def file(self, id: int) -> File:
        node = self.node(id)
        if not isinstance(node, File):
            fail(errno.EISDIR)
        return node

    def in_use(self, node: Node) -> _InUse:
        return _InUse(self, node)

    def forget(self, id: int, count: int) -> None:
        node = self.nodes.get(NodeId(id))
        if node is None and self.gate.knows(NodeId(id)):
            # `entrust` gave it away between the lookup and now: a listing had no room for it.
            node = self._from_gate(NodeId(id))
        if node is not None:
            node.lookups -= count
            self.release(node)

    def release(self, node: Node | None) -> None:
        """Drops `node`, and then its parents, if nothing needs them any more."""
        while node is not None and node.lookups <= 0 and node.users <= 0 and node.id != ROOT:
            if self.gate.holds(node.id):
                return  # `let_go` follows
            if self.nodes.get(node.id) is node:
                if isinstance(node, File) and node.handles:
                    self.let_go_of_files(node)
                del self.nodes[node.id]
                self.gate.forget(node.id)
            parent = node.parent
            if parent is not None:
                self._unname(node, parent, node.name)
            for directory, name in node.names or ():
                self._unname(node, directory, name)
                if directory is not parent:
                    self.release(directory)
            node.names = None
            node.parent = None
            self.stack.pool.drop(node)
            self.pin(node, None)
            node = parent

    def entrust(self, node: Node, parent: Directory, name: bytes) -> None:
        """Gives a lower file that was only looked up to the gate: Python answered because its directory was
        not loaded yet."""
        if node.in_upper or node.users or node.names or not isinstance(node, File) or not self.gate.native:
            return
        plain = self._plain_home(node.home) if node.home is not None else None
        if plain is None or node.id != plain[2] | node.real:
            return  # the gate would give it another number
        lookups, node.lookups = node.lookups, 0
        self.release(node)
        if not self.gate.entrust(parent.id, name, lookups):
            assert parent.merged is not None
            self.child(parent, name, parent.merged.names[name]).lookups = lookups

    def pin(self, node: Node, pin: Pin | None) -> None:
        self.pins += isinstance(pin, OwnedFd) - isinstance(node.pin, OwnedFd)
        node.pin = pin

    def let_go(self, id: int) -> None:
        """The gate holds nothing of a directory any more."""
        self.release(self.nodes.get(NodeId(id)))

    def _unname(self, node: Node, parent: Directory, name: bytes) -> None:
        parent.users -= 1
        entry = parent.merged.names.get(name) if parent.merged is not None else None
        if entry is not None and entry.node is node:
            entry.node = None
            if entry.home is not None:
                self.gate.give_back(parent.id, name, entry.is_dir)

    def add_name(self, node: Node, parent: Directory, name: bytes) -> None:
        """`node` has the name `name` in `parent` (as well)."""
        if node.parent is None and node.id != ROOT:
            node.parent, node.name = parent, name
            self.pin(node, None)
        elif (node.parent, node.name) == (parent, name) or (node.names and (parent, name) in node.names):
            return
        else:
            if node.names is None:
                node.names = set()
            node.names.add((parent, name))
        parent.users += 1

    def drop_name(self, node: Node, parent: Directory, name: bytes) -> None:
        """`node` lost that name. It may be left without one."""
        if (node.parent, node.name) == (parent, name):
            if node.names:
                node.parent, node.name = node.names.pop()
            else:
                node.parent = None
        elif node.names and (parent, name) in node.names:
            node.names.remove((parent, name))
        else:
            return
        parent.users -= 1

    def child(self, parent: Directory, name: bytes, entry: Entry) -> Node:
        """The node of an entry, made if there is none. Raises OSError (EIO for a nonsense redirect, whatever
        lstat gives).
        """
        if entry.node is not None:
            assert isinstance(entry.node, Node)
            return entry.node
        node = (
            self._make_directory(parent, name, entry)
            if entry.is_dir
            else self._make_file(parent, name, entry)
        )
        entry.node = node
        self.add_name(node, parent, name)
        return node

    def _make_directory(self, parent: Directory, name: bytes, entry: Entry) -> Directory:
        upper_parent = self.upper_fd(parent) if entry.home is None else None
        lowers = lower_directories(self.stack, parent.lowers, name, entry.lowers, upper_parent)
        if lowers:
            top = lowers[0]
            real, region = entry.real, self._region(parent, entry)
            if entry.home is None or top.layer is not entry.home.layer:
                real = os.fstat(self.stack.open(top).fd).st_ino
                region = top.region
            ino = numbers.compose(top.layer.number, RealIno(real), region)
        else:
            ino = self._upper_number(parent, name, entry)
        lookups = self.gate.adopt(parent.id, name)
        node = Directory(self.claim(ino), parent=None, name=name)
        node.lookups = lookups
        node.lowers = lowers
        if lowers:
            node.lower_path = self._lower_path(parent, name, entry, lowers)
        node.in_upper = entry.home is None
        node.home, node.home_name, node.real = entry.home, name, entry.real
        self.nodes[node.id] = node
        return node

    def _lower_path(
        self, parent: Directory, name: bytes, entry: Entry, lowers: tuple[LowerDir, ...]
    ) -> bytes:
        if entry.home is None and self.stack.upper is not None:
            path = at_path(self.upper_fd(parent).fd, name)
            target = own_redirect(path, self.stack.names, follow=False)
            if target is not None and target.startswith(b"/"):
                return target[1:]
            if target is not None:
                name = target
        if parent.lower_path is None:
            return lowers[0].path
        return parent.lower_path + b"/" + name if parent.lower_path else name

    def _make_file(self, parent: Directory, name: bytes, entry: Entry) -> File:
        region = self._region(parent, entry)
        if entry.home is None:
            ino = self._upper_number(parent, name, entry)
        else:
            ino = numbers.compose(entry.home.layer.number, RealIno(entry.real), region)
        known = self.nodes.get(NodeId(ino))
        if isinstance(known, File) and self._same(known, entry, region):
            return known
        lookups = self.gate.adopt(parent.id, name)
        node = File(self.claim(ino), parent=None, name=name)
        node.lookups = lookups
        node.in_upper = entry.home is None
        node.home, node.home_name, node.real = entry.home, name, entry.real
        node.region = region
        node.lookup_dirs = parent.lowers
        self.nodes[node.id] = node
        return node

    @staticmethod
    def _same(node: File, entry: Entry, region: bytes) -> bool:
        """Whether a live node is the object of another entry: a hard link in one file system of one layer."""
        if node.real != entry.real or node.region != region or node.in_upper != (entry.home is None):
            return False
        return entry.home is None or (node.home is not None and node.home.layer is entry.home.layer)

    def _region(self, parent: Directory, entry: Entry) -> bytes:
        """The region (`inodes.numbers`) in which the entry's real inode number counts."""
        if entry.home is not None:
            self.stack.open(entry.home)
            return entry.home.region
        return self.upper_region(parent)

    def upper_region(self, directory: Directory) -> bytes:
        """As a lower's: the path where another file system begins. An upper should hold none, but may."""
        if directory.upper_region is None:
            assert self.stack.upper is not None
            device = os.fstat(self.upper_fd(directory).fd).st_dev
            own = device == os.fstat(self.stack.upper.fd.fd).st_dev
            directory.upper_region = b"" if own else b"device %d" % device
        return directory.upper_region

    # -- numbers ----------------------------------------------------------------------------------

    def claim(self, ino: Ino) -> NodeId:
        """The node id for a new node: its number, or a temporary one when a live node has that."""
        id = NodeId(ino)
        while id in self.nodes or self.gate.knows(id):
            self._temporary += 1
            id = NodeId(numbers.TEMPORARY | self._temporary)
        self.gate.claim(id)
        return id

    def _upper_number(self, parent: Directory, name: bytes, entry: Entry) -> Ino:
        if self.upper is not None and (self.is_impure(parent) or self.upper.inode_log):
            directory = self.upper_fd(parent)
            recorded = self.upper.recorded_ino(directory.fd, name, entry.real)
            if recorded is not None and numbers.storable(recorded):
                return Ino(recorded)
            found = self.upper.origin_of(directory.fd, name)
            if found is not None and self._has_one_name(directory, name):
                number = self._origin_number(parent, name, found)
                if number is not None:
                    return number
        assert self.stack.upper is not None
        return numbers.compose(self.stack.upper.number, RealIno(entry.real), self.upper_region(parent))

    def is_impure(self, directory: Directory) -> bool:
        if directory.impure is None:
            fd = self.upper_fd(directory) if directory.in_upper else None
            directory.impure = False
            if fd is not None and self.upper is not None:
                directory.impure, directory.marked = self.upper.impurity(fd)
        return directory.impure

    @staticmethod
    def _has_one_name(directory: OwnedFd, name: bytes) -> bool:
        """The number of an origin depends on the path it is found at, so it will not do for several names."""
        return os.stat(name, dir_fd=directory.fd, follow_symlinks=False).st_nlink == 1

    def _origin_number(self, parent: Directory, name: bytes, found: origin_codec.Origin) -> Ino | None:
        """The number for an upper object that another overlay copied up: the lower inode number in its
        origin, and the layer it must be from. Nothing is opened by handle.
        """
        real = origin_codec.real_ino(found)
        if real is None:
            return None
        for home in parent.lowers:
            try:
                st = os.stat(name, dir_fd=self.stack.open(home).fd, follow_symlinks=False)
            except OSError:
                continue
            if st.st_ino == real:
                return numbers.compose(home.layer.number, RealIno(real))
        if self._uuids is None:
            self._uuids = [layer.uuid() for layer in self.stack.lowers]
        for layer, uuid in zip(self.stack.lowers, self._uuids, strict=True):
            if uuid == found.uuid:
                return numbers.compose(layer.number, RealIno(real))
        return None

    # -- descriptors ------------------------------------------------------------------------------

    def upper_fd(self, directory: Directory) -> OwnedFd:
        """An O_PATH descriptor of the directory's upper part, which must exist. Raises OSError."""
        assert directory.in_upper and self.stack.upper is not None
        if directory.parent is None:
            if isinstance(directory.pin, OwnedFd):
                return directory.pin
            if directory.id != ROOT:
                fail(errno.ENOENT)
            return self.stack.upper.fd
        # Not recursive: trees may be deeper than Python's stack. Climb to the nearest kept descriptor, then
        # come down.
        way: list[Directory] = []
        here: Directory | None = directory
        fd: OwnedFd | None = None
        pool = self.stack.pool
        while here is not None and fd is None:
            if here.parent is None:
                fd = self.upper_fd(here)
            elif here in pool:
                fd = pool.get(here, _unreachable)
            else:
                way.append(here)
                here = here.parent
        assert fd is not None
        for here in reversed(way):
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = pool.get(here, partial(os.open, here.name, flags, dir_fd=fd.fd))
        return fd

    def where(self, node: Node) -> tuple[OwnedFd, bytes]:
        """(directory descriptor, name) of the real object now; an empty name means the descriptor is the
        object. Raises OSError.
        """
        if isinstance(node.pin, Parked):
            return node.pin.directory, node.pin.name
        if node.pin is not None:
            return node.pin, b""
        if node.in_upper:
            if node.parent is None:
                return self.upper_fd(self._as_directory(node)), b""
            return self.upper_fd(node.parent), node.name
        if node.id == ROOT:
            return self.stack.open(self.root.lowers[0]), b""
        assert node.home is not None
        return self.stack.open(node.home), node.home_name

    @staticmethod
    def _as_directory(node: Node) -> Directory:
        if not isinstance(node, Directory):
            fail(errno.ENOENT)
        return node

    def real_path(self, node: Node) -> tuple[bytes, bool, OwnedFd]:
        """A path for calls that take no descriptor; whether to follow its last component (never a user's
        link); what keeps it valid.
        """
        fd, name = self.where(node)
        if name:
            return at_path(fd.fd, name), False, fd
        return fd_path(fd.fd), True, fd

    def object_path(self, fd: OwnedFd, name: bytes) -> OwnedFd:
        """An O_PATH descriptor of exactly the object that `where` named: for calls that would follow a
        symbolic link. Raises OSError.
        """
        if not name:
            return fd
        return OwnedFd(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd.fd))

    def stat_real(self, node: Node) -> os.stat_result:
        """The real object's attributes, with owner, mode, type and device as its layer means them
        (`overlay.override`); owners are not mapped yet. Raises OSError.
        """
        fd, name = self.where(node)
        st = os.stat(name, dir_fd=fd.fd, follow_symlinks=False) if name else os.fstat(fd.fd)
        if self.stack.overrides:
            path, follow, _keep = self.real_path(node)
            return self._layer_of(node).shown(st, path, follow=follow)
        return st

    def _layer_of(self, node: Node) -> Layer:
        if node.in_upper:
            assert self.stack.upper is not None
            return self.stack.upper
        return node.home.layer if node.home is not None else self.stack.lowers[0]

    def open_real(self, fd: OwnedFd, name: bytes, flags: int) -> OwnedFd:
        """Opens the regular file that `where` or `data_location` named. Raises OSError: EIO when it is not
        one by now (changed from outside): opening a fifo would block, opening a device does things.
        """
        target = self.object_path(fd, name)
        if not stat.S_ISREG(os.fstat(target.fd).st_mode):
            fail(errno.EIO)
        return OwnedFd(os.open(fd_path(target.fd), flags | os.O_CLOEXEC))

    def data_location(self, node: File) -> tuple[OwnedFd, bytes]:
        """Where the bytes of a file are now: as `where`, but the lower file for a metadata-only one. Raises
        OSError(EIO) without data.
        """
        if not self.is_metacopy(node):
            return self.where(node)
        target = self.redirect_of(node)
        below = -1 if node.in_upper or node.home is None else node.home.layer.index
        home, data_name = data_source(self.stack, node.lookup_dirs, node.home_name, target, below)
        return self.stack.open(home), data_name

    def redirect_of(self, node: Node) -> bytes | None:
        """The node's own redirect. Raises OSError(EIO) for nonsense."""
        path, follow, _keep = self.real_path(node)
        return own_redirect(path, self.stack.names, follow=follow)

    def is_metacopy(self, node: File) -> bool:
        if node.metacopy is None:
            path, follow, _keep = self.real_path(node)
            # Listing needs no permission on the file, getting does. On anything but a regular file the mark
            # means nothing (fs/overlayfs/namei.c ovl_check_metacopy_xattr).
            try:
                present = self.stack.names.metacopy in os.listxattr(path, follow_symlinks=follow)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                present = False
            node.metacopy = present and stat.S_ISREG(self.stat_real(node).st_mode)
        return node.metacopy

    # -- loading ----------------------------------------------------------------------------------

    async def load(self, directory: Directory) -> Merged:
        """The names of a directory, read on first touch, once however many ask. Raises OSError."""
        while True:
            if directory.merged is not None:
                return directory.merged
            if directory.loading is not None:
                await directory.loading.wait()
                continue
            directory.loading = trio.Event()
            directory.users += 1
            try:
                merged = await self._read_names(directory)
                # Nothing can have changed the names meanwhile: every change loads first, and a copy-up of the
                # directory itself only adds an empty upper part.
                directory.merged = merged
                self.gate.publish_directory(directory.id, merged.names, self._plain(directory))
                self.grown()
                return merged
            finally:
                directory.loading.set()
                directory.loading = None
                directory.users -= 1

    def unload(self, directory: Directory) -> None:
        """Drops the names of a directory that nothing leans on; the next touch loads them again."""
        directory.merged = None
        self.gate.unpublish_directory(directory.id)
        self.unloaded(directory)

    def _plain(self, directory: Directory) -> dict[LowerDir, Plain]:
        """The lower directories whose files are shown as they are, but for their numbers."""
        return {home: plain for home in directory.lowers if (plain := self._plain_home(home)) is not None}

    def _plain_home(self, home: LowerDir) -> Plain | None:
        base = numbers.base(home.layer.number)
        if self.owners is not None or home.layer.overrides or home.region or base is None:
            return None
        return (home.layer.fd.fd, home.path, base) if len(home.path) < PATH_MAX else None

    async def _read_names(self, directory: Directory) -> Merged:
        upper = self.upper_fd(directory) if directory.in_upper else None
        lowers = [(home, self.stack.open(home)) for home in directory.lowers]
        size = sum(os.fstat(fd.fd).st_size for _, fd in lowers)
        if upper is not None:
            size += os.fstat(upper.fd).st_size
        work = partial(merge_directory, upper, lowers, self.stack.names)
        if size <= _THREAD_ABOVE:
            return work()
        return await trio.to_thread.run_sync(work, limiter=self._load_limiter)

    async def find(self, parent: Directory, name: bytes) -> Entry | None:
        """The entry `name` in `parent`; None when there is none. Raises OSError (ENOENT for a removed
        parent).
        """
        if len(name) > NAME_MAX:
            fail(errno.ENAMETOOLONG)
        merged = parent.merged if parent.merged is not None else await self.load(parent)
        return merged.names.get(name)

    # -- attributes -------------------------------------------------------------------------------

    async def attributes(self, node: Node) -> Attributes:
        """Raises OSError."""
        if isinstance(node, File) and node.fleeting:
            node.fleeting = self._is_written(node)
        st = self.stat_real(node)
        if isinstance(node, File):
            node.is_regular = stat.S_ISREG(st.st_mode)
            if node.in_upper:
                shown = self._upper_attributes(node, st, st.st_nlink)
                shown.fleeting = node.fleeting
                return shown
            nlink = st.st_nlink
            if node.parent is None:
                nlink = 0
            elif nlink > 1 and self.links is not None:
                nlink = await self.links.count(node, nlink)
                if self._changed_meanwhile(node):
                    return await self.attributes(node)
            return self._attributes(st, node.id, nlink, st.st_ctime_ns, st.st_blocks)
        assert isinstance(node, Directory)
        return self._directory_attributes(node, st)

    def _is_written(self, node: File) -> bool:
        """Whether somebody has a file of the upper open, or mapped to be written. Raises OSError."""
        if node.handles:
            return True
        fd = self.open_real(*self.where(node), os.O_RDONLY | os.O_NOATIME)
        written = is_open_for_writing(fd.fd)
        del fd
        return written

    def _directory_attributes(self, node: Directory, st: os.stat_result | None = None) -> Attributes:
        if st is None:
            st = self.stat_real(node)
        parts = len(node.lowers) + node.in_upper
        if node.in_upper:
            return self._upper_attributes(node, st, st.st_nlink if parts == 1 else 1)
        nlink = st.st_nlink if parts == 1 else 1
        return self._attributes(st, node.id, nlink, st.st_ctime_ns, st.st_blocks)

    def _attributes(self, st: os.stat_result, ino: int, nlink: int, ctime_ns: int, blocks: int) -> Attributes:
        uid, gid = st.st_uid, st.st_gid
        if self.owners is not None:
            uid, gid = self.owners.uid.shown(uid), self.owners.gid.shown(gid)
        return Attributes(st, uid, gid, ino, nlink, ctime_ns, blocks)

    def shown_uid(self, st: os.stat_result) -> int:
        """The owner of a real object as it is shown."""
        return st.st_uid if self.owners is None else self.owners.uid.shown(st.st_uid)

    def shown_gid(self, st: os.stat_result) -> int:
        """The group of a real object as it is shown."""
        return st.st_gid if self.owners is None else self.owners.gid.shown(st.st_gid)

    @staticmethod
    def _changed_meanwhile(node: File) -> bool:
        """Whether a lower file was copied up or unlinked while its names were counted."""
        return node.in_upper or node.parent is None

    def _upper_attributes(self, node: Node, st: os.stat_result, nlink: int) -> Attributes:
        ctime = st.st_ctime_ns
        if isinstance(node.pin, Parked):
            nlink -= 1
        if nlink > 1 and self.upper is not None and isinstance(node, File):
            nlink = max(1, nlink + self.upper.hidden_links(*self.where(node)))
        kept = self.shown_ctimes.get(st.st_ino)
        if kept is not None and kept[0] == ctime:
            ctime = kept[1]
        blocks = st.st_blocks
        if (
            blocks == 0
            and st.st_size
            and isinstance(node, File)
            and node.is_regular
            and self.is_metacopy(node)
        ):
            # tar and cp take "no blocks" for "all hole": show those of the file that has the data.
            try:
                fd, name = self.data_location(node)
                blocks = os.stat(name, dir_fd=fd.fd, follow_symlinks=False).st_blocks
            except OSError:
                pass
        return self._attributes(st, node.id, nlink, ctime, blocks)

    def birth_time(self, node: Node) -> int | None:
        """When an object was made (statx(2) stx_btime), in ns since 1970; None where its layer does not say.

        A merged directory's is that of its top lower, as its number is; a copy of anything else shows its
        original's. Raises OSError."""
        if isinstance(node, Directory) and node.lowers:
            return birth_time(self.stack.open(node.lowers[0]).fd, b"")
        fd, name = self.where(node)
        if node.in_upper and self.upper is not None:
            return self.upper.birth_time(fd.fd, name)
        return birth_time(fd.fd, name)

    def keep_ctime(self, node: Node, shown: int) -> None:
        """Shows `shown` as ctime of an upper object until something really changes it: a copy-up is not a
        change.
        """
        st = self.stat_real(node)
        self.shown_ctimes[st.st_ino] = (st.st_ctime_ns, shown)

    def shown_ctime(self, node: Node) -> int:
        st = self.stat_real(node)
        if node.in_upper:
            kept = self.shown_ctimes.get(st.st_ino)
            if kept is not None and kept[0] == st.st_ctime_ns:
                return kept[1]
        return st.st_ctime_ns

    def changed(self, node: Node) -> None:
        """Something really changed `node`: its own ctime counts again."""
        if node.in_upper and self.shown_ctimes:
            self.shown_ctimes.pop(node.real, None)
        self.gate.retract_attributes(node.id)
        if self.gate.native and isinstance(node, Directory):
            self._changed.add(node)

    def tell_changed(self) -> None:
        """Tells the gate how directories are after a change: the kernel asks for the attributes of the parent
        before each next one (fs/fuse/dir.c fuse_perm_getattr)."""
        while self._changed:
            directory = self._changed.pop()
            if self.nodes.get(directory.id) is directory and not directory.unlinked:
                self.tell(directory)

    def tell(self, directory: Directory) -> None:
        try:
            self.gate.tell_attributes(directory.id, self._directory_attributes(directory))
        except OSError:
            pass  # whoever asks gets the error

    def path(self, directory: Directory) -> bytes:
        """Path of a directory in the merged tree, from the root, without a leading slash. Raises
        OSError(ENOENT) when it is removed.
        """
        parts: list[bytes] = []
        here = directory
        while here.id != ROOT:
            if here.parent is None:
                fail(errno.ENOENT)
            parts.append(here.name)
            here = here.parent
        return b"/".join(reversed(parts))


def _unreachable() -> int:
    raise AssertionError("the pool lost a descriptor between two lines")
