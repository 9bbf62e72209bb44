"""The journal of hard-link copy-ups: whatever a crash left, the next mount finishes it or there was nothing
to finish.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.fdutil import OwnedFd
from layerfs.overlay.names import TRUSTED, USER, XattrNames
from layerfs.upper import journal
from layerfs.upper.work import WorkDir

NAMES = XattrNames(TRUSTED if os.geteuid() == 0 else USER)


class Box:
    def __init__(self, base: Path) -> None:
        self.upper = base / "upper"
        self.work_path = base / "work"
        self.upper.mkdir()
        self.work_path.mkdir()
        (self.upper / "d").mkdir()
        (self.upper / "e").mkdir()
        self.root = OwnedFd(os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY))
        self.work = WorkDir(str(self.work_path), self.root, str(self.upper))

    def temporary(self, name: str = "#1") -> Path:
        path = self.work_path / "work" / name
        path.write_text("copy")
        return path

    def recover(self) -> None:
        journal.recover(self.work, self.root, NAMES)
        assert [name for name in os.listdir(self.work_path / "layerfs") if "links" in name] == []

    def record(self, text: str, name: str = "links.1") -> None:
        (self.work_path / "layerfs" / name).write_text(text)

    def names(self) -> list[str]:
        return sorted(
            str(path.relative_to(self.upper)) for path in self.upper.rglob("*") if not path.is_dir()
        )

    def close(self) -> None:
        self.root.close()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.close()


THREE = [(b"d", b"one"), (b"e", b"two"), (b"", b"three")]


@pytest.mark.parametrize("done", range(4))
def test_the_rest_is_linked(box: Box, done: int) -> None:
    """A crash after `done` of the links."""
    copy = box.temporary()
    journal.commit(box.work, journal.draft(box.work, b"#1", THREE, sync=True))
    for directory, name in THREE[:done]:
        os.link(copy, box.upper / os.fsdecode(directory) / os.fsdecode(name))
    box.recover()
    assert box.names() == ["d/one", "e/two", "three"]
    assert {(box.upper / name).stat().st_ino for name in box.names()} == {copy.stat().st_ino}


def test_after_the_last_step(box: Box) -> None:
    """The temporary is gone, the journal is not: all names are linked already."""
    copy = box.temporary()
    journal.commit(box.work, journal.draft(box.work, b"#1", THREE, sync=True))
    for directory, name in THREE:
        os.link(copy, box.upper / os.fsdecode(directory) / os.fsdecode(name))
    copy.unlink()
    box.recover()
    assert box.names() == ["d/one", "e/two", "three"]


def test_a_draft_is_no_journal(box: Box) -> None:
    box.temporary()
    box.record(json.dumps({"temporary": "#1", "names": [["", "a"]]}), ".links.1")
    box.recover()
    assert box.names() == []


def test_names_of_all_bytes(box: Box) -> None:
    box.temporary()
    odd = bytes(range(1, 47)) + bytes(range(48, 256))
    (box.upper / os.fsdecode(odd)).mkdir()
    journal.commit(box.work, journal.draft(box.work, b"#1", [(odd, odd)], sync=False))
    box.recover()
    assert (box.upper / os.fsdecode(odd) / os.fsdecode(odd)).read_text() == "copy"


def test_two_journals(box: Box) -> None:
    box.temporary("#1")
    box.temporary("#2")
    journal.commit(box.work, journal.draft(box.work, b"#1", [(b"d", b"a")], sync=False))
    journal.commit(box.work, journal.draft(box.work, b"#2", [(b"e", b"b")], sync=False))
    box.recover()
    assert box.names() == ["d/a", "e/b"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"temporary": 1, "names": []}',
        '{"temporary": "#1"}',
        '{"temporary": "#1", "names": 3}',
        '{"temporary": "#1", "names": [["d"]]}',
        '{"temporary": "#1", "names": [["d", 1]]}',
        '{"temporary": "#1", "names": [["\\u4e00", "a"]]}',
        '{"temporary": "#1", "names": [["d", "one"]',
        '{"temporary": "../../layerfs/inodes", "names": [["d", "one"]]}',
        '{"temporary": "#/../x", "names": [["d", "one"]]}',
        '{"temporary": "", "names": [["d", "one"]]}',
    ],
)
def test_nonsense_promises_nothing(box: Box, text: str) -> None:
    box.temporary()
    box.record(text)
    box.recover()
    assert box.names() == []


@pytest.mark.parametrize("directory", ["..", "../upper", "/", "/tmp", "d/../..", "link", "link/sub", "d/one"])
def test_nothing_is_linked_outside(box: Box, directory: str, tmp_path: Path) -> None:
    box.temporary()
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    os.symlink(outside, box.upper / "link")
    box.record(json.dumps({"temporary": "#1", "names": [[directory, "evil"]]}))
    try:
        box.recover()
    except OSError:
        pass  # a mount that is refused is fine, too
    assert [name for name in box.names() if "evil" in name] == []
    assert (
        not list(tmp_path.glob("evil")) and not list(outside.rglob("evil")) and not Path("/tmp/evil").exists()
    )


def test_a_name_that_is_taken_by_something_else_stays(box: Box) -> None:
    box.temporary()
    (box.upper / "d" / "one").write_text("newer")
    journal.commit(box.work, journal.draft(box.work, b"#1", [(b"d", b"one"), (b"e", b"two")], sync=True))
    box.recover()
    assert (box.upper / "d" / "one").read_text() == "newer"
    assert (box.upper / "e" / "two").read_text() == "copy"


def test_directories_are_as_the_copy_up_leaves_them(box: Box) -> None:
    """Marked to hold objects with a recorded number, their times not moved."""
    box.temporary()
    os.utime(box.upper / "d", ns=(1_000_000_001, 1_000_000_002))
    journal.commit(box.work, journal.draft(box.work, b"#1", [(b"d", b"one")], sync=True))
    box.recover()
    assert (box.upper / "d").stat().st_mtime_ns == 1_000_000_002
    assert os.getxattr(box.upper / "d", NAMES.impure) == b"y"
