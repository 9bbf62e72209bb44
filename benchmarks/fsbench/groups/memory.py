"""What a daemon holds in memory after a walk over many files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..commands import BenchmarkError
from ..contenders import Contender
from ..measures import Sizes
from ..rounds import Bench
from ..stacks import Stack
from .group import Group


class Memory(Group):
    """Resident memory of the daemon after `find -ls`, which asks for the attributes of every file, too."""

    name = "memory"

    def rounds(self, sizes: Sizes) -> int:
        return 1

    def stacks(self, sizes: Sizes) -> Sequence[str]:
        return [f"numerous {files}" for files in sizes.walked]

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        if not contender.fuse:
            return
        files, output = len(stack.contents), bench.scratch / "listing"
        lines = files + len(stack.directories) + 1
        with bench.place(contender, stack) as place:

            def take() -> float:
                place.program("find", "-ls", output=output)
                if output.read_bytes().count(b"\n") != lines:
                    raise BenchmarkError(f"find -ls: not {lines} lines")
                return resident(place.mnt)

            title = f"resident memory after a walk of {files:,} files"
            place.time(f"memory_{files}", title, lines, take, unit="MB")


def resident(mnt: Path) -> int:
    """Bytes of resident memory of the processes that serve `mnt`: those that have /dev/fuse open and were
    told this mount point."""
    pages = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(mnt) in (process / "cmdline").read_bytes().split(b"\0") and any(
                os.readlink(fd) == "/dev/fuse" for fd in (process / "fd").iterdir()
            ):
                pages += int((process / "statm").read_text().split()[1])
        except OSError:
            continue  # it has ended
    if not pages:
        raise BenchmarkError("no process that serves the mount was found")
    return pages * os.sysconf("SC_PAGE_SIZE")
