"""`layerfs stat`: shows what a running mount counts. What it counts is `layerfs.control.statistics`'; how it
looks is `stat_view`'s."""

from __future__ import annotations

import json
import os
import sys

import click

from layerfs.cli import stat_view
from layerfs.control.asking import Reader
from layerfs.errors import UsageError

_KEYS = """\b
--json prints one object. Numbers are since the mount, those marked * as of now:
  version             text   of layerfs
  uptime              float  seconds since the mount
  data.mode           text * passthrough, cached or python
  data.why            text * why this one
  gate.on             bool * requests are answered natively, where they can be
  gate.why            text * why, or why not
  gate.entries        int  * names it has an answer for
  gate.known          int  * nodes it has an answer for
  gate.bytes          int  * its memory
  requests.KIND              KIND is an opcode of FUSE, in small letters
    .native           int    answered by the gate
    .python           int    answered by Python
    .native_us        [int]  times of the gate's, where it measures them
    .python_us        [int]  times of Python's: item K counts what took
                             2**(K-1) us or more, and less than 2**K us
  copyups.count       int    objects brought into the upper directory
    .directories      int    those that are directories
    .metadata_only    int    those brought without their data
    .reflinked        int    those whose data were cloned
    .bytes            int    bytes copied for the others, without holes
  bytes.read          int    bytes of files that went through the daemon
  bytes.written       int    bytes of files that went through the daemon
  nodes               int  * objects in use, by the kernel or in the daemon
  memory              int  * resident memory of the daemon, in bytes
  descriptors         int  * open in the daemon
"""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, epilog=_KEYS)
@click.argument("mountpoint")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, once; see below.")
@click.option(
    "--interval",
    type=float,
    metavar="SECONDS",
    default=1.0,
    show_default=True,
    help="On a terminal: time from one look to the next, 0.1 to 3600.",
)
def command(mountpoint: str, as_json: bool, interval: float) -> int:
    """Show what the mount on MOUNTPOINT has done since it was made, and what it holds.

    On a terminal the numbers are live, with rates beside them, until q or Ctrl-C; elsewhere they are printed
    once. Times are powers of two, in microseconds, from where the daemon begins a request to where it ends.

    Root and whoever made the mount may ask. Exit code 1: it is no mount of layerfs, its daemon has gone or
    does not answer, or it is somebody else's.
    """
    if not 0.1 <= interval <= 3600:
        raise UsageError("--interval: give seconds, from 0.1 to 3600")
    with Reader(mountpoint) as reader:
        if as_json:
            print(json.dumps(reader.read()))
        elif sys.stdout.isatty() and os.environ.get("TERM") not in (None, "dumb"):
            stat_view.watch(reader.read, interval)
        else:
            print("\n".join(stat_view.lines(reader.read())))
    return 0
