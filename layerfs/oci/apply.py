"""Applies layer tarballs to a directory, as root or as an ordinary user. Every tar is hostile: nothing
outside the directory is touched.

How that is held: `tarreader` refuses names that would leave the root; the parent of every member is opened
from the directory's own descriptor with openat2 and RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS, so a symbolic link
that the same tar (or an earlier layer) planted is never followed; the last component is only ever named in
calls that do not follow.

How nothing is half-made: a layer that comes from a regular file is read once before anything is changed
(`check_layer`), so that a damaged, cut or hostile one is refused with the directory as it was; every object
but a directory is made under a temporary name and renamed into place when it is whole.

Sources: image-spec layer.md "Applying Changesets", "Whiteouts". Dropped with a note (DESIGN, "Layers and
images"): overlay's and fuse-overlayfs's xattrs, and character devices 0/0, because in a layer directory they
would steer a merge.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from layerfs.errors import LayerError, TarError
from layerfs.fdutil import (
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    RESOLVE_NO_XDEV,
    OwnedFd,
    at_path,
    fd_path,
    openat2,
    renameat2,
)
from layerfs.oci.member import Kind, Mark, Member, classify, display, join, made_up_time, split
from layerfs.oci.streams import LayerSource
from layerfs.oci.tarreader import TarReader
from layerfs.overlay import acl, whiteout
from layerfs.overlay.names import FOREIGN, TRUSTED, USER

#: What is mounted inside the target is no part of it: a whiteout must not empty somebody's bind-mounted home.
_BENEATH = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV
_ROOT = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_DIRECTORY = _ROOT | os.O_NOFOLLOW
_CHUNK = 256 << 10
#: A run of zeros of this size becomes a hole: archives hold sparse files plainly.
_HOLE = 64 << 10
_ZEROS = bytes(_HOLE)
_ACLS = (acl.ACCESS, acl.DEFAULT)
_STEERING = (TRUSTED, USER, *FOREIGN)
#: xattrs that stay on a directory though the layer does not name them: overlay's marks, and what the machine
#: puts on everything.
_KEPT = (*_STEERING, "security.selinux", "security.ima", "security.evm", "system.nfs4_acl")


@dataclass(slots=True)
class Applied:
    """What applying a layer did. `notes` are single lines, gathered by reason where there may be many."""

    members: int = 0
    removed: int = 0
    notes: list[str] = field(default_factory=list)


def apply_layer(fd: int, target: str) -> Applied:
    """Applies the layer that the descriptor `fd` gives, from its current position, to the directory `target`.

    Raises TarError for a bad layer (before anything was changed when `fd` is a regular file), LayerError with
    the errno where the file system refuses (ENOSPC, EROFS, EACCES, …) or one that cannot be applied here."""
    if stat.S_ISREG(os.fstat(fd).st_mode):
        start = os.lseek(fd, 0, os.SEEK_CUR)
        check_layer(fd, target)
        os.lseek(fd, start, os.SEEK_SET)
    source = LayerSource(fd)
    applier = _Applier(target)
    # What it holds open must not live as long as somebody keeps an exception.
    with contextlib.closing(applier):
        return _run(applier, source, target)


def _run(applier: _Applier, source: LayerSource, target: str) -> Applied:
    part = f"{display(os.fsencode(target))} holds a part of the layer now"
    try:
        return applier.run(source)
    except TarError as error:
        raise TarError(f"{error}; {part}", error.errno) from None
    except LayerError as error:
        raise LayerError(f"{error}; {part}", error.errno) from None
    except OSError as error:
        name = error.filename
        where = f" ({display(os.fsencode(name))})" if isinstance(name, (str, bytes)) else ""
        raise LayerError(f"{error.strerror}{where}; {part}", error.errno) from error


def check_layer(fd: int, target: str) -> None:
    """Reads a layer to its end and changes nothing. Raises TarError for whatever will keep it from being
    applied to `target`; only the file system's own refusals (ENOSPC, EACCES, …) are left to be met later."""
    plan = _Plan(OwnedFd(os.open(target, _ROOT)))
    for member in TarReader(LayerSource(fd)):
        plan.add(member)


