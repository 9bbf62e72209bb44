"""A disk that can be stopped: an ext4 on a loop device whose image lies in a small FUSE file system, which
answers writes only while the valve is open. So "this takes long" can be asked for, whatever the machine's
disks.

Run as a program it is that file system: `valve.py IMAGE MOUNTPOINT CLOSED`; while the file CLOSED exists,
writes and syncs wait.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_SIZE = 192 << 20


class Valve:
    """`dir`: a directory on the disk."""

    def __init__(self, base: Path) -> None:
        self._closed = base / "closed"
        self._mount = base / "valve"
        self.dir = base / "disk"
        image = base / "image"
        for path in (self._mount, self.dir):
            path.mkdir()
        with open(image, "wb") as file:
            file.truncate(_SIZE)
        subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True, timeout=60)
        self._process = subprocess.Popen(
            [sys.executable, __file__, image, self._mount, self._closed], cwd="/"
        )
        try:
            deadline = time.monotonic() + 20
            while not (self._mount / "image").exists():
                assert self._process.poll() is None and time.monotonic() < deadline, (
                    "the valve does not start"
                )
                time.sleep(0.01)
            subprocess.run(
                ["mount", "-o", "loop,noatime", self._mount / "image", self.dir],
                check=True,
                capture_output=True,
                timeout=60,
            )
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def shut(self) -> None:
        """From now on nothing reaches the disk."""
        self._closed.touch()

    def open(self) -> None:
        self._closed.unlink(missing_ok=True)

    def close(self) -> None:
        self.open()
        subprocess.run(["umount", self.dir], check=True, timeout=60)
        deadline = time.monotonic() + 20
        # The loop device lets go of its file a moment after its file system is gone.
        while subprocess.run(["umount", self._mount], capture_output=True, timeout=60).returncode:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self._process.wait(20)


def _serve(image: str, mountpoint: str, closed: str) -> None:
    import pyfuse3
    import trio

    fd = os.open(image, os.O_RDWR)

    async def passes() -> None:
        while os.path.exists(closed):
            await trio.sleep(0.005)

    class Disk(pyfuse3.Operations):
        async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_mode = stat.S_IFDIR | 0o700 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o600
            entry.st_nlink = 1
            entry.st_size = _SIZE
            entry.st_blksize = 4096
            return entry

        async def lookup(self, parent: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
            if name != b"image":
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(2)

        async def setattr(
            self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any
        ) -> pyfuse3.EntryAttributes:
            return await self.getattr(inode)

        async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
            return pyfuse3.FileInfo(fh=2)

        async def read(self, fh: int, off: int, size: int) -> bytes:
            return os.pread(fd, size, off)

        async def write(self, fh: int, off: int, buf: bytes) -> int:
            await passes()
            return os.pwrite(fd, buf, off)

        async def fsync(self, fh: int, datasync: bool) -> None:
            await passes()

    pyfuse3.init(Disk(), mountpoint, {"fsname=valve", *pyfuse3.default_options})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
