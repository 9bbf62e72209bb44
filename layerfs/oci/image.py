"""Images as documents: descriptors, indexes, manifests, configs and history, checked by types and kept as
they came. Opens no file; where blobs lie is `layout`'s and `docker_archive`'s.

Every document has a view, whose fields are checked, and `raw`, the JSON object as it was: who rewrites a
document changes `raw`, so what we do not know is not lost. A null means the same as no value, as in the
programs that write these documents (all are in Go).

Sources: OCI image-spec descriptor.md, image-index.md, manifest.md, config.md, media-types.md; docker's
"Image Manifest Version 2, Schema 2".
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from layerfs.errors import ImageError
from layerfs.ids import DiffId, Digest
from layerfs.oci.streams import LayerSource
from layerfs.oci.strict_json import parse_object

#: Bytes. Registries take manifests of up to 4 MiB; a config carries a history entry for each of its layers.
MAX_MANIFEST = 4 << 20
MAX_CONFIG = 8 << 20
#: The kernel stacks 500; an image may be squashed before it is mounted.
MAX_LAYERS = 1000
_CHUNK = 1 << 20

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
_DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
_DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
INDEXES = frozenset((INDEX, _DOCKER_INDEX))
MANIFESTS = frozenset((MANIFEST, _DOCKER_MANIFEST))
_CONFIGS = frozenset((CONFIG, _DOCKER_CONFIG))

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_FOREIGN = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
#: Media type of a layer that can be read -> its name in OCI manifests. The nondistributable ones are kept in
#: an image that has them; nothing makes new ones.
LAYERS = {
    **{_LAYER + suffix: _LAYER + suffix for suffix in ("", "+gzip", "+zstd")},
    **{_FOREIGN + suffix: _FOREIGN + suffix for suffix in ("", "+gzip", "+zstd")},
    _DOCKER_LAYER: _LAYER,
    _DOCKER_LAYER + ".gzip": _LAYER + "+gzip",
    _DOCKER_LAYER + ".zstd": _LAYER + "+zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": _FOREIGN,
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": _FOREIGN + "+gzip",
}

#: The only form in which a digest may become a path (descriptor.md, registered algorithms).
DIGEST = r"^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z"
_SHA256 = r"^sha256:[0-9a-f]{64}\Z"

_DigestField = Annotated[Digest, msgspec.Meta(pattern=DIGEST)]
#: Chain IDs and the layer cache are sha256 throughout.
_DiffIdField = Annotated[DiffId, msgspec.Meta(pattern=_SHA256)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


def check_digest(text: str) -> Digest:
    """`text` as a digest. Raises ImageError."""
    if not re.match(DIGEST, text):
        raise ImageError(f"{text[:100]!r} is no sha256 or sha512 digest")
    return Digest(text)


def digest_of(data: bytes, algorithm: str = "sha256") -> Digest:
    return Digest(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")


class Platform(msgspec.Struct, frozen=True):
    architecture: str
    os: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """What a blob is, its digest, and its size in bytes. `urls` are never fetched."""

    media_type: str
    digest: _DigestField
    size: _Size
    annotations: Mapping[str, str] = {}
    platform: Platform | None = None
    urls: tuple[str, ...] = ()


class _Document(msgspec.Struct, frozen=True, dict=True):
    @property
    def raw(self) -> dict[str, Any]:
        """The JSON object as it came: copy it before changing it."""
        raw: dict[str, Any] = vars(self)["raw"]
        return raw

    @property
    def data(self) -> bytes:
        """The bytes as they came: what its digest is of."""
        data: bytes = vars(self)["data"]
        return data


class Index(_Document, frozen=True, rename="camel"):
    schema_version: Literal[2]
    manifests: tuple[Descriptor, ...] = ()
    media_type: str = ""
    annotations: Mapping[str, str] = {}


class Manifest(_Document, frozen=True, rename="camel"):
    schema_version: Literal[2]
    config: Descriptor
    layers: tuple[Descriptor, ...] = ()
    media_type: str = ""
    annotations: Mapping[str, str] = {}


class History(msgspec.Struct, frozen=True):
    """One step of an image's making; all but those with `empty_layer` made a layer."""

    created: str = ""
    created_by: str = ""
    author: str = ""
    comment: str = ""
    empty_layer: bool = False