def check_names(member: Member) -> tuple[Mark, bytes]:
    """What the last name of `member` stands for.

    Raises TarError for a member below a whiteout, and for a whiteout that is no plain file."""
    directory, name = split(member.name)
    if whiteout.PREFIX in directory and any(
        part.startswith(whiteout.PREFIX) for part in directory.split(b"/")
    ):
        raise TarError(f"member {display(member.name)} lies below a whiteout")
    mark, hidden = classify(name)
    if mark in (Mark.WHITEOUT, Mark.OPAQUE) and member.kind not in (Kind.FILE, Kind.HARDLINK):
        raise TarError(f"member {display(member.name)} is a whiteout that is no regular file")
    return mark, hidden


def _open_beneath(directory: int, path: bytes, flags: int) -> OwnedFd:
    """Opens `path` inside `directory`. Raises LayerError at a mount point, OSError (ELOOP for a symbolic
    link)."""
    try:
        return OwnedFd(openat2(directory, path, flags, resolve=_BENEATH))
    except OSError as error:
        if error.errno != errno.EXDEV:  # no name here has a `..`, and no link is followed: it is a mount
            raise
        what = f"{display(path)}: something else is mounted there or above; unmount it first"
        raise LayerError(what, errno.EXDEV) from None


def _is_whiteout_device(member: Member) -> bool:
    return member.kind is Kind.CHAR and member.rdev == (0, 0)


def _behind_link(what: str) -> TarError:
    return TarError(f"{what} lies behind a symbolic link")


