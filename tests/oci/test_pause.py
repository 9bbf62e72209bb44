"""`commit --pause`: what is held, what is not, and that whoever holds can go at any moment."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.control.client import Connection
from layerfs.errors import MountError
from tests.oci import members as m
from tests.support import mounts
from tests.support.mounts import Layerfs, layerfs_command, why_no_layerfs
from tests.support.stack import Stack
from tests.support.tree import assert_equal, snapshot

pytestmark = pytest.mark.skipif(bool(why_no_layerfs()), reason=str(why_no_layerfs()))

PATIENCE = 30.0
#: Long enough for what is not held to be done, on a busy machine, in most runs: one that is too short lets a
#: fault pass, and never makes a false alarm.
MOMENT = 0.4


@pytest.fixture
def mounted(stack: Stack) -> Iterator[Layerfs]:
    (stack.lowers[0] / "low").write_text("low")
    (stack.lowers[0] / "big").write_bytes(b"b" * 300_000)
    (stack.lowers[0] / "dir").mkdir()
    with Layerfs(stack) as mount:
        (stack.mnt / "f").write_text("f")
        (stack.mnt / "empty").mkdir()
        yield mount


def connect(mount: Layerfs) -> Connection:
    return Connection(str(mount.mnt), str(mount.stack.work))


class Child:
    """A process that works in the mount: `code` sees `mnt`, and `said(TEXT)` and `heard()` to talk to us."""

    PRELUDE = """
import os, signal, sys
mnt = sys.argv[1] + "/"
def said(text): print(text, flush=True)
def heard(): return sys.stdin.readline()
class Signalled(Exception): pass
def on_signal(*_): raise Signalled
signal.signal(signal.SIGUSR1, on_signal)
"""

    def __init__(self, mount: Layerfs, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PRELUDE + code, str(mount.mnt)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def ended(self) -> int:
        code = self.process.wait(PATIENCE)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        return code


CHANGES = {
    "create": 'open(mnt + "new", "x").close()',
    "append": 'open(mnt + "f", "a").write("more")',
    "first append": 'open(mnt + "low", "a").write("more")',
    "open with truncation": 'os.open(mnt + "f", os.O_RDONLY | os.O_TRUNC)',
    "truncate": 'os.truncate(mnt + "big", 5)',
    "chmod": 'os.chmod(mnt + "low", 0o600)',
    "utime": 'os.utime(mnt + "dir", (1, 1))',
    "setxattr": 'os.setxattr(mnt + "f", "user.k", b"v")',
    "mkdir": 'os.mkdir(mnt + "newdir")',
    "symlink": 'os.symlink("x", mnt + "sym")',
    "mknod": 'os.mkfifo(mnt + "fifo")',
    "link": 'os.link(mnt + "f", mnt + "linked")',
    "unlink": 'os.unlink(mnt + "low")',
    "rmdir": 'os.rmdir(mnt + "empty")',
    "rename": 'os.rename(mnt + "f", mnt + "g")',
}
_TELLS = 'said("ready"); heard()\n'


def test_every_change_is_held_and_carried_out_later(mounted: Layerfs) -> None:
    """All at once: nothing of them is seen in the upper until the pause ends; then each is done."""
    assert mounted.stack.upper is not None
    children = {name: Child(mounted, _TELLS + code) for name, code in CHANGES.items()}
    for child in children.values():
        assert child.hear() == "ready"
    with connect(mounted) as paused:
        paused.pause()
        before = snapshot(mounted.stack.upper)
        # Reads are answered, of what was not known to the kernel, too; but not a listing where a change
        # waits, as the kernel keeps the directory's lock meanwhile.
        assert sorted(os.listdir(mounted.mnt)) == ["big", "dir", "empty", "f", "low"]
        for child in children.values():
            child.tell()
        time.sleep(MOMENT)
        assert_equal(before, snapshot(mounted.stack.upper))
        assert {name for name, child in children.items() if child.process.poll() is not None} == set()
        assert (mounted.mnt / "big").read_bytes() == b"b" * 300_000
    # Some of them meet each other's outcome (an append to what is renamed): what counts is that all are done.
    for child in children.values():
        child.ended()
    assert sorted(os.listdir(mounted.mnt)) != ["big", "dir", "empty", "f", "low"]
    assert (mounted.mnt / "big").stat().st_size == 5


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_each_change(mounted: Layerfs, name: str) -> None:
    assert mounted.stack.upper is not None
    child = Child(mounted, _TELLS + CHANGES[name])
    assert child.hear() == "ready"
    with connect(mounted) as paused:
        paused.pause()
        before = snapshot(mounted.stack.upper)
        child.tell()
        time.sleep(MOMENT)
        assert child.process.poll() is None
        assert_equal(before, snapshot(mounted.stack.upper))
    assert child.ended() == 0
    after = snapshot(mounted.stack.upper)
    assert after != before


WRITER = """
fd = os.open(mnt + "f", os.O_RDWR)
said("ready"); heard()
try:
    while True:
        os.pwrite(fd, b"x" * %d, 0)
        said("written") if not %d else None
