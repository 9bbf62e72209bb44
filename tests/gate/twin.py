"""What the gate decides, in plain Python: the rules of gate/PROTOCOL.md and core.h said a second time, with
dictionaries and the `os` module. Slow, and clear; no descriptor is kept.

It must give the same verdict and the same reply as the C core on any frame, over the same layers on disk."""

from __future__ import annotations

import enum
import errno
import os
import stat
import struct
from dataclasses import dataclass, field
from typing import NamedTuple

from layerfs.fdutil import RESOLVE_INSIDE
from layerfs.fdutil.syscalls import openat2
from tests.gate import frames as f

#: Handles of files that the gate opened.
NATIVE = 1 << 63
LISTING_MAX = 256 << 10
READ_MAX = 256 << 20
WRITE_MAX = 128 << 10
#: In the handle of a WRITE that is passed: setuid stays.
KEEPS_SETID = 1 << 62
_REAL_MASK = (1 << 48) - 1
#: What pyfuse3 does not know.
_UNCARRIED = {f.FALLOCATE, f.COPY_FILE_RANGE, f.TMPFILE, f.STATX, f.COPY_FILE_RANGE_64}


class Verdict(enum.IntEnum):
    ANSWERED, PASSED, CARRIED = range(3)


class Home(NamedTuple):
    """A lower directory: number of its layer, path there, what is or-ed to real inode numbers."""

    layer: int
    path: bytes
    base: int


class Plain(NamedTuple):
    """What was published of a name: number of its home, real inode number, whether it is a directory."""

    home: int
    real: int
    directory: bool = False


@dataclass
class Name:
    plain: Plain | None
    #: whether it is plain now; else Python is asked
    answered: bool
    #: what a listing calls the place behind it
    offset: int
    #: it has vanished
    gone: bool = False


@dataclass
class Known:
    directory: Directory
    name: bytes
    lookups: int


@dataclass
class Directory:
    id: int
    homes: list[Home]
    names: dict[bytes, Name]
    known: int = 0
    let_go: bool = False
    #: names retracted so far
    changes: int = 0


@dataclass
class Listing:
    directory: int
    parent: int
    names: list[bytes]
    #: of the directory when `names` were
    changes: int
    fresh: bool


@dataclass
class Opened:
    node: int
    fd: int


@dataclass
class Way:
    """How a node is open."""

    backing: int
    handles: int


@dataclass
class Answer:
    verdict: Verdict
    #: the frame as pyfuse3, or whoever takes carried ones, gets it
    frame: bytes
    replies: list[bytes] = field(default_factory=list)
    let_go: list[int] = field(default_factory=list)


class _Ask(Exception):
    """Python must answer."""


class _Carry(Exception):
    """Python must, and pyfuse3 cannot carry it."""


