"""File systems on loop devices, made for one test and gone with it. Not tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.stack import Stack

#: Kind -> mkfs command. Smallest sizes that each takes.
MKFS = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-O", "^has_journal"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
SIZE = 320 << 20


@contextlib.contextmanager
def file_system(kind: str) -> Iterator[Path]:
    """The root of a fresh file system: "tmpfs" or one of `MKFS`. Skips the test where it cannot be had."""
    holder = Stack(name=kind, n_lowers=0, writable=False)
    try:
        if kind == "tmpfs":
            mounts.mount("none", holder.mnt, "tmpfs")
        else:
            image = holder.dir / "image"
            with open(image, "wb") as file:
                file.truncate(SIZE)
            try:
                subprocess.run([*MKFS[kind], image], check=True, capture_output=True)
                subprocess.run(["mount", "-o", "loop", image, holder.mnt], check=True, capture_output=True)
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no {kind} on a loop device here: {error}")
        os.chmod(holder.mnt, 0o755)
        try:
            yield holder.mnt
        finally:
            mounts.umount(holder.mnt)
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", holder.dir], check=True)
