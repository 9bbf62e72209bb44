"""`layerfs export`: a whole root, of a live mount or an image, as one flat tar. The work is
`layerfs.oci.commit`'s and `layerfs.oci.join`'s."""

from __future__ import annotations

import json
import os

import click

from layerfs.cli import talk
from layerfs.cli.layer_output import LayerOutput, layer_as_json, layer_lines, layer_output
from layerfs.cli.progress import bar
from layerfs.control import mounts
from layerfs.control.reading import reading, refuse_output_in
from layerfs.errors import MountError, UsageError
from layerfs.oci.commit import CommitOptions, write_layer
from layerfs.oci.join import join_layers
from layerfs.oci.progress import Progress
from layerfs.oci.references import open_image
from layerfs.oci.streams import Written


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@layer_output
@click.option(
    "--pause",
    is_flag=True,
    help="Hold everybody who changes something in the mount until the tar is made, so that all is of one"
    " moment. [default: each file is of one moment]",
)
@click.option("--json", "as_json", is_flag=True, help="The summary as one JSON object; no progress bar.")
@click.argument("source", metavar="MOUNTPOINT | IMAGE")
def command(source: str, output: LayerOutput, pause: bool, as_json: bool) -> int:
    """Write all that the mount on MOUNTPOINT shows, or the root of IMAGE, as one flat tar without whiteouts.

    IMAGE is DIR:TAG, DIR@sha256:..., or FILE.tar[:REPO:TAG] as docker save writes it; nothing of it is
    unpacked, and no privilege is needed. The same tree gives the same bytes, whichever way it is exported. A
    root that no layer gives attributes is root's, with mode 0755.

    Files of compressed layers are kept in $TMPDIR or /var/tmp meanwhile.
    """
    with bar("export", quiet=as_json) as progress:
        if _is_mount(source):
            members, written, notes = _mount(source, output, pause, progress)
        elif pause:
            raise UsageError("only a mount can be paused, and this is an image")
        else:
            members, written, notes = _image(source, output, progress)
    for note in notes:
        talk.note("layerfs export", note)
    if as_json:
        output.say(json.dumps(layer_as_json(written) | {"members": members, "notes": list(notes)}))
    else:
        output.say("\n".join([*layer_lines(written), f"Members  {members}"]))
    return 0


_Told = tuple[int, Written, tuple[str, ...]]


def _is_mount(source: str) -> bool:
    """Whether `source` is a mount of ours; a directory that is neither this nor a layout is a mistake. Raises
    MountError."""
    if not os.path.isdir(source):
        return False
    try:
        mounts.describe(source)
    except MountError:
        if os.path.exists(os.path.join(source, "oci-layout")):
            return False
        raise
    return True


def _mount(mountpoint: str, output: LayerOutput, pause: bool, progress: Progress) -> _Told:
    options = CommitOptions(output.compression, output.level, whole=True)
    refuse_output_in(mountpoint, output.target())
    with reading(mountpoint, durable=False, need_upper=False, pause=pause) as mount:
        upper = mount.stack.upper
        with output.open(upper.fd.fd if upper is not None else None) as fd:
            summary = write_layer(mount.stack, fd, options, progress, snapshots=mount.snapshots)
            mount.check()
    return summary.added, summary.written, summary.notes


def _image(reference: str, output: LayerOutput, progress: Progress) -> _Told:
    image = open_image(reference)
    with output.open() as fd, output.sink(fd) as sink:
        joined = join_layers(image.layers, sink, whole=True, name_root=True, progress=progress)
        written = sink.finish()
    return joined.members, written, joined.notes