class _Plan:
    """Follows in mind what a layer would do to a directory, as far as it decides whether a member can be
    made.

    `_Applier` checks everything again when it does it; this is here so that a layer is refused before the
    first change. Test: test_apply_evil.py::test_refused_before_the_first_change."""

    def __init__(self, root: OwnedFd) -> None:
        self._root = root
        #: what the layer made so far, directories that it implies or uses included
        self._kinds: dict[bytes, Kind] = {}
        #: names whose object in the target is gone, with all below it
        self._removed: set[bytes] = set()
        #: directories of the target that stay, and lose all below
        self._emptied: set[bytes] = set()
        #: directories in which members can be made: all are in `_kinds`
        self._usable: set[bytes] = {b""}

    def add(self, member: Member) -> None:
        mark, hidden = check_names(member)
        if mark is Mark.AUFS or _is_whiteout_device(member):
            return
        directory, _ = split(member.name)
        what = f"member {display(member.name)}"
        if mark is not Mark.ENTRY:
            kind = self._walk(directory, what, make=False)
            if kind is Kind.SYMLINK:
                raise _behind_link(what)
            if kind is Kind.DIR:
                if mark is Mark.OPAQUE:
                    self._emptied.add(directory)
                else:
                    self._removed.add(join(directory, hidden))
            return
        if directory not in self._usable:
            if self._walk(directory, what, make=True) is not Kind.DIR:
                raise TarError(f"{what} lies below something that is no directory")
            self._usable.add(directory)
        if not member.name:
            return
        if member.kind is Kind.HARDLINK:
            self._need_partner(member)
        before = self._kinds.get(member.name)
        if member.kind is Kind.DIR:
            self._walk(member.name, what, make=False)  # finds out about mount points
            if before not in (None, Kind.DIR):
                self._removed.add(member.name)
        elif before is Kind.DIR:
            inside = member.name + b"/"
            for gone in [name for name in self._kinds if name.startswith(inside)]:
                del self._kinds[gone]
            self._usable = {b""}
        self._kinds[member.name] = member.kind

    def _need_partner(self, member: Member) -> None:
        wanted = f"hard link {display(member.name)} to {display(member.target)}"
        kind = self._walk(member.target, wanted, make=False)
        if kind is None:
            raise TarError(f"{wanted}: that is not there")
        if kind is Kind.DIR:
            raise TarError(f"{wanted}: that is a directory")

    def _walk(self, path: bytes, what: str, *, make: bool) -> Kind | None:
        """What is under `path` by now; None when there is nothing. `make`: missing directories are made.

        Raises TarError when a symbolic link is on the way to it, and with `make` also when `path` is one."""
        visible = b"" not in self._emptied
        kind: Kind | None = Kind.DIR
        here = b""
        for part in path.split(b"/") if path else ():
            if kind is Kind.SYMLINK:
                raise _behind_link(what)
            if kind is not Kind.DIR:
                return None
            here = join(here, part)
            below = self._in_target(here) if visible and here not in self._removed else None
            kind = self._kinds.get(here, below)
            visible = below is Kind.DIR and here not in self._emptied
            if make and kind in (None, Kind.DIR):
                kind = self._kinds[here] = Kind.DIR
        if make and kind is Kind.SYMLINK:
            raise _behind_link(what)
        return kind

    def _in_target(self, path: bytes) -> Kind | None:
        """What the target has under `path`, all above which are directories."""
        try:
            fd = _open_beneath(self._root.fd, path, os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        mode = os.fstat(fd.fd).st_mode
        if stat.S_ISLNK(mode):
            return Kind.SYMLINK
        return Kind.DIR if stat.S_ISDIR(mode) else Kind.FILE


class _LeftOut(Exception):
    """A device that cannot be made here."""


class _Tally:
    """Notes of which there may be thousands: the first name stands for all."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[bytes, int]] = {}

    def add(self, reason: str, name: bytes) -> None:
        first, count = self._first.get(reason, (name, 0))
        self._first[reason] = (first, count + 1)

    def lines(self) -> Iterator[str]:
        for reason, (name, count) in self._first.items():
            more = f" (and {count - 1} more)" if count > 1 else ""
            yield f"{display(name) or '.'}: {reason}{more}"


@dataclass(slots=True)
class _Parent:
    """The directory that members are being made in."""

    path: bytes
    fd: OwnedFd
    #: new objects inherit an ACL here, which must come off again
    has_default_acl: bool


class _Applier:
    """One layer being applied."""

    def __init__(self, target: str) -> None:
        self._root = OwnedFd(os.open(target, _ROOT))
        self._privileged = os.geteuid() == 0
        self._parent: _Parent | None = None
        #: Names that this layer has made, by directory, directories on the way to them included: whiteouts
        #: hide the layers below only.
        self._own: dict[bytes, set[bytes]] = {}
        #: Those among them that no member has named (yet).
        self._implied: set[bytes] = set()
        #: Directories of this layer: their attributes are set at the end, as making things in them changes
        #: times, and modes may forbid it.
        self._directories: dict[bytes, Member] = {}
        #: Directories that the layer does not name and that were changed all the same: the time and the mode
        #: to leave them with.
        self._touched: dict[bytes, tuple[int, int]] = {}
        self._left_out: set[bytes] = set()
        self._tally = _Tally()
        self._result = Applied()
        # No member can have this name: it would be taken for AUFS's.
        self._temporary = b".layerfs-apply-" + secrets.token_hex(12).encode()
        self._made_up = made_up_time() * 1_000_000_000 if os.environ.get("SOURCE_DATE_EPOCH") else None

    def close(self) -> None:
        if self._parent is not None:
            self._parent.fd.close()
        self._root.close()

    def run(self, source: LayerSource) -> Applied:
        reader = TarReader(source, self._result.notes)
        try:
            for member in reader:
                self._apply(member, reader)
        except BaseException:
            # What was made gets its attributes all the same; a second failure must not hide the first.
            with contextlib.suppress(OSError, LayerError):
                self._finish_directories()
            raise
        self._finish_directories()
        self._result.notes.extend(self._tally.lines())
        return self._result

    # --- one member ---

    def _apply(self, member: Member, reader: TarReader) -> None:
        mark, hidden = check_names(member)
        directory, name = split(member.name)
        if mark is Mark.AUFS:
            self._tally.add("book-keeping of AUFS: ignored", member.name)
            return
        if mark is Mark.OPAQUE:
            self._prune(directory, self._to_hide_in(directory, member.name))
            return
        if mark is Mark.WHITEOUT:
            self._hide(directory, hidden, member.name)
            return
        if _is_whiteout_device(member):
            self._tally.add("a character device 0/0, which would be a whiteout: dropped", member.name)
            return
        if member.kind is Kind.HARDLINK and member.target in self._left_out:
            self._tally.add("a link to a device that was left out", member.name)
            return
        if not member.name:
            self._result.members += 1
            self._directories[b""] = member
            return
        parent = self._open_parent(directory, member.name)
        if member.name in self._implied:
            self._implied.discard(member.name)
        elif name in self._own.get(directory, ()):
            self._tally.add("is in the layer more than once: the last one counts", member.name)
        if member.kind is Kind.DIR:
            self._make_directory(parent, name, member)
        else:
            try:
                self._make(parent, self._temporary, member, reader)
                self._publish(parent, name, member)
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.unlink(self._temporary, dir_fd=parent.fd.fd)
                if not isinstance(error, _LeftOut):
                    raise
                self._tally.add("a device, which only real root can make: left out", member.name)
                self._left_out.add(member.name)
                return
        self._result.members += 1
        self._own.setdefault(directory, set()).add(name)

    def _make(self, parent: _Parent, name: bytes, member: Member, reader: TarReader) -> None:
        """Makes `member` under the temporary name `name`. Raises _LeftOut for what this user may not make."""
        if member.kind is Kind.FILE:
            self._make_file(parent, name, member, reader)
        elif member.kind is Kind.HARDLINK:
            self._make_link(parent, name, member)
        else:
            self._make_special(parent, name, member)

    def _make_file(self, parent: _Parent, name: bytes, member: Member, reader: TarReader) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = OwnedFd(os.open(name, flags, 0o600, dir_fd=parent.fd.fd))
        size = 0
        hole = False
        while chunk := reader.read(_CHUNK):
            for at in range(0, len(chunk), _HOLE):
                piece = chunk[at : at + _HOLE]
                hole = piece == _ZEROS
                if not hole:
                    _write_at(fd.fd, piece, size)
                size += len(piece)
        if hole:
            os.ftruncate(fd.fd, size)
        self._set_attributes(fd_path(fd.fd), member, follow=True, clean=parent.has_default_acl)

    def _make_special(self, parent: _Parent, name: bytes, member: Member) -> None:
        fd = parent.fd.fd
        if member.kind is Kind.SYMLINK:
            os.symlink(member.target, name, dir_fd=fd)
        else:
            kind = {Kind.FIFO: stat.S_IFIFO, Kind.CHAR: stat.S_IFCHR, Kind.BLOCK: stat.S_IFBLK}[member.kind]
            try:
                os.mknod(name, kind | 0o600, os.makedev(*member.rdev), dir_fd=fd)
            except OSError as error:
                # Root of a user namespace is refused as well. EACCES would be about the directory.
                if error.errno == errno.EPERM and member.kind is not Kind.FIFO:
                    raise _LeftOut from None
                raise
        self._set_attributes(at_path(fd, name), member, follow=False, clean=parent.has_default_acl)

    def _make_link(self, parent: _Parent, name: bytes, member: Member) -> None:
        directory, last = split(member.target)
        wanted = f"hard link {display(member.name)} to {display(member.target)}"
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
            source = _open_beneath(self._root.fd, directory or b".", flags)
            st = os.stat(last, dir_fd=source.fd, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise TarError(f"{wanted}: that is not there") from None
            raise self._in_the_way(directory, wanted, error) from None
        if stat.S_ISDIR(st.st_mode):
            raise TarError(f"{wanted}: that is a directory")
        os.link(last, name, src_dir_fd=source.fd, dst_dir_fd=parent.fd.fd, follow_symlinks=False)

    def _publish(self, parent: _Parent, name: bytes, member: Member) -> None:
        """Renames the finished object into place; whatever was there before goes."""
        fd = parent.fd.fd
        try:
            renameat2(fd, self._temporary, fd, name)
        except IsADirectoryError:
            self._remove(parent.fd, member.name)
            renameat2(fd, self._temporary, fd, name)
        if member.kind is Kind.HARDLINK:
            # rename(2) does nothing, and says so to nobody, when both names are the same file already.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=fd)

    def _make_directory(self, parent: _Parent, name: bytes, member: Member) -> None:
        fd = parent.fd.fd
        try:
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            st = None
        if st is not None and not stat.S_ISDIR(st.st_mode):
            os.unlink(name, dir_fd=fd)
            st = None
        if st is None:
            os.mkdir(name, 0o700, dir_fd=fd)
            if parent.has_default_acl:
                _clean_acls(at_path(fd, name))
        elif not self._privileged and st.st_mode & 0o700 != 0o700:
            os.chmod(name, stat.S_IMODE(st.st_mode) | 0o700, dir_fd=fd)
        self._directories[member.name] = member

    # --- directories on the way ---

    def _open_parent(self, path: bytes, member: bytes) -> _Parent:
        """The directory `path`, made where the layer implies it without naming it.

        Raises TarError when something else is in the way."""
        if self._parent is not None and self._parent.path == path:
            return self._parent
        missing: list[bytes] = []
        here = path
        while True:
            try:
                fd = self._open(here)
                break
            except FileNotFoundError:
                here, name = split(here)
                missing.append(name)
            except OSError as error:
                raise self._in_the_way(here, f"member {display(member)}", error) from None
        self._touch(here, fd)
        while missing:
            name = missing.pop()
            os.mkdir(name, 0o755, dir_fd=fd.fd)
            if _has_default_acl(fd.fd):
                _clean_acls(at_path(fd.fd, name))
            fd = _open_beneath(fd.fd, name, _DIRECTORY)
            os.fchmod(fd.fd, 0o755)
            here = join(here, name)
            if self._made_up is not None:
                self._touched[here] = (self._made_up, 0o755)
        while here:
            above, name = split(here)
            own = self._own.setdefault(above, set())
            if name in own:
                break  # and so are those above it
            own.add(name)
            self._implied.add(here)
            here = above
        self._parent = _Parent(path, fd, _has_default_acl(fd.fd))
        return self._parent

    def _open(self, path: bytes) -> OwnedFd:
        """The directory `path`, readable. An ordinary user's own directory that he may not read is opened to
        him until the end."""
        try:
            return _open_beneath(self._root.fd, path or b".", _DIRECTORY)
        except PermissionError:
            if self._privileged:
                raise
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
            self._touch(path, _open_beneath(self._root.fd, path or b".", flags))
            return _open_beneath(self._root.fd, path or b".", _DIRECTORY)

    def _in_the_way(self, path: bytes, what: str, error: OSError) -> Exception:
        """What to raise when the directory `path` cannot be opened."""
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            return error
        # For a symbolic link as the last component, O_DIRECTORY makes it ENOTDIR as well.
        if self._is_behind_link(path):
            return _behind_link(what)
        return TarError(f"{what} lies below something that is no directory")

    def _is_behind_link(self, path: bytes) -> bool:
        here = b""
        for part in path.split(b"/"):
            here = join(here, part)
            try:
                fd = _open_beneath(self._root.fd, here, os.O_PATH | os.O_NOFOLLOW)
            except FileNotFoundError:
                return False
            if not stat.S_ISDIR(os.fstat(fd.fd).st_mode):
                return stat.S_ISLNK(os.fstat(fd.fd).st_mode)
        return False

    def _touch(self, path: bytes, fd: OwnedFd) -> None:
        """To be called before names in a directory change. The layer may not name it, and then it looks
        afterwards as it did before."""
        st = os.fstat(fd.fd)
        if path not in self._directories:
            self._touched.setdefault(path, (st.st_mtime_ns, stat.S_IMODE(st.st_mode)))
        if not self._privileged and st.st_mode & 0o700 != 0o700 and st.st_uid == os.geteuid():
            os.chmod(fd_path(fd.fd), stat.S_IMODE(st.st_mode) | 0o700)

    # --- hiding and removing ---

    def _to_hide_in(self, directory: bytes, member: bytes) -> OwnedFd | None:
        """The directory in which a whiteout stands; None when it has nothing to hide.

        Raises TarError behind a symbolic link."""
        try:
            return self._open(directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ENOTDIR and not self._is_behind_link(directory):
                return None
            raise self._in_the_way(directory, f"member {display(member)}", error) from None

    def _hide(self, directory: bytes, name: bytes, member: bytes) -> None:
        """A whiteout: removes what the layers below have under the name, and nothing of this layer."""
        parent = self._to_hide_in(directory, member)
        if parent is None:
            return
        path = join(directory, name)
        if name in self._own.get(directory, ()):
            self._prune(path, self._subdirectory(parent, name))
        else:
            self._touch(directory, parent)
            self._remove(parent, path)

    def _prune(self, path: bytes, fd: OwnedFd | None) -> None:
        """Removes everything below the directory `path` (`fd`) that this layer did not make."""
        if fd is None:
            return
        todo = [path]
        while todo:
            path = todo.pop()
            fd = self._open(path)
            own = self._own.get(path, set())
            for name in _names(fd):
                if name not in own:
                    self._touch(path, fd)
                    self._remove(fd, join(path, name))
                elif self._subdirectory(fd, name) is not None:
                    todo.append(join(path, name))

    @staticmethod
    def _subdirectory(parent: OwnedFd, name: bytes) -> OwnedFd | None:
        try:
            flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
            return _open_beneath(parent.fd, name, flags)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    def _remove(self, parent: OwnedFd, path: bytes) -> None:
        """Removes the tree `path`, whose directory is `parent`, and forgets it; nothing there: nothing
        happens."""
        _, name = split(path)
        self._parent = None
        self._forget(path)
        try:
            os.unlink(name, dir_fd=parent.fd)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent.fd, follow_symlinks=False).st_mode):
                raise
            self._remove_tree(parent, name)
        self._result.removed += 1

    def _remove_tree(self, parent: OwnedFd, top: bytes) -> None:
        """rm -rf by descriptors, never following a link. Two are open at a time and no stack grows: a tree
        may be as deep as it likes."""
        here = self._open_to_remove(parent, top)
        levels: list[tuple[bytes, Iterator[bytes]]] = [(top, iter(_names(here)))]
        identities = [_identity(parent)]
        while levels:
            name, names = levels[-1]
            child = next(names, None)
            if child is None:
                levels.pop()
                above = OwnedFd(os.open(b"..", _DIRECTORY, dir_fd=here.fd)) if levels else parent
                if _identity(above) != identities.pop():
                    raise LayerError(
                        "somebody moves directories about while a layer is applied; try again alone"
                    )
                here = above
                os.rmdir(name, dir_fd=here.fd)
                continue
            try:
                os.unlink(child, dir_fd=here.fd)
            except (IsADirectoryError, PermissionError):
                if not stat.S_ISDIR(os.stat(child, dir_fd=here.fd, follow_symlinks=False).st_mode):
                    raise
                identities.append(_identity(here))
                here = self._open_to_remove(here, child)
                levels.append((child, iter(_names(here))))

    def _open_to_remove(self, parent: OwnedFd, name: bytes) -> OwnedFd:
        if not self._privileged:
            os.chmod(at_path(parent.fd, name), 0o700)
        return _open_beneath(parent.fd, name, _DIRECTORY)

    def _forget(self, path: bytes) -> None:
        """Drops what was known of a tree that goes away, so that the end does not set its times on whatever
        comes in its place."""
        directory, name = split(path)
        self._own.get(directory, set()).discard(name)
        if path not in self._own and path not in self._directories and path not in self._touched:
            return
        inside = path + b"/"
        tables: tuple[dict[bytes, set[bytes]] | dict[bytes, Member] | dict[bytes, tuple[int, int]], ...]
        tables = (self._own, self._directories, self._touched)
        for table in tables:
            for gone in [key for key in table if key == path or key.startswith(inside)]:
                del table[gone]

    # --- attributes ---

    def _finish_directories(self) -> None:
        """Owners, modes, xattrs and times of directories, deepest first: a parent's mode may forbid the way
        to its children."""
        for path in sorted(self._directories.keys() | self._touched.keys(), key=_depth, reverse=True):
            member = self._directories.get(path)
            if member is not None:
                fd = self._open(path)
                self._set_attributes(fd_path(fd.fd), member, follow=True, clean=True)
                continue
            try:
                fd = self._open(path)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it was touched, and then went with the tree that it was in
            time, mode = self._touched[path]
            st = os.fstat(fd.fd)
            if stat.S_IMODE(st.st_mode) != mode:
                os.fchmod(fd.fd, mode)
            os.utime(fd.fd, ns=(st.st_atime_ns, time))

    def _set_attributes(self, where: bytes, member: Member, *, follow: bool, clean: bool) -> None:
        """Owner, xattrs, mode, time, in this order: chown clears setuid and capabilities, an ACL sets mode
        bits, and a mode may forbid an ordinary user to set xattrs.

        `clean`: xattrs that the member does not have come off (a directory's old ones, an inherited ACL)."""
        if self._privileged:
            try:
                os.chown(where, member.uid, member.gid, follow_symlinks=follow)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                owner = f"{display(member.name)}: belongs to {member.uid}:{member.gid}"
                hint = "which this user namespace does not map: map more ids or run as root"
                raise LayerError(f"{owner}, {hint}", error.errno) from None
        elif (member.uid, member.gid) != (os.geteuid(), os.getegid()):
            self._tally.add(
                "belongs to somebody else, which only root can arrange: it is yours now", member.name
            )
        xattrs = self._wanted_xattrs(member)
        if clean:
            _clean_xattrs(where, xattrs, follow)
        for attribute, value in xattrs.items():
            try:
                os.setxattr(where, attribute, value, follow_symlinks=follow)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._tally.add(
                    f"xattr {display(os.fsencode(attribute))} cannot be set here: dropped", member.name
                )
        if member.kind is not Kind.SYMLINK:
            os.chmod(where, member.mode)
        os.utime(where, ns=(member.mtime_ns, member.mtime_ns), follow_symlinks=follow)

    def _wanted_xattrs(self, member: Member) -> dict[str, bytes]:
        wanted = {}
        for attribute, value in member.xattrs.items():
            if attribute.startswith(_STEERING):
                self._tally.add(
                    f"xattr {display(os.fsencode(attribute))} would steer a merge: dropped", member.name
                )
            else:
                wanted[attribute] = value
        return wanted


def _clean_xattrs(where: bytes, wanted: Mapping[str, bytes], follow: bool) -> None:
    try:
        present = os.listxattr(where, follow_symlinks=follow)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return
        raise
    for attribute in present:
        if attribute not in wanted and not attribute.startswith(_KEPT):
            with contextlib.suppress(PermissionError):
                os.removexattr(where, attribute, follow_symlinks=follow)


def _clean_acls(where: bytes) -> None:
    for attribute in _ACLS:
        with contextlib.suppress(OSError):
            os.removexattr(where, attribute, follow_symlinks=False)


def _has_default_acl(fd: int) -> bool:
    try:
        os.getxattr(fd, acl.DEFAULT)
    except OSError:
        return False
    return True


def _names(directory: OwnedFd) -> list[bytes]:
    return [os.fsencode(name) for name in os.listdir(directory.fd)]


def _identity(fd: OwnedFd) -> tuple[int, int]:
    st = os.fstat(fd.fd)
    return st.st_dev, st.st_ino


def _depth(path: bytes) -> int:
    return path.count(b"/") + 1 if path else 0


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
