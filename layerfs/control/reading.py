"""Layers opened for one long reading, as `layerfs commit` and `export` do it: of directories, or of a live
mount, which is then read file by file as of one moment, or held still. Reads nothing itself."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerfs.control import mounts
from layerfs.control.client import Connection
from layerfs.errors import UsageError
from layerfs.oci.member import display
from layerfs.oci.snapshot import Snapshots
from layerfs.stack import Stack


@dataclass(frozen=True, slots=True)
class Reading:
    """`snapshots` for `oci.commit.write_layer`."""

    stack: Stack
    snapshots: Snapshots | None = None
    paused: Connection | None = None

    def check(self) -> None:
        """To be called at the end. Raises MountError when the mount was not held all the time."""
        if self.paused is not None:
            self.paused.ask("ping")


@contextlib.contextmanager
def reading(
    mountpoint: str | None,
    upper: str | None = None,
    lowers: Sequence[str] = (),
    userxattr: bool | None = None,
    *,
    durable: bool,
    need_upper: bool = True,
    pause: bool = False,
) -> Iterator[Reading]:
    """The layers as `mounts.open_layers` opens them. `pause`: nothing changes in the mount while the block
    runs. Raises UsageError, MountError, LayerError."""
    if mountpoint is None and pause:
        raise UsageError("only a mount can be paused: give MOUNTPOINT, not --upper and --lower")
    stack = mounts.open_layers(mountpoint, upper, lowers, userxattr, durable=durable, need_upper=need_upper)
    if mountpoint is None:
        yield Reading(stack)
        return
    info = mounts.describe(mountpoint)
    if info.work is None or stack.upper is None:  # read-only: nothing changes
        yield Reading(stack)
        return
    with Connection(mountpoint, info.work) as connection:
        if pause:
            # After the flush that open_layers made: while WRITE is held, a flush would wait for us.
            connection.pause()
            yield Reading(stack, paused=connection)
        else:
            yield Reading(stack, Snapshots(stack.upper.fd.fd, info.work, connection))


def refuse_output_in(mountpoint: str | None, output: int | str) -> None:
    """To be called before the mount is read: an output (a descriptor, or the path of something to be made) in
    it would be a change there, and wait for its own end when it is paused. Raises UsageError."""
    if mountpoint is None:
        return
    try:
        mount = os.stat(mountpoint).st_dev
        if isinstance(output, int):
            name, device = "the output", os.fstat(output).st_dev
        else:
            name, device = (
                display(os.fsencode(output)),
                os.stat(nearest_directory(os.path.dirname(output))).st_dev,
            )
    except OSError:
        return  # whoever opens it will say so
    if device == mount:
        raise UsageError(f"{name}: lies in the mount that is being read; give another place")


def nearest_directory(path: str) -> str:
    """`path`, or the directory in which the first one on the way to it would be made."""
    here = os.path.abspath(path)
    while not os.path.isdir(here):
        here = os.path.dirname(here)
    return here
