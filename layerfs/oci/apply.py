"""Applies layer tarballs to a directory, as root or as an ordinary user. Every tar is hostile: nothing
outside the directory is touched (`beneath`, `building`).

How nothing is half-made: a layer that comes from a regular file is read once before anything is changed
(`check_layer`), so that a damaged, cut or hostile one is refused with the directory as it was. What is made
then are the members that were checked, unless they are too many to keep (`tarreader.Contents`). What replaces
an object is made under a temporary name and renamed over it when it is whole; what cannot be finished is
taken away again.

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
import time

from layerfs.errors import LayerError, TarError
from layerfs.fdutil import OwnedFd, at_path
from layerfs.oci.beneath import ROOT, in_the_way, is_behind_link, names_in, remove
from layerfs.oci.building import Applied, Builder, OpenParent, refusal
from layerfs.oci.known import OBJECT, Known
from layerfs.oci.making import clean_acls
from layerfs.oci.member import Kind, Member, display, join, made_up_time, split
from layerfs.oci.plan import Plan
from layerfs.oci.progress import Progress
from layerfs.oci.snapshot import stamps
from layerfs.oci.streams import LayerSource
from layerfs.oci.tarreader import Contents, TarReader
from layerfs.oci.told import reader

__all__ = ["Applied", "apply_layer", "check_layer"]


def apply_layer(fd: int, target: str, progress: Progress | None = None) -> Applied:
    """Applies the layer that the descriptor `fd` gives, from its current position, to the directory `target`.
    `progress` is told of the layer's bytes; those of a regular file are read twice.

    Raises TarError for a bad layer (before anything was changed when `fd` is a regular file), LayerError with
    the errno where the file system refuses (ENOSPC, EROFS, EACCES, …) or one that cannot be applied here."""
    contents, checked = None, os.fstat(fd)
    if stat.S_ISREG(checked.st_mode):
        start = os.lseek(fd, 0, os.SEEK_CUR)
        if progress is not None:
            progress.total(2 * (checked.st_size - start))
        contents = check_layer(fd, target, progress)
        os.lseek(fd, start, os.SEEK_SET)
        if stamps(os.fstat(fd)) != stamps(checked):
            raise LayerError("the layer was changed while it was checked; nothing was applied")
    source = LayerSource(fd)
    applier = _Applier(target)
    # What it holds open must not live as long as somebody keeps an exception.
    with contextlib.closing(applier):
        return _run(applier, reader(source, progress, contents), target)


def _run(applier: _Applier, members: TarReader, target: str) -> Applied:
    part = f"{display(os.fsencode(target))} holds a part of the layer now"
    try:
        return applier.run(members)
    except TarError as error:
        raise TarError(f"{error}; {part}", error.errno) from None
    except LayerError as error:
        raise LayerError(f"{error}; {part}", error.errno) from None
    except OSError as error:
        raise LayerError(f"{refusal(error)}; {part}", error.errno) from error


def check_layer(fd: int, target: str, progress: Progress | None = None) -> Contents:
    """Reads a layer to its end and changes nothing; returns what it holds.

    Raises TarError for whatever will keep it from being applied to `target`; only the file system's own
    refusals (ENOSPC, EACCES, …) are left to be met later."""
    plan = Plan(OwnedFd(os.open(target, ROOT)))
    contents = Contents()
    with LayerSource(fd) as source:
        members = reader(source, progress)
        for member in members:
            plan.add(member)
            contents.add(member, source.position)
        contents.notes = members.notes
    return contents


class _Applier(Builder):
    """Whiteouts are carried out; what the layer replaces goes."""

    def __init__(self, target: str) -> None:
        made_up = made_up_time() * 1_000_000_000 if os.environ.get("SOURCE_DATE_EPOCH") else None
        super().__init__(OwnedFd(os.open(target, ROOT)), made_up)
        # Random: no layer can hold a name that it does not know.
        self._temporary = b".layerfs-apply-" + secrets.token_hex(12).encode()

    # --- making ---

    def _put(self, parent: OpenParent, name: bytes, member: Member, reader: TarReader) -> Known:
        """A new name is used at once. When we are killed it may stand for a part, which the next attempt
        replaces; a temporary name would stay for ever."""
        try:
            self._make(parent, name, member, reader)
        except FileExistsError:
            self._replace(parent, name, member, reader)
        return OBJECT

    def _replace(self, parent: OpenParent, name: bytes, member: Member, reader: TarReader) -> None:
        """The object that is there stays until the new one is whole."""
        self._make(parent, self._temporary, member, reader)
        fd = parent.fd.fd
        try:
            try:
                os.rename(self._temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
            except IsADirectoryError:
                self._remove(parent.fd, member.name)
                os.rename(self._temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=fd)
            raise
        if member.kind is Kind.HARDLINK:
            # rename(2) does nothing, and says so to nobody, when both names are the same file already.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=fd)

    def _put_directory(self, parent: OpenParent, name: bytes, member: Member) -> None:
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
            parent.known.child(name).pruned = True
            if parent.has_default_acl:
                clean_acls(at_path(fd, name))
        elif not self._maker.privileged and st.st_mode & 0o700 != 0o700:
            os.chmod(name, stat.S_IMODE(st.st_mode) | 0o700, dir_fd=fd)

    # --- hiding and removing ---

    def _to_hide_in(self, directory: bytes, member: bytes) -> OwnedFd | None:
        """The directory in which a whiteout stands; None when it has nothing to hide.

        Raises TarError behind a symbolic link."""
        try:
            return self._open(directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ENOTDIR and not is_behind_link(self._root, directory):
                return None
            raise in_the_way(self._root, directory, f"member {display(member)}", error) from None

    def _hide(self, directory: bytes, name: bytes, member: bytes) -> None:
        parent = self._to_hide_in(directory, member)
        if parent is None:
            return
        known = self._known.at(directory)
        child = known.children.get(name)
        if child is None or not child.is_own:
            self._touch(known, parent)
            self._remove(parent, join(directory, name))
        elif child.is_own_directory:
            path = join(directory, name)
            self._hide_attributes(path, child)
            self._prune(path, child)

    def _hide_all(self, directory: bytes, member: bytes) -> None:
        known = self._known.find(directory)
        if known is not None and known.pruned:
            return
        if self._to_hide_in(directory, member) is not None:
            self._prune(directory, self._known.at(directory))

    def _prune(self, path: bytes, known: Known) -> None:
        """Removes everything below the directory `path` that this layer did not make. What comes into it from
        then on is the layer's own: so each directory is looked at once, however often it is hidden."""
        todo = [(path, known)]
        while todo:
            path, known = todo.pop()
            if known.pruned:
                continue
            fd = self._open(path)
            for name in names_in(fd):
                child = known.children.get(name)
                if child is None or not child.is_own:
                    self._touch(known, fd)
                    self._remove(fd, join(path, name))
                elif child.is_own_directory:
                    self._hide_attributes(join(path, name), child)
                    todo.append((join(path, name), child))
            known.pruned = True

    def _hide_attributes(self, path: bytes, known: Known) -> None:
        """A directory that was hidden below has no attributes to give to the one that the layer implies,
        wherever the whiteout stands."""
        if known.member is None:
            now = time.time_ns() if self._implied_ns is None else self._implied_ns
            known.member = Member(path, Kind.DIR, 0o755, os.geteuid(), os.getegid(), now)

    def _remove(self, parent: OwnedFd, path: bytes) -> None:
        """Removes the tree `path`, whose directory is `parent`, and forgets it; nothing there: nothing
        happens."""
        self._forget(path)
        if remove(parent, split(path)[1]):
            self._result.removed += 1
