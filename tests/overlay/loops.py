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
    "xfs-noreflink": ("mkfs.xfs", "-q", "-f", "-m", "reflink=0"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
SIZE = 320 << 20


def make_file_system(kind: str, size: int, image: Path, target: Path) -> None:
    """Mounts a fresh file system on `target`: "tmpfs", "overlay" (the kernel's) or one of `MKFS`, of `size`
    bytes, which are taken from `image` as they are written. Raises OSError, CalledProcessError.
    """
    if kind == "tmpfs":
        mounts.mount("none", target, "tmpfs", data=f"size={size}")
    elif kind == "overlay":
        layers = [image / name for name in ("lower", "upper", "work")]
        for layer in layers:
            layer.mkdir(parents=True)
        mounts.mount_overlay(target, layers[:1], layers[1], layers[2])
    else:
        with open(image, "wb") as file:
            file.truncate(size)
        subprocess.run([*MKFS[kind], image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, target], check=True, capture_output=True)
    os.chmod(target, 0o755)


@contextlib.contextmanager
def file_system(kind: str, size: int = SIZE) -> Iterator[Path]:
    """The root of a fresh file system as `make_file_system` has it. Skips the test where it cannot be had."""
    holder = Stack(name=kind, n_lowers=0, writable=False)
    try:
        try:
            make_file_system(kind, size, holder.dir / "image", holder.mnt)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no {kind} on a loop device here: {error}")
        try:
            yield holder.mnt
        finally:
            mounts.umount(holder.mnt)
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", holder.dir], check=True)
