"""Turns the members of one layer into objects of one directory: what `apply` and `unpack` have in common.
They differ in what a whiteout does, and in what may be there already.

How nothing leads outside: `tarreader` refuses names that would leave the root, and every directory is opened
through `beneath`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field

from layerfs.errors import LayerError
from layerfs.fdutil import OwnedFd, at_path, fd_path
from layerfs.oci.beneath import DIRECTORY, DIRECTORY_PATH, in_the_way, open_beneath
from layerfs.oci.known import OBJECT, Known, Made
from layerfs.oci.making import Births, LeftOut, ObjectMaker, Parent, clean_acls, has_default_acl, owner_of
from layerfs.oci.member import Kind, Mark, Member, display, split
from layerfs.oci.plan import check_names, is_whiteout_device
from layerfs.oci.tally import Tally
from layerfs.oci.tarreader import TarReader

#: Parents that are kept open: archives go through a tree in order, and come back to the directories above.
_OPEN_PARENTS = 32


@dataclass(slots=True)
class Applied:
    """What applying a layer did. `notes` are single lines, gathered by reason where there may be many."""

    members: int = 0
    removed: int = 0
    notes: list[str] = field(default_factory=list)


def refusal(error: OSError) -> str:
    """What a file system refused, and where if it says so."""
    name = error.filename
    where = f" ({display(os.fsencode(name))})" if isinstance(name, (str, bytes)) else ""
    return f"{error.strerror}{where}"


@dataclass(slots=True, kw_only=True)
class OpenParent(Parent):
    """One that is kept open, and what the layer has done in it."""

    known: Known


class Builder:
    """One layer being made below `root`. Subclasses publish objects and carry out whiteouts."""

    #: there may be something that was not made by this layer
    _replaces = True

    def __init__(self, root: OwnedFd, implied_ns: int | None) -> None:
        """`implied_ns`: mtime of directories that the layer uses without naming them; None: when they are
        made."""
        self._root = root
        self._implied_ns = implied_ns
        self._tally = Tally()
        self._maker = ObjectMaker(self._tally)
        self._parents: dict[bytes, OpenParent] = {}
        #: by file system, group and setgid bit of the directory
        self._births: dict[tuple[int, int, int], Births] = {}
        #: What this layer has done. Attributes of directories are set at the end, as making things in them
        #: changes times, and modes may forbid it.
        self._known = Known()
        self._known.made = Made.DIRECTORY  # there is a root, whoever names it
        self._left_out: set[bytes] = set()
        self._result = Applied()

    def close(self) -> None:
        self._forget_parents()
        self._root.close()

    def run(self, reader: TarReader) -> Applied:
        """Makes all members. Raises TarError, LayerError, OSError."""
        try:
            for member in reader:
                self._add(member, reader)
        except BaseException:
            self._give_up()
            raise
        self._finish_directories()
        self._result.notes.extend((*reader.notes, *self._tally.lines()))
        return self._result

    def _give_up(self) -> None:
        """What was made by then gets its attributes all the same."""
        # A second failure must not hide the first.
        with contextlib.suppress(OSError, LayerError):
            self._finish_directories()

    # --- what subclasses decide ---

    def _hide(self, directory: bytes, name: bytes, member: bytes) -> None:
        """A whiteout of `name`: hides what the layers below have, and nothing of this layer."""
        raise NotImplementedError

    def _hide_all(self, directory: bytes, member: bytes) -> None:
        """An opaque mark: the same for everything in `directory`."""
        raise NotImplementedError

    def _put(self, parent: OpenParent, name: bytes, member: Member, reader: TarReader) -> Known:
        """Makes an object that is no directory; whatever was there goes. Returns what is to be known of it.
        Raises LeftOut."""
        raise NotImplementedError

    def _put_directory(self, parent: OpenParent, name: bytes, member: Member) -> None:
        """Makes a directory, or leaves the one that is there; anything else that was there goes."""
        raise NotImplementedError

    def _made_implied(self, known: Known) -> None:
        """A directory was made because a member needs it."""

    # --- one member ---

    def _add(self, member: Member, reader: TarReader) -> None:
        mark, hidden = check_names(member)
        directory, name = split(member.name)
        if mark is not Mark.ENTRY:
            if mark is Mark.AUFS:
                self._tally.add("book-keeping of AUFS: ignored", member.name)
            elif mark is Mark.OPAQUE:
                self._hide_all(directory, member.name)
            else:
                self._hide(directory, hidden, member.name)
            return
        if is_whiteout_device(member):
            self._tally.add("a character device 0/0, which would be a whiteout: dropped", member.name)
            return
        if member.kind is Kind.HARDLINK and member.target in self._left_out:
            self._tally.add("a link to a device that was left out", member.name)
            return
        if not member.name:
            self._result.members += 1
            self._known.member = member
            return
        parent = self._parents.get(directory) or self._open_parent(directory, member.name)
        known = parent.known.children.get(name)
        if known is not None and known.is_own and known.made is not Made.IMPLIED:
            self._tally.add("is in the layer more than once: the last one counts", member.name)
        if member.kind is Kind.DIR:
            self._put_directory(parent, name, member)
            known = parent.known.child(name)
            known.made = Made.DIRECTORY
            known.member = member
        else:
            try:
                parent.known.put(name, self._put(parent, name, member, reader))
            except LeftOut:
                self._tally.add("a device, which only real root can make: left out", member.name)
                self._left_out.add(member.name)
                return
        self._result.members += 1

    def _make(self, parent: Parent, name: bytes, member: Member, reader: TarReader) -> None:
        """Makes `member` as the new name `name`. Raises LeftOut, OSError (EEXIST)."""
        if member.kind is Kind.FILE:
            self._maker.file(parent, name, member, reader)
        elif member.kind is Kind.HARDLINK:
            self._maker.hard_link(self._root, parent, name, member)
        else:
            self._maker.special(parent, name, member)

    # --- directories on the way ---

    def _open_parent(self, path: bytes, member: bytes) -> OpenParent:
        """The directory `path`, made where the layer implies it without naming it.

        Raises TarError when something else is in the way."""
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
                raise in_the_way(self._root, here, f"member {display(member)}", error) from None
        known = self._known
        for name in here.split(b"/") if here else ():
            known = known.child(name)
            if not known.is_own:
                known.made = Made.IMPLIED
        self._touch(known, fd)
        while missing:
            name = missing.pop()
            os.mkdir(name, 0o755, dir_fd=fd.fd)
            if self._has_default_acl(fd):
                clean_acls(at_path(fd.fd, name))
            fd = open_beneath(fd.fd, name, DIRECTORY)
            os.fchmod(fd.fd, 0o755)
            known = known.child(name)
            known.made = Made.IMPLIED
            known.pruned = True
            if self._implied_ns is not None:
                known.touched = (self._implied_ns, 0o755)
            self._made_implied(known)
        if len(self._parents) >= _OPEN_PARENTS:
            self._forget_parents()
        st = os.fstat(fd.fd)
        births = self._births.setdefault((st.st_dev, st.st_gid, st.st_mode & stat.S_ISGID), Births())
        parent = OpenParent(path, fd, self._has_default_acl(fd), births, known=known)
        self._parents[path] = parent
        return parent

    def _has_default_acl(self, directory: OwnedFd) -> bool:
        return has_default_acl(directory.fd)

    def _forget_parents(self) -> None:
        self._parents.clear()

    def _open(self, path: bytes) -> OwnedFd:
        """The directory `path`, readable. An ordinary user's own directory that he may not read is opened to
        him until the end."""
        try:
            return open_beneath(self._root.fd, path or b".", DIRECTORY)
        except PermissionError:
            if self._maker.privileged:
                raise
            self._touch(self._known.at(path), open_beneath(self._root.fd, path or b".", DIRECTORY_PATH))
            return open_beneath(self._root.fd, path or b".", DIRECTORY)

    def _touch(self, known: Known, fd: OwnedFd) -> None:
        """To be called before names in a directory change. The layer may not name it, and then it looks
        afterwards as it did before."""
        st = os.fstat(fd.fd)
        if known.member is None and known.touched is None:
            known.touched = (st.st_mtime_ns, stat.S_IMODE(st.st_mode))
        if not self._maker.privileged and st.st_mode & 0o700 != 0o700 and st.st_uid == os.geteuid():
            os.chmod(fd_path(fd.fd), stat.S_IMODE(st.st_mode) | 0o700)

    def _forget(self, path: bytes) -> None:
        """Drops what was known of a tree that goes away, so that the end does not set its times on whatever
        comes in its place."""
        directory, name = split(path)
        above = self._known.find(directory)
        gone = above.children.pop(name, None) if above is not None else None
        if gone is not None and gone is not OBJECT:
            self._forget_parents()  # some may be in it

    # --- at the end ---

    def _finish_directories(self) -> None:
        """Owners, modes, xattrs and times of directories, those inside first: a parent's mode may forbid the
        way to its children."""
        self._forget_parents()
        for path, known in self._known.walk():
            if known.member is not None:
                fd = self._open(path)
                self._maker.set_attributes(
                    fd_path(fd.fd), known.member, follow=True, clean=self._replaces, owner=owner_of(fd.fd)
                )
            elif known.touched is not None:
                try:
                    fd = self._open(path)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # somebody else took it away
                time, mode = known.touched
                st = os.fstat(fd.fd)
                if stat.S_IMODE(st.st_mode) != mode:
                    os.fchmod(fd.fd, mode)
                os.utime(fd.fd, ns=(st.st_atime_ns, time))
