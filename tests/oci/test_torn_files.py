"""A file that is written to through a mount while that is committed is in the layer as of one moment, on each
file system that `oci.snapshot` knows. Without a mount: test_moment.py.
"""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.overlay.loops import file_system
from tests.support.mounts import Layerfs, layerfs_command, why_no_layerfs
from tests.support.stack import Stack

pytestmark = [
    pytest.mark.root,
    pytest.mark.loop,
    pytest.mark.skipif(bool(why_no_layerfs()), reason=str(why_no_layerfs())),
]

#: Bytes of half a file: one request of the kernel's, several, and more than is copied in memory.
HALVES = {"small": 20_000, "requests": 1 << 20, "big": 3 << 20}


def rewrite(path: Path, half: int, turn: int) -> None:
    """Both halves by one write(2)."""
    fd = os.open(path, os.O_WRONLY)
    try:
        data = bytes((turn % 255 + 1,)) * half
        assert os.pwrite(fd, data + data, 0) == 2 * half
    finally:
        os.close(fd)


def replace(path: Path, half: int, turn: int) -> None:
    """A new file of another size, renamed over the old one."""
    other = path.with_name(path.name + ".new")
    data = bytes((turn % 255 + 1,)) * (half + turn % 255 + 1)
    other.write_bytes(data + data)
    os.rename(other, path)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
@pytest.mark.parametrize("change", [rewrite, replace])
def test_no_torn_file(kind: str, change: Callable[[Path, int, int], None]) -> None:
    with file_system(kind) as base:
        stack = Stack(base, n_lowers=1)
        with Layerfs(stack) as mount:
            for name, half in HALVES.items():
                (mount.mnt / name).write_bytes(bytes(2 * half))
            stop = threading.Event()
            turns = dict.fromkeys(HALVES, 0)

            def write(name: str, half: int) -> None:
                while not stop.is_set():
                    change(mount.mnt / name, half, turns[name])
                    turns[name] += 1

            writers = [threading.Thread(target=write, args=item) for item in HALVES.items()]
            for writer in writers:
                writer.start()
            try:
                for _ in range(4):
                    check(commit(mount))
            finally:
                stop.set()
                for writer in writers:
                    writer.join()
        assert min(turns.values()) > 4, "nobody wrote"


def commit(mount: Layerfs) -> bytes:
    done = subprocess.run([*layerfs_command(), "commit", mount.mnt], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(layer: bytes) -> None:
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        found = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
    for name in HALVES:
        file = found.get(name)
        assert file is not None, f"{name} was there all the time"
        data = file.read()
        assert len(data) % 2 == 0 and len(set(data)) == 1, f"{name} is torn"
