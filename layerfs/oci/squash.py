"""Joins the top layers of an image, or all of them, into one. What they are together is `join`'s, the
documents are `append`'s: the joined layer goes upon the image without those layers.

History: the entries of the joined layers stay, as entries without a layer, and one for the joined layer comes
behind them. So it still tells how the image was made, and entries with a layer are as many as layers
(config.md). docker build --squash did the same.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace

from layerfs.errors import ImageError, UsageError
from layerfs.oci.append import Appended, ImageOptions, append_layer
from layerfs.oci.image import MANIFESTS, MAX_MANIFEST, Descriptor, Image, parse_config, parse_manifest
from layerfs.oci.join import Joined, join_layers
from layerfs.oci.layout import Layout
from layerfs.oci.progress import Progress
from layerfs.oci.streams import LayerSink, Written
from layerfs.oci.strict_json import encode

_BASE_DIGEST = "org.opencontainers.image.base.digest"
_BASE_NAME = "org.opencontainers.image.base.name"


def squash(
    path: str,
    tag: str,
    image: Image,
    first: int,
    options: ImageOptions,
    sink: Callable[[int], LayerSink],
    progress: Progress | None = None,
) -> tuple[Appended, Joined, Written]:
    """Makes `tag` of the layout at `path` (made when there is none) the image in which the layers of `image`
    from number `first` (0: the lowest) on are one. `sink` packs what is written to a descriptor.

    Raises UsageError for wrong options, LayerError (TarError, ImageError) for layers that are damaged or
    cannot be joined, and where the layout cannot be written."""
    if not 0 <= first < len(image.layers):
        raise UsageError(f"the image has {len(image.layers)} layers")
    below, top = image.layers[:first], image.layers[first:]
    told: list[tuple[Joined, Written]] = []

    def write(fd: int) -> Written:
        with sink(fd) as out:
            joined = join_layers(top, out, whole=not below, below=below, progress=progress)
            written = out.finish()
        told.append((joined, written))
        return written

    appended = append_layer(path, tag, _without_layers(path, image, first), options, write)
    ((joined, written),) = told
    return appended, joined, written


def _without_layers(path: str, image: Image, first: int) -> Image:
    """The image without its layers from number `first` on, which only the history still tells of."""
    config = copy.deepcopy(image.config.raw)
    config["rootfs"]["diff_ids"] = list(image.config.rootfs.diff_ids[:first])
    if image.config.history:
        config["history"] = image.config.whole_history()
        layers = [entry for entry in config["history"] if not entry.get("empty_layer")]
        for entry in layers[first:]:
            entry["empty_layer"] = True
    manifest = image.manifest
    if manifest is not None:
        raw = copy.deepcopy(manifest.raw)
        raw["layers"] = (raw.get("layers") or [])[:first]
        manifest = parse_manifest(encode(raw))
    base = _base(path, image, first)
    return replace(
        image,
        name=manifest.annotations.get(_BASE_NAME, "") if manifest is not None and base is not None else "",
        descriptor=base,
        manifest=manifest,
        config=parse_config(encode(config)),
        layers=image.layers[:first],
    )


def _base(path: str, image: Image, first: int) -> Descriptor | None:
    """The image that the annotations call the base, if it still is one: the layers that stay begin with its
    layers. None where the layout at `path` does not show it."""
    digest = image.manifest.annotations.get(_BASE_DIGEST) if image.manifest is not None else None
    if digest is None or not os.path.exists(path):
        return None
    try:
        layout = Layout.open(path)
        for each in layout.index().manifests:
            if each.digest == digest and each.media_type in MANIFESTS:
                layers = parse_manifest(layout.read_blob(each, MAX_MANIFEST)).layers
                kept = [layer.descriptor.digest for layer in image.layers[:first] if layer.descriptor]
                if layers and [layer.digest for layer in layers] == kept[: len(layers)]:
                    return each
    except ImageError:
        pass  # an annotation is all that hangs on it: whoever writes there will say what is wrong
    return None
