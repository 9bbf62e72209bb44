"""`mount.layerfs`: the form in which mount(8), podman and buildah ask for a mount. Translates arguments,
nothing else.

    mount.layerfs SOURCE MOUNTPOINT [-sfnv] [-N NS] [-t TYPE] [-o OPTS]   mount(8): -f is "fake", no mount
    mount.layerfs [-o OPTS] [-f] [-d] MOUNTPOINT                fuse-overlayfs: -f is "foreground"

The number of names tells the two apart: mount(8) always gives a source. Exit codes go by that too: mount(8)'s
own, or 1 for everything, as fuse-overlayfs has it. Parsed by hand: getopt's rules, options and names in any
order, and a caller that starts hundreds of containers should not pay for click.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from layerfs import __version__
from layerfs.cli import talk
from layerfs.errors import UsageError

PROGRAM = "mount.layerfs"
#: mount(8), "EXIT STATUS".
USAGE, BUG, FAILED = 1, 4, 32
#: fuse-overlayfs knows this one alone, so a caller that speaks to it gets no other.
_FUSE_OVERLAYFS_FAILED = 1

_USAGE = """\
Usage: mount.layerfs [SOURCE] MOUNTPOINT -o lowerdir=A:B[,upperdir=U,workdir=W][,OPTIONS]

  -o OPTIONS     mount options; may stand anywhere and more than once
  -f             with a SOURCE, as mount(8) says it: do everything but mount; without: stay in the foreground
  -d             stay in the foreground
  -s -n -v       accepted for mount(8), without effect
  -h, --help     this text
  -V, --version  the version

Unknown options are noted on stderr and ignored.
"""


@dataclass
class Arguments:
    """One command line. `names` are what is not an option."""

    names: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    flags: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)


def parse_arguments(arguments: list[str], into: Arguments | None = None) -> Arguments:
    """Raises UsageError when the value of an option is missing; `into` then has what stood before it."""
    parsed = into if into is not None else Arguments()
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            parsed.names.extend(rest)
        elif argument in ("--help", "--version"):
            parsed.flags.add(argument[2])
        elif argument in ("--foreground", "--debug"):
            parsed.flags.add("d")
        elif argument.startswith("--"):
            parsed.ignored.append(argument)
        elif argument.startswith("-") and argument != "-":
            letters = iter(argument[1:])
            for letter in letters:
                if letter in "oNt":
                    value = "".join(letters) or next(rest, None)
                    if value is None:
                        raise UsageError(f"option -{letter} needs a value")
                    if letter == "o":
                        parsed.options.append(value)
                elif letter in "fdsnvhV":
                    parsed.flags.add("v-" if letter == "v" else letter)
                else:
                    parsed.ignored.append(f"-{letter}")
        else:
            parsed.names.append(argument)
    return parsed


def main() -> int:
    arguments = sys.argv[1:]
    parsed = Arguments()

    def run() -> int:
        parse_arguments(arguments, parsed)
        return _run(parsed)

    code = talk.run(PROGRAM, run)
    failed = FAILED if len(parsed.names) == 2 else _FUSE_OVERLAYFS_FAILED
    return {2: USAGE, talk.INTERNAL: BUG, 1: failed}.get(code, code)


def _run(parsed: Arguments) -> int:
    if "h" in parsed.flags:
        print(_USAGE, end="")
        return 0
    if "v" in parsed.flags or "V" in parsed.flags:
        print(f"layerfs {__version__}")
        return 0
    if len(parsed.names) not in (1, 2):
        raise UsageError(
            "a mount point is missing" if not parsed.names else f"too many names: {parsed.names[2]}"
        )
    source, mountpoint = [None, *parsed.names][-2:]
    assert mountpoint is not None
    foreground = "d" in parsed.flags or ("f" in parsed.flags and source is None)
    fake = "f" in parsed.flags and source is not None
    if foreground or fake:
        return _mount(parsed, source, mountpoint, foreground=foreground, fake=fake)
    talk.die_quietly_of_sigint()
    from layerfs.cli import launching

    with launching.daemon_ahead():
        return _mount(parsed, source, mountpoint, foreground=False, fake=False)


def _mount(parsed: Arguments, source: str | None, mountpoint: str, *, foreground: bool, fake: bool) -> int:
    import os

    from layerfs.cli import launching
    from layerfs.overlay.options import parse_options

    options = parse_options(parsed.options)
    for unknown in (*parsed.ignored, *options.unknown):
        talk.note(PROGRAM, f"unknown argument ignored: {unknown}")
    launching.mount(
        options=options,
        mountpoint=mountpoint,
        foreground=foreground,
        fake=fake,
        log=os.environ.get("LAYERFS_LOG") or None,
        source=None if source in (None, "none", "") else source,
        note=lambda line: talk.note(PROGRAM, line),
    )
    return 0
