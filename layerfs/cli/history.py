"""`layerfs history`: how an image was made, step by step. Reads no layer."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Iterable, Iterator

import click

from layerfs.cli import talk
from layerfs.oci.image import History, Image, ImageLayer
from layerfs.oci.member import display
from layerfs.oci.references import open_image


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="One JSON array, the newest step first.")
@click.argument("image", metavar="IMAGE")
def command(image: str, as_json: bool) -> int:
    """Show the history of IMAGE, the newest step first; IMAGE as for `layerfs inspect`.

    SIZE is that of the layer as it is stored, often compressed; '-': the step made no layer. On a terminal
    long commands are cut, elsewhere they are whole.
    """
    found = open_image(image)
    steps = list(_steps(found))[::-1]
    if as_json:
        print(json.dumps([_as_json(step, layer) for step, layer in steps]))
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(_table(steps, width)))
    if found.config.history_fault:
        talk.note("layerfs history", found.config.history_fault)
    return 0


def _steps(image: Image) -> Iterator[tuple[History, ImageLayer | None]]:
    """Each step, the oldest first, with the layer that it made, as far as there is one. Layers without a
    history are steps without a word."""
    layers = iter(image.layers)
    for step in image.config.history:
        yield step, None if step.empty_layer else next(layers, None)
    yield from zip(itertools.repeat(History()), layers)


def _as_json(step: History, layer: ImageLayer | None) -> dict[str, object]:
    return {
        "created": step.created,
        "created_by": step.created_by,
        "author": step.author,
        "comment": step.comment,
        "diff_id": layer.diff_id if layer is not None else None,
        "size": layer.size if layer is not None else None,
    }


def _table(steps: Iterable[tuple[History, ImageLayer | None]], width: int | None) -> Iterator[str]:
    from rich.filesize import decimal

    rows = [("LAYER", "CREATED", "SIZE", "CREATED BY", "COMMENT")]
    for step, layer in steps:
        created = display(step.created.encode())[:19].replace("T", " ") or "-"
        size = decimal(layer.size) if layer is not None else "-"
        name = layer.diff_id.partition(":")[2][:12] if layer is not None else "-"
        rows.append((name, created, size, display(step.created_by.encode()), display(step.comment.encode())))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    if width is not None:
        # what the other columns leave, but not less than a few words
        widths[3] = min(
            widths[3], max(30, width - sum(widths[:3]) - 8 - min(20, max(len(r[4]) for r in rows)))
        )
    for name, created, size, by, comment in rows:
        if len(by) > widths[3]:
            by = by[: widths[3] - 1] + "…"
        cells = f"{name:{widths[0]}}  {created:{widths[1]}}  {size:>{widths[2]}}  {by:{widths[3]}}  {comment}"
        yield cells.rstrip()
