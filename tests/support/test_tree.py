"""Tests of the tree snapshots that the other tests stand on. No mounts here."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tree import assert_equal, differences, lowers_guard, snapshot

PAST = (1_000_000_000_000_000_001, 1_000_000_000_000_000_002)


def build(root: Path) -> Path:
    root.mkdir()
    (root / "d").mkdir(mode=0o750)
    (root / "d" / "f").write_bytes(b"hello")
    (root / "d" / "g").hardlink_to(root / "d" / "f")
    (root / "s").symlink_to("d/f")
    os.mkfifo(root / "p")
    with (root / "sparse").open("wb") as f:
        f.seek(1 << 20)
        f.write(b"x" * 4096)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "sock"))
    (root / os.fsdecode(b"n\xff\n")).write_bytes(b"")
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=PAST, follow_symlinks=False)
    os.utime(root, ns=PAST)
    return root


def test_snapshot_tells_what_is_there(tmp_path: Path) -> None:
    seen = snapshot(build(tmp_path / "a").as_posix(), holes=True)
    assert set(seen) == {b".", b"d", b"d/f", b"d/g", b"s", b"p", b"sparse", b"sock", b"n\xff\n"}
    assert (seen[b"d"].type, seen[b"d"].mode, seen[b"d"].size, seen[b"d"].nlink) == ("dir", 0o750, None, None)
    assert seen[b"d/f"].names == {b"d/f", b"d/g"} and seen[b"d/f"].nlink == 2 and seen[b"d/f"].size == 5
    assert seen[b"s"].target == b"d/f" and seen[b"p"].type == "fifo" and seen[b"sock"].type == "socket"
    assert all(entry.mtime_ns == PAST[1] for entry in seen.values())
    extents = seen[b"sparse"].extents
    assert extents is not None and sum(end - start for start, end in extents) < 1 << 20


def test_two_builds_are_equal(tmp_path: Path) -> None:
    a, b = snapshot(bytes(build(tmp_path / "a"))), snapshot(bytes(build(tmp_path / "b")))
    assert_equal(a, b)
    assert differences(a, b, strict=["ino"]) != []


def _append(root: Path) -> None:
    with (root / "d/f").open("ab") as f:
        f.write(b"!")
    os.utime(root / "d/f", ns=PAST)


def _unshare(root: Path) -> None:
    (root / "d/g").unlink()
    (root / "d/g").write_bytes(b"hello")
    for name in ("d/g", "d"):
        os.utime(root / name, ns=PAST)


def _fill_hole(root: Path) -> None:
    with (root / "sparse").open("r+b") as f:
        f.write(b"\0" * 8192)
    os.utime(root / "sparse", ns=PAST)


def _same_size(root: Path) -> None:
    (root / "d/f").write_bytes(b"HELLO")
    os.utime(root / "d/f", ns=PAST)


CHANGES: dict[str, Callable[[Path], None]] = {
    "size": _append,
    "names": _unshare,
    "extents": _fill_hole,
    "digest": _same_size,
    "mode": lambda root: os.chmod(root / "d", 0o2750),
    "mtime_ns": lambda root: os.utime(root / "p", ns=(PAST[0], PAST[1] + 1)),
    "xattrs": lambda root: os.setxattr(root / "d", b"user.a", b"1"),
    "nlink": lambda root: os.link(root / "p", root.parent / "outside"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_field_is_compared(tmp_path: Path, what: str) -> None:
    a, b = build(tmp_path / "a"), build(tmp_path / "b")
    CHANGES[what](b)
    before, after = snapshot(str(a), holes=True), snapshot(str(b), holes=True)
    assert any(f": {what}:" in line for line in differences(before, after))
    with pytest.raises(AssertionError, match=what):
        assert_equal(before, after)


def test_recent_times_are_one(tmp_path: Path) -> None:
    a, b = build(tmp_path / "a"), build(tmp_path / "b")
    now = 1_500_000_000_000_000_000
    os.utime(a / "p", ns=(now, now + 1))
    os.utime(b / "p", ns=(now, now + 2))
    assert_equal(snapshot(str(a)), snapshot(str(b)), recent_ns=now)
    os.utime(b / "p", ns=PAST)
    with pytest.raises(AssertionError, match="mtime_ns"):
        assert_equal(snapshot(str(a)), snapshot(str(b)), recent_ns=now)


def test_missing_and_retyped_names_are_told(tmp_path: Path) -> None:
    a, b = build(tmp_path / "a"), build(tmp_path / "b")
    (b / "s").unlink()
    (b / "p").unlink()
    (b / "p").mkdir()
    lines = differences(snapshot(str(a)), snapshot(str(b)), labels=("plain", "mount"))
    assert any("'s': only in plain" in line for line in lines)
    assert any("'p': plain: fifo" in line and "mount: dir" in line for line in lines)


def test_exclude_leaves_a_subtree_out(tmp_path: Path) -> None:
    seen = snapshot(str(build(tmp_path / "a")), exclude=[b"d"])
    assert b"s" in seen and not any(name.startswith(b"d") for name in seen)


def test_guard_lets_readers_through(tmp_path: Path) -> None:
    root = build(tmp_path / "a")
    with lowers_guard([str(root)]):
        (root / "d/f").read_bytes()
        os.listdir(root)


def test_guard_sees_a_change_that_was_undone(tmp_path: Path) -> None:
    root = build(tmp_path / "a")
    with pytest.raises(AssertionError, match="was changed"), lowers_guard([str(root)]):
        _same_size(root)
        (root / "d/f").write_bytes(b"hello")
        os.utime(root / "d/f", ns=PAST)


def test_guard_without_content_still_sees_writes(tmp_path: Path) -> None:
    root = build(tmp_path / "a")
    with pytest.raises(AssertionError, match="ctime_ns"), lowers_guard([str(root)], content=False):
        _same_size(root)
