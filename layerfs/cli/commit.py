"""`layerfs commit`: makes a layer tarball of what an upper directory changes. The work is
`layerfs.oci.commit`'s."""

from __future__ import annotations

import json
import sys

import click

from layerfs.cli import talk
from layerfs.control import mounts
from layerfs.errors import UsageError
from layerfs.oci.commit import Summary, output_file, write_layer


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--upper", metavar="DIR", help="The upper directory, when it is not mounted.")
@click.option(
    "--lower", "lowers", multiple=True, metavar="DIR", help="A lower layer, top first; may be repeated."
)
@click.option(
    "--userxattr/--no-userxattr",
    default=None,
    help="The upper's marks are user.* or trusted.* attributes. [default: found out]",
)
@click.option("-o", "--output", metavar="FILE", help="Where the layer goes; '-' and default: stdout.")
@click.option(
    "--compression",
    type=click.Choice(("none", "gzip")),
    default="none",
    show_default=True,
    help="Of the layer.",
)
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object.")
@click.argument("mountpoint", required=False)
def command(
    upper: str | None,
    lowers: tuple[str, ...],
    userxattr: bool | None,
    output: str | None,
    compression: str,
    as_json: bool,
    mountpoint: str | None,
) -> int:
    """Make an OCI layer of the changes in the mount on MOUNTPOINT, or in --upper over --lower.

    The same trees give the same bytes. With -o the summary goes to stdout, and FILE appears only when it is
    whole; otherwise the layer goes to stdout and the summary to stderr.
    """
    to_stdout = output in (None, "-")
    if to_stdout and sys.stdout.isatty():
        raise UsageError("a layer is not for the terminal: give -o FILE, or send the output elsewhere")
    stack = mounts.open_layers(mountpoint, upper, lowers, userxattr, durable=True)
    if to_stdout:
        sys.stdout.flush()
        summary = write_layer(stack, sys.stdout.fileno(), compression)
    else:
        assert output is not None and stack.upper is not None
        with output_file(output, keep_out_of=stack.upper.fd.fd) as fd:
            summary = write_layer(stack, fd, compression)
    for note in summary.notes:
        talk.note("layerfs commit", note)
    text = json.dumps(_as_json(summary)) if as_json else "\n".join(_lines(summary))
    print(text, file=sys.stderr if to_stdout else sys.stdout)
    return 0


def _lines(summary: Summary) -> list[str]:
    written = summary.written
    size = f"{written.size:,} bytes"
    if written.size != written.tar_size:
        size += f" ({written.tar_size:,} uncompressed)"
    counts = f"{summary.added} added, {summary.changed} changed, {summary.deleted} deleted"
    if summary.unchanged:
        counts += f", {summary.unchanged} left out as unchanged"
    return [
        f"DiffID   {written.diff_id}",
        f"Digest   {written.digest}",
        f"Size     {size}",
        f"Changes  {counts}",
    ]


def _as_json(summary: Summary) -> dict[str, object]:
    written = summary.written
    return {
        "diff_id": written.diff_id,
        "digest": written.digest,
        "media_type": written.media_type,
        "size": written.size,
        "uncompressed_size": written.tar_size,
        "added": summary.added,
        "changed": summary.changed,
        "deleted": summary.deleted,
        "unchanged": summary.unchanged,
        "notes": list(summary.notes),
    }
