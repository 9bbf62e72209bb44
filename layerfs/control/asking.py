"""Asks a running mount for its `statistics`.

One with a work directory is asked on its control socket, and no request of the file system is needed. A
read-only one has none: it answers getxattr on its root, a request that is among those it counts.
"""

from __future__ import annotations

import msgspec

from layerfs.control import mounts
from layerfs.control.client import Channel
from layerfs.control.statistics import Statistics
from layerfs.errors import MountError


class Reader:
    """Asks one mount, as often as one likes."""

    def __init__(self, mountpoint: str) -> None:
        """Raises MountError."""
        self._mountpoint = mountpoint
        work = mounts.work_directory(mountpoint)
        self._channel = Channel(mountpoint, work) if work is not None else None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._channel is not None:
            self._channel.close()

    def read(self) -> Statistics:
        """Raises MountError: also when the mount has ended."""
        try:
            if self._channel is not None:
                return msgspec.convert(self._channel.ask("stat"), Statistics)
            said = mounts.told(self._mountpoint, mounts.STATISTICS_ATTRIBUTE)
            return msgspec.json.decode(said, type=Statistics)
        except msgspec.DecodeError as error:  # which a wrong type is, too
            raise MountError(
                f"{mounts.shown(self._mountpoint)}: does not answer as layerfs does: {error}"
            ) from None