class RootFs(msgspec.Struct, frozen=True):
    type: Literal["layers"]
    diff_ids: tuple[_DiffIdField, ...] = ()


class Execution(msgspec.Struct, frozen=True, rename="pascal"):
    """The `config` of a config: how a container of the image runs."""

    user: str = ""
    exposed_ports: Mapping[str, Any] = {}
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    volumes: Mapping[str, Any] = {}
    working_dir: str = ""
    labels: Mapping[str, str] = {}
    stop_signal: str = ""


class Config(_Document, frozen=True):
    architecture: str
    os: str
    rootfs: RootFs
    variant: str = ""
    created: str = ""
    author: str = ""
    config: Execution = Execution()
    history: tuple[History, ...] = ()

    @property
    def platform(self) -> Platform:
        return Platform(self.architecture, self.os, self.variant)

    @property
    def history_fault(self) -> str:
        """What is wrong with the history, which tells of every layer or is absent (config.md); empty where
        that is so. Only who writes a config has to mind."""
        told, layers = sum(not entry.empty_layer for entry in self.history), len(self.rootfs.diff_ids)
        if not self.history or told == layers:
            return ""
        return f"of {layers} layer{'s' if layers != 1 else ''} the history of the image tells of {told}"

    def whole_history(self) -> list[dict[str, Any]]:
        """The history for a config that is written, as JSON: one that tells of every layer. What is there
        stays; entries without a word are put behind it for layers that it does not reach, and what it tells
        beyond the last layer becomes entries without one.

        Elsewhere: docker takes an image whose history is too short and refuses one that is too long, umoci
        appends to either, buildah builds upon neither."""
        entries = copy.deepcopy(self.raw.get("history") or [])
        left = len(self.rootfs.diff_ids)
        for entry, view in zip(entries, self.history, strict=True):
            if not view.empty_layer:
                if not left:
                    entry["empty_layer"] = True
                left -= left > 0
        return [*entries, *({} for _ in range(left))]


_D = TypeVar("_D", bound=_Document)
_T = TypeVar("_T")


def parse_index(data: bytes) -> Index:
    """Raises ImageError."""
    index = _parse(data, Index, "the image index", MAX_MANIFEST)
    _check_kind(index.raw, index.media_type, INDEXES, ("config", "layers"), "the image index")
    return index


def parse_manifest(data: bytes) -> Manifest:
    """Raises ImageError, also for a manifest of something that is no image."""
    manifest = _parse(data, Manifest, "the manifest", MAX_MANIFEST)
    _check_kind(manifest.raw, manifest.media_type, MANIFESTS, ("manifests", "fsLayers"), "the manifest")
    if manifest.config.media_type not in _CONFIGS:
        raise ImageError(f"this is no image: its config is of type {manifest.config.media_type[:100]!r}")
    if len(manifest.layers) > MAX_LAYERS:
        raise ImageError(f"the image is refused: it has more than {MAX_LAYERS} layers")
    for number, layer in enumerate(manifest.layers):
        if layer.media_type not in LAYERS:
            raise ImageError(
                f"layer {number} of the image is of type {layer.media_type[:100]!r}, which is not supported"
            )
    return manifest


def parse_config(data: bytes) -> Config:
    """Raises ImageError."""
    config = _parse(data, Config, "the image config", MAX_CONFIG)
    if len(config.rootfs.diff_ids) > MAX_LAYERS:
        raise ImageError(f"the image is refused: it has more than {MAX_LAYERS} layers")
    return config


def _parse(data: bytes, form: type[_D], what: str, limit: int) -> _D:
    raw = parse_object(data, what, limit)
    document = check(raw, form, what)
    vars(document).update(raw=raw, data=data)
    return document


