"""An image and one more layer: new documents in a layout. Where the layer comes from is the caller's.

What is kept of the base: its config with every field, unknown ones too, its layers byte for byte (docker's
media types become those of OCI), the annotations of its manifest. What is not: `subject` (it says what the
base's manifest was attached to) and docker's `container` and `container_config` (they describe the last
container of the base's making).

Order of writes: layers, config, manifest, index.json. A crash before the last leaves blobs that nobody names.

Source: image-spec config.md, annotations.md ("org.opencontainers.image.base.*"), conversion from docker:
media-types.md, "Compatibility Matrix".
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from layerfs.errors import ImageError, LayerError, UsageError
from layerfs.ids import DiffId, Digest
from layerfs.oci.config_changes import apply_changes
from layerfs.oci.image import (
    CONFIG,
    LAYERS,
    MANIFEST,
    MAX_LAYERS,
    Descriptor,
    Image,
    ImageLayer,
    parse_config,
    parse_manifest,
)
from layerfs.oci.layout import Layout, check_tag
from layerfs.oci.member import display, made_up_time
from layerfs.oci.platforms import this_machine
from layerfs.oci.streams import MEDIA_TYPES, Written
from layerfs.oci.strict_json import encode

_BASE_DIGEST = "org.opencontainers.image.base.digest"
_BASE_NAME = "org.opencontainers.image.base.name"
_CREATED = "org.opencontainers.image.created"


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What the history and the config of a new image say. `changes` are `config_changes`'s."""

    created_by: str
    message: str = ""
    author: str = ""
    changes: tuple[str, ...] = ()

    def is_plain(self) -> bool:
        """Whether nothing is to be said beyond the layer itself."""
        return not (self.message or self.author or self.changes)


@dataclass(frozen=True, slots=True)
class Appended:
    """The image that was written: its manifest and its ID. `added`: it has the new layer. `same`: nothing was
    new, so it is the base."""

    manifest: Descriptor
    image_id: Digest
    layers: int
    added: bool = False
    same: bool = False


def append_layer(
    path: str,
    tag: str,
    base: Image | None,
    options: ImageOptions,
    write: Callable[[int], Written | None],
) -> Appended:
    """Makes `tag` of the layout at `path` (made when there is none) the image `base` (None: nothing) with one
    more layer, which `write` writes to the descriptor that it is given. When it returns None nothing has
    changed: then a history entry tells of `options`, and without any of them the tag is the base's image as
    it is. An image from nothing has a layer, be it empty, because many tools take no image without.

    Raises UsageError for wrong options, before anything is written; ImageError for a base that is damaged;
    LayerError where the layout cannot be written; what `write` raises."""
    check_tag(tag)
    draft = _Draft(base, options)
    try:
        with _naming(path):
            layout = Layout.create(path)
        with _naming(base.reference if base is not None else path):
            layers = [_layer_in(layout, layer) for layer in (base.layers if base is not None else ())]
        with layout.new_blob() as blob:
            written = write(blob.fd)
            if written is not None:
                blob.commit(written.digest, written.size)
        entries = _entries(base, layers)
        with _naming(path):
            if written is not None:
                new = {"mediaType": written.media_type, "digest": written.digest, "size": written.size}
                entries.append(new)
            elif base is not None and options.is_plain():
                return _tag_base(layout, tag, base, entries)
            config = draft.config(written.diff_id if written is not None else None)
            made = _publish(layout, tag, config, draft.manifest(entries))
            return replace(made, added=written is not None)
    except OSError as error:
        shown = display(os.fsencode(path))
        raise LayerError(f"{shown}: cannot be written: {error.strerror}", error.errno) from error


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Errors of stores do not say which one."""
    try:
        yield
    except LayerError as error:
        raise type(error)(f"{display(os.fsencode(path))}: {error}", error.errno) from None


class _Draft:
    """The documents of the new image, apart from the layers."""

    def __init__(self, base: Image | None, options: ImageOptions) -> None:
        self._base = base
        self._options = options
        self._created = _created()
        if base is not None:
            if len(base.layers) >= MAX_LAYERS:
                raise ImageError(f"the image has {MAX_LAYERS} layers already: squash it first")
            self._config: dict[str, Any] = copy.deepcopy(base.config.raw)
            for stale in ("container", "container_config"):
                self._config.pop(stale, None)
        else:
            here = this_machine()
            self._config = {"architecture": here.architecture, "os": here.os}
            if here.variant:
                self._config["variant"] = here.variant
        self._config["created"] = self._created
        if options.author:
            self._config["author"] = options.author
        self._config["config"] = apply_changes(self._config.get("config") or {}, options.changes)
        try:
            encode((options.created_by, options.message, options.author))
        except UnicodeEncodeError:
            raise UsageError("the message, the author or the command is not UTF-8") from None

    def config(self, diff_id: DiffId | None) -> dict[str, Any]:
        """The config with the new layer, or with none."""
        rootfs = self._config.setdefault("rootfs", {"type": "layers"})
        diff_ids = list(rootfs.get("diff_ids") or ())
        history = self._base.config.whole_history() if self._base is not None else []
        options = self._options
        entry: dict[str, Any] = {"created": self._created, "created_by": options.created_by}
        if options.author:
            entry["author"] = options.author
        if options.message:
            entry["comment"] = options.message
        if diff_id is None:
            entry["empty_layer"] = True
        else:
            diff_ids.append(diff_id)
        rootfs["diff_ids"] = diff_ids
        self._config["history"] = [*history, entry]
        return self._config

    def manifest(self, layers: list[dict[str, Any]]) -> dict[str, Any]:
        """The manifest, but for its config."""
        manifest: dict[str, Any] = {"schemaVersion": 2, "mediaType": MANIFEST}
        annotations: dict[str, str] = {}
        if self._base is not None:
            if self._base.manifest is not None:
                manifest.update(copy.deepcopy(self._base.manifest.raw))
                manifest.pop("subject", None)
                annotations.update(self._base.manifest.annotations)
            for key in (_BASE_DIGEST, _BASE_NAME):
                annotations.pop(key, None)
            if self._base.descriptor is not None:
                annotations[_BASE_DIGEST] = self._base.descriptor.digest
            if self._base.name:
                annotations[_BASE_NAME] = self._base.name
            if _CREATED in annotations:
                annotations[_CREATED] = self._created
        manifest.update(mediaType=MANIFEST, layers=layers)
        manifest.pop("annotations", None)
        if annotations:
            manifest["annotations"] = annotations
        return manifest


def _publish(layout: Layout, tag: str, config: dict[str, Any], manifest: dict[str, Any]) -> Appended:
    """Writes the documents, checked as if they were a stranger's."""
    config_data = encode(config)
    parse_config(config_data)
    return _publish_documents(layout, tag, config_data, manifest)


