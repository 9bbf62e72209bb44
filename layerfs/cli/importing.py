"""`layerfs import`: a flat tar as an image of one layer. The work is `layerfs.oci.importing`'s and
`layerfs.oci.append`'s."""

from __future__ import annotations

import json
import os
import shlex
import sys

import click

from layerfs.cli import talk
from layerfs.cli.image_options import Target, image_as_json, image_lines
from layerfs.cli.layer_output import layer_as_json, layer_lines, packing
from layerfs.cli.progress import bar
from layerfs.errors import LayerError, UsageError
from layerfs.oci.append import ImageOptions, append_layer
from layerfs.oci.importing import Imported, import_tar
from layerfs.oci.join import CountedSource
from layerfs.oci.layout import check_tag
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
@click.option("-m", "--message", metavar="TEXT", default="", help="For the image's history.")
@click.option("-a", "--author", metavar="TEXT", default="", help="For the image and its history.")
@click.option(
    "-c",
    "--change",
    "changes",
    multiple=True,
    metavar="INSTRUCTION",
    help="How containers of the image run, by an instruction of a Dockerfile: CMD, ENTRYPOINT, ENV, EXPOSE,"
    " LABEL, STOPSIGNAL, USER, VOLUME or WORKDIR. May be repeated.",
)
@packing
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object; no progress bar.")
@click.argument("archive", metavar="FILE.tar|-")
def command(
    archive: str,
    layout: str,
    message: str,
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
    check_tag(tag)
    shown = "standard input" if archive == "-" else display(os.fsencode(archive))
    created_by = " ".join((_PROGRAM, *(f"--change {shlex.quote(each)}" for each in changes)))
    options = ImageOptions(created_by, message, author, changes)
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
