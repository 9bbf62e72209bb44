"""The journal of a hard-link copy-up: all names of a file move to the upper together, or the next mount
finishes it.

WORK/layerfs/links.N, JSON: {"temporary": NAME in WORK/work, "names": [[DIRECTORY, NAME], …]} with bytes in
latin-1.

    1. the copy is complete in WORK/work           crash: the mount removes it, lowers are seen
    2. journal written, fsynced and renamed        crash: the mount links all names
    3. each name is linked in the upper            crash: the mount links the rest
    4. journal unlinked (the commit is 2)          crash: the temporary is removed as any other
"""

from __future__ import annotations

import errno
import json
import logging
import os

from layerfs.fdutil import RESOLVE_INSIDE, OwnedFd, fd_path, openat2
from layerfs.overlay.names import XattrNames
from layerfs.upper.work import WorkDir, remove_tree

log = logging.getLogger("layerfs.upper")

_PREFIX = "links."


def draft(work: WorkDir, temporary: bytes, names: list[tuple[bytes, bytes]], sync: bool) -> str:
    """Writes the journal under a name that recovery throws away; returns that name. Blocks when it syncs.
    Raises OSError, nothing left.
    """
    record = {
        "temporary": temporary.decode("latin-1"),
        "names": [[directory.decode("latin-1"), name.decode("latin-1")] for directory, name in names],
    }
    name = "." + _PREFIX + temporary.decode("latin-1").lstrip("#")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = OwnedFd(os.open(name, flags, 0o600, dir_fd=work.state.fd))
        data = json.dumps(record).encode()
        while data:
            data = data[os.write(fd.fd, data) :]
        if sync:
            os.fsync(fd.fd)
    except OSError:
        remove_tree(work.state.fd, name.encode())
        raise
    return name


def commit(work: WorkDir, draft_name: str) -> str:
    """Makes a draft count: one rename; the journal's name. No sync: the links that follow are in the same
    file system's log behind it. Raises OSError.
    """
    journal = draft_name[1:]
    os.rename(draft_name, journal, src_dir_fd=work.state.fd, dst_dir_fd=work.state.fd)
    return journal


def remove(work: WorkDir, journal: str) -> None:
    os.unlink(journal, dir_fd=work.state.fd)


def recover(work: WorkDir, upper: OwnedFd, names: XattrNames) -> None:
    """Finishes every journalled copy-up. Called at mount, before the work directory is emptied. Raises
    OSError.
    """
    for journal in sorted(os.listdir(work.state.fd)):
        if journal.startswith("." + _PREFIX):
            os.unlink(journal, dir_fd=work.state.fd)
        elif journal.startswith(_PREFIX):
            _finish(work, upper, journal, names)
            remove(work, journal)


def _finish(work: WorkDir, upper: OwnedFd, journal: str, marks: XattrNames) -> None:
    with open(
        os.open(journal, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=work.state.fd), "rb"
    ) as file:
        try:
            record = json.load(file)
            temporary = record["temporary"].encode("latin-1")
            names = [
                (directory.encode("latin-1"), name.encode("latin-1")) for directory, name in record["names"]
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return  # written by nobody who finished writing: there is nothing it promised
    if not temporary.startswith(b"#") or b"/" in temporary:
        return
    for directory, name in names:
        if b"/" in name or b"\0" in name + directory or name in (b"", b".", b".."):
            continue
        try:
            parent = OwnedFd(
                openat2(
                    upper.fd,
                    directory or b".",
                    os.O_PATH | os.O_DIRECTORY,
                    resolve=RESOLVE_INSIDE,
                )
            )
            before = os.fstat(parent.fd)
            os.link(temporary, name, src_dir_fd=work.fd.fd, dst_dir_fd=parent.fd, follow_symlinks=False)
            # As the copy-up would have: the recorded number is looked for only in marked directories.
            for mark in (marks.numbers, marks.impure):
                try:
                    os.setxattr(fd_path(parent.fd), mark, b"y")
                except PermissionError:
                    pass
            os.utime(fd_path(parent.fd), ns=(before.st_atime_ns, before.st_mtime_ns))
        except OSError as error:
            # EEXIST: linked before the crash. ENOENT: done, and the temporary is gone. Anything else was
            # changed since by somebody else, and must not keep the upper from being mounted.
            if error.errno not in (errno.EEXIST, errno.ENOENT):
                log.warning("hard link %r was not restored: %s", directory + b"/" + name, error.strerror)