def _publish_documents(layout: Layout, tag: str, config: bytes, manifest: dict[str, Any]) -> Appended:
    stored = layout.put(config, CONFIG)
    manifest["config"] = _entry(stored)
    data = encode(manifest)
    parse_manifest(data)
    descriptor = layout.put(data, MANIFEST)
    layout.tag(tag, descriptor)
    return Appended(descriptor, stored.digest, len(manifest["layers"]))


def _tag_base(layout: Layout, tag: str, base: Image, entries: list[dict[str, Any]]) -> Appended:
    """The base itself under the new tag; one with docker's media types gets OCI documents around the same
    config."""
    manifest = base.manifest
    if manifest is not None and base.descriptor is not None and base.descriptor.media_type == MANIFEST:
        layout.put(base.config.data, manifest.config.media_type)
        descriptor = layout.put(manifest.data, MANIFEST)
        layout.tag(tag, descriptor)
        return Appended(descriptor, base.config_digest, len(entries), same=True)
    raw: dict[str, Any] = {"schemaVersion": 2} if manifest is None else copy.deepcopy(manifest.raw)
    raw.update(mediaType=MANIFEST, layers=entries)
    made = _publish_documents(layout, tag, base.config.data, raw)
    return replace(made, same=True)


def _layer_in(layout: Layout, layer: ImageLayer) -> Descriptor:
    """A layer of the base as a blob of `layout`: copied and verified when it is not there yet."""
    descriptor = layer.descriptor
    if descriptor is None:
        with layer.open() as opened:
            opened.verify()
            media_type = MEDIA_TYPES[opened.source.compression]
            descriptor = Descriptor(media_type, opened.source.raw_digest(), layer.size)
    if not layout.has_blob(descriptor):
        source = layer.open_raw()
        try:
            layout.copy_blob(source, descriptor)
        finally:
            os.close(source)
    return descriptor


def _entries(base: Image | None, layers: list[Descriptor]) -> list[dict[str, Any]]:
    """The layers as a manifest lists them, in OCI's media types."""
    if base is None or base.manifest is None:
        return [_entry(layer) for layer in layers]
    told = base.manifest.raw["layers"] if layers else []
    return [
        {**entry, "mediaType": LAYERS[layer.media_type]} for entry, layer in zip(told, layers, strict=True)
    ]


def _entry(descriptor: Descriptor) -> dict[str, Any]:
    return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}


def _created() -> str:
    """Now, or SOURCE_DATE_EPOCH, as RFC 3339 has it."""
    seconds = made_up_time() if os.environ.get("SOURCE_DATE_EPOCH") else int(time.time())
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"SOURCE_DATE_EPOCH={seconds} is later than a date can be") from None
