"""The two kinds of cold."""

from __future__ import annotations

import os
from pathlib import Path

_DROP = Path("/proc/sys/vm/drop_caches")


def drop_names() -> None:
    """The kernel forgets names and inodes, of the mount and of its layers.

    Blocks stay cached: a slow disk would hide the difference."""
    os.sync()
    _DROP.write_text("2\n")


def drop_all() -> None:
    """Blocks and the contents of files are forgotten, too: what comes next waits for the disk."""
    os.sync()
    _DROP.write_text("3\n")