except Signalled:
    said("interrupted")
"""


@pytest.mark.parametrize("size", [10, 4 << 20])
def test_a_write_that_is_held_ends_with_eintr(mounted: Layerfs, size: int) -> None:
    """A Python handler that raises is only run when write(2) comes back."""
    child = Child(mounted, WRITER % (size, 1))
    assert child.hear() == "ready"
    with connect(mounted) as paused:
        paused.pause()
        child.tell()
        time.sleep(MOMENT)
        child.process.send_signal(signal.SIGUSR1)
        assert child.hear() == "interrupted"
        assert child.ended() == 0
    assert (mounted.mnt / "f").read_text() == "f", "a held write was not carried out"


@pytest.mark.parametrize("code", ['os.unlink(mnt + "low")', 'os.pwrite(fd, b"x", 0)'])
def test_a_killed_process_is_gone_at_once(mounted: Layerfs, code: str) -> None:
    child = Child(mounted, 'fd = os.open(mnt + "f", os.O_RDWR)\n' + _TELLS + code)
    assert child.hear() == "ready"
    with connect(mounted) as paused:
        paused.pause()
        child.tell()
        time.sleep(MOMENT)
        child.process.kill()
        assert child.ended() == -signal.SIGKILL
    assert (mounted.mnt / "low").read_text() == "low" and (mounted.mnt / "f").read_text() == "f"


def test_a_killed_commit_lets_go(mounted: Layerfs) -> None:
    assert mounted.stack.upper is not None
    out = mounted.stack.dir / "pipe"
    os.mkfifo(out)
    command = [*layerfs_command(), "commit", "--pause", "-o", str(out), str(mounted.mnt)]
    commit = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        # It waits for somebody to read the pipe, which is after it has paused.
        writer = None
        for _ in range(200):
            writer = Child(mounted, 'os.mkdir(mnt + "tried%d" % os.getpid())')
            time.sleep(MOMENT)
            if writer.process.poll() is None:
                break
            writer.ended()
        assert writer is not None and writer.process.poll() is None, "it never paused"
    finally:
        commit.kill()
        commit.wait()
        assert commit.stderr is not None
        commit.stderr.close()
    assert writer.ended() == 0


HOLDER = """
import os, sys, time
from layerfs.control.client import Connection
connection = Connection(sys.argv[1], sys.argv[2])
with connection.held(int(sys.argv[3]), b"big") as found:
    print(found, flush=True)
    time.sleep(100)
