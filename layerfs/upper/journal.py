"""The journal of a hard-link copy-up: all names of a file move to the upper together, or the next mount
finishes it.

WORK/layerfs/links.N, JSON: {"temporary": NAME in WORK/work, "names": [[DIRECTORY, NAME], …]} with bytes in
latin-1.

    1. the copy is complete in WORK/work           crash: the mount removes it, lowers are seen
    2. journal written and fsynced                 crash: the mount links all names
    3. each name is linked in the upper            crash: the mount links the rest
    4. journal unlinked (the commit is 2)          crash: the temporary is removed as any other
"""

from __future__ import annotations

import json
import os

from layerfs.fdutil import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, OwnedFd, fd_path, openat2
from layerfs.overlay.names import XattrNames
from layerfs.upper.work import WorkDir

_PREFIX = "links."


def write(work: WorkDir, temporary: bytes, names: list[tuple[bytes, bytes]], sync: bool) -> str:
    """Writes the journal; returns its name. Raises OSError."""
    record = {
        "temporary": temporary.decode("latin-1"),
        "names": [[directory.decode("latin-1"), name.decode("latin-1")] for directory, name in names],
    }
    journal = _PREFIX + temporary.decode("latin-1").lstrip("#")
    draft = "." + journal
    fd = OwnedFd(
        os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=work.state.fd)
    )
    data = json.dumps(record).encode()
    while data:
        data = data[os.write(fd.fd, data) :]
    if sync:
        os.fsync(fd.fd)
    os.rename(draft, journal, src_dir_fd=work.state.fd, dst_dir_fd=work.state.fd)
    if sync:
        os.fsync(work.state.fd)
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
                    resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS,
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
        except (FileExistsError, FileNotFoundError):
            continue  # linked before the crash, or the work was done and the temporary is gone
