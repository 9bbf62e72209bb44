"""`layerfs commit`: makes a layer tarball of what an upper directory changes. The work is
`layerfs.oci.commit`'s."""

from __future__ import annotations

import json
import os

import click

from layerfs.cli import talk
from layerfs.cli.image_options import Target, commit_image, image_as_json, image_lines, image_options
from layerfs.cli.layer_output import LayerOutput, layer_as_json, layer_lines, layer_output
from layerfs.cli.progress import bar
from layerfs.cli.upper_options import Chosen, upper_options
from layerfs.control.reading import Reading, reading, refuse_output_in
from layerfs.errors import UsageError
from layerfs.oci.commit import CommitOptions, Summary, write_layer


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@upper_options
@image_options
@layer_output
@click.option(
    "--keep-unchanged",
    is_flag=True,
    help="Keep copies that equal what lies below them. [default: they are left out]",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Take what PATTERN names as if it had not been changed: neither added nor deleted, with all below"
    " it. As in .gitignore, from the root of the layer: '*.pyc' at any depth, '/tmp' and 'var/cache' from the"
    " root, 'log/' directories only, '**' any directories, a later '!PATTERN' takes back. May be repeated.",
)
@click.option(
    "--pause",
    is_flag=True,
    help="Hold everybody who changes something in the mount until the layer is made, so that all of it is of"
    " one moment. [default: each file is of one moment]",
)
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object; no progress bar.")
def command(
    chosen: Chosen,
    output: LayerOutput,
    keep_unchanged: bool,
    exclude: tuple[str, ...],
    pause: bool,
    as_json: bool,
    target: Target | None,
) -> int:
    """Make an OCI layer of the changes in the mount on MOUNTPOINT, or in --upper over --lower.

    The same trees give the same bytes. With -o the summary goes to stdout, and FILE appears only when it is
    whole; otherwise the layer goes to stdout and the summary to stderr.

    With --layout an image is made of it and nothing else is written. When nothing has changed the image gets
    a history entry without a layer, or, with nothing to tell, is the base as it is.
    """
    options = CommitOptions(output.compression, output.level, keep_unchanged, exclude)
    if target is None:
        output.refuse_terminal()
        refuse_output_in(chosen.mountpoint, output.target())
    elif output.path is not None:
        raise UsageError("give either --output or --layout, not both")
    else:
        refuse_output_in(chosen.mountpoint, os.path.join(target.path, "index.json"))
    opened = reading(
        chosen.mountpoint, chosen.upper, chosen.lowers, chosen.userxattr, durable=True, pause=pause
    )
    with opened as source:
        if target is not None:
            return _commit_to_layout(target, source, options, as_json)
        return _commit_to_file(output, source, options, as_json)


def _commit_to_file(output: LayerOutput, source: Reading, options: CommitOptions, as_json: bool) -> int:
    assert source.stack.upper is not None
    with bar("commit", quiet=as_json) as progress, output.open(source.stack.upper.fd.fd) as fd:
        summary = write_layer(source.stack, fd, options, progress, snapshots=source.snapshots)
        source.check()
    for note in summary.notes:
        talk.note("layerfs commit", note)
    output.say(json.dumps(_as_json(summary)) if as_json else "\n".join(_lines(summary)))
    return 0


def _commit_to_layout(target: Target, source: Reading, options: CommitOptions, as_json: bool) -> int:
    with bar("commit", quiet=as_json) as progress:
        summary, appended = commit_image(target, source, options, progress)
    for note in summary.notes:
        talk.note("layerfs commit", note)
    if as_json:
        print(json.dumps(_as_json(summary) | image_as_json(target, appended)))
    else:
        print("\n".join([*(_lines(summary) if appended.added else []), *image_lines(target, appended)]))
    return 0


def _lines(summary: Summary) -> list[str]:
    counts = f"{summary.added} added, {summary.changed} changed, {summary.deleted} deleted"
    if summary.unchanged:
        counts += f", {summary.unchanged} left out as unchanged"
    if summary.excluded:
        counts += f", {summary.excluded} excluded"
    details = f"{summary.file_bytes:,} in files"
    return [*layer_lines(summary.written, details), f"Changes  {counts}"]


def _as_json(summary: Summary) -> dict[str, object]:
    return layer_as_json(summary.written) | {
        "file_bytes": summary.file_bytes,
        "added": summary.added,
        "changed": summary.changed,
        "deleted": summary.deleted,
        "unchanged": summary.unchanged,
        "excluded": summary.excluded,
        "notes": list(summary.notes),
    }
