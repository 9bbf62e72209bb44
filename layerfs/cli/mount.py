"""`layerfs mount`: the command line of a mount. Checking, forking and mounting are
`layerfs.cli.launching`'s.
"""

from __future__ import annotations

from dataclasses import replace

import click

from layerfs.cli import launching, talk
from layerfs.errors import UsageError
from layerfs.overlay.options import parse_options


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--lower", "lowers", metavar="DIR", multiple=True, help="A read-only layer; the first is on top."
)
@click.option(
    "--upper", metavar="DIR", help="The directory that takes all changes; without one nothing can be written."
)
@click.option("--work", metavar="DIR", help="Scratch directory beside the upper one.  [default: UPPER.work]")
@click.option(
    "--ephemeral", is_flag=True, help="A temporary upper directory (in $TMPDIR or /var/tmp), gone at the end."
)
@click.option("-o", "options", metavar="OPTS", multiple=True, help="Mount options, separated by commas.")
@click.option("--gate", type=click.Choice(["on", "off"]), help="As -o gate=.")
@click.option("--foreground", is_flag=True, help="Serve in this process instead of a daemon.")
@click.option(
    "--log", metavar="FILE", envvar="LAYERFS_LOG", help="Append what the daemon has to say to FILE."
)
@click.argument("arguments", metavar="[IMAGE] MOUNTPOINT", nargs=-1, required=True)
def command(
    lowers: tuple[str, ...],
    upper: str | None,
    work: str | None,
    ephemeral: bool,
    options: tuple[str, ...],
    gate: str | None,
    foreground: bool,
    log: str | None,
    arguments: tuple[str, ...],
) -> int:
    """Mount the layers on MOUNTPOINT. Returns when the mount is usable.

    IMAGE is DIR:TAG or DIR@sha256:... in an OCI image layout, or FILE.tar[:REPO:TAG] as docker save writes
    it. Its layers lie below all --lower directories. They are unpacked once, verified, into
    $XDG_CACHE_HOME/layerfs (~/.cache/layerfs), and shared by all images that have them.

    \b
    Options for -o:
      lowerdir=A:B  upperdir=U  workdir=W   as kernel overlayfs writes them; \\: and \\, escape
      volatile                              never wait for the disk; a crash spoils the upper
      redirect_dir=on|off                   rename directories by a mark [on] or by copying
      metacopy=on|off                       copy attributes up without data [on]
      data=cached|passthrough|python        who moves the bytes of files: the gate [where it was built], the
                                            kernel itself (root, Linux 6.9), or Python (gate=off)
      gate=on|off                           answer from native code what is known [on where it was built]
      max_names=N                           names to keep in memory, about [1000000]
      userxattr                             keep marks in user.* attributes even as root
      ro nosuid nodev noexec noatime ...    as for any mount
      allow_other                           other users may enter (root: the default)
    """
    if len(arguments) > 2:
        raise UsageError(f"too many names: {arguments[2]}: give [IMAGE] MOUNTPOINT")
    image, mountpoint = [None, *arguments][-2:]
    assert mountpoint is not None
    if image == "":
        raise UsageError("the image is an empty name")
    parsed = parse_options(options)
    if parsed.unknown:
        raise UsageError(f"unknown mount option: {parsed.unknown[0]}")
    if parsed.ineffective:
        raise UsageError(
            f"mount option {parsed.ineffective[0]} is fuse-overlayfs's and has no effect here: leave it out"
        )
    for name, given, parsed_value in (("upper", upper, parsed.upper), ("work", work, parsed.work)):
        if given is not None and parsed_value is not None:
            raise UsageError(f"--{name} and -o {name}dir= are the same thing: give one of them")
    if lowers and parsed.lowers:
        raise UsageError("--lower and -o lowerdir= are the same thing: use one of them")
    for name, values in (("--lower", lowers), ("--upper", (upper,)), ("--work", (work,))):
        if "" in values:
            raise UsageError(f"{name}: an empty path")
    parsed = replace(
        parsed, lowers=lowers or parsed.lowers, upper=upper or parsed.upper, work=work or parsed.work
    )
    if gate is not None:
        parsed = replace(parsed, gate=gate == "on")
    launching.mount(
        options=parsed,
        mountpoint=mountpoint,
        ephemeral=ephemeral,
        foreground=foreground,
        log=log or None,
        image=(lambda: _unpacked(image)) if image is not None else None,
        note=lambda line: talk.note("layerfs mount", line),
    )
    return 0


def _unpacked(reference: str) -> list[str]:
    """The layer directories of an image, top first. Raises LayerfsError."""
    from layerfs.cli.image_layers import unpacked

    return unpacked(reference, lambda line: talk.note("layerfs mount", line))
