"""Turns what an upper changed into a layer tarball, and puts it where it belongs. Finding the changes is
`changes`, bytes are `tarwriter`."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from layerfs.errors import LayerError, UsageError
from layerfs.oci.changes import ChangeFinder, ChangeKind, whiteout_member
from layerfs.oci.member import Kind, made_up_time
from layerfs.oci.streams import LayerSink, Written
from layerfs.oci.tarwriter import TarWriter, read_chunks
from layerfs.stack import Stack


@dataclass(frozen=True, slots=True)
class Summary:
    """What went into a layer. `unchanged`: copies in the upper that equal what lies below and were left
    out."""

    written: Written
    added: int
    changed: int
    deleted: int
    unchanged: int
    notes: tuple[str, ...]


def write_layer(stack: Stack, fd: int, compression: str = "none") -> Summary:
    """Writes the layer that `stack.upper` is over `stack.lowers` to `fd` (not synced, not closed).

    The same trees give the same bytes. Raises LayerError when a layer cannot be read, OSError when `fd`
    cannot be written."""
    seconds = made_up_time()
    notes: list[str] = []
    counts = dict.fromkeys(ChangeKind, 0)
    sink = LayerSink(fd, compression)
    writer = TarWriter(sink.write)
    finder = ChangeFinder(stack, notes)
    for change in finder:
        counts[change.kind] += 1
        if change.kind is ChangeKind.UNCHANGED:
            continue
        if change.member is None:
            writer.add(whiteout_member(change.path, seconds))
        elif change.source is not None and change.member.size:
            assert change.member.kind is Kind.FILE
            data = finder.open(change.source, change.path)
            writer.add(change.member, read_chunks(data.fd, change.member.size, change.path))
        else:
            writer.add(change.member)
    writer.finish()
    return Summary(
        sink.finish(),
        counts[ChangeKind.ADDED],
        counts[ChangeKind.CHANGED],
        counts[ChangeKind.DELETED],
        counts[ChangeKind.UNCHANGED],
        tuple(notes),
    )


@contextlib.contextmanager
def output_file(path: str, keep_out_of: int | None = None) -> Iterator[int]:
    """A descriptor to write `path` by: a temporary file beside it that is synced and renamed over it on
    leaving, and removed on an exception. What is no regular file (a pipe, /dev/null) is written as it is.
    `keep_out_of`: a descriptor of a directory that must not hold it.

    Raises UsageError for a place where nothing can be written, LayerError when writing fails later."""
    directory, name = os.path.split(path)
    try:
        parent = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        if keep_out_of is not None and _is_inside(parent, keep_out_of):
            raise UsageError(
                f"{path}: lies in the upper directory that is being committed; give another place"
            )
        try:
            present = os.stat(name, dir_fd=parent)
        except OSError:
            present = None
        if not name or (present is not None and stat.S_ISDIR(present.st_mode)):
            raise UsageError(f"{path}: is a directory; give a file name")
        if present is not None and not stat.S_ISREG(present.st_mode):
            fd = _open_output(path, name, os.O_WRONLY, parent)
            try:
                yield fd
            finally:
                os.close(fd)
            return
        temporary = f".{name[:200]}.{secrets.token_hex(6)}.tmp"
        fd = _open_output(path, temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, parent)
        try:
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent)
            if isinstance(error, OSError) and error.filename is None:
                raise LayerError(f"{path}: {error.strerror}", error.errno) from error
            raise
    finally:
        os.close(parent)


def _open_output(path: str, name: str, flags: int, parent: int) -> int:
    try:
        return os.open(name, flags | os.O_CLOEXEC, 0o666, dir_fd=parent)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


def _is_inside(directory: int, root: int) -> bool:
    """Whether `directory` is `root` or lies below it, by (device, inode)."""
    wanted = os.fstat(root)
    here = os.dup(directory)
    try:
        while True:
            st = os.fstat(here)
            if (st.st_dev, st.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
            try:
                above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
            except OSError:
                return False
            os.close(here)
            here = above
            up = os.fstat(here)
            if (up.st_dev, up.st_ino) == (st.st_dev, st.st_ino):
                return False
    finally:
        os.close(here)
