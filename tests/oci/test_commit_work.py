"""What a commit costs hangs on the upper, not on the image below it: system calls are counted, no time is
taken."""

from __future__ import annotations

import collections
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")

_FILES = 100
#: Calls whose number hangs on how threads happen to meet, or on memory.
_NOT_COUNTED = {
    "futex",
    "mmap",
    "munmap",
    "brk",
    "madvise",
    "mprotect",
    "clock_nanosleep",
    "sched_yield",
    "restart_syscall",
}


def make_base(place: Path, directories: list[str]) -> None:
    for directory in directories:
        (place / directory).mkdir(parents=True)
        for number in range(_FILES):
            os.close(os.open(place / directory / f"file-{number:02}", os.O_CREAT | os.O_WRONLY, 0o644))


def traced_commit(upper: Path, lower: Path, layer: Path, log: Path) -> list[tuple[str, str]]:
    """(system call, the rest of the line) of everything that a commit does."""
    layerfs = [sys.executable, "-m", "layerfs", "commit", "--upper", str(upper), "--lower", str(lower)]
    subprocess.run(
        ["strace", "-f", "-s", "300", "-o", str(log), *layerfs, "-o", str(layer)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    called = (re.match(r"\d+ +([a-z]\w+)\((.*)", line) for line in log.read_text().splitlines())
    return [(match[1], match[2]) for match in called if match and match[1] not in _NOT_COUNTED]


def test_one_changed_file_over_a_hundred_thousand(tmp_path: Path) -> None:
    """1,000 directories of 100 files, three levels deep; one file differs. The same calls as over the one
    directory that holds it, give or take what reading longer listings takes, and no other name of the image
    is ever mentioned."""
    many = ["/".join(parts) for parts in itertools.product("abcdefghij", repeat=3)]
    make_base(tmp_path / "large", many)
    make_base(tmp_path / "small", ["a/a/a"])
    changed = tmp_path / "upper/a/a/a/file-07"
    changed.parent.mkdir(parents=True)
    changed.write_text("changed\n")

    calls = {}
    for base in ("large", "small"):
        layer = tmp_path / f"{base}.tar"
        calls[base] = traced_commit(tmp_path / "upper", tmp_path / base, layer, tmp_path / "log")
        with tarfile.open(layer) as tar:
            assert tar.getnames() == [".", "a", "a/a", "a/a/a", "a/a/a/file-07"]

    counts = {base: collections.Counter(call for call, _ in made) for base, made in calls.items()}
    difference = {
        call: counts["large"][call] - counts["small"][call] for call in counts["large"] | counts["small"]
    }
    assert sum(map(abs, difference.values())) <= 4, {call: n for call, n in difference.items() if n}

    named = {name for _, line in calls["large"] for name in re.findall(r'"([a-j])"', line)}
    assert named == {"a"}
    assert {name for _, line in calls["large"] for name in re.findall(r"file-\d\d", line)} == {"file-07"}
    shutil.rmtree(tmp_path / "large")  # pytest keeps what three runs leave


def test_a_deleted_directory_is_not_walked(tmp_path: Path) -> None:
    """A whiteout over 10,000 files: none of them is looked at."""
    make_base(tmp_path / "lower", [f"gone/d{number}" for number in range(100)])
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper/.wh.gone").touch()
    layer = tmp_path / "layer.tar"
    made = traced_commit(tmp_path / "upper", tmp_path / "lower", layer, tmp_path / "log")
    with tarfile.open(layer) as tar:
        assert ".wh.gone" in tar.getnames()
    assert not [line for _, line in made if re.search(r'"d\d+"|file-\d\d', line)]


def test_calls_for_each_file(tmp_path: Path) -> None:
    """open, fstat, flistxattr, read, close for a new file of an upper that nobody writes to, and no look at
    it before (an upper without marks is not searched for them)."""
    counts = []
    for number, files in enumerate((50, 250)):
        place = tmp_path / str(number)
        for name in ("upper/d", "lower"):
            (place / name).mkdir(parents=True)
        for file in range(files):
            (place / f"upper/d/file-{file:03}").write_bytes(b"x" * 1000)
        made = traced_commit(place / "upper", place / "lower", place / "layer.tar", tmp_path / "log")
        counts.append(collections.Counter(call for call, _ in made))
    more = {call: counts[1][call] - counts[0][call] for call in counts[1] | counts[0]}
    assert sum(more.values()) <= 200 * 5 + 10, {call: n for call, n in more.items() if n}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root looks for marks")
def test_marks_are_looked_for_where_there_is_one(tmp_path: Path) -> None:
    """A mark deep in the upper still tells under which prefix all of them are."""
    (tmp_path / "lower/a/b/c").mkdir(parents=True)
    (tmp_path / "lower/a/b/c/gone").touch()
    (tmp_path / "upper/a/b/c").mkdir(parents=True)
    (tmp_path / "upper/a/b/c/new").touch()
    os.setxattr(tmp_path / "upper/a/b/c", "user.overlay.opaque", b"y")
    layer = tmp_path / "layer.tar"
    traced_commit(tmp_path / "upper", tmp_path / "lower", layer, tmp_path / "log")
    with tarfile.open(layer) as tar:
        assert "a/b/c/.wh.gone" in tar.getnames()
