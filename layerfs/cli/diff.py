"""`layerfs diff`: lists what an upper directory changes. Finding it is `layerfs.oci.changes`."""

from __future__ import annotations

import json
import os
import sys

import click

from layerfs.cli import talk
from layerfs.cli.upper_options import Chosen, upper_options
from layerfs.control import mounts
from layerfs.oci.changes import Change, ChangeFinder, ChangeKind
from layerfs.oci.member import Kind, display

_SHOWN = (ChangeKind.ADDED, ChangeKind.CHANGED, ChangeKind.DELETED)
_TYPES = {
    Kind.FILE: "file",
    Kind.HARDLINK: "hardlink",
    Kind.SYMLINK: "symlink",
    Kind.CHAR: "char",
    Kind.BLOCK: "block",
    Kind.DIR: "dir",
    Kind.FIFO: "fifo",
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@upper_options
@click.option("--json", "as_json", is_flag=True, help="One JSON array of {kind, path, type}.")
def command(chosen: Chosen, as_json: bool) -> int:
    """Show what changed in the mount on MOUNTPOINT, or in --upper over --lower.

    One line for each name: A added, C changed (content or metadata), D deleted. Control characters and
    backslashes in names are escaped; --json has them as they are.
    """
    stack = mounts.open_layers(
        chosen.mountpoint, chosen.upper, chosen.lowers, chosen.userxattr, durable=False
    )
    notes: list[str] = []
    found = [change for change in ChangeFinder(stack, notes) if change.kind in _SHOWN]
    found.sort(key=lambda change: change.path.split(b"/"))
    if as_json:
        json.dump([_as_json(change) for change in found], sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        for change in found:
            sys.stdout.write(f"{change.kind.value} /{display(change.path)}\n")
    for note in notes:
        talk.note("layerfs diff", note)
    return 0


def _as_json(change: Change) -> dict[str, str]:
    """A name's undecodable bytes are surrogate escapes, which JSON writes as \\udcNN."""
    shown = {"kind": change.kind.value, "path": "/" + os.fsdecode(change.path)}
    if change.member is not None:
        shown["type"] = _TYPES[change.member.kind]
    return shown
