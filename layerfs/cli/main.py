"""Entry point of `layerfs`. Starts the right command as fast as it can be; parsing is
`layerfs.cli.group`'s.
"""

from __future__ import annotations

import sys

from layerfs import __version__
from layerfs.cli import talk
from layerfs.cli.commands import COMMANDS


def main() -> int:
    arguments = sys.argv[1:]
    if len(arguments) == 4 and arguments[2] == "-o" and arguments[0] not in COMMANDS:
        # As mount.fuse3(8) runs the program of `fuse.layerfs`, where mount(8) finds no helper of ours:
        # SOURCE MOUNTPOINT -o OPTIONS.
        from layerfs.cli import mount_helper

        return mount_helper.main()
    command = next((each for each in arguments if not each.startswith("-")), "")
    program = f"layerfs {command}" if command in COMMANDS else "layerfs"
    return talk.run(program, lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:  # asked by scripts, so not worth the import of click
        print(f"layerfs {__version__}")
        return 0
    if not arguments:
        arguments = ["--help"]
    if arguments[0] != "mount" or not {"--foreground", "--help", "-h"}.isdisjoint(arguments):
        from layerfs.cli import group

        return group.run(arguments)
    talk.die_quietly_of_sigint()
    # The daemon imports trio and pyfuse3 while we import click, read the options and look at the layers.
    from layerfs.cli import launching

    with launching.daemon_ahead():
        from layerfs.cli import group

        return group.run(arguments)
