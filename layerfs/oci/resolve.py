"""From an index to one image: by tag or digest, then by platform. Knows stores of blobs by what they can do,
not where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

from layerfs.errors import ImageError
from layerfs.ids import Digest
from layerfs.oci.image import (
    INDEXES,
    MANIFESTS,
    MAX_CONFIG,
    MAX_MANIFEST,
    Descriptor,
    Image,
    ImageLayer,
    Index,
    Platform,
    chain_ids,
    parse_config,
    parse_index,
    parse_manifest,
)
from layerfs.oci.platforms import rank, this_machine

#: image-spec annotations.md: the name of an image inside a layout.
REF_NAME = "org.opencontainers.image.ref.name"
DEFAULT_TAG = "latest"
#: Indexes inside indexes: two are in use. Both limits also end what never would.
_MAX_DEPTH = 4
_MAX_INDEXES = 64
_MAX_SHOWN = 20


class Store(Protocol):
    """Blobs by descriptor, verified as `layout.Layout` says."""

    def index(self) -> Index: ...

    def read_blob(self, descriptor: Descriptor, limit: int) -> bytes: ...

    def open_blob(self, descriptor: Descriptor) -> int: ...


def find(store: Store, wanted: str | Digest | None) -> Descriptor:
    """The manifest of the image that `wanted` names: a tag, a digest, or None for `latest` or the only image
    there is. Of several platforms the one that suits this machine is taken. Raises ImageError."""
    manifests = store.index().manifests
    if is_digest(wanted):
        found = next((each for each in _Walk(store).all(manifests) if each.digest == wanted), None)
        if found is None:
            raise ImageError(f"there is no image {wanted}{_there_is(manifests)}")
        return _choose(store, [found])
    tag = DEFAULT_TAG if wanted is None else wanted
    named = [each for each in manifests if each.annotations.get(REF_NAME) == tag]
    if not named and wanted is None:
        if len({each.annotations.get(REF_NAME) for each in manifests}) > 1:
            raise ImageError(f"which image is meant{_there_is(manifests)}")
        named = list(manifests)
    if not named:
        raise ImageError(f"there is no image {tag!r}{_there_is(manifests)}")
    return _choose(store, named)


def is_digest(wanted: str | Digest | None) -> bool:
    return wanted is not None and wanted.startswith(("sha256:", "sha512:"))


def load(store: Store, descriptor: Descriptor, wanted: str | Digest | None, reference: str) -> Image:
    """The image whose manifest is `descriptor`, as `find` found it for `wanted`. Raises ImageError."""
    manifest = parse_manifest(store.read_blob(descriptor, MAX_MANIFEST))
    config = parse_config(store.read_blob(manifest.config, MAX_CONFIG))
    diff_ids = config.rootfs.diff_ids
    if len(manifest.layers) != len(diff_ids):
        raise ImageError(
            f"the image is wrong: its manifest has {len(manifest.layers)} layers, its config {len(diff_ids)}"
        )
    layers = tuple(
        ImageLayer(diff_id, chain_id, blob, blob.size, partial(store.open_blob, blob))
        for blob, diff_id, chain_id in zip(manifest.layers, diff_ids, chain_ids(diff_ids), strict=True)
    )
    # the tag may belong to an index around the manifest
    name = descriptor.annotations.get(REF_NAME) or ("" if is_digest(wanted) else wanted or "")
    return Image(reference, name, descriptor, manifest, config, manifest.config.digest, layers)


class _Walk:
    """Walks nested indexes, each once, within the limits."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: set[Digest] = set()

    def all(self, descriptors: Sequence[Descriptor], depth: int = 0) -> Iterator[Descriptor]:
        """Every manifest and index, outer before inner."""
        for each in descriptors:
            if each.media_type in MANIFESTS:
                yield each
            elif each.media_type in INDEXES and each.digest not in self._seen:
                if depth >= _MAX_DEPTH or len(self._seen) >= _MAX_INDEXES:
                    raise ImageError("the image is refused: its indexes are nested too deeply, or too many")
                self._seen.add(each.digest)
                yield each
                inner = parse_index(self._store.read_blob(each, MAX_MANIFEST))
                yield from self.all(inner.manifests, depth + 1)


def _choose(store: Store, named: list[Descriptor]) -> Descriptor:
    if len(named) == 1 and named[0].media_type in MANIFESTS:
        return named[0]  # whatever it is for: it was asked for, and there is no choice
    manifests = [each for each in _Walk(store).all(named) if each.media_type in MANIFESTS]
    if not manifests:
        raise ImageError("this is no image: it has no manifest")
    here = this_machine()
    best: tuple[int, Descriptor] | None = None
    offered = []
    for each in manifests:
        platform = each.platform or _platform_of(store, each)
        offered.append(str(platform))
        fit = rank(platform, here)
        if fit is not None and (best is None or fit < best[0]):
            best = (fit, each)
    if best is None:
        raise ImageError(f"there is no image for {here}, only for {listed(offered)}: name one by its digest")
    return best[1]


def _platform_of(store: Store, descriptor: Descriptor) -> Platform:
    manifest = parse_manifest(store.read_blob(descriptor, MAX_MANIFEST))
    return parse_config(store.read_blob(manifest.config, MAX_CONFIG)).platform


def _there_is(manifests: Sequence[Descriptor]) -> str:
    if not manifests:
        return ": there are none"
    return f"; there is {listed([each.annotations.get(REF_NAME) or each.digest for each in manifests])}"


def listed(names: list[str]) -> str:
    """`names` for a message, sorted; many are cut short."""
    names = sorted({name if name.isprintable() else repr(name) for name in names})
    more = len(names) - _MAX_SHOWN
    return ", ".join(name[:100] for name in names[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
