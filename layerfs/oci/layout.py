"""An OCI image layout on disk: blobs by digest and an index of what they make, read and written. Knows what
is published how, not what is in an image.

On disk (image-spec image-layout.md), and what we add to it:

    oci-layout               {"imageLayoutVersion": "1.0.0"}
    index.json               the images, by the annotation org.opencontainers.image.ref.name
    blobs/sha256/HEX         a blob; its name is the digest of its bytes
    .layerfs-RANDOM.tmp      a blob or an index being written; its writer holds flock(2) on it

Order of writes: a blob is written to a temporary file, synced, renamed to its name, and the directory
synced; what names it comes later, and index.json last, by one rename under flock(2) of the layout's
directory, read again inside the lock. That rename is the commit point: a crash before it leaves the old
images and blobs that nobody names. Temporary files of killed writers are removed by the next writer: they are
made and locked under the lock of the directory, so one that is not locked has no writer any more. (umoci,
skopeo and buildah do not lock: when one of them writes an index in the same moment, a tag may be lost.)

Nothing in a layout is followed: symbolic links, in place of a blob or on the way to it, are refused. They
lead elsewhere, and a layout that somebody hands us would make us read there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from layerfs.errors import ImageError, LayerError, UsageError
from layerfs.fdutil import RESOLVE_INSIDE, OwnedFd, openat2
from layerfs.ids import Digest
from layerfs.oci.image import (
    INDEX,
    MAX_MANIFEST,
    Descriptor,
    Index,
    check_digest,
    digest_of,
    parse_index,
)
from layerfs.oci.member import display
from layerfs.oci.resolve import REF_NAME
from layerfs.oci.strict_json import encode, parse_object

_MARK = b"oci-layout"
_INDEX = b"index.json"
_BLOBS = b"blobs/sha256"
_TEMPORARY = re.compile(rb"\.layerfs-[0-9a-f]{16}\.tmp")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CHUNK = 1 << 20
#: image-spec annotations.md, the grammar of ref.name.
_REF = re.compile(
    r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*(?:/[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*)*"
)


class BlobWriter:
    """A blob being written to `fd`. It is in the layout after `commit`, and gone without."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._name, self.fd = layout._temporary()
        self._done = False

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            with contextlib.suppress(OSError):
                os.unlink(self._name, dir_fd=self._layout.fd)
        os.close(self.fd)

    def commit(self, digest: Digest, size: int) -> None:
        """Publishes what was written to `fd`, of which the writer knows the digest and the size in bytes.

        A blob that is there already is replaced: its bytes are the same, unless somebody damaged them. Raises
        OSError, ImageError when `fd` holds another number of bytes."""
        if (found := os.fstat(self.fd).st_size) != size:
            raise ImageError(f"blob {digest} was written with {found} bytes in place of {size}")
        os.fsync(self.fd)
        with self._layout._blobs() as blobs:
            os.rename(self._name, _hex(digest), src_dir_fd=self._layout.fd, dst_dir_fd=blobs)
            self._done = True
            os.fsync(blobs)


