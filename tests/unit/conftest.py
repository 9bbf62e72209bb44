"""File systems of known kinds for the tests that ask what the kernel does on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import mounts

KINDS = ("ext4", "xfs", "btrfs", "tmpfs")
_MIB = 1 << 20
_SIZES = {"ext4": 64 * _MIB, "xfs": 320 * _MIB, "btrfs": 160 * _MIB}


class Filesystems:
    """Mounts each kind at most once, on a sparse image file; outside the directory that is swept after
    every test.
    """

    def __init__(self) -> None:
        self._base = Path(tempfile.mkdtemp(prefix="layerfs-unit-", dir="/var/tmp"))
        self._mounted: dict[str, Path] = {}
        self._reasons: dict[str, str] = {}

    def get(self, kind: str) -> Path:
        """The mount point of a file system of that kind; skips the test where there can be none."""
        if kind not in self._mounted and kind not in self._reasons:
            point = self._base / kind
            point.mkdir()
            try:
                self._mount(kind, point)
                self._mounted[kind] = point
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", None)
                self._reasons[kind] = f"no {kind} here: {(said or str(error)).strip()}"
        if kind in self._reasons:
            pytest.skip(self._reasons[kind])
        return self._mounted[kind]

    def _mount(self, kind: str, point: Path) -> None:
        if kind == "tmpfs":
            mounts.mount("none", point, "tmpfs", 0, "size=64m")
            return
        image = self._base / f"{kind}.img"
        with open(image, "wb") as file:
            file.truncate(_SIZES[kind])
        for command in ([f"mkfs.{kind}", "-q", str(image)], ["mount", "-o", "loop", str(image), str(point)]):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)

    def close(self) -> None:
        for point in self._mounted.values():
            mounts.umount(point)
        shutil.rmtree(self._base)


@pytest.fixture(scope="session")
def filesystems() -> Iterator[Filesystems]:
    made = Filesystems()
    yield made
    made.close()


@pytest.fixture(params=KINDS)
def on_each(request: pytest.FixtureRequest, root: None, filesystems: Filesystems) -> Iterator[Path]:
    """An empty directory on each kind of file system."""
    here = Path(tempfile.mkdtemp(dir=filesystems.get(request.param)))
    yield here
    shutil.rmtree(here)


@pytest.fixture
def ext4(root: None, filesystems: Filesystems) -> Iterator[Path]:
    here = Path(tempfile.mkdtemp(dir=filesystems.get("ext4")))
    yield here
    shutil.rmtree(here)


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A descriptor of an empty directory."""
    fd = os.open(tmp_path_factory.mktemp("dir"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    yield fd
    os.close(fd)
