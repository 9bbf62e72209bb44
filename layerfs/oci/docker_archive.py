"""Images in one uncompressed tar, read in place: what `docker save` writes, and OCI layouts in a tar. Writes
nothing and unpacks nothing: a layer is a range of the file.

    manifest.json     [{"Config": NAME, "RepoTags": [REPO:TAG...], "Layers": [NAME...]}...]
    NAME.json         a config; its name is its digest, and is checked where it looks like one
    NAME/layer.tar    a layer; or a symbolic link to the same layer under another name

Without manifest.json: the files of an OCI layout (`layout`). Newer dockers write both; then manifest.json
counts, because RepoTags stand there in full. Layers carry no digest here: they are held to their DiffIDs.

Source: docker's image/spec v1.2, "Combined Image JSON + Filesystem Changeset Format".
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from dataclasses import dataclass
from functools import partial

import msgspec

from layerfs.errors import ImageError, TarError
from layerfs.fdutil import OwnedFd, fd_path
from layerfs.ids import Digest
from layerfs.oci.image import (
    MAX_CONFIG,
    MAX_MANIFEST,
    Descriptor,
    Image,
    ImageLayer,
    Index,
    chain_ids,
    check,
    check_digest,
    digest_of,
    parse_config,
    parse_index,
)
from layerfs.oci.member import Kind, display, plain_path
from layerfs.oci.resolve import find, is_digest, listed, load
from layerfs.oci.strict_json import parse
from layerfs.oci.tarreader import TarReader

#: Members of the outer tar: three a layer in the old form, one a blob in the new.
_MAX_MEMBERS = 100_000
_MAX_IMAGES = 1000
_MAX_LINKS = 8
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}


class _Entry(msgspec.Struct, frozen=True, rename="pascal"):
    """One image of manifest.json."""

    config: str
    repo_tags: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Place:
    """Bytes of the archive."""

    at: int
    size: int


class _File:
    """The archive's bytes in order, and where the next one stands."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self.position = 0

    def read(self, size: int) -> bytes:
        data = _read_at(self._fd, _Place(self.position, size))
        self.position += len(data)
        return data

    def skip(self, size: int) -> bool:
        self.position += size
        return self.position <= self._size