def check(raw: object, form: type[_T], what: str) -> _T:
    """`raw` as a `form`, a null like no value. Raises ImageError."""
    try:
        return msgspec.convert(_without_nulls(raw), form)
    except msgspec.ValidationError as error:
        raise ImageError(f"{what} is malformed: {error}") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value


def _check_kind(
    raw: dict[str, Any], media_type: str, allowed: frozenset[str], foreign: tuple[str, ...], what: str
) -> None:
    """A document that could be read as an index and as a manifest is neither (CVE-2021-41190)."""
    if media_type and media_type not in allowed:
        raise ImageError(f"{what} says of itself that it is {media_type[:100]!r}")
    if any(raw.get(key) is not None for key in foreign):
        raise ImageError(f"{what} is refused: it could be read as an index and as a manifest")


def chain_ids(diff_ids: Iterable[DiffId]) -> tuple[str, ...]:
    """The ChainID of every layer, lowest first (config.md, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else str(diff_id))
    return tuple(chain)


class OpenLayer:
    """A layer being read: a context manager that closes it. Nothing made of `source` may be published before
    `verify` has returned."""

    def __init__(self, fd: int, size: int, digest: Digest | None, diff_id: DiffId) -> None:
        """Takes over `fd`, which stands at the first of the layer's `size` bytes. `digest` is of these bytes;
        None where nobody told it. Raises TarError for a compression that layers may not have."""
        self._fd = fd
        self._start = os.lseek(fd, 0, os.SEEK_CUR)
        self._size = size
        self._digest = digest
        self._diff_id = diff_id
        try:
            self.source = LayerSource(fd, size=size, digests=True)
        except BaseException:
            os.close(fd)
            raise

    @property
    def place(self) -> tuple[int, int]:
        """The descriptor that it is read from, and where in that its first byte is."""
        return self._fd, self._start

    def __enter__(self) -> OpenLayer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.close()
        os.close(self._fd)

    def verify(self) -> None:
        """Reads what is left. Raises ImageError unless the bytes are those of the digest, and the tar in them
        is that of the DiffID; TarError where they cannot be decompressed."""
        self.source.drain()
        if self._digest is not None and (found := self._raw_digest(self._digest)) != self._digest:
            raise ImageError(f"blob {self._digest} is damaged: its bytes are {found}")
        if self.source.diff_id() != self._diff_id:
            raise ImageError(
                f"a layer does not match its image: its DiffID is {self.source.diff_id()}, "
                f"the config says {self._diff_id}"
            )

    def _raw_digest(self, wanted: Digest) -> str:
        if wanted.startswith("sha256:"):
            return self.source.raw_digest()
        # sha512 is as rare as it is legal: a second reading will do
        found = hashlib.sha512()
        at, end = self._start, self._start + self._size
        while at < end and (data := os.pread(self._fd, min(_CHUNK, end - at), at)):
            found.update(data)
            at += len(data)
        return "sha512:" + found.hexdigest()


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """One layer and where its bytes are. `descriptor` is None in a docker archive, which tells DiffIDs alone.

    `open_raw` gives a new descriptor that stands at the first of the layer's `size` bytes, as they are
    stored; nothing of them is verified."""

    diff_id: DiffId
    chain_id: str
    descriptor: Descriptor | None
    size: int
    open_raw: Callable[[], int]

    def open(self) -> OpenLayer:
        """Raises ImageError, TarError, OSError."""
        digest = self.descriptor.digest if self.descriptor is not None else None
        return OpenLayer(self.open_raw(), self.size, digest, self.diff_id)


@dataclass(frozen=True, slots=True)
class Image:
    """An image, its documents read and verified; of its layers nothing but the number is checked.

    `reference` is what the user said; `name` a tag of the image, where it has one. `manifest` and
    `descriptor` (the manifest's) are None in a docker archive. `config_digest` is the image ID. `layers` are
    lowest first."""

    reference: str
    name: str
    descriptor: Descriptor | None
    manifest: Manifest | None
    config: Config
    config_digest: Digest
    layers: tuple[ImageLayer, ...]
