"""diff, commit and apply as commands, on live layerfs mounts and on directories."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.control import mounts as control
from layerfs.errors import MountError, UsageError
from tests.oci import members as m
from tests.oci.test_commit import Worker, apply, check_layout, populate
from tests.support.mounts import Layerfs, layerfs_command, why_no_layerfs
from tests.support.stack import Stack as Dirs
from tests.support.stack import scratch_root
from tests.support.tree import assert_equal, lowers_guard, snapshot

live = pytest.mark.skipif(bool(why_no_layerfs()), reason=str(why_no_layerfs()))
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (other users)")


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="live-", dir=scratch_root()))
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


def run(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [os.fspath(word) for word in (*layerfs_command(), *words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done
    if code:
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"layerfs {words[0]}: "), (
            done.stderr
        )
    return done


@live
@pytest.mark.parametrize("seed", range(8))
def test_commit_of_a_live_mount_is_what_the_mount_shows(place: Path, seed: int) -> None:
    dirs = Dirs(place, 3)
    for number, lower in enumerate(dirs.lowers):
        populate(lower, seed * 3 + number)
    target = place / "target"
    with lowers_guard(dirs.lowers), Layerfs(dirs) as mount:
        subprocess.run(["cp", "-a", str(dirs.mnt), str(target)], check=True)
        worker = Worker(dirs.mnt, seed)
        for _ in range(25):
            worker.step()
        run("commit", dirs.mnt, "-o", place / "layer.tar.gz", "--compression", "gzip")
        mount.remount()
        merged = snapshot(dirs.mnt)
        # By path, unmounted or not, it is the same layer.
        lowers = [word for lower in dirs.lowers for word in ("--lower", lower)]
        assert dirs.upper is not None
        run("commit", "--upper", dirs.upper, *lowers, "-o", place / "again.tar.gz", "--compression", "gzip")
    assert (place / "again.tar.gz").read_bytes() == (place / "layer.tar.gz").read_bytes()
    check_layout(place / "layer.tar.gz")
    apply(place / "layer.tar.gz", target)
    assert_equal(merged, snapshot(target), labels=("mount", "applied"))


@live
@root
@pytest.mark.parametrize("seed", range(3))
def test_commit_by_an_ordinary_user(place: Path, seed: int) -> None:
    if why := why_no_layerfs(65534):
        pytest.skip(why)
    who = (65534, 65534)
    dirs = Dirs(place, 2, owner=who)
    for number, lower in enumerate(dirs.lowers):
        populate(lower, seed * 3 + number)
        subprocess.run(["chown", "-hR", "65534:65534", str(lower)], check=True)
    target = place / "target"
    with Layerfs(dirs, as_user=who) as mount:
        subprocess.run(["cp", "-a", str(dirs.lowers[1]), str(target)], check=True)
        subprocess.run(["cp", "-aT", str(dirs.lowers[0]), str(target)], check=True)
        done = mount.run("python3", "-c", _RENAMES, dirs.mnt)
        assert done.returncode == 0, done.stderr
        out = dirs.dir / "layer.tar"
        done = mount.run(*layerfs_command(), "commit", dirs.mnt, "-o", out)
        assert done.returncode == 0, done.stderr
        done = mount.run(*layerfs_command(), "diff", dirs.mnt)
        assert {"D /d1", "A /moved", "C /fixed/a"} <= set(done.stdout.splitlines()), done
        # root sees the same layer through the mount's own word for it
        if os.path.exists(out):
            again = dirs.dir / "again.tar"
            run(
                "commit",
                "--upper",
                dirs.upper or "",
                "--lower",
                dirs.lowers[0],
                "--lower",
                dirs.lowers[1],
                "-o",
                again,
            )
            assert again.read_bytes() == out.read_bytes()
        done = mount.run("python3", "-c", _SNAPSHOT, dirs.mnt)
        merged = done.stdout
    apply(out, target)
    told = subprocess.run(
        ["python3", "-c", _SNAPSHOT, str(target)], capture_output=True, text=True, check=True
    )
    assert told.stdout == merged


_RENAMES = """
import os, sys
os.chdir(sys.argv[1])
os.rename("d1", "moved")
os.chmod("fixed/a", 0o600)
os.rename("moved/s1", "d2/s1")
open("new", "w").write("1")
os.link("new", "new2")
os.setxattr("new", "user.k", b"v")
os.symlink("x", "sym")
"""
_SNAPSHOT = """
import os, sys
os.chdir(sys.argv[1])
for where, names, files in sorted(os.walk(".")):
    for name in sorted(names + files):
        path = os.path.join(where, name)
        st = os.lstat(path)
        data = open(path, "rb").read() if os.path.isfile(path) and not os.path.islink(path) else b""
        print(path, oct(st.st_mode), st.st_uid, st.st_mtime_ns, data)
