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
from layerfs.fdutil import fd_path
from layerfs.oci.changes import ChangeFinder, ChangeKind, whiteout_member
from layerfs.oci.exclude import Excluded
from layerfs.oci.member import Member, display, made_up_time
from layerfs.oci.objects import Data
from layerfs.oci.progress import Progress, Silent
from layerfs.oci.snapshot import Snapshots
from layerfs.oci.streams import LayerSink, Written
from layerfs.oci.tarwriter import TarWriter
from layerfs.stack import Layer, Stack


@dataclass(frozen=True, slots=True)
class CommitOptions:
    """What goes into a layer, and how it is packed."""

    compression: str = "none"
    #: of the compression; None: its default
    level: int | None = None
    #: copies in the upper that equal what lies below are part of the layer
    keep_unchanged: bool = False
    #: gitignore(5) patterns of names that are taken as if they had not been changed
    exclude: tuple[str, ...] = ()
    #: the whole merged tree, as a layer over nothing; then the stack need not have an upper
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """What went into a layer. `unchanged`: copies in the upper that equal what lies below and were left out;
    `excluded`: names left out by a pattern (what lies below them is not counted); `file_bytes`: of the
    contents of files that are in it."""

    written: Written
    added: int
    changed: int
    deleted: int
    unchanged: int
    excluded: int
    file_bytes: int
    notes: tuple[str, ...]


def write_layer(
    stack: Stack,
    fd: int,
    options: CommitOptions | None = None,
    progress: Progress | None = None,
    *,
    snapshots: Snapshots | None = None,
) -> Summary:
    """Writes the layer that `stack.upper` is over `stack.lowers` to `fd` (not synced, not closed).

    The same trees give the same bytes. `snapshots`: for an upper that is written to meanwhile. Raises
    UsageError for options that make no sense, LayerError when a layer cannot be read, OSError when `fd`
    cannot be written."""
    options = options or CommitOptions()
    progress = progress or Silent()
    seconds = made_up_time()
    notes: list[str] = []
    finder = ChangeFinder(
        stack,
        notes,
        whole=options.whole,
        keep_unchanged=options.keep_unchanged,
        exclude=Excluded(options.exclude) if options.exclude else None,
        with_data=True,
        snapshots=snapshots,
    )
    if stack.upper is not None and not options.whole and not isinstance(progress, Silent):
        progress.total(_size(stack.upper))
    watched = None if isinstance(progress, Silent) else progress
    counts = dict.fromkeys(ChangeKind, 0)
    file_bytes = 0
    with LayerSink(fd, options.compression, options.level) as sink:
        writer = TarWriter(sink.write)
        for change in finder:
            counts[change.kind] += 1
            if change.kind in (ChangeKind.UNCHANGED, ChangeKind.EXCLUDED):
                continue
            if change.member is None:
                writer.add(whiteout_member(change.path, seconds))
            elif change.data is not None and change.member.size:
                file_bytes += change.member.size
                _add_file(writer, change.member, change.data, sink, watched)
            else:
                writer.add(change.member)
        writer.finish()
        written = sink.finish()
    return Summary(
        written,
        counts[ChangeKind.ADDED],
        counts[ChangeKind.CHANGED],
        counts[ChangeKind.DELETED],
        counts[ChangeKind.UNCHANGED],
        counts[ChangeKind.EXCLUDED],
        file_bytes,
        tuple(notes),
    )


def _add_file(
    writer: TarWriter, member: Member, data: Data, sink: LayerSink, progress: Progress | None
) -> None:
    """Raises LayerError when it has become shorter (a live mount)."""
    if progress is not None:
        progress.describe(display(member.name))
    try:
        writer.add_file(member, data if progress is None else _Counted(data, progress), sink)
    except EOFError:
        raise LayerError(
            f"{display(member.name)}: became shorter while it was read; try again when nobody writes to it"
        ) from None


class _Counted:
    """The bytes of a file, as `progress` hears of them."""

    def __init__(self, data: Data, progress: Progress) -> None:
        self._data = data
        self._progress = progress

    def read_into(self, target: memoryview, offset: int) -> int:
        read = self._data.read_into(target, offset)
        self._progress.advance(read)
        return read


def _size(upper: Layer) -> int:
    """Bytes of the files in an upper: an estimate of what there is to do, for somebody who watches. Raises
    nothing."""
    total = 0
    todo = [fd_path(upper.fd.fd)]
    while todo:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return total


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
        if keep_out_of is not None and is_inside(parent, keep_out_of):
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


def is_inside(directory: int, root: int) -> bool:
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
