"""`layerfs apply`: applies layer tarballs to a directory. The work, and the distrust, are
`layerfs.oci.apply`'s."""

from __future__ import annotations

import os
import sys

import click

from layerfs.cli import progress, talk
from layerfs.errors import LayerError, TarError, UsageError
from layerfs.oci.apply import apply_layer
from layerfs.oci.member import display

_PROGRAM = "layerfs apply"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("layers", nargs=-1, required=True, metavar="LAYER...")
@click.argument("directory", metavar="DIR")
def command(layers: tuple[str, ...], directory: str) -> int:
    """Apply layer tarballs (plain, gzip or zstd) to DIR, the lowest layer first; '-' is stdin.

    A damaged or hostile layer is refused, from a file before anything was changed. What a layer may not have
    (overlay's own attributes, character devices 0/0) and what an ordinary user may not make (devices, other
    owners) is left out with a note.
    """
    if not os.path.isdir(directory):
        raise UsageError(f"{display(os.fsencode(directory))}: no such directory")
    for layer in layers:
        shown = "standard input" if layer == "-" else display(os.fsencode(layer))
        fd = sys.stdin.fileno() if layer == "-" else _open(layer, shown)
        try:
            with progress.bar(f"applying {shown}") as bar:
                applied = apply_layer(fd, directory, bar)
        except TarError as error:
            raise TarError(f"{shown}: {error}", error.errno) from None
        except LayerError as error:
            raise LayerError(f"{shown}: {error}", error.errno) from None
        finally:
            if layer != "-":
                os.close(fd)
        for note in applied.notes:
            talk.note(_PROGRAM, f"{shown}: {note}")
        talk.note(_PROGRAM, f"{shown}: {applied.members} entries applied, {applied.removed} removed")
    return 0


def _open(layer: str, shown: str) -> int:
    try:
        return os.open(layer, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{shown}: {error.strerror}") from None
