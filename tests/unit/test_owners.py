"""Maps of owners: pure rules. What a mount makes of them: tests/overlay/test_owners.py."""

from __future__ import annotations

import struct
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfs.errors import UsageError
from layerfs.overlay import acl
from layerfs.overlay.options import parse_options
from layerfs.overlay.owners import CAPABILITY, IdMap, IdRange, Owners, parse_ranges

IDS = st.integers(0, 2**32 - 2)
#: 0..999 -> 100000.., 1000 -> 5000, 1001..65535 -> 101001..
MAP = IdMap((IdRange(0, 100_000, 1000), IdRange(1000, 5000, 1), IdRange(1001, 101_001, 64_535)))


@given(IDS)
def test_a_shown_id_is_stored_as_what_it_came_from(stored: int) -> None:
    if stored < 65_536:
        assert MAP.stored(MAP.shown(stored)) == stored
    else:
        assert MAP.shown(stored) == 65_534


@given(IDS)
def test_what_can_be_stored_is_shown_again(shown: int) -> None:
    stored = MAP.stored(shown)
    if stored is not None:
        assert MAP.shown(stored) == shown


@given(IDS)
def test_no_map_and_squash(some: int) -> None:
    assert IdMap().shown(some) == some == IdMap().stored(some)
    squash = IdMap(MAP.ranges, 7)
    assert squash.shown(some) == 7
    assert squash.mapped(some) == MAP.shown(some)
    assert squash.stored(some) == MAP.stored(some)


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        (":0:100000:65536", (IdRange(0, 100_000, 65_536),)),
        ("0:1000:1:1:100000:65536", (IdRange(0, 1000, 1), IdRange(1, 100_000, 65_536))),
    ],
)
def test_ranges(text: str, ranges: tuple[IdRange, ...]) -> None:
    assert parse_ranges("uidmapping", text) == ranges


@pytest.mark.parametrize(
    "text", ["", ":", "0:1", "0:1:2:3", "a:1:2", "-1:0:1", "0:0:0", "0:1:4294967295", "0::1"]
)
def test_bad_ranges(text: str) -> None:
    with pytest.raises(UsageError):
        parse_ranges("uidmapping", text)


@pytest.mark.parametrize(
    "text", ["squash_to_uid", "squash_to_gid=-1", "squash_to_uid=4294967295", "uidmapping"]
)
def test_bad_options(text: str) -> None:
    with pytest.raises(UsageError):
        parse_options([text])


def test_options() -> None:
    assert not parse_options(["ro"]).owners
    said = parse_options(["uidmapping=:0:10:5,gidmapping=1:2:3"]).owners
    assert said == Owners(IdMap((IdRange(0, 10, 5),)), IdMap((IdRange(1, 2, 3),)))
    assert parse_options(["squash_to_root"]).owners == Owners(IdMap(squash=0), IdMap(squash=0))
    assert parse_options(["squash_to_uid=3"]).owners == Owners(IdMap(squash=3), IdMap())
    assert Owners.from_dict(asdict(said)) == said


def entry(tag: int, permissions: int, id: int = 0xFFFFFFFF) -> bytes:
    return struct.pack("<HHI", tag, permissions, id)


def test_acl() -> None:
    """Named users and groups are mapped; the others hold no id (posix_acl_xattr.h: ACL_UNDEFINED_ID)."""
    base = (entry(1, 6), entry(4, 4), entry(0x10, 7), entry(0x20, 4))
    value = struct.pack("<I", 2) + base[0] + entry(2, 5, 7) + base[1] + entry(8, 6, 1000) + base[2] + base[3]
    shown = (
        struct.pack("<I", 2)
        + base[0]
        + entry(2, 5, 100_007)
        + base[1]
        + entry(8, 6, 5000)
        + base[2]
        + base[3]
    )
    owners = Owners(MAP, MAP)
    assert owners.shown_xattr(acl.ACCESS, value) == shown
    assert owners.stored_xattr(acl.DEFAULT, shown) == value
    assert owners.stored_xattr(acl.ACCESS, value) is None, "nothing is shown as user 7"
    assert owners.shown_xattr("user.x", value) == value
    assert owners.shown_xattr(acl.ACCESS, b"no ACL") == b"no ACL"


def test_file_capability() -> None:
    """vfs_cap_data, for root 0, becomes vfs_ns_cap_data for the root that is shown (linux/capability.h)."""
    sets = bytes(range(16))
    short = struct.pack("<I", 0x02000001) + sets
    long = struct.pack("<I", 0x03000001) + sets + struct.pack("<I", 100_000)
    owners = Owners(MAP, MAP)
    assert owners.shown_xattr(CAPABILITY, short) == long
    assert owners.stored_xattr(CAPABILITY, long) == short
    assert owners.stored_xattr(CAPABILITY, short) is None, "root of the host is nobody here"
    other = struct.pack("<I", 0x03000000) + sets + struct.pack("<I", 1000)
    assert owners.shown_xattr(CAPABILITY, other) == other[:20] + struct.pack("<I", 5000)
    assert owners.shown_xattr(CAPABILITY, b"odd") == b"odd"