class DockerArchive:
    """An archive that is open."""

    def __init__(self, path: str) -> None:
        """Raises ImageError for what is no such archive."""
        try:
            self._fd = OwnedFd(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror}") from None
        self._path = path
        st = os.fstat(self._fd.fd)
        if not stat.S_ISREG(st.st_mode):
            raise ImageError("is no docker archive: it is no regular file")
        self._size = st.st_size
        self._files: dict[bytes, _Place] = {}
        self._links: dict[bytes, bytes] = {}
        self._read_members()

    def image(self, wanted: str | Digest | None, reference: str) -> Image:
        """The image that `wanted` (REPO:TAG, image ID, or a layout's tag) names, None: the only one. Raises
        ImageError."""
        if b"manifest.json" in self._files:
            return self._load(self._choose(self._entries(), wanted), reference)
        if b"index.json" in self._files and b"oci-layout" in self._files:
            return load(self, find(self, wanted), wanted, reference)
        raise ImageError("is no docker archive: it has neither manifest.json nor index.json")

    # -- the outer tar ------------------------------------------------------------------------------

    def _read_members(self) -> None:
        head = _read_at(self._fd.fd, _Place(0, 8))
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise ImageError(f"is compressed with {name}: decompress it first (its layers may stay so)")
        file = _File(self._fd.fd, self._size)
        try:
            for number, member in enumerate(TarReader(file)):
                if number >= _MAX_MEMBERS:
                    raise ImageError(f"is refused: more than {_MAX_MEMBERS} members")
                # as for an extractor, a later member of the same name replaces the earlier one
                self._files.pop(member.name, None)
                self._links.pop(member.name, None)
                if member.kind is Kind.FILE:
                    self._files[member.name] = _Place(file.position, member.size)
                elif member.kind is Kind.HARDLINK:
                    self._links[member.name] = member.target
                elif member.kind is Kind.SYMLINK:
                    target = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), member.target))
                    self._links[member.name] = target
        except TarError as error:
            raise ImageError(f"is no docker archive: {error}") from None

    def _place(self, name: str) -> _Place:
        """Where a file's bytes are. Links lead to other members only, for we look nowhere else. Raises
        ImageError."""
        shown = display(os.fsencode(name[:200]))
        try:
            path = plain_path(os.fsencode(name))
        except (TarError, UnicodeError):
            path = b""
        if not path or name.startswith("/"):
            raise ImageError(f"names a file outside of itself: {shown}") from None
        for _ in range(_MAX_LINKS):
            if (place := self._files.get(path)) is not None:
                return place
            if path not in self._links:
                raise ImageError(f"lacks {shown}")
            path = self._links[path]
        raise ImageError(f"{shown} is a loop of links")

    def _read(self, name: str, limit: int) -> bytes:
        place = self._place(name)
        if place.size > limit:
            raise ImageError(f"{name} is refused: it is larger than {limit >> 10} KiB")
        return _read_at(self._fd.fd, place)

    def _open_at(self, place: _Place) -> int:
        """A descriptor of its own at `place`: layers are read by several threads at once, each from its
        position."""
        fd = os.open(fd_path(self._fd.fd), os.O_RDONLY | os.O_CLOEXEC)
        os.lseek(fd, place.at, os.SEEK_SET)
        return fd

    # -- manifest.json ------------------------------------------------------------------------------

    def _entries(self) -> list[_Entry]:
        data = self._read("manifest.json", MAX_MANIFEST)
        raw = parse(data, "manifest.json", MAX_MANIFEST)
        entries = check(raw, list[_Entry], "manifest.json")
        if not 0 < len(entries) <= _MAX_IMAGES:
            raise ImageError(f"holds {len(entries)} images; 1 to {_MAX_IMAGES} are read")
        return entries

    def _choose(self, entries: list[_Entry], wanted: str | Digest | None) -> _Entry:
        tags = [tag for entry in entries for tag in entry.repo_tags]
        if wanted is None:
            found = entries
        elif is_digest(wanted):
            found = [each for each in entries if digest_of(self._read(each.config, MAX_CONFIG)) == wanted]
        else:
            name = _full_name(wanted)
            found = [each for each in entries if name in map(_full_name, each.repo_tags)]
        if not found:
            raise ImageError(f"there is no image {wanted!r}; there is {listed(tags) or 'one without a name'}")
        if len(found) > 1:
            raise ImageError(f"which image is meant; there is {listed(tags) or 'none with a name'}")
        return found[0]

    def _load(self, entry: _Entry, reference: str) -> Image:
        data = self._read(entry.config, MAX_CONFIG)
        config_digest = digest_of(data)
        named = re.search(r"(?:^|/)([0-9a-f]{64})(?:\.json)?\Z", entry.config)
        if named is not None and config_digest != f"sha256:{named[1]}":
            raise ImageError(f"the config {entry.config} is damaged: its bytes have another digest")
        config = parse_config(data)
        diff_ids = config.rootfs.diff_ids
        if len(entry.layers) != len(diff_ids):
            raise ImageError(
                f"the image is wrong: manifest.json has {len(entry.layers)} layers, "
                f"its config {len(diff_ids)}"
            )
        places = map(self._place, entry.layers)
        layers = tuple(
            ImageLayer(diff_id, chain_id, None, place.size, partial(self._open_at, place))
            for place, diff_id, chain_id in zip(places, diff_ids, chain_ids(diff_ids), strict=True)
        )
        return Image(reference, next(iter(entry.repo_tags), ""), None, None, config, config_digest, layers)

    # -- an OCI layout in a tar: what `resolve` asks of a store ---------------------------------------

    def index(self) -> Index:
        return parse_index(self._read("index.json", MAX_MANIFEST))

    def open_blob(self, descriptor: Descriptor) -> int:
        """As `layout.Layout.open_blob`; the descriptor stands at the blob's first byte."""
        return self._open_at(self._blob(descriptor))

    def read_blob(self, descriptor: Descriptor, limit: int) -> bytes:
        """As `layout.Layout.read_blob`."""
        place = self._blob(descriptor)
        if place.size > limit:
            raise ImageError(f"blob {descriptor.digest} is refused: it is larger than {limit >> 10} KiB")
        data = _read_at(self._fd.fd, place)
        if digest_of(data, descriptor.digest.partition(":")[0]) != descriptor.digest:
            raise ImageError(f"blob {descriptor.digest} is damaged: its bytes have another digest")
        return data

    def _blob(self, descriptor: Descriptor) -> _Place:
        algorithm, _, name = check_digest(descriptor.digest).partition(":")
        place = self._place(f"blobs/{algorithm}/{name}")
        if place.size != descriptor.size:
            raise ImageError(
                f"blob {descriptor.digest} is damaged: {place.size} bytes in place of {descriptor.size}"
            )
        return place


def _full_name(name: str) -> str:
    """A name as docker means it: `busybox` is docker.io/library/busybox:latest."""
    if ":" not in name.rpartition("/")[2]:
        name += ":latest"
    first, slash, _ = name.partition("/")
    if not slash:
        return f"docker.io/library/{name}"
    if "." not in first and ":" not in first and first != "localhost":
        return f"docker.io/{name}"
    return name


def _read_at(fd: int, place: _Place) -> bytes:
    """Fewer bytes only where the file ends."""
    pieces = []
    at, left = place.at, place.size
    while left and (data := os.pread(fd, left, at)):
        pieces.append(data)
        at += len(data)
        left -= len(data)
    return b"".join(pieces)
