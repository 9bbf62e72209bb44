"""`-o data=passthrough`: the kernel reads and writes files itself; never writes a lower, and nobody sees a
difference.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from layerfs.control.asking import Reader
from layerfs.control.client import Connection
from layerfs.control.statistics import Statistics
from layerfs.gate import passthrough
from tests.posix.calls import AT_FDCWD, AT_SYMLINK_FOLLOW, linkat
from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs
from tests.support.stack import Stack
from tests.support.tree import lowers_guard

OPTION = "data=passthrough"
BIG = b"0123456789abcdef" * 40_000
USER = 65534


@pytest.fixture(autouse=True)
def possible(root: None) -> None:
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)
    if reason := passthrough.obstacle():
        pytest.skip(f"no passthrough: {reason}")


@pytest.fixture
def mounted(stack: Stack) -> Iterator[Layerfs]:
    lower = stack.lowers[0]
    for name in ("low", "other", "linked"):
        (lower / name).write_bytes(BIG)
    os.link(lower / "linked", lower / "linked too")
    with lowers_guard(stack.lowers, ctime=False), Layerfs(stack, OPTION) as mount:
        (stack.mnt / "f").write_bytes(BIG)
        yield mount


@pytest.fixture
def read_only(stack: Stack) -> Iterator[Layerfs]:
    (stack.lowers[0] / "low").write_bytes(BIG)
    stack.upper = stack.work = None
    with lowers_guard(stack.lowers), Layerfs(stack, OPTION) as mount:
        yield mount


def asked(mount: Layerfs) -> Statistics:
    with Reader(str(mount.mnt)) as reader:
        return reader.read()


def moved(mount: Layerfs) -> int:
    """READs and WRITEs so far, by whoever answered them."""
    requests = asked(mount)["requests"]
    return sum(
        requests[kind]["native"] + requests[kind]["python"] for kind in ("read", "write") if kind in requests
    )


# -- nothing is asked of the daemon -------------------------------------------------------------------


def read(path: Path) -> None:
    assert path.read_bytes() == BIG


def write(path: Path) -> None:
    path.write_bytes(BIG[::-1])
    assert path.read_bytes() == BIG[::-1]


def append(path: Path) -> None:
    with open(path, "ab", buffering=0) as one, open(path, "ab", buffering=0) as two:
        assert (one.write(b"one"), two.write(b"two"), one.write(b"three")) == (3, 3, 5)
    assert path.read_bytes() == BIG + b"onetwothree"
    assert path.stat().st_size == len(BIG) + 11


def direct(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    with closing(mmap.mmap(-1, 8192)) as aligned:
        aligned[:] = b"d" * 8192
        try:
            assert os.pwritev(fd, [aligned], 4096) == 8192
        except OSError as error:
            pytest.skip(f"no O_DIRECT on this file system: {error}")
        aligned[:] = bytes(8192)
        assert os.preadv(fd, [aligned], 4096) == 8192 and aligned[:] == b"d" * 8192
    os.close(fd)
    assert path.read_bytes() == BIG[:4096] + b"d" * 8192 + BIG[12288:]


def synchronous(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_SYNC)
    assert os.pwrite(fd, b"sync", 8) == 4
    os.fsync(fd)
    os.close(fd)
    assert path.read_bytes()[8:12] == b"sync"


def mapped(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        shared[100:106] = b"stored"
        assert path.read_bytes()[100:106] == b"stored"
        os.pwrite(file.fileno(), b"written", 200)
        assert shared[200:207] == b"written"
    with open(path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
            private[0:7] = b"private"
            assert file.read(7) == BIG[:7] and private[100:106] == b"stored"


def sent(path: Path) -> None:
    copy = path.with_name("copy")
    with open(path, "rb") as source, open(copy, "wb") as target:
        at = 0
        while count := os.sendfile(target.fileno(), source.fileno(), at, 1 << 20):
            at += count
    assert copy.read_bytes() == BIG


def cut(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(1000)
        file.seek(2000)
        file.write(b"behind")
        file.flush()
        os.ftruncate(file.fileno(), 3000)
    os.truncate(path, 2500)
    assert path.read_bytes() == BIG[:1000] + bytes(1000) + b"behind" + bytes(494)


@pytest.mark.parametrize("volatile", [False, True], ids=["", "volatile"])
@pytest.mark.parametrize("work", [read, write, append, direct, synchronous, mapped, sent, cut])
def test_nothing_is_asked(stack: Stack, work: Callable[[Path], None], volatile: bool) -> None:
    if volatile and work is synchronous:
        pytest.skip("nothing is to reach the disk: cached")
    with Layerfs(stack, f"{OPTION},volatile" if volatile else OPTION) as mount:
        (mount.mnt / "f").write_bytes(BIG)
        before = moved(mount)
        work(mount.mnt / "f")
        assert moved(mount) == before
        assert before == 0


def test_o_sync_of_a_volatile_mount_is_cached(stack: Stack) -> None:
    with Layerfs(stack, f"{OPTION},volatile") as mount:
        (mount.mnt / "f").write_bytes(BIG)
        synchronous(mount.mnt / "f")
        assert moved(mount) > 0


def test_unnamed_files(mounted: Layerfs) -> None:
    before = moved(mounted)
    fd = os.open(mounted.mnt, os.O_TMPFILE | os.O_RDWR)
    assert os.pwrite(fd, BIG, 0) == len(BIG) and os.pread(fd, len(BIG), 0) == BIG
    linkat(AT_FDCWD, f"/proc/self/fd/{fd}", mounted.mnt / "named", AT_SYMLINK_FOLLOW)
    assert (mounted.mnt / "named").read_bytes() == BIG
    os.close(fd)
    assert moved(mounted) == before


def test_programs_run(mounted: Layerfs) -> None:
    shutil.copy2("/bin/true", mounted.mnt / "program")
    before = moved(mounted)
    assert subprocess.run([mounted.mnt / "program"]).returncode == 0
    assert moved(mounted) == before


def test_what_else_works_on_an_open_file(mounted: Layerfs) -> None:
    """fallocate, SEEK_HOLE, copy_file_range, fsync, locks, readahead."""
    with open(mounted.mnt / "f", "r+b", buffering=0) as file, open(mounted.mnt / "new", "w+b") as target:
        fd = file.fileno()
        os.posix_fallocate(fd, len(BIG), 4096)
        assert os.fstat(fd).st_size == len(BIG) + 4096
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        assert os.copy_file_range(fd, target.fileno(), len(BIG), 0, 0) == len(BIG)
        os.fdatasync(target.fileno())
        assert os.pread(target.fileno(), len(BIG) + 1, 0) == BIG


def test_stat_says_so(mounted: Layerfs) -> None:
    said = asked(mounted)["data"]
    assert said["mode"] == "passthrough" and said["why"].startswith("asked for")


# -- a read-only mount ---------------------------------------------------------------------------------


def test_a_read_only_mount_passes_all(read_only: Layerfs) -> None:
    path = read_only.mnt / "low"
    with open(path, "rb") as one, open(path, "rb") as two:
        assert one.read() == two.read() == BIG
        with mmap.mmap(one.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            assert mapping[:] == BIG
    said = asked(read_only)["requests"]
    assert "read" not in said
    assert said["open"]["native"] >= 2 and said["open"]["python"] == 0


def test_gate_and_python_open_one_file_the_same_way(stack: Stack) -> None:
    lower = stack.lowers[0]
    (lower / "low").write_bytes(BIG)
    stack.upper = stack.work = None
    with Layerfs(stack, OPTION) as mount:
        path = mount.mnt / "low"
        with open(path, "rb") as native:
            os.setxattr(lower / "low", "user.x", b"")  # from now on it is asked of Python
            os.getxattr(path, "user.x")
            with open(path, "rb") as python:
                assert native.read() == python.read() == BIG
            assert asked(mount)["requests"]["open"]["python"] > 0
            native.close()
            with open(path, "rb") as again:
                assert again.read() == BIG
        assert "read" not in asked(mount)["requests"]


def test_access_times_of_lowers_stay(stack: Stack) -> None:
    path = stack.lowers[0] / "low"
    path.write_bytes(BIG)
    os.utime(path, ns=(10**18, 2 * 10**18))
    stack.upper = stack.work = None
    with Layerfs(stack, OPTION) as mount:
        with open(mount.mnt / "low", "rb") as file:
            assert file.read() == BIG
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ).close()
        assert moved(mount) == 0
    assert path.stat().st_atime_ns == 10**18


# -- never into a lower --------------------------------------------------------------------------------
# `mounted` compares all lowers with what they were.


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND])
@pytest.mark.parametrize("name", ["low", "linked"])
def test_readers_hold_what_is_written(mounted: Layerfs, name: str, flags: int) -> None:
    path = mounted.mnt / name
    reader = open(path, "rb")
    mapping = mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ)
    assert reader.read(5) == BIG[:5] and mapping[:5] == BIG[:5]
    fd = os.open(path, flags)
    at = 0 if not flags & os.O_APPEND else len(BIG)
    assert os.pwrite(fd, b"WRITTEN", 0) == 7
    # Cached, all of it: the reader sees the file that there is now.
    assert os.pread(reader.fileno(), 7, at) == b"WRITTEN"
    if not flags & os.O_TRUNC:
        assert mapping[at : at + 7] == b"WRITTEN"[: max(0, len(mapping) - at)]
    assert moved(mounted) > 0
    with open(path, "rb") as later:
        assert later.read()[at : at + 7] == b"WRITTEN"
    os.close(fd)
    mapping.close()
    reader.close()
    # The last handle is closed: from now on in passthrough.
    _settle(mounted)
    before = moved(mounted)
    with open(path, "r+b") as file:
        assert file.read()[at : at + 7] == b"WRITTEN"
        file.write(b"after")
    assert path.read_bytes().endswith(b"after")
    assert moved(mounted) == before
    assert (mounted.stack.lowers[0] / name).read_bytes() == BIG


def _settle(mount: Layerfs) -> None:
    """Waits for RELEASEs, which close(2) does not."""
    said = asked(mount)["requests"]
    deadline = time.monotonic() + mounts.PATIENCE
    while _handles(said) and time.monotonic() < deadline:
        time.sleep(0.01)
        said = asked(mount)["requests"]


def _handles(said: dict) -> int:  # type: ignore[type-arg]
    counts = {kind: each["native"] + each["python"] for kind, each in said.items()}
    return counts.get("open", 0) + counts.get("create", 0) - counts.get("release", 0)


def test_a_writer_of_another_name(mounted: Layerfs) -> None:
    with open(mounted.mnt / "linked", "rb") as reader:
        with open(mounted.mnt / "linked too", "r+b", buffering=0) as writer:
            writer.write(b"WRITTEN")
            assert os.pread(reader.fileno(), 7, 0) == b"WRITTEN"
    assert (mounted.mnt / "linked").read_bytes() == b"WRITTEN" + BIG[7:]


def test_a_program_that_is_replaced_while_it_runs(mounted: Layerfs) -> None:
    path = mounted.mnt / "sleep"
    shutil.copy2("/bin/sleep", path)
    running = subprocess.Popen([path, "60"])
    try:
        with pytest.raises(OSError) as raised:
            os.open(path, os.O_WRONLY)
        assert raised.value.errno == errno.ETXTBSY
        shutil.copy2("/bin/sleep", path.with_name("new"))
        os.rename(path.with_name("new"), path)
        assert running.poll() is None
        path.write_bytes(b"#!/bin/sh\nexit 3\n")
        assert subprocess.run([path]).returncode == 3
        assert running.poll() is None
    finally:
        running.kill()
        running.wait()


def test_readers_and_writers_at_once(mounted: Layerfs) -> None:
    """All the ways that a lower file can be opened while it is copied up."""
    lower = mounted.stack.lowers[0]
    wrong: list[str] = []

    def reader(name: str) -> None:
        for _ in range(60):
            try:
                data = (mounted.mnt / name).read_bytes()
            except OSError as error:
                wrong.append(f"{name}: {error}")
                return
            if len(data) != len(BIG) or set(data[:8]) - set(b"01234567W"):
                wrong.append(f"{name}: {data[:8]!r}, {len(data)}")

    names = ["low", "other", "linked", "linked too"]
    threads = [threading.Thread(target=reader, args=(name,)) for name in names for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        for name in names:
            with open(mounted.mnt / name, "r+b", buffering=0) as file:
                file.write(b"WWWWWWWW")
    for thread in threads:
        thread.join()
    assert not wrong
    assert all((lower / name).read_bytes() == BIG for name in names)


def test_metadata_only_copies_are_cached(mounted: Layerfs) -> None:
    path = mounted.mnt / "low"
    os.chmod(path, 0o600)
    with open(path, "rb") as reader:
        assert reader.read() == BIG
        assert moved(mounted) > 0
        with open(path, "r+b", buffering=0) as writer:
            writer.write(b"WRITTEN")
            assert os.pread(reader.fileno(), 7, 0) == b"WRITTEN"
    assert path.read_bytes() == b"WRITTEN" + BIG[7:]


# -- what is kept of a file ----------------------------------------------------------------------------


def test_a_store_shows_in_mtime(mounted: Layerfs) -> None:
    path = mounted.mnt / "f"
    os.utime(path, ns=(10**18, 10**18))
    assert path.stat().st_mtime_ns == 10**18
    with open(path, "r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    assert path.stat().st_mtime_ns == 10**18
    mapping[0] = 0  # the descriptor is closed already
    assert path.stat().st_mtime_ns != 10**18
    mapping.close()


def test_attributes_are_kept_when_nobody_can_store(mounted: Layerfs) -> None:
    path = mounted.mnt / "f"
    with open(path, "r+b"):
        assert _asks(mounted, path)
    _settle(mounted)
    path.stat()
    assert not _asks(mounted, path)
    with open(path, "r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
    _settle(mounted)
    assert _asks(mounted, path), "the mapping is still there"
    mapping.close()
    path.stat()
    assert not _asks(mounted, path)


def _asks(mount: Layerfs, path: Path) -> bool:
    """Whether stat is a request."""
    before = asked(mount)["requests"]["getattr"]
    path.stat()
    return asked(mount)["requests"]["getattr"] != before


def test_times_and_size_after_a_write(mounted: Layerfs) -> None:
    path = mounted.mnt / "f"
    os.utime(path, ns=(10**18, 10**18))
    fd = os.open(path, os.O_WRONLY)
    assert path.stat().st_mtime_ns == 10**18
    os.pwrite(fd, b"x", len(BIG) + 99)
    found = path.stat()
    assert found.st_mtime_ns != 10**18 and found.st_size == len(BIG) + 100 == os.fstat(fd).st_size
    assert found.st_blocks == os.stat(mounted.stack.dir / "upper" / "f").st_blocks
    os.close(fd)


def test_pages_that_were_kept_before_are_not_used_after(mounted: Layerfs) -> None:
    """Cached, in passthrough, cached again."""
    path = mounted.mnt / "f"
    os.chmod(path, 0o4755)  # cached
    with open(path, "r+b", buffering=0) as file:
        assert file.read(4) == b"0123"
    os.chmod(path, 0o755)
    _settle(mounted)
    before = moved(mounted)
    with open(path, "r+b", buffering=0) as file:
        file.write(b"past")
    assert moved(mounted) == before
    os.chmod(path, 0o4755)
    _settle(mounted)
    with open(path, "r+b", buffering=0) as file:
        assert file.read(4) == b"past"
    assert moved(mounted) > before


def _as_user(code: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import os, sys\na = sys.argv[1:]\n{code}", *map(str, arguments)],
        user=USER,
        group=USER,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_setuid_goes_when_it_is_written_to(mounted: Layerfs) -> None:
    path = mounted.mnt / "f"
    os.chmod(path, 0o6777)
    before = moved(mounted)
    _as_user("fd = os.open(a[0], os.O_WRONLY)\nos.write(fd, b'x')", path)
    assert moved(mounted) > before, "such a file is to be cached"
    assert stat.S_IMODE(path.stat().st_mode) == 0o777


def test_setuid_that_comes_while_it_is_open_goes_as_well(mounted: Layerfs) -> None:
    path = mounted.mnt / "f"
    os.chmod(path, 0o777)
    before = moved(mounted)
    said = _as_user(
        "fd = os.open(a[0], os.O_WRONLY)\n"
        "os.write(fd, b'x')\n"
        "print(oct(os.stat(a[0]).st_mode), flush=True)\n"
        "open(a[1], 'w').close()\n"
        "while not os.stat(a[0]).st_mode & 0o4000: pass\n"
        "os.write(fd, b'x')\n"
        "print(oct(os.stat(a[0]).st_mode))",
        *_meanwhile(mounted, lambda: os.chmod(path, 0o6777)),
    )
    assert said.split() == ["0o100777", "0o100777"]
    assert moved(mounted) == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o777


def _meanwhile(mount: Layerfs, action: Callable[[], object]) -> tuple[Path, Path]:
    """`f`, and a file that has `action` done when it is made."""
    flags = mount.stack.dir / "flags"
    flags.mkdir(mode=0o777)
    os.chmod(flags, 0o777)

    def wait() -> None:
        deadline = time.monotonic() + mounts.PATIENCE
        while not (flags / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        action()

    threading.Thread(target=wait).start()
    return mount.mnt / "f", flags / "go"


# -- several handles -----------------------------------------------------------------------------------


def test_opens_with_different_flags(mounted: Layerfs) -> None:
    path = mounted.mnt / "f"
    before = moved(mounted)
    flags = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_SYNC, os.O_RDWR]
    fds = [os.open(path, each) for each in flags]
    for number, fd in enumerate(fds[1:]):
        os.pwrite(fd, b"%d" % number, number)
    os.close(fds.pop(1))
    assert os.pread(fds[0], 4, 0) == b"0" + b"123"[:0] + BIG[1:2] + b"23"
    fds.append(os.open(path, os.O_RDWR | os.O_TRUNC))
    assert os.pread(fds[0], 1, 0) == b"" and os.fstat(fds[0]).st_size == 0
    for fd in fds:
        os.close(fd)
    assert moved(mounted) == before


def test_hard_links(mounted: Layerfs) -> None:
    before = moved(mounted)
    os.link(mounted.mnt / "f", mounted.mnt / "g")
    with open(mounted.mnt / "f", "r+b", buffering=0) as one, open(mounted.mnt / "g", "r+b") as two:
        one.write(b"one")
        assert two.read(3) == b"one"
    assert moved(mounted) == before


def test_unlinked_while_open(mounted: Layerfs) -> None:
    before = moved(mounted)
    with open(mounted.mnt / "f", "r+b", buffering=0) as file:
        os.unlink(mounted.mnt / "f")
        file.write(b"still")
        assert os.pread(file.fileno(), 5, 0) == b"still"
        with open(f"/proc/self/fd/{file.fileno()}", "rb") as again:
            assert again.read(5) == b"still"
        (mounted.mnt / "f").write_bytes(b"another")
        assert os.pread(file.fileno(), 5, 0) == b"still"
    assert (mounted.mnt / "f").read_bytes() == b"another"
    assert moved(mounted) == before


def test_renamed_over_while_open(mounted: Layerfs) -> None:
    before = moved(mounted)
    (mounted.mnt / "new").write_bytes(b"new")
    with open(mounted.mnt / "f", "rb") as old, open(mounted.mnt / "new", "r+b", buffering=0) as new:
        os.rename(mounted.mnt / "new", mounted.mnt / "f")
        assert old.read() == BIG
        new.write(b"now")
        assert (mounted.mnt / "f").read_bytes() == b"now"
    assert moved(mounted) == before


def test_limit_of_file_size(mounted: Layerfs) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    code = (
        "import os, sys\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "print(os.write(fd, bytes(1500)))\n"
        "try: os.write(fd, b'x')\n"
        "except OSError as error: print(error.errno)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, mounted.mnt / "limited"],
        preexec_fn=limited,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1000", str(errno.EFBIG)], done.stderr


def test_more_files_than_descriptors(stack: Stack) -> None:
    """What cannot be opened is an error, and what can is right."""
    for number in range(200):
        (stack.lowers[0] / f"{number}").write_bytes(b"%d" % number)
    stack.upper = stack.work = None

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))

    mount = Layerfs(stack, OPTION)
    stack.dir.joinpath("daemon.log").touch()
    command = list(map(os.fspath, mount.command()))
    subprocess.run(command, preexec_fn=few, env=mount.env(), check=True, cwd="/")
    mounts.live.append(mount)
    fds = []
    try:
        for number in range(200):
            try:
                fds.append(os.open(mount.mnt / f"{number}", os.O_RDONLY))
            except OSError as error:
                assert error.errno in (errno.EMFILE, errno.ENFILE)
                continue
            assert os.read(fds[-1], 9) == b"%d" % number
        assert len(fds) > 20
    finally:
        for fd in fds:
            os.close(fd)
        mount.close()


def test_many_opens_of_few_files(mounted: Layerfs) -> None:
    """Handles come and go, several at a time."""
    before = moved(mounted)
    names = [f"n{number}" for number in range(8)]
    for name in names:
        (mounted.mnt / name).write_bytes(name.encode())
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for turn in range(200):
                name = names[(seed * 7 + turn * 3) % len(names)]
                with open(mounted.mnt / name, "r+b" if turn % 2 else "rb") as file:
                    assert file.read() == name.encode()
        except (OSError, AssertionError) as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert moved(mounted) == before


# -- what commit asks for ------------------------------------------------------------------------------


def test_writers_are_held(mounted: Layerfs) -> None:
    work = mounted.stack.work
    assert work is not None
    path = mounted.mnt / "f"
    inode = (mounted.stack.dir / "upper" / "f").stat().st_ino
    with open(path, "r+b", buffering=0) as file:
        with closing(Connection(str(mounted.mnt), str(work))) as connection:
            assert connection.writing(inode) and connection.undivided(inode)
            for _ in range(2):
                with connection.held(inode, b"f") as found:
                    assert found
                    writer = _writes(file.fileno())
                    assert file.read(4) == BIG[:4], "reading goes on"
                    file.seek(0)
                assert _ended(writer)
                os.pwrite(file.fileno(), BIG[:4], 0)
        assert os.fstat(file.fileno()).st_size == len(BIG)


def test_a_pause_holds_writers(mounted: Layerfs) -> None:
    work = mounted.stack.work
    assert work is not None
    with open(mounted.mnt / "f", "r+b", buffering=0) as one, open(mounted.mnt / "new", "w+b") as two:
        with closing(Connection(str(mounted.mnt), str(work))) as connection:
            connection.pause()
            writers = [_writes(each.fileno()) for each in (one, two)]
            assert (mounted.mnt / "f").stat().st_size == len(BIG)
        assert all(_ended(writer) for writer in writers)
        assert one.read(4) == b"held"


def _writes(fd: int) -> threading.Thread:
    """A thread that writes, and is seen to wait."""
    thread = threading.Thread(target=os.pwrite, args=(fd, b"held", 0))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    return thread


def _ended(thread: threading.Thread) -> bool:
    thread.join(mounts.PATIENCE)
    return not thread.is_alive()


def test_commit_of_a_file_that_is_open(mounted: Layerfs, tmp_path: Path) -> None:
    with open(mounted.mnt / "f", "r+b", buffering=0) as file:
        file.write(b"written while it is open")
        target = tmp_path / "layer.tar"
        done = mounted.run(*mounts.layerfs_command(), "commit", mounted.mnt, "-o", target)
        assert done.returncode == 0, done.stderr
    taken = subprocess.run(["tar", "-xOf", target, "f"], capture_output=True, check=True).stdout
    assert taken == b"written while it is open" + BIG[24:]


# -- refused, and stacked ------------------------------------------------------------------------------


def _refused(mount: Layerfs) -> str:
    done = mount.run(*mount.command())
    assert done.returncode != 0 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not mounts.mounts_below(mount.mnt)
    return done.stderr


def test_an_ordinary_user_may_not(make_stack: type[Stack], ordinary_user: tuple[int, int]) -> None:
    stack = make_stack(owner=ordinary_user)
    said = _refused(Layerfs(stack, OPTION, as_user=ordinary_user))
    assert "data=passthrough: it takes CAP_SYS_ADMIN in the initial user namespace" in said


def test_not_without_the_gate(stack: Stack) -> None:
    assert "gate" in _refused(Layerfs(stack, f"{OPTION},gate=off"))
    assert "gate" in _refused(Layerfs(stack, OPTION, args=["--gate", "off"]))


def test_not_where_modes_are_xattrs(stack: Stack) -> None:
    assert "setuid" in _refused(Layerfs(stack, f"{OPTION},xattr_permissions=2"))


def test_not_in_a_user_namespace(stack: Stack) -> None:
    mount = Layerfs(stack, f"{OPTION},userxattr")
    done = mount.run("unshare", "-Urm", *mount.command())
    assert done.returncode != 0
    assert "data=passthrough: it takes CAP_SYS_ADMIN in the initial user namespace" in done.stderr


@pytest.mark.parametrize("writable", [False, True])
def test_a_layer_that_lies_on_overlayfs(
    kernel_overlay: None, make_stack: type[Stack], writable: bool
) -> None:
    below = make_stack(name="below")
    (below.lowers[0] / "low").write_bytes(BIG)
    stack = make_stack(name="above")
    with KernelOverlay(below):
        if writable:
            for name in ("upper", "work"):
                (below.mnt / name).mkdir()
            stack.upper, stack.work = below.mnt / "upper", below.mnt / "work"
        else:
            stack.lowers, stack.upper, stack.work = [below.mnt], None, None
        with Layerfs(stack, OPTION) as mount:
            if writable:
                (mount.mnt / "f").write_bytes(BIG)
            assert (mount.mnt / ("f" if writable else "low")).read_bytes() == BIG
            assert moved(mount) == 0


def test_overlayfs_lies_on_it(kernel_overlay: None, make_stack: type[Stack]) -> None:
    stack = make_stack(name="below")
    (stack.lowers[0] / "low").write_bytes(BIG)
    stack.upper = stack.work = None
    above = make_stack(name="above")
    with Layerfs(stack, OPTION) as mount:
        above.lowers = [mount.mnt]
        with KernelOverlay(above):
            assert (above.mnt / "low").read_bytes() == BIG
            with open(above.mnt / "low", "r+b") as file:
                file.write(b"above")
            assert (above.mnt / "low").read_bytes() == b"above" + BIG[5:]
        assert (mount.mnt / "low").read_bytes() == BIG
