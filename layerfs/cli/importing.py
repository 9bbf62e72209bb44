"""`layerfs import`: a flat tar as an image of one layer. The work is `layerfs.oci.importing`'s and
`layerfs.oci.append`'s."""

from __future__ import annotations

import json
import os
import sys

import click

from layerfs.cli import talk
from layerfs.cli.image_options import (
    Target,
    author_option,
    change_option,
    image_as_json,
    image_lines,
    made_by,
    message_option,
)
from layerfs.cli.layer_output import layer_as_json, layer_lines, packing
from layerfs.cli.progress import bar
from layerfs.errors import LayerError, UsageError
from layerfs.oci.append import ImageOptions, append_layer
from layerfs.oci.importing import Imported, import_tar
from layerfs.oci.join import CountedSource
from layerfs.oci.member import display
from layerfs.oci.references import split_new_reference
from layerfs.oci.streams import LayerSink, LayerSource, Written

_PROGRAM = "layerfs import"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--layout",
    metavar="DIR[:TAG]",
    required=True,
    help="Where the image goes: an OCI image layout, which is made when it is not there."
    " [default of TAG: latest]",
)
@message_option
@author_option
@change_option
@packing
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object; no progress bar.")
@click.argument("archive", metavar="FILE.tar|-")
def command(
    archive: str,
    layout: str,
    message: str | None,
    author: str,
    changes: tuple[str, ...],
    compression: str,
    level: int | None,
    as_json: bool,
) -> int:
    """Make an image of one layer of a flat tar: what `layerfs export`, `docker export` or tar make of a root.
    '-' is stdin. The tar may be compressed (gzip, zstd).

    Every member is checked and written anew, in the order of the archive, so owners, devices and attributes
    need no privilege. Refused: what no layer can hold (a path twice, GNU sparse files), what leads outside,
    and whiteouts, as they make a layer. Dropped with a note: overlay's own attributes, character devices 0/0.
    """
    path, tag = split_new_reference(layout)
    shown = "standard input" if archive == "-" else display(os.fsencode(archive))
    options = ImageOptions(made_by(_PROGRAM, changes), message or "", author, changes)
    told: list[tuple[Imported, Written]] = []
    with bar("import", quiet=as_json) as progress:
        with _open(archive, shown) as source:

            def write(fd: int) -> Written:
                with LayerSink(fd, compression, level) as sink:
                    try:
                        imported = import_tar(CountedSource(source), sink, progress)
                    except LayerError as error:
                        raise type(error)(f"{shown}: {error}", error.errno) from None
                    written = sink.finish()
                told.append((imported, written))
                return written

            made = append_layer(path, tag, None, options, write)
    ((imported, written),) = told
    for note in imported.notes:
        talk.note(_PROGRAM, f"{shown}: {note}")
    target = Target(path, tag, None, options)
    if as_json:
        summary = {"members": imported.members, "notes": list(imported.notes)}
        print(json.dumps(layer_as_json(written) | summary | image_as_json(target, made)))
    else:
        lines = [*layer_lines(written), f"Members  {imported.members}", *image_lines(target, made)]
        print("\n".join(lines))
    return 0


def _open(archive: str, shown: str) -> LayerSource:
    try:
        if archive == "-":
            return LayerSource(sys.stdin.fileno())
        with open(archive, "rb", buffering=0) as file:
            return LayerSource(file.fileno())
    except OSError as error:
        raise UsageError(f"{shown}: {error.strerror}") from None
    except LayerError as error:
        raise type(error)(f"{shown}: {error}", error.errno) from None
