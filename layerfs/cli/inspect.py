"""`layerfs inspect`: what an image is, from its documents. Reads no layer."""

from __future__ import annotations

import json
from collections.abc import Iterable

import click

from layerfs.cli import talk
from layerfs.oci.image import Image
from layerfs.oci.member import display
from layerfs.oci.references import open_image

_WIDTH = 12


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--json", "as_json", is_flag=True, help="Everything as one JSON object, the documents as they are."
)
@click.argument("image", metavar="IMAGE")
def command(image: str, as_json: bool) -> int:
    """Show what IMAGE is: DIR:TAG or DIR@sha256:... in an OCI image layout, or FILE.tar[:REPO:TAG] as docker
    save writes it.

    The documents are verified against their digests. The layers are not read.
    """
    found = open_image(image)
    print(json.dumps(_as_json(found)) if as_json else "\n".join(_lines(found)))
    if found.config.history_fault:
        talk.note("layerfs inspect", found.config.history_fault)
    return 0


def _as_json(image: Image) -> dict[str, object]:
    return {
        "reference": image.reference,
        "name": image.name,
        "id": image.config_digest,
        "digest": image.descriptor.digest if image.descriptor is not None else None,
        "layers": [
            {
                "diff_id": layer.diff_id,
                "chain_id": layer.chain_id,
                "digest": layer.descriptor.digest if layer.descriptor is not None else None,
                "media_type": layer.descriptor.media_type if layer.descriptor is not None else None,
                "size": layer.size,
            }
            for layer in image.layers
        ],
        "manifest": image.manifest.raw if image.manifest is not None else None,
        "config": image.config.raw,
    }


def _lines(image: Image) -> Iterable[str]:
    config, run = image.config, image.config.config
    yield from _field("Name", image.name)
    yield from _field("Image ID", image.config_digest)
    if image.descriptor is not None:
        yield from _field("Manifest", image.descriptor.digest)
    yield from _field("Platform", str(config.platform))
    yield from _field("Created", config.created)
    yield from _field("Author", config.author)
    yield from _field("Entrypoint", _command(run.entrypoint))
    yield from _field("Cmd", _command(run.cmd))
    yield from _field("User", run.user)
    yield from _field("WorkingDir", run.working_dir)
    yield from _field("StopSignal", run.stop_signal)
    yield from _field("Env", *run.env)
    yield from _field("Ports", " ".join(run.exposed_ports))
    yield from _field("Volumes", *run.volumes)
    yield from _field("Labels", *(f"{name}={value}" for name, value in sorted(run.labels.items())))
    if image.manifest is not None:
        notes = sorted(image.manifest.annotations.items())
        yield from _field("Annotations", *(f"{name}={value}" for name, value in notes))
    total = sum(layer.size for layer in image.layers)
    yield from _field("Layers", f"{len(image.layers)}, {total:,} bytes as stored; the lowest first")
    for layer in image.layers:
        yield f"{'':{_WIDTH}}{layer.diff_id}  {layer.size:>14,}"


def _field(name: str, *values: str) -> Iterable[str]:
    """One line a value; empty ones are left out. Values are a stranger's, and may hold anything."""
    for value in filter(None, values):
        yield f"{name:{_WIDTH}}{display(value.encode())}"
        name = ""


def _command(words: tuple[str, ...]) -> str:
    return json.dumps(words, ensure_ascii=False) if words else ""
