"""Owner, mode and type in an xattr: the value's grammar, and a stat result with it in place."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfs.overlay import override
from layerfs.overlay.override import CONTAINERS, FUSE_OVERLAYFS, PRIVILEGED, Override, decode, encode

ids = st.integers(0, 2**32 - 2)
devices = st.builds(os.makedev, st.integers(0, 2**12 - 1), st.integers(0, 2**20 - 1))
overrides = st.one_of(
    st.builds(
        Override,
        ids,
        ids,
        st.integers(0, 0o7777),
        st.sampled_from([None, stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK]),
    ),
    st.builds(
        Override, ids, ids, st.integers(0, 0o7777), st.sampled_from([stat.S_IFBLK, stat.S_IFCHR]), devices
    ),
)


@given(overrides)
def test_what_is_written_is_read(value: Override) -> None:
    assert decode(encode(value)) == value


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (b"0:0:0755", Override(0, 0, 0o755)),
        (b"1000:33:04755:file", Override(1000, 33, 0o4755, stat.S_IFREG)),
        (b"5:6:0644:char-1-3", Override(5, 6, 0o644, stat.S_IFCHR, os.makedev(1, 3))),
        (b"5:6:0600:block-259-1048575", Override(5, 6, 0o600, stat.S_IFBLK, os.makedev(259, 1048575))),
        (b"0:0:0600:pipe", Override(0, 0, 0o600, stat.S_IFIFO)),
        (b"0:0:40755", Override(0, 0, 0o755)),  # as fuse-overlayfs 1.10 writes a directory's
        (b"0:0:100644", Override(0, 0, 0o644)),
        (b"0:0:644\0", Override(0, 0, 0o644)),
    ],
)
def test_forms(value: bytes, meaning: Override) -> None:
    assert decode(value) == meaning


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"0:0",
        b"0:0:",
        b"-1:0:755",
        b"0:0:0888",
        b"4294967295:0:755",
        b"99999999999:0:755",
        b"0:0:755:",
        b"0:0:755:door",
        b"0:0:755:char",
        b"0:0:755:char-1",
        b"0:0:755:char-4096-0",
        b"0:0:755:pipe-1-2",
        b"0:0:755 ",
        b"x" * 10_000,
    ],
)
def test_nonsense(value: bytes) -> None:
    assert decode(value) is None
    here = os.stat("/")
    assert override.apply(here, value) is here


def test_in_a_stat_result(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 5000)
    os.utime(path, ns=(123_456_789_012_345_678, 987_654_321_098_765_432))
    before = os.stat(path)
    after = override.apply(before, b"7:8:04711:char-5-1")
    assert stat.S_ISCHR(after.st_mode) and stat.S_IMODE(after.st_mode) == 0o4711
    assert (after.st_uid, after.st_gid, after.st_rdev) == (7, 8, os.makedev(5, 1))
    for name in ("st_ino", "st_dev", "st_nlink", "st_size", "st_blocks", "st_blksize"):
        assert getattr(after, name) == getattr(before, name)
    for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
        assert getattr(after, name) == getattr(before, name)
    assert override.of(after) == Override(7, 8, 0o4711, stat.S_IFCHR, os.makedev(5, 1))


def test_a_directory_stays_one_and_nothing_becomes_one(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert stat.S_ISDIR(override.apply(os.stat(tmp_path), b"0:0:755:file").st_mode)
    assert stat.S_ISREG(override.apply(os.stat(tmp_path / "f"), b"0:0:755:dir").st_mode)


@pytest.mark.parametrize(
    ("option", "present", "names"),
    [
        (1, [CONTAINERS], (PRIVILEGED,)),
        (2, [], (FUSE_OVERLAYFS, CONTAINERS)),
        (2, [CONTAINERS], (CONTAINERS, FUSE_OVERLAYFS)),
        (2, [FUSE_OVERLAYFS], (FUSE_OVERLAYFS, CONTAINERS)),
        (2, [CONTAINERS, FUSE_OVERLAYFS], (FUSE_OVERLAYFS, CONTAINERS)),
    ],
)
def test_names_of_an_upper(option: int, present: list[str], names: tuple[str, ...]) -> None:
    assert override.names_of_upper(option, present) == names