class Twin:
    def __init__(
        self, *, descriptors: int, xattrs: bool = True, carries: bool = False, statfs: str | None = None
    ) -> None:
        self.descriptors, self.xattrs, self.carries, self.statfs = descriptors, xattrs, carries, statfs
        self.layers: list[str] = []
        self.directories: dict[int, Directory] = {}
        self.known: dict[int, Known] = {}
        self.claimed: set[int] = set()
        self.listings: dict[int, Listing] = {}
        self.open: dict[int, Opened] = {}
        self._vacant: list[int] = []
        #: node -> attributes, as Python told them
        self.told: dict[int, os.stat_result] = {}
        self.no_capability: set[int] = set()
        #: handle of Python's -> descriptor, whether it may be written
        self.lent: dict[int, tuple[int, bool]] = {}
        self.writes_held = False
        #: files are opened without asking; of those that were read, a descriptor for each node (the core has
        #: room for so many only, and opens again)
        self.openless = False
        #: directories, too; then listings are by node id
        self.opendirless = False
        #: Python opens and releases directories when it is called, at once.
        self.takes_calls = False
        self.open_directories: set[int] = set()
        self._directory_handles = 0x1000
        self.kept: dict[int, int] = {}
        #: INIT's flags: what the kernel offered, what is asked for beside libfuse's
        self.offered, self.wanted = 0, 0
        #: passthrough: `max_stack_depth`, 0: none; whether lower files have it
        self.stack_depth, self.passes_lowers = 0, False
        self.ways: dict[int, Way] = {}
        #: handle of Python's -> backing file
        self.backed: dict[int, int] = {}
        self._backings = 0
        #: whether replies arrive
        self.plugged = True

    def close(self) -> None:
        for opened in self.open.values():
            os.close(opened.fd)
        for fd, _ in self.lent.values():
            os.close(fd)
        for fd in self.kept.values():
            os.close(fd)

    # -- facts ------------------------------------------------------------------------------------

    def publish(self, id: int, homes: list[Home], names: dict[bytes, Plain | None]) -> None:
        assert id not in self.directories or not self.directories[id].known
        fits = {
            name: plain if plain and 1 < plain.real <= _REAL_MASK else None for name, plain in names.items()
        }
        self.directories[id] = Directory(id, homes, {})
        for name, plain in fits.items():
            self._add(self.directories[id], name, plain)

    @staticmethod
    def _add(directory: Directory, name: bytes, plain: Plain | None) -> None:
        """Names never go; those that are not plain when they come are listed first."""
        offset = 1 << (29 if plain is None else 30) | len(directory.names)
        directory.names[name] = Name(plain, plain is not None, offset + 3)

    def forget_directory(self, id: int) -> None:
        self.directories.pop(id, None)

    def retract(self, id: int, name: bytes) -> bool:
        directory = self.directories.get(id)
        if directory is None:
            return False
        directory.changes += 1
        if name not in directory.names:
            # Before all others: who lists meanwhile does not come to it.
            directory.names[name] = Name(None, False, (1 << 29) - len(directory.names) + 2)
        directory.names[name].answered = directory.names[name].gone = False
        return True

    def vanish(self, id: int, name: bytes) -> None:
        directory = self.directories.get(id)
        if directory is not None and name in directory.names:
            directory.names[name].answered, directory.names[name].gone = False, True

    def adopt(self, id: int, name: bytes) -> int:
        directory = self.directories.get(id)
        found = directory.names.get(name) if directory else None
        if directory is None or found is None or not found.answered or found.plain is None:
            return 0
        found.answered = False
        node = directory.homes[found.plain.home].base | found.plain.real
        self._drop(node)
        known = self.known.get(node)
        if known is None or (known.directory, known.name) != (directory, name):
            return 0
        del self.known[node]
        directory.known -= 1
        return known.lookups

    def give_back(self, id: int, name: bytes) -> None:
        directory = self.directories.get(id)
        found = directory.names.get(name) if directory else None
        if found is not None and found.plain is not None:
            found.answered, found.gone = True, False

    def holds(self, id: int) -> bool:
        directory = self.directories.get(id)
        if directory is None or not directory.known:
            return False
        directory.let_go = True
        return True

    def arrange(self, id: int, names: list[bytes]) -> list[bytes]:
        """In the order of listings."""
        return sorted(names, key=lambda name: self.directories[id].names[name].offset)

    def list_names(self, handle: int, id: int, parent: int, names: list[bytes]) -> None:
        changes = self.directories[id].changes
        self.listings[handle] = Listing(id, parent, names, changes, handle not in self.listings)

    def lend(self, handle: int, path: str, writes: bool) -> bool:
        self.take_back(handle)
        self.lent[handle] = os.open(path, os.O_RDWR), writes
        return True

    def take_back(self, handle: int) -> None:
        if handle in self.lent:
            os.close(self.lent.pop(handle)[0])

    def open_backing(self, handle: int, node: int, allowed: bool) -> int:
        backing = self._open_way(node, allowed)
        if backing:
            self.backed[handle] = backing
        return backing

    def close_backing(self, handle: int, node: int) -> None:
        self.backed.pop(handle, None)
        self._close_way(node)

    def _open_way(self, node: int, allowed: bool) -> int:
        """The first handle decides."""
        if node not in self.ways:
            self._backings += allowed
            self.ways[node] = Way(self._backings if allowed else 0, 0)
        self.ways[node].handles += 1
        return self.ways[node].backing

    def _close_way(self, node: int) -> None:
        self.ways[node].handles -= 1
        if not self.ways[node].handles:
            del self.ways[node]

    def switch(self, node: int, path: str) -> int:
        switched = [opened for opened in self.open.values() if opened.node == node]
        for opened in switched:
            os.close(opened.fd)
            opened.fd = os.open(path, os.O_RDONLY)
        if node in self.kept:
            self._drop(node)
            self.kept[node] = os.open(path, os.O_RDONLY)
        return len(switched) + (node in self.kept)

    # -- objects ----------------------------------------------------------------------------------

    def _way(self, directory: Directory, name: bytes) -> bytes:
        """A path to a plain name. Raises _Ask."""
        found = directory.names[name]
        assert found.plain is not None
        home = directory.homes[found.plain.home]
        root = os.open(self.layers[home.layer], os.O_PATH | os.O_DIRECTORY)
        try:
            if home.path:  # nothing on the way may lead out of the layer
                flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
                os.close(openat2(root, home.path, flags, resolve=RESOLVE_INSIDE))
        except OSError:
            raise _Ask from None
        finally:
            os.close(root)
        return os.path.join(os.fsencode(self.layers[home.layer]), home.path, name)

    def _stat(self, directory: Directory, name: bytes) -> os.stat_result:
        """Of a name that is what it was when it was published, and has no others. Raises _Ask."""
        found = directory.names[name]
        if not found.answered or found.plain is None:
            raise _Ask
        try:
            st = os.lstat(self._way(directory, name))
        except OSError:
            raise _Ask from None
        if st.st_ino != found.plain.real or stat.S_ISDIR(st.st_mode) != found.plain.directory:
            raise _Ask
        if found.plain.directory:
            if not self._is_bare(directory, name):  # a mark may say that it lies elsewhere
                raise _Ask
        elif st.st_nlink != 1:
            raise _Ask
        return st

    def _is_bare(self, directory: Directory, name: bytes) -> bool:
        """Whether it has no xattrs."""
        try:
            return not os.listxattr(self._way(directory, name), follow_symlinks=False)
        except OSError:
            return False

    def _know(self, directory: Directory, name: bytes) -> int:
        """The node of a plain name, which the kernel is about to get. Raises _Ask."""
        plain = directory.names[name].plain
        assert plain is not None
        node = directory.homes[plain.home].base | plain.real
        known = self.known.get(node)
        if known is None:
            if node in self.claimed:
                raise _Ask
            self.known[node] = Known(directory, name, 0)
            directory.known += 1
        elif (known.directory, known.name) != (directory, name):
            raise _Ask
        return node

    def _forget(self, node: int, count: int, answer: Answer) -> None:
        known = self.known[node]
        known.lookups -= min(count, known.lookups)
        if known.lookups == 0:
            self._drop(node)
            del self.known[node]
            known.directory.known -= 1
            if known.directory.known == 0 and known.directory.let_go:
                answer.let_go.append(known.directory.id)

    def _drop(self, node: int) -> None:
        if node in self.kept:
            os.close(self.kept.pop(node))

    # -- frames -----------------------------------------------------------------------------------

    def answer(self, frame: bytes) -> Answer:
        answer = Answer(Verdict.PASSED, frame)
        if len(frame) < f.IN_HEADER.size:
            return answer
        _, opcode, unique, node, *_ = f.IN_HEADER.unpack_from(frame)
        body = frame[f.IN_HEADER.size :]
        try:
            if opcode == f.FORGET:
                self._on_forget(node, body, answer)
            elif opcode == f.BATCH_FORGET:
                self._on_batch_forget(body, answer)
            elif opcode == f.INTERRUPT:
                f.INTERRUPT_IN.unpack_from(body)
                answer.verdict = Verdict.ANSWERED  # nobody but Python is asked for anything that lasts
            elif opcode in _UNCARRIED or (
                opcode == f.SETXATTR and self.offered & self.wanted & f.SETXATTR_EXT
            ):
                answer.verdict = Verdict.CARRIED
            else:
                self._on_request(opcode, node, body, unique, answer)
        except _Carry:
            answer.verdict = Verdict.CARRIED
        except (_Ask, struct.error):
            return answer
        if answer.verdict is Verdict.CARRIED and not self.carries:
            self._reply(answer, f.reply(unique, errno.ENOSYS))
        return answer

    def libfuse_replies(self, opcode: int, payload: bytes, unique: int = 7) -> bytes:
        """The packet that goes out."""
        if opcode == f.INIT and len(payload) >= f.INIT_OUT.size:
            fields = list(f.INIT_OUT.unpack_from(payload))
            flags = self.offered & self.wanted
            fields[3] |= flags & 0xFFFFFFFF
            if flags >> 32:
                fields[3] |= f.INIT_EXT
                fields[10] |= flags >> 32
            if self.openless:
                fields[3] &= ~f.ATOMIC_O_TRUNC
            if flags & f.PASSTHROUGH:
                fields[11] = self.stack_depth
            payload = f.INIT_OUT.pack(*fields) + payload[f.INIT_OUT.size :]
        elif opcode == f.OPENDIR and len(payload) == f.OPEN_OUT.size:
            handle, flags, backing = f.OPEN_OUT.unpack(payload)
            if handle in self.listings:
                payload = f.OPEN_OUT.pack(handle, flags | f.FOPEN_CACHE_DIR | f.FOPEN_KEEP_CACHE, backing)
        elif opcode in (f.OPEN, f.CREATE) and len(payload) >= f.OPEN_OUT.size:
            before, opened = payload[: -f.OPEN_OUT.size], payload[-f.OPEN_OUT.size :]
            handle, flags, backing = f.OPEN_OUT.unpack(opened)
            if handle in self.backed:
                flags, backing = f.FOPEN_PASSTHROUGH, self.backed[handle]
            payload = before + f.OPEN_OUT.pack(handle, flags, backing)
        return f.reply(unique, 0, payload)

    def _reply(self, answer: Answer, reply: bytes) -> None:
        answer.verdict = Verdict.ANSWERED
        if self.plugged:
            answer.replies.append(reply)

    def _on_request(self, opcode: int, node: int, body: bytes, unique: int, answer: Answer) -> None:
        handler = {
            f.LOOKUP: self._lookup,
            f.GETATTR: self._getattr,
            f.READLINK: self._readlink,
            f.GETXATTR: self._getxattr,
            f.LISTXATTR: self._listxattr,
            f.STATFS: self._statfs,
            f.OPENDIR: self._opendir,
            f.FSYNCDIR: self._fsyncdir,
            f.READDIRPLUS: self._readdirplus,
            f.OPEN: self._open,
            f.READ: self._read,
            f.WRITE: self._write,
            f.IOCTL: self._ioctl,
            f.RELEASE: self._release,
            f.RELEASEDIR: self._releasedir,
            f.FSYNC: self._fsync,
            f.FLUSH: self._flush,
            f.LSEEK: self._lseek,
        }.get(opcode)
        if handler is None:
            raise _Ask
        try:
            payload = handler(node, body, answer)
        except OSError as error:
            assert error.errno
            self._reply(answer, f.reply(unique, error.errno))
            return
        if payload is not None:
            self._reply(answer, f.reply(unique, 0, payload))

    def _on_forget(self, node: int, body: bytes, answer: Answer) -> None:
        (count,) = f.FORGET_IN.unpack_from(body)
        if node not in self.known:
            raise _Ask
        self._forget(node, count, answer)
        answer.verdict = Verdict.ANSWERED

    def _on_batch_forget(self, body: bytes, answer: Answer) -> None:
        count, dummy = f.BATCH_FORGET_IN.unpack_from(body)
        items = body[f.BATCH_FORGET_IN.size :]
        if count > len(items) // f.FORGET_ONE.size:
            raise _Ask
        left = []
        for at in range(count):
            item = items[at * f.FORGET_ONE.size : (at + 1) * f.FORGET_ONE.size]
            node, lookups = f.FORGET_ONE.unpack(item)
            if node in self.known:
                self._forget(node, lookups, answer)
            else:
                left.append(item)
        if not left:
            answer.verdict = Verdict.ANSWERED
            return
        rest = f.BATCH_FORGET_IN.pack(len(left), dummy) + b"".join(left)
        length = struct.pack("<I", f.IN_HEADER.size + len(rest))
        answer.frame = length + answer.frame[4 : f.IN_HEADER.size] + rest

    # -- looking ----------------------------------------------------------------------------------

    def _lookup(self, node: int, body: bytes, answer: Answer) -> bytes:
        name, end, _ = body.partition(b"\0")
        directory = self.directories.get(node)
        if directory is None or not end or len(name) > 255:
            raise _Ask
        if name not in directory.names or directory.names[name].gone:
            if name in (b".", b".."):
                raise _Ask
            return f.ABSENT
        st = self._stat(directory, name)
        found = self._know(directory, name)
        self.known[found].lookups += 1
        if not self.plugged:
            self._forget(found, 1, answer)
        return f.entry(st, found)

    def _of(self, node: int) -> Known:
        if node not in self.known:
            raise _Ask
        return self.known[node]

    def _getattr(self, node: int, body: bytes, answer: Answer) -> bytes:
        if node in self.told and node not in self.known:
            return f.ATTR_OUT.pack(f.FOR_EVER, 0, 0) + f.attributes(self.told[node], node)
        known = self._of(node)
        st = self._stat(known.directory, known.name)
        return f.ATTR_OUT.pack(f.FOR_EVER, 0, 0) + f.attributes(st, node)

    def _readlink(self, node: int, body: bytes, answer: Answer) -> bytes:
        known = self._of(node)
        try:
            return os.readlink(self._way(known.directory, known.name))
        except OSError:
            raise _Ask from None

    def _without_xattrs(self, node: int, body: bytes) -> int:
        """The size that was asked for."""
        (size, _) = f.GETXATTR_IN.unpack_from(body)
        if not self.xattrs:
            raise _Ask
        known = self._of(node)
        if not self._is_bare(known.directory, known.name):
            raise _Ask
        return int(size)

    def _getxattr(self, node: int, body: bytes, answer: Answer) -> bytes:
        if node in self.no_capability and body[f.GETXATTR_IN.size :].startswith(b"security.capability\0"):
            raise OSError(errno.ENODATA, "")
        self._without_xattrs(node, body)
        raise OSError(errno.ENODATA, "")

    def _listxattr(self, node: int, body: bytes, answer: Answer) -> bytes:
        return b"" if self._without_xattrs(node, body) else f.GETXATTR_OUT.pack(0, 0)

    def _statfs(self, node: int, body: bytes, answer: Answer) -> bytes:
        if self.statfs is None:
            raise _Ask
        st = os.statvfs(self.statfs)
        return f.STATFS_OUT.pack(
            st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree, st.f_bsize, 255, st.f_frsize, 0
        )

    # -- listing ----------------------------------------------------------------------------------

    def _opendir(self, node: int, body: bytes, answer: Answer) -> bytes:
        if self.opendirless:
            raise OSError(errno.ENOSYS, "")
        if not self.takes_calls or node not in self.directories:
            raise _Ask
        self._directory_handles += 1
        handle = self._directory_handles
        keeps = f.FOPEN_CACHE_DIR | f.FOPEN_KEEP_CACHE if handle in self.listings else 0
        if self.plugged:
            self.open_directories.add(handle)
        else:
            self.listings.pop(handle, None)
        return f.OPEN_OUT.pack(handle, keeps, 0)

    def _fsyncdir(self, node: int, body: bytes, answer: Answer) -> bytes:
        if not self.opendirless:
            raise _Ask
        return b""

    def _readdirplus(self, node: int, body: bytes, answer: Answer) -> bytes:
        handle, offset, size, *_ = f.READ_IN.unpack_from(body)
        by_node = self.opendirless and not handle
        other = _Carry if by_node else _Ask
        listing = self.listings.get(node if by_node else handle)
        directory = self.directories.get(listing.directory) if listing else None
        if listing is None or directory is None:
            raise other
        changed = listing.changes != directory.changes
        if not by_node and ((offset == 0 and not listing.fresh) or changed):
            raise _Ask  # Python looks again
        room = min(size, LISTING_MAX)
        payload, told = b"", []
        begun = True
        for at in range(offset, 2):
            ino = (listing.directory, listing.parent)[at]
            item = f.listed(b".." if at else b".", ino, at + 1, stat.S_IFDIR)
            begun = len(payload) + len(item) <= room
            if not begun:
                break
            payload += item
        for name in listing.names if begun else ():
            behind = directory.names[name].offset
            if behind <= offset or directory.names[name].gone:
                continue
            if len(payload) + len(f.listed(name, 0, 0, 0)) > room:
                break
            try:
                st = self._stat(directory, name)
                found = self._know(directory, name)
            except _Ask:
                if not payload:
                    raise other from None
                break
            self.known[found].lookups += 1
            told.append(found)
            payload += f.listed(name, found, behind, stat.S_IFMT(st.st_mode), f.entry(st, found))
        if offset == 0:
            listing.fresh = False
        if not self.plugged:
            for found in told:
                if found in self.known:
                    self._forget(found, 1, answer)
        return payload

    def _releasedir(self, node: int, body: bytes, answer: Answer) -> bytes:
        handle, *_ = f.RELEASE_IN.unpack_from(body)
        self.listings.pop(handle, None)
        if self.takes_calls and not handle & NATIVE:
            self.open_directories.discard(handle)
            return b""
        return self._release_native(handle)

    # -- data -------------------------------------------------------------------------------------

    def _open_known(self, node: int) -> int:
        """Raises _Ask."""
        known = self._of(node)
        if not stat.S_ISREG(self._stat(known.directory, known.name).st_mode):
            raise _Ask
        way = self._way(known.directory, known.name)
        try:
            if os.listxattr(way, follow_symlinks=False):  # it may say that the data lie elsewhere
                raise _Ask
            return os.open(way, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            raise _Ask from None

    def _open(self, node: int, body: bytes, answer: Answer) -> bytes:
        if self.openless:
            raise OSError(errno.ENOSYS, "")
        flags, _ = f.OPEN_IN.unpack_from(body)
        self._of(node)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC or len(self.open) >= self.descriptors:
            raise _Ask
        if self.passes_lowers and flags & os.O_DIRECT:
            raise _Ask
        fd = self._open_known(node)
        number = self._vacant.pop() if self._vacant else len(self.open)
        flags, backing = f.FOPEN_KEEP_CACHE, 0
        if self.stack_depth and (backing := self._open_way(node, self.passes_lowers)):
            flags = f.FOPEN_PASSTHROUGH
        self.open[number] = Opened(node, fd)
        if not self.plugged:
            self._close(number)
        return f.OPEN_OUT.pack(NATIVE | number, flags, backing)

    def _close(self, number: int) -> None:
        opened = self.open.pop(number, None)
        if opened is not None:
            if self.stack_depth:
                self._close_way(opened.node)
            os.close(opened.fd)
            self._vacant.append(number)

    def _descriptor(self, node: int) -> int:
        """What a message without a handle means. Raises _Carry."""
        if node in self.lent:
            return self.lent[node][0]
        if node not in self.kept:
            try:
                self.kept[node] = self._open_known(node)
            except _Ask:
                raise _Carry from None
        return self.kept[node]

    def _opened(self, handle: int) -> Opened:
        """Raises _Ask for a handle of Python's, OSError for one that is closed."""
        if not handle & NATIVE:
            raise _Ask
        opened = self.open.get(handle & ~NATIVE)
        if opened is None:
            raise OSError(errno.EBADF, "")
        return opened

    def _read(self, node: int, body: bytes, answer: Answer) -> bytes:
        handle, offset, size, *_ = f.READ_IN.unpack_from(body)
        if self.openless and not handle:
            fd = self._descriptor(node)
        else:
            fd = self.lent[handle][0] if handle in self.lent else self._opened(handle).fd
        if size > READ_MAX or offset >= 1 << 63:
            raise OSError(errno.EINVAL, "")
        return os.pread(fd, size, offset)

    def _write(self, node: int, body: bytes, answer: Answer) -> bytes | None:
        handle, offset, size, flags, _, how, _ = f.WRITE_IN.unpack_from(body)
        data = body[f.WRITE_IN.size :]
        openless = self.openless and not handle
        fd, writes = self.lent.get(node if openless else handle, (-1, False))
        writes = writes and not (openless and how & os.O_SYNC)
        writes = writes and not self.writes_held and size <= len(data) and offset < 1 << 63
        if writes and size > WRITE_MAX and not flags & f.WRITE_CACHE:
            return f.WRITE_OUT.pack(os.pwrite(fd, data[:size], offset), 0)
        if writes and size <= WRITE_MAX:
            try:
                if os.pwrite(fd, data[:size], offset) == size:
                    return f.WRITE_OUT.pack(size, 0)
            except OSError:
                pass  # Python finds out, and remembers
        if openless:
            if not self.offered & self.wanted & f.HANDLE_KILLPRIV_V2:
                kills = struct.pack("<I", flags | f.WRITE_KILL_SUIDGID)
                answer.frame = answer.frame[: f.IN_HEADER.size] + body[:20] + kills + body[24:]
            raise _Carry
        if self.offered & self.wanted & f.HANDLE_KILLPRIV_V2 and not flags & f.WRITE_KILL_SUIDGID:
            marked = struct.pack("<Q", handle | KEEPS_SETID)
            answer.frame = answer.frame[: f.IN_HEADER.size] + marked + body[8:]
        return None

    def _ioctl(self, node: int, body: bytes, answer: Answer) -> None:
        _, _, command, *_ = f.IOCTL_IN.unpack_from(body)
        if command not in f.INODE_IOCTLS:
            raise OSError(errno.ENOTTY, "")
        answer.verdict = Verdict.CARRIED

    def _release(self, node: int, body: bytes, answer: Answer) -> bytes:
        handle, *_ = f.RELEASE_IN.unpack_from(body)
        if self.openless and not handle:  # created before the first OPEN
            return b""
        return self._release_native(handle)

    def _release_native(self, handle: int) -> bytes:
        if not handle & NATIVE:
            raise _Ask
        self._close(handle & ~NATIVE)
        return b""

    def _flush(self, node: int, body: bytes, answer: Answer) -> bytes:
        (handle,) = struct.unpack_from("<Q", body)
        if not (self.openless and not handle):
            self._opened(handle)
        raise OSError(errno.ENOSYS, "")

    def _fsync(self, node: int, body: bytes, answer: Answer) -> bytes | None:
        (handle,) = struct.unpack_from("<Q", body)
        if self.openless and not handle:
            if node in self.known:  # nothing of a lower was written
                return b""
            raise _Carry
        opened = self._opened(handle)
        if opened.node in self.known or not self.carries:
            return b""
        answer.verdict = Verdict.CARRIED  # Python knows whether the file lies in the upper by now
        return None

    def _lseek(self, node: int, body: bytes, answer: Answer) -> bytes | None:
        (handle,) = struct.unpack_from("<Q", body)
        try:
            fd = self._descriptor(node) if self.openless and not handle else self._opened(handle).fd
        except _Ask:
            raise _Carry from None
        if len(body) < f.LSEEK_IN.size:
            raise OSError(errno.EINVAL, "")
        _, offset, whence, _ = f.LSEEK_IN.unpack_from(body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):  # the kernel knows the others itself
            raise OSError(errno.EINVAL, "")
        return f.LSEEK_OUT.pack(os.lseek(fd, offset - (offset >> 63 << 64), whence))
