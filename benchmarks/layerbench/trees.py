"""Makes the tree that is packed, the same at every run, and compares what was unpacked with it. Times
nothing."""

from __future__ import annotations

import os
import random
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

FILES_PER_DIRECTORY = 40
_MEBI = 1 << 20


class Contents:
    """Bytes like those of an image: text and code, structured binary data, and some that is compressed
    already.

    Slices of pools that are larger than any compressor's window here, so that files do not compress by being
    copies of each other."""

    def __init__(self, choose: random.Random, pool_size: int) -> None:
        self._choose = choose
        self._pools = (_text(choose, pool_size), _binary(choose, pool_size), choose.randbytes(pool_size // 2))
        self._size = pool_size

    def give(self, size: int) -> Iterator[bytes]:
        (pool,) = self._choose.choices(self._pools, (60, 30, 10))
        while size > 0:
            start = self._choose.randrange(len(pool) - 4096)
            piece = pool[start : start + min(size, self._choose.randrange(4096, 200_000))]
            size -= len(piece)
            yield piece


def _text(choose: random.Random, size: int) -> bytes:
    letters, weights = "etaoinshrdlucmfwypvbgkjqxz_", range(27, 0, -1)
    words = ["".join(choose.choices(letters, weights, k=choose.randint(2, 11))) for _ in range(20_000)]
    spoken = choose.choices(words, [1 / rank for rank in range(1, len(words) + 1)], k=size // 5)
    marks = choose.choices((" ", " ", " ", " ", ", ", ".\n", "(", ")\n    ", " = "), k=size // 5)
    return "".join([part for pair in zip(spoken, marks, strict=True) for part in pair])[:size].encode()


def _binary(choose: random.Random, size: int) -> bytes:
    """Records of counters, small numbers and a few random bytes."""
    records = (
        struct.pack("<IHHq8s", at, choose.randrange(40), choose.randrange(4), at * 64, choose.randbytes(3))
        for at in range(size // 24)
    )
    return b"".join(records)


def make(tree: Path, files: int, size: int) -> None:
    """`files` files of together about `size` bytes: most are small, a few large, as in a root file system."""
    choose = random.Random(7)
    contents = Contents(choose, min(48 * _MEBI, max(2 * _MEBI, size // 8)))
    sizes = [choose.lognormvariate(0, 1.7) for _ in range(files)]
    scale = size / sum(sizes)
    tree.mkdir()
    directories = [tree]
    deepest = len(tree.parts) + 5
    for number, share in enumerate(sizes):
        if number % FILES_PER_DIRECTORY == 0:
            parent = choose.choice([tree, *(one for one in directories[-300:] if len(one.parts) < deepest)])
            directory = parent / f"directory-{number // FILES_PER_DIRECTORY:05}"
            directory.mkdir()
            directories.append(directory)
        path = directory / f"file-{number:06}.{choose.choice(('txt', 'py', 'so', 'html', 'mo'))}"
        with open(path, "wb") as file:
            file.writelines(contents.give(int(share * scale)))
        path.chmod(0o755 if number % 9 == 0 else 0o644)
        if number % 25 == 0:
            (directory / f"link-{number:06}").symlink_to(path.name)
        if number % 100 == 0:
            (directory / f"name-{number:06}").hardlink_to(path)
        _set_time(path, choose)
    for directory in reversed(directories):
        _set_time(directory, choose)


def _set_time(path: Path, choose: random.Random) -> None:
    at = choose.randrange(1_500_000_000, 1_790_000_000) * 10**9 + choose.randrange(10**9)
    os.utime(path, ns=(at, at))


def difference(tree: Path, other: Path, *, seconds: bool) -> str | None:
    """The first name in which two trees differ (owners, modes, times, links, contents); None: they are equal.

    `seconds`: times may have been rounded. The times of symbolic links and the roots are not
    compared."""
    ours, theirs = sorted(os.listdir(tree)), sorted(os.listdir(other))
    if ours != theirs:
        return f"{tree}: names {sorted(set(ours) ^ set(theirs))[:3]}"
    for name in ours:
        a, b = tree / name, other / name
        left, right = a.lstat(), b.lstat()
        if _told(left) != _told(right):
            return f"{name}: {_told(left)} became {_told(right)}"
        if not stat.S_ISLNK(left.st_mode):
            off = abs(left.st_mtime_ns - right.st_mtime_ns)
            if off > (10**9 if seconds else 0):
                return f"{name}: its time is off by {off} ns"
        if stat.S_ISDIR(left.st_mode):
            below = difference(a, b, seconds=seconds)
            if below is not None:
                return below
        elif stat.S_ISLNK(left.st_mode):
            if a.readlink() != b.readlink():
                return f"{name}: its target"
        elif a.read_bytes() != b.read_bytes():
            return f"{name}: its contents"
    return None


def _told(st: os.stat_result) -> tuple[int, ...]:
    size, links = (0, 0) if stat.S_ISDIR(st.st_mode) else (st.st_size, st.st_nlink)
    return st.st_mode, st.st_uid, st.st_gid, size, links
