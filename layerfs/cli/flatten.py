"""`layerfs flatten`: the command line; the work is `layerfs.vfs.flatten`'s, on the stack that a mount would
have.
"""

from __future__ import annotations

import click

from layerfs.cli import talk
from layerfs.errors import UsageError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--upper", metavar="DIR", required=True, help="The directory to make plain. Not mounted.")
@click.option("--work", metavar="DIR", help="Its work directory.  [default: UPPER.work]")
@click.option(
    "--lower",
    "lowers",
    metavar="DIR",
    multiple=True,
    help="Its lower layers as mounted; the first is on top.",
)
@click.option("--userxattr", is_flag=True, help="Its marks are user.* attributes, though this is root.")
def command(upper: str, work: str | None, lowers: tuple[str, ...], userxattr: bool) -> int:
    """Make an upper directory plain, in place: directories that were renamed by a mark are copied in full,
    files of which only the attributes were copied get their data, whiteouts take the kernel's form.

    Every overlay then reads it without options: the kernel's with userxattr, one with redirect_dir=off, or
    fuse-overlayfs. It takes the room of what is copied. Stopped anywhere, the upper still mounts to the same
    tree, and the command may be run again.
    """
    from layerfs.cli import launching
    from layerfs.runtime.mounts import absolute
    from layerfs.vfs.config import StackConfig

    if not lowers:
        raise UsageError("at least one --lower is needed: what is copied lies there")
    config = StackConfig(
        lowers=tuple(absolute(lower) for lower in lowers),
        upper=absolute(upper),
        work=absolute(work) if work else None,
        userxattr=True if userxattr else None,
    )
    with launching.work_directory(config) as complete:
        from layerfs.vfs.offline import flatten

        done = flatten(complete)
    talk.note(
        "layerfs flatten",
        f"{done.directories} directories, {done.files} files and {done.whiteouts} whiteouts made plain",
    )
    return 0
