"""What a new object inherits from a default ACL: the same as ext4 gives it, for every mode."""

from __future__ import annotations

import itertools
import os
import stat
import struct
from pathlib import Path

import pytest

from layerfs.overlay import acl

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 0x10, 0x20
NOBODY = 0xFFFFFFFF


def packed(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


DEFAULTS = {
    "plain": packed((USER_OBJ, 7, NOBODY), (GROUP_OBJ, 5, NOBODY), (OTHER, 5, NOBODY)),
    "plain, nothing": packed((USER_OBJ, 0, NOBODY), (GROUP_OBJ, 0, NOBODY), (OTHER, 0, NOBODY)),
    "plain, all": packed((USER_OBJ, 7, NOBODY), (GROUP_OBJ, 7, NOBODY), (OTHER, 7, NOBODY)),
    "masked plain": packed(
        (USER_OBJ, 7, NOBODY), (GROUP_OBJ, 7, NOBODY), (MASK, 4, NOBODY), (OTHER, 1, NOBODY)
    ),
    "a user": packed(
        (USER_OBJ, 6, NOBODY), (USER, 7, 1000), (GROUP_OBJ, 5, NOBODY), (MASK, 7, NOBODY), (OTHER, 4, NOBODY)
    ),
    "a group": packed(
        (USER_OBJ, 7, NOBODY), (GROUP_OBJ, 0, NOBODY), (GROUP, 6, 100), (MASK, 6, NOBODY), (OTHER, 0, NOBODY)
    ),
    "many": packed(
        (USER_OBJ, 5, NOBODY),
        (USER, 1, 1),
        (USER, 2, 2),
        (GROUP_OBJ, 3, NOBODY),
        (GROUP, 4, 3),
        (GROUP, 5, 4),
        (MASK, 3, NOBODY),
        (OTHER, 2, NOBODY),
    ),
}
MODES = [
    *(0o100 * a + 0o10 * b + c for a, b, c in itertools.product((0, 4, 6, 7), repeat=3)),
    0o4755,
    0o2755,
    0o1777,
]


@pytest.mark.parametrize("name", DEFAULTS)
def test_as_ext4(ext4: Path, name: str) -> None:
    parent = ext4 / "parent"
    parent.mkdir()
    os.setxattr(parent, acl.DEFAULT, DEFAULTS[name])
    umask = os.umask(0o077)  # it must not count where there is a default ACL
    try:
        for mode in MODES:
            new = parent / f"{mode:o}"
            os.mknod(new, stat.S_IFREG | mode)
            try:
                access: bytes | None = os.getxattr(new, acl.ACCESS)
            except OSError:
                access = None
            expected = (new.stat().st_mode, access)
            assert acl.inherit(DEFAULTS[name], stat.S_IFREG | mode) == expected, f"mode {mode:o}"
    finally:
        os.umask(umask)


def test_the_type_is_kept() -> None:
    mode, _ = acl.inherit(DEFAULTS["plain"], stat.S_IFDIR | 0o7777)
    assert mode == stat.S_IFDIR | 0o7755


@pytest.mark.parametrize(
    "value", [b"", b"\2", b"\2\0\0", b"\1\0\0\0", DEFAULTS["plain"][:-1], DEFAULTS["plain"] + b"\0"]
)
def test_what_is_no_acl(value: bytes) -> None:
    with pytest.raises(ValueError):
        acl.inherit(value, 0o644)
