"""The origin xattr: our codec against the bytes that the kernel writes, and what may stand there instead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfs.fdutil import fs_uuid, name_to_handle
from layerfs.overlay import origin
from layerfs.overlay.origin import Origin
from tests.support.mounts import KernelOverlay
from tests.support.stack import Stack

origins = st.builds(
    Origin, st.binary(min_size=16, max_size=16), st.integers(0, 255), st.binary(max_size=255 - 21)
)


@given(origins)
def test_inverse(value: Origin) -> None:
    encoded = origin.encode(value)
    assert encoded is not None
    assert origin.decode(encoded) == value


@given(st.binary(max_size=64))
def test_anything_may_stand_there(value: bytes) -> None:
    found = origin.decode(value)
    if found is not None:
        origin.real_ino(found)


@pytest.mark.parametrize(
    "wrong",
    [Origin(bytes(16), 256, b""), Origin(bytes(16), -1, b""), Origin(bytes(16), 1, bytes(235))],
    ids=["type", "negative", "long"],
)
def test_what_cannot_be_stored(wrong: Origin) -> None:
    assert origin.encode(wrong) is None


GOOD = b"\0\xfb\x1d\0\1" + bytes(range(16)) + b"\x0c\0\0\0\1\2\3\4"
MALFORMED = {
    "empty": b"",
    "short": GOOD[:20],
    "version": b"\1" + GOOD[1:],
    "magic": b"\0\xfc" + GOOD[2:],
    "length too small": GOOD[:2] + b"\x1c" + GOOD[3:],
    "length too big": GOOD[:2] + b"\x1e" + GOOD[3:],
    "cut": GOOD[:-1],
    "other byte order": GOOD[:3] + b"\1" + GOOD[4:],
}


def test_good() -> None:
    found = origin.decode(GOOD)
    assert found == Origin(bytes(range(16)), 1, GOOD[21:])
    assert origin.real_ino(found) == 12


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED)
def test_malformed(value: bytes) -> None:
    assert origin.decode(value) is None


def test_as_the_kernel_writes_it(on_each: Path, kernel_overlay: None) -> None:
    stack = Stack(on_each)
    lower = stack.lowers[0]
    (lower / "file").write_text("x")
    (lower / "dir").mkdir()
    (lower / "dir" / "in").write_text("x")
    with KernelOverlay(stack) as mount:
        os.chmod(mount.mnt / "file", 0o600)
        os.chmod(mount.mnt / "dir", 0o700)
        os.chmod(mount.mnt / "dir" / "in", 0o600)
    assert stack.upper is not None
    for name in ("file", "dir", "dir/in"):
        written = os.getxattr(stack.upper / name, "trusted.overlay.origin")
        if not written:
            pytest.skip("the kernel writes no origin on this file system")
        found = origin.decode(written)
        assert found is not None
        assert origin.real_ino(found) == (lower / name).stat().st_ino
        assert origin.encode(found) == written
        fd = os.open(lower, os.O_RDONLY)
        try:
            handle = name_to_handle(fd, name.encode())
            uuid = fs_uuid(fd)
        finally:
            os.close(fd)
        assert handle == (found.handle_type, found.handle)
        if uuid is not None:
            assert found.uuid == uuid, "the kernel wrote the UUID that we see"