class Layout:
    """A layout that is open. Stays the directory that was opened, whatever happens to its path."""

    def __init__(self, path: str, fd: OwnedFd) -> None:
        self.path = path
        self._fd = fd

    @property
    def fd(self) -> int:
        return self._fd.fd

    @classmethod
    def open(cls, path: str) -> Layout:
        """Raises ImageError where there is no layout; its message does not name the path."""
        try:
            layout = cls(path, OwnedFd(os.open(path, _DIRECTORY)))
            mark = layout._read(_MARK, 4096)
        except FileNotFoundError as error:
            missing = "no such directory" if error.filename == path else "it has no file 'oci-layout'"
            raise ImageError(f"is no OCI image layout: {missing}") from None
        except OSError as error:
            raise ImageError(f"cannot be read as an OCI image layout: {error.strerror}") from None
        version = parse_object(mark, "oci-layout", 4096).get("imageLayoutVersion")
        if not isinstance(version, str) or not version.startswith("1."):
            raise ImageError(f"is an OCI image layout of version {version!r:.40}; 1.0.0 is known")
        return layout

    @classmethod
    def create(cls, path: str) -> Layout:
        """Opens the layout, or makes an empty one in a directory that is empty or not there. Raises
        UsageError where there is something else, OSError."""
        shown = display(os.fsencode(path))
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
                _sync_directory(os.path.dirname(path.rstrip("/")) or ".")
            layout = cls(path, OwnedFd(os.open(path, _DIRECTORY)))
        except OSError as error:
            raise UsageError(f"{shown}: cannot be made an OCI image layout: {error.strerror}") from None
        with layout._locked():
            present = {os.fsencode(name) for name in os.listdir(layout.fd)}
            if _MARK not in present:
                # what a killed maker leaves is finished
                own = {b"blobs", _INDEX}
                if any(name not in own and not _TEMPORARY.fullmatch(name) for name in present):
                    raise UsageError(f"{shown}: is no OCI image layout, and not empty: name a new directory")
            layout._make_directories()
            if _INDEX not in present:
                empty = {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
                layout._replace_locked(_INDEX, encode(empty))
            if _MARK not in present:
                layout._replace_locked(_MARK, encode({"imageLayoutVersion": "1.0.0"}))
        return cls.open(path)

    def _make_directories(self) -> None:
        """blobs/sha256, and its way on disk. Never through a link: mkdir(2) would follow one."""
        at = self._fd
        for name in _BLOBS.split(b"/"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=at.fd)
            os.fsync(at.fd)
            at = OwnedFd(openat2(at.fd, name, _DIRECTORY, 0, RESOLVE_INSIDE))

    # -- reading ------------------------------------------------------------------------------------

    def index(self) -> Index:
        """What index.json says. Raises ImageError."""
        return parse_index(self._index_bytes())

    def _index_bytes(self) -> bytes:
        try:
            return self._read(_INDEX, MAX_MANIFEST)
        except OSError as error:
            raise ImageError(f"the layout has no index.json that can be read: {error.strerror}") from None

    def open_blob(self, descriptor: Descriptor) -> int:
        """A new descriptor of the blob's file, at its beginning. Its size was checked; its digest is for the
        reader to check at the end. Raises ImageError."""
        algorithm, _, name = check_digest(descriptor.digest).partition(":")
        try:
            fd = self._open_file(f"blobs/{algorithm}/{name}".encode())
        except FileNotFoundError:
            why = ", and is not fetched from elsewhere" if descriptor.urls else ""
            raise ImageError(f"blob {descriptor.digest} is missing{why}") from None
        except OSError as error:
            raise ImageError(f"blob {descriptor.digest} cannot be read: {error.strerror}") from None
        size = os.fstat(fd).st_size
        if size != descriptor.size:
            os.close(fd)
            raise ImageError(
                f"blob {descriptor.digest} is damaged: {size} bytes in place of {descriptor.size}"
            )
        return fd

    def read_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """A blob of at most `limit` bytes, its digest verified. Raises ImageError."""
        if descriptor.size > limit:
            raise ImageError(f"blob {descriptor.digest} is refused: it is larger than {limit >> 10} KiB")
        fd = self.open_blob(descriptor)
        try:
            data = _read_up_to(fd, limit)
        finally:
            os.close(fd)
        if digest_of(data, descriptor.digest.partition(":")[0]) != descriptor.digest:
            raise ImageError(f"blob {descriptor.digest} is damaged: its bytes have another digest")
        return data

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there, in its right size. The digest is not computed, that would be reading
        whole images at every commit: blobs appear whole, and whoever reads one checks its digest."""
        try:
            os.close(self.open_blob(descriptor))
        except ImageError:
            return False
        return True

    def _open_file(self, path: bytes) -> int:
        """O_NONBLOCK: a fifo must not keep us waiting for a writer."""
        fd = openat2(self.fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, 0, RESOLVE_INSIDE)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is no regular file", path)
        return fd

    def _read(self, path: bytes, limit: int) -> bytes:
        """A file of the layout; one byte more than `limit` where it is longer. Raises OSError."""
        fd = self._open_file(path)
        try:
            return _read_up_to(fd, limit + 1)
        finally:
            os.close(fd)

    # -- writing ------------------------------------------------------------------------------------

    def new_blob(self) -> BlobWriter:
        """Raises OSError."""
        return BlobWriter(self)

    def put(self, data: bytes, media_type: str) -> Descriptor:
        """Writes `data` as a blob. Raises OSError."""
        digest = digest_of(data)
        with self.new_blob() as blob:
            _write_all(blob.fd, data)
            blob.commit(digest, len(data))
        return Descriptor(media_type, digest, len(data))

    def put_json(self, document: object, media_type: str) -> Descriptor:
        """Writes `document` as a blob. Raises OSError."""
        return self.put(encode(document), media_type)

    def copy_blob(self, source: int, descriptor: Descriptor) -> None:
        """Copies the `descriptor.size` bytes that stand at the position of `source` as a blob, verified.
        Raises ImageError, OSError."""
        algorithm = descriptor.digest.partition(":")[0]
        if algorithm != "sha256":
            raise ImageError(f"blob {descriptor.digest} is not copied: only sha256 is written")
        found = hashlib.sha256()
        left = descriptor.size
        with self.new_blob() as blob:
            while left and (data := os.read(source, min(left, _CHUNK))):
                found.update(data)
                _write_all(blob.fd, data)
                left -= len(data)
            if left or f"sha256:{found.hexdigest()}" != descriptor.digest:
                raise ImageError(f"blob {descriptor.digest} is damaged: its bytes have another digest")
            blob.commit(descriptor.digest, descriptor.size)

    def tag(self, name: str, descriptor: Descriptor) -> None:
        """Makes `name` stand for `descriptor`, and for nothing else. Two callers at once: both tags appear.
        Raises UsageError, ImageError, OSError."""
        check_tag(name)
        with self._locked():
            index = parse_index(self._index_bytes())
            raw: dict[str, Any] = dict(index.raw)
            kept = [
                entry
                for entry, view in zip(raw.get("manifests") or [], index.manifests, strict=True)
                if view.annotations.get(REF_NAME) != name
            ]
            kept.append(
                {
                    "mediaType": descriptor.media_type,
                    "digest": descriptor.digest,
                    "size": descriptor.size,
                    "annotations": {**descriptor.annotations, REF_NAME: name},
                }
            )
            raw["manifests"] = kept
            self._replace_locked(_INDEX, encode(raw))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock of the layout. A descriptor of its own: flock(2) belongs to the open file, and two threads
        may share ours."""
        lock = os.open(b".", _DIRECTORY, dir_fd=self.fd)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._remove_stale_locked()
            yield
        finally:
            os.close(lock)

    def _remove_stale_locked(self) -> None:
        for name in os.listdir(self.fd):
            raw = os.fsencode(name)
            if not _TEMPORARY.fullmatch(raw):
                continue
            try:
                fd = self._open_file(raw)
            except OSError:
                continue  # gone meanwhile, or nothing of ours
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(raw, dir_fd=self.fd)
            except OSError:
                pass  # somebody writes it, has just published it, or it is not ours to remove
            finally:
                os.close(fd)

    def _temporary(self) -> tuple[bytes, int]:
        with self._locked():
            return self._temporary_locked()

    def _temporary_locked(self) -> tuple[bytes, int]:
        name = f".layerfs-{secrets.token_hex(8)}.tmp".encode()
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=self.fd)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return name, fd

    def _replace_locked(self, name: bytes, data: bytes) -> None:
        temporary, fd = self._temporary_locked()
        try:
            try:
                _write_all(fd, data)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self.fd)
            raise
        os.fsync(self.fd)

    @contextlib.contextmanager
    def _blobs(self) -> Iterator[int]:
        fd = openat2(self.fd, _BLOBS, _DIRECTORY, 0, RESOLVE_INSIDE)
        try:
            yield fd
        finally:
            os.close(fd)


def _sync_directory(path: str) -> None:
    try:
        fd = os.open(path, _DIRECTORY)
    except PermissionError:
        return  # one may write into a directory that one may not read
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_tag(name: str) -> None:
    """Raises UsageError where image-spec's grammar does not take `name`."""
    if len(name) > 255 or not _REF.fullmatch(name):
        raise UsageError(f"{name[:100]!r} is no tag: letters and digits, joined by one of -._:@+/")


def _hex(digest: Digest) -> bytes:
    algorithm, _, name = check_digest(digest).partition(":")
    if algorithm != "sha256":
        raise LayerError(f"{digest}: only sha256 is written")
    return name.encode()


def _read_up_to(fd: int, limit: int) -> bytes:
    pieces = []
    while limit and (data := os.read(fd, min(limit, _CHUNK))):
        pieces.append(data)
        limit -= len(data)
    return b"".join(pieces)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
