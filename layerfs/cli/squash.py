"""`layerfs squash`: joins layers into one, in an image or as tarballs. The work is `layerfs.oci.squash`'s and
`layerfs.oci.join`'s."""

from __future__ import annotations

import json
from functools import partial

import click

from layerfs.cli import talk
from layerfs.cli.image_options import (
    Target,
    author_option,
    image_as_json,
    image_lines,
    message_option,
    tell_completed,
)
from layerfs.cli.layer_output import LayerOutput, layer_as_json, layer_lines, layer_output
from layerfs.cli.progress import bar
from layerfs.errors import UsageError
from layerfs.oci.append import ImageOptions
from layerfs.oci.image import Image
from layerfs.oci.join import Joined, TarFile, join_layers
from layerfs.oci.references import open_image, split_new_reference
from layerfs.oci.squash import squash
from layerfs.oci.streams import LayerSink, Written

_PROGRAM = "layerfs squash"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--layout",
    metavar="DIR[:TAG]",
    help="Where the new image goes: an OCI image layout, which is made when it is not there."
    " [default of TAG: latest]",
)
@click.option("--from", "first", type=int, metavar="N", help="Join the layers from N on; 1 is the lowest.")
@click.option("--last", type=int, metavar="N", help="Join the N top layers. [default: all layers]")
@message_option
@author_option
@click.option(
    "--whole",
    is_flag=True,
    help="With tarballs: nothing lies below them, so no whiteouts are needed. [default: whiteouts are kept]",
)
@layer_output
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object; no progress bar.")
@click.argument("sources", nargs=-1, required=True, metavar="IMAGE | LAYER...")
def command(
    sources: tuple[str, ...],
    layout: str | None,
    first: int | None,
    last: int | None,
    message: str | None,
    author: str,
    whole: bool,
    output: LayerOutput,
    as_json: bool,
) -> int:
    """Join the layers of IMAGE, or the top ones, into one, and write the new image to --layout; or join layer
    tarballs, the lowest first, and write the one layer to -o FILE or to stdout.

    IMAGE is DIR:TAG, DIR@sha256:..., or FILE.tar[:REPO:TAG] as docker save writes it. Nothing is unpacked and
    no privilege is needed. The tree stays the same; what the upper layers hide is gone for good, unless it
    lies in a layer that is not joined. Config and history are kept: entries of joined layers become entries
    without a layer, and one for the new layer follows.

    Files of compressed layers are kept in $TMPDIR or /var/tmp meanwhile.
    """
    if layout is None:
        if first is not None or last is not None or message is not None or author:
            raise UsageError("--from, --last, --message and --author are for an image and need --layout")
        return _join_tarballs(sources, whole, output, as_json)
    if output.path is not None or whole:
        raise UsageError("--output and --whole are for tarballs; --layout takes an image")
    if len(sources) != 1:
        raise UsageError("with --layout give one IMAGE")
    path, tag = split_new_reference(layout)
    image = open_image(sources[0])
    begin = _begin(image, first, last)
    count = len(image.layers) - begin
    message = f"{_counted(count)} joined" if message is None else message
    options = ImageOptions(_created_by(first, last), message, author)
    sink = partial(LayerSink, compression=output.compression, level=output.level)
    with bar("squash", quiet=as_json) as progress:
        made, joined, written = squash(path, tag, image, begin, options, sink, progress)
    _tell(joined)
    tell_completed(_PROGRAM, image)
    target = Target(path, tag, image, options)
    if as_json:
        print(json.dumps(_as_json(joined, written, count) | image_as_json(target, made)))
    else:
        print("\n".join([*_lines(joined, written, count), *image_lines(target, made)]))
    return 0


def _join_tarballs(sources: tuple[str, ...], whole: bool, output: LayerOutput, as_json: bool) -> int:
    layers = [TarFile("/dev/stdin" if source == "-" else source) for source in sources]
    with output.open() as fd, bar("squash", quiet=as_json) as progress, output.sink(fd) as sink:
        joined = join_layers(layers, sink, whole=whole, progress=progress)
        written = sink.finish()
    _tell(joined)
    told = joined, written, len(sources)
    output.say(json.dumps(_as_json(*told)) if as_json else "\n".join(_lines(*told)))
    return 0


def _begin(image: Image, first: int | None, last: int | None) -> int:
    """Number of the lowest layer to be joined, counted from 0."""
    count = len(image.layers)
    if first is not None and last is not None:
        raise UsageError("give either --from or --last, not both")
    if not count:
        raise UsageError("the image has no layers: there is nothing to join")
    for option, value in (("--from", first), ("--last", last)):
        if value is not None and not 1 <= value <= count:
            raise UsageError(f"{option} {value}: the image has {count} layers")
    if last is not None:
        return count - last
    return first - 1 if first is not None else 0


def _created_by(first: int | None, last: int | None) -> str:
    if first is not None:
        return f"{_PROGRAM} --from {first}"
    return f"{_PROGRAM} --last {last}" if last is not None else _PROGRAM


def _counted(layers: int) -> str:
    return "1 layer" if layers == 1 else f"{layers} layers"


def _tell(joined: Joined) -> None:
    for note in joined.notes:
        talk.note(_PROGRAM, note)


def _lines(joined: Joined, written: Written, count: int) -> list[str]:
    return [*layer_lines(written), f"Joined   {_counted(count)}, {joined.members} members"]


def _as_json(joined: Joined, written: Written, count: int) -> dict[str, object]:
    return layer_as_json(written) | {"joined": count, "members": joined.members, "notes": list(joined.notes)}