"""


@live
def test_describe(place: Path) -> None:
    dirs = Dirs(place, 3)
    with Layerfs(dirs) as mount:
        info = control.describe(str(dirs.mnt))
        assert info.pid in mount.pids()
        assert info.lowers == tuple(map(str, dirs.lowers))
        assert (info.upper, info.work, info.volatile) == (str(dirs.upper), str(dirs.work), False)
        assert info.prefix in ("trusted.overlay.", "user.overlay.")
        with pytest.raises(MountError, match="not the root of a layerfs mount"):
            control.describe(str(dirs.lowers[0]))
        (dirs.mnt / "d").mkdir()
        with pytest.raises(MountError, match="not the root of a layerfs mount"):
            control.describe(str(dirs.mnt / "d"))
        with pytest.raises(MountError, match="no such"):
            control.describe(str(place / "absent"))
        with pytest.raises(UsageError):
            control.open_layers(str(dirs.mnt), str(dirs.upper), [], durable=False)
        mount.kill()
        with pytest.raises(MountError, match="dead mount"):
            control.describe(str(dirs.mnt))


@live
@root
def test_a_stranger_is_told_nothing(place: Path) -> None:
    if why := why_no_layerfs(65534):
        pytest.skip(why)
    dirs = Dirs(place, 1)
    with Layerfs(dirs):
        words = [*layerfs_command(), "diff", str(dirs.mnt)]
        done = subprocess.run(words, capture_output=True, text=True, user=65534, group=65534, extra_groups=[])
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and str(dirs.upper) not in done.stderr


@live
def test_a_mount_without_an_upper(place: Path) -> None:
    dirs = Dirs(place, 1, writable=False)
    with Layerfs(dirs):
        assert "without an upper" in run("diff", dirs.mnt, code=1).stderr
        assert "without an upper" in run("commit", dirs.mnt, "-o", place / "x", code=1).stderr
    assert not (place / "x").exists()


@live
def test_a_mount_on_its_own_lower(place: Path) -> None:
    dirs = Dirs(place, 1)
    dirs.mnt = dirs.lowers[0]
    (dirs.lowers[0] / "f").write_text("1")
    with Layerfs(dirs):
        (dirs.mnt / "g").write_text("2")
        assert "covered by the mount" in run("diff", dirs.mnt, code=1).stderr


@live
def test_stores_through_a_mapping_are_committed(place: Path) -> None:
    """They reach the daemon only when the kernel writes them back: commit makes it do so."""
    dirs = Dirs(place, 1)
    (dirs.lowers[0] / "low").write_bytes(b"l" * 5000)
    with Layerfs(dirs):
        (dirs.mnt / "up").write_bytes(b"u" * 5000)
        with open(dirs.mnt / "low", "r+b") as low, open(dirs.mnt / "up", "r+b") as up:
            with mmap.mmap(low.fileno(), 5000) as one, mmap.mmap(up.fileno(), 5000) as two:
                one[4500:4503] = two[4500:4503] = b"new"
                run("commit", dirs.mnt, "-o", place / "layer.tar")
    data = {member.name: data for member, data in m.read_bytes((place / "layer.tar").read_bytes())}
    assert data[b"low"] == b"l" * 4500 + b"new" + b"l" * 497
    assert data[b"up"] == b"u" * 4500 + b"new" + b"u" * 497


@live
def test_names_that_are_hard_to_show(place: Path) -> None:
    dirs = Dirs(place, 1)
    (dirs.lowers[0] / "gone").write_text("")
    hard = [b"\xff\xfe", b"new\nline", b"back\\slash", "grün".encode(), b"\x1b[31m", "\u0085".encode()]
    with Layerfs(dirs):
        (dirs.mnt / "gone").unlink()
        for name in hard:
            with open(os.fsencode(dirs.mnt) + b"/" + name, "wb"):
                pass
        lines = run("diff", dirs.mnt).stdout.splitlines()
        told = json.loads(run("diff", "--json", dirs.mnt).stdout)
    assert sorted(lines) == sorted(
        [
            "D /gone",
            "A /\\xff\\xfe",
            "A /new\\nline",
            "A /back\\\\slash",
            "A /grün",
            "A /\\x1b[31m",
            "A /\\u0085",
        ]
    )
    assert {os.fsencode(entry["path"])[1:] for entry in told if entry["kind"] == "A"} == set(hard)
    assert {entry["kind"]: entry.get("type") for entry in told} == {"A": "file", "D": None}


def test_commit_says_what_it_wrote(place: Path) -> None:
    upper, lower = place / "upper", place / "lower"
    for path in (upper, lower):
        path.mkdir()
    (upper / "f").write_text("x" * 5000)
    layers = ("--upper", upper, "--lower", lower)
    done = run("commit", *layers, "-o", place / "l.tar")
    digest = hashlib.sha256((place / "l.tar").read_bytes()).hexdigest()
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"DiffID   sha256:{digest}",
        f"Digest   sha256:{digest}",
        f"Size     {(place / 'l.tar').stat().st_size:,} bytes (5,000 in files)",
        "Changes  1 added, 0 changed, 0 deleted",
    ]
    done = run("commit", *layers, "--json", "--compression", "gzip", "-o", place / "l.tgz")
    told = json.loads(done.stdout)
    assert told["diff_id"] == f"sha256:{digest}"
    assert told["digest"] == "sha256:" + hashlib.sha256((place / "l.tgz").read_bytes()).hexdigest()
    assert (told["size"], told["added"]) == ((place / "l.tgz").stat().st_size, 1)
    assert [member.name for member, _ in m.read_bytes((place / "l.tgz").read_bytes())] == [b"", b"f"]
    for words in (("-o", "-"), ()):
        command = [os.fspath(word) for word in (*layerfs_command(), "commit", *layers, *words)]
        raw = subprocess.run(command, capture_output=True, check=True)
        assert raw.stdout == (place / "l.tar").read_bytes()
        assert digest.encode() in raw.stderr


def test_wrong_command_lines(place: Path) -> None:
    for words in (
        ("diff",),
        ("diff", "--upper", place),
        ("diff", "--lower", place),
        ("diff", place, "--upper", place, "--lower", place),
        ("commit", "--compression", "lzma", place),
        ("commit", "--upper", place, "--lower", place, "-o", place / "in-the-upper"),
        ("commit", "--upper", place, "--lower", place, "-o", "/absent/layer.tar"),
        ("apply", place),
        ("apply", "/absent.tar", place),
        ("apply", "/dev/null", place / "absent"),
    ):
        run(*words, code=2)
    for words in (
        ("diff", place),
        ("diff", "--upper", "/absent", "--lower", place),
        ("apply", "/dev/null", place),
    ):
        run(*words, code=1)
    assert os.listdir(place) == []
