"""Where the model tests keep their layers: an ext4 of their own, in memory if possible."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.stack import scratch_root


@pytest.fixture(scope="session")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory on a journalling ext4 with an UUID. Gone at the end of the session."""
    if mounts.why_not_root() or not shutil.which("mkfs.ext4"):
        yield scratch_root()
        return
    # Not below the scratch directory: a mount there counts as left behind by a test.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    top = Path(tempfile.mkdtemp(prefix="layerfs-model-", dir=memory))
    image, point = top / "image", top / "ext4"
    point.mkdir()
    try:
        with image.open("wb") as f:
            f.truncate(512 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-N", "65536", image], check=True, capture_output=True)
        if subprocess.run(["mount", "-o", "loop", image, point], check=False, capture_output=True).returncode:
            yield scratch_root()  # no loop devices here
            return
        os.chmod(top, 0o755)
        os.chmod(point, 0o755)
        try:
            yield point
        finally:
            mounts.umount(point)
    finally:
        shutil.rmtree(top)