"""
MAPPER = """
import mmap
file = open(mnt + "big", "r+b")
mapping = mmap.mmap(file.fileno(), 0)
said("mapped"); heard()
mapping[0] = 1
said("stored"); heard()
mapping.flush()
"""


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_leaves_nothing_held(mounted: Layerfs, sig: signal.Signals) -> None:
    """Though others have stored through a mapping of what it holds, and their pages wait to be written.

    One page: of many the kernel writes some back at once, and while these are held nobody may store."""
    (mounted.mnt / "big").write_bytes(bytes(16 << 20))
    mapper = Child(mounted, MAPPER)
    assert mapper.hear() == "mapped"
    assert mounted.stack.upper is not None and mounted.stack.work is not None
    inode = (mounted.stack.upper / "big").stat().st_ino
    words = [sys.executable, "-c", HOLDER, str(mounted.mnt), str(mounted.stack.work), str(inode)]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    mapper.tell()
    assert mapper.hear() == "stored"
    mapper.tell()
    time.sleep(MOMENT)
    assert mapper.process.poll() is None, "its pages are held"
    holder.send_signal(sig)
    assert holder.wait(PATIENCE) == -sig
    holder.stdout.close()
    assert mapper.ended() == 0


def test_the_mount_can_be_ended_while_paused(mounted: Layerfs) -> None:
    """What waits is carried out or fails; nothing that succeeded is lost; the pause ends with the mount."""
    child = Child(mounted, 'fd = os.open(mnt + "f", os.O_RDWR)\n' + _TELLS + 'os.pwrite(fd, b"x", 0)')
    other = Child(mounted, _TELLS + 'os.mkdir(mnt + "d")')
    assert child.hear() == other.hear() == "ready"
    with connect(mounted) as paused:
        paused.pause()
        child.tell()
        other.tell()
        time.sleep(MOMENT)
        mounted.kill(signal.SIGTERM)
        codes = (child.ended(), other.ended())
        with pytest.raises(MountError, match="cannot be asked"):
            paused.ask("ping")
    mounts.live.remove(mounted)  # it is unmounted already
    mounted.open()
    assert (mounted.mnt / "f").read_text() == "x" if codes[0] == 0 else codes[0] == 1
    assert (mounted.mnt / "d").is_dir() if codes[1] == 0 else codes[1] == 1


def test_a_pause_waits_for_the_copy_that_is_under_way(mounted: Layerfs) -> None:
    """What has begun is finished first, a copy-up included; pauses come one after the other."""
    (mounted.stack.lowers[0] / "huge").write_bytes(b"h" * (256 << 20))
    mounted.remount()
    child = Child(mounted, _TELLS + 'open(mnt + "huge", "r+b").write(b"x"); said("done")')
    assert child.hear() == "ready"
    child.tell()
    with connect(mounted) as paused, connect(mounted) as second:
        paused.pause()
        assert mounted.stack.upper is not None
        copied = mounted.stack.upper / "huge"
        assert not copied.exists() or copied.stat().st_size == 256 << 20
        before = snapshot(mounted.stack.upper)
        paused.close()
        second.pause()
        second.close()
    assert child.hear() == "done" and child.ended() == 0
    assert before is not None


def test_stores_through_a_mapping_wait_in_the_page_cache(mounted: Layerfs) -> None:
    """What was stored before the pause is in the layer; what is stored later is not, and is not lost."""
    path = mounted.mnt / "f"
    path.write_bytes(b"0" * 8192)
    out = mounted.stack.dir / "layer.tar"
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 8192) as mapping:
        mapping[:6] = b"before"
        done = commit(mounted, out, "--pause")
        assert done.returncode == 0, done
        found = {member.name: data for member, data in m.read_bytes(out.read_bytes())}
        assert found[b"f"][:8] == b"before00"
        with connect(mounted) as paused:
            paused.pause()
            mapping[4096:4100] = b"late"
            assert mounted.stack.upper is not None
            assert (mounted.stack.upper / "f").read_bytes()[4096:4100] == b"0000"
        mapping.flush()
    assert (mounted.stack.upper / "f").read_bytes()[4096:4100] == b"late"


def commit(mount: Layerfs, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*layerfs_command(), "commit", *options, "-o", str(out), str(mount.mnt)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 4)


def test_the_layer_must_not_go_into_the_mount(mounted: Layerfs) -> None:
    for options in ((), ("--pause",)):
        done = commit(mounted, mounted.mnt / "layer.tar", *options)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    with open(mounted.mnt / "layer.tar", "wb") as file:
        command = [*layerfs_command(), "commit", "--pause", str(mounted.mnt)]
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "lies in the mount" in done.stderr
    assert "layer.tar" not in [name for name in os.listdir(mounted.mnt) if name != "layer.tar"]


def test_only_a_mount_can_be_paused(stack: Stack) -> None:
    command = [
        *layerfs_command(),
        "commit",
        "--pause",
        "--upper",
        str(stack.upper),
        "--lower",
        str(stack.dir),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "only a mount can be paused" in done.stderr
