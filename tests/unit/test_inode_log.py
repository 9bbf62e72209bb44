"""The log of inode numbers: what was put is found after a restart, torn and foreign lines are not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.fdutil import OwnedFd
from layerfs.upper.inode_log import InodeLog


class Box:
    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "state").mkdir()
        (path / "objects").mkdir()
        self.state = OwnedFd(os.open(path / "state", os.O_RDONLY))
        self.objects = OwnedFd(os.open(path / "objects", os.O_RDONLY))

    @property
    def log(self) -> Path:
        return self.path / "state" / "inodes"

    def make(self, name: str) -> int:
        """A symbolic link, which can carry no user xattr; its inode number."""
        os.symlink("target", self.path / "objects" / name)
        return (self.path / "objects" / name).lstat().st_ino

    def get(self, name: str, real: int | None = None) -> int | None:
        real = (self.path / "objects" / name).lstat().st_ino if real is None else real
        return InodeLog(self.state).get(self.objects.fd, name.encode(), real)


@pytest.fixture
def box(ext4: Path) -> Iterator[Box]:
    yield Box(ext4)


def test_what_was_put_is_found_again(box: Box) -> None:
    log = InodeLog(box.state)
    assert not log
    for number in range(20):
        log.put(box.objects.fd, b"%d" % number, box.make(str(number)), 1000 + number)
    assert log
    for number in range(20):
        assert box.get(str(number)) == 1000 + number


def test_the_last_one_counts(box: Box) -> None:
    real = box.make("a")
    log = InodeLog(box.state)
    log.put(box.objects.fd, b"a", real, 1)
    log.put(box.objects.fd, b"a", real, 2)
    assert log.get(box.objects.fd, b"a", real) == 2
    assert box.get("a") == 2


def test_a_number_used_again_is_another_object(box: Box) -> None:
    """The handle holds the generation: the next file with the same inode number has no entry."""
    real = box.make("a")
    InodeLog(box.state).put(box.objects.fd, b"a", real, 77)
    for _ in range(50):
        os.unlink(box.path / "objects" / "a")
        if box.make("a") == real:
            break
    else:
        pytest.skip("this file system does not use the number again")
    assert box.get("a") is None


def test_renamed_it_is_the_same(box: Box) -> None:
    real = box.make("a")
    InodeLog(box.state).put(box.objects.fd, b"a", real, 77)
    os.rename(box.path / "objects" / "a", box.path / "objects" / "b")
    assert box.get("b") == 77


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_is_dropped(box: Box, cut: int) -> None:
    log = InodeLog(box.state)
    log.put(box.objects.fd, b"a", box.make("a"), 1001)
    log.put(box.objects.fd, b"b", box.make("b"), 1_000_000_002)
    os.truncate(box.log, box.log.stat().st_size - cut)
    assert box.get("a") == 1001
    assert box.get("b") is None


def test_after_a_torn_line_new_ones_are_found(box: Box) -> None:
    """A crash, a mount, more objects, and one more mount."""
    log = InodeLog(box.state)
    log.put(box.objects.fd, b"a", box.make("a"), 1001)
    log.put(box.objects.fd, b"b", box.make("b"), 1_000_000_002)
    os.truncate(box.log, box.log.stat().st_size - 4)
    log = InodeLog(box.state)
    log.put(box.objects.fd, b"c", box.make("c"), 1003)
    log.put(box.objects.fd, b"d", box.make("d"), 1004)
    assert (box.get("a"), box.get("c"), box.get("d")) == (1001, 1003, 1004)


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"x\n",
        b"1:00 2\n",
        b"1:00 -2 3\n",
        b"1:00 2 3 4\n",
        b"1:00 2 x\n",
        b"\0\0\0\n",
        b"\xff" * 300 + b"\n",
    ],
)
def test_nonsense_is_passed_over(box: Box, line: bytes) -> None:
    real = box.make("a")
    log = InodeLog(box.state)
    log.put(box.objects.fd, b"a", real, 1001)
    with open(box.log, "ab") as file:
        file.write(line)
    assert box.get("a") == 1001


def test_a_link_in_its_place_is_not_followed(box: Box) -> None:
    elsewhere = box.path / "elsewhere"
    elsewhere.write_text("")
    os.symlink(elsewhere, box.log)
    with pytest.raises(OSError):
        InodeLog(box.state).put(box.objects.fd, b"a", box.make("a"), 1)
    assert elsewhere.read_text() == ""
