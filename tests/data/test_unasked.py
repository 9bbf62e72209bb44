"""data=cached: the kernel opens and closes files without asking. What POSIX says of an open file holds all
the same, for root and for an ordinary user, with few descriptors."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from layerfs.control import client
from layerfs.control.client import Connection
from tests.posix.calls import listing
from tests.posix.place import forked
from tests.support import mounts
from tests.support.mounts import Layerfs
from tests.support.stack import Stack

pytestmark = pytest.mark.skipif(bool(mounts.why_no_layerfs()), reason=str(mounts.why_no_layerfs()))

FEW = 256
MANY = 2000


@pytest.fixture
def mounted(stack: Stack) -> Iterator[Layerfs]:
    (stack.lowers[0] / "lower").write_bytes(b"lower " * 1000)
    (stack.lowers[0] / "other").write_bytes(b"other")
    with Layerfs(stack, "data=cached") as mount:
        yield mount


def upper_of(mount: Layerfs) -> Path:
    assert mount.stack.upper is not None
    return mount.stack.upper


# -- what an open does, and what it no longer does ------------------------------------------------------


def test_a_file_is_copied_up_by_its_first_write(mounted: Layerfs) -> None:
    fd = os.open(mounted.mnt / "lower", os.O_RDWR)
    reader = os.open(mounted.mnt / "lower", os.O_RDONLY)
    assert os.listdir(upper_of(mounted)) == []
    os.pwrite(fd, b"UPPER", 0)
    assert (upper_of(mounted) / "lower").read_bytes() == b"UPPER" + (b"lower " * 1000)[5:]
    assert os.pread(reader, 11, 0) == b"UPPER lower"
    assert os.fstat(fd) == os.fstat(reader) == os.stat(mounted.mnt / "lower")
    os.close(fd)
    os.close(reader)


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR], ids=["r", "w", "rw"])
@pytest.mark.parametrize("where", ["lower", "upper"])
def test_o_trunc_cuts(mounted: Layerfs, where: str, access: int) -> None:
    path = mounted.mnt / "lower"
    if where == "upper":
        path.write_bytes(b"written")
    os.utime(path, (1, 1))
    os.close(os.open(path, access | os.O_TRUNC))
    assert path.read_bytes() == b""
    assert path.stat().st_mtime > 1e9
    assert (upper_of(mounted) / "lower").stat().st_size == 0


def test_o_trunc_of_somebody_s_open_file(mounted: Layerfs) -> None:
    fd = os.open(mounted.mnt / "lower", os.O_RDWR)
    os.write(fd, b"x" * 10_000)
    os.close(os.open(mounted.mnt / "lower", os.O_WRONLY | os.O_TRUNC))
    assert os.fstat(fd).st_size == 0 and os.pread(fd, 10, 0) == b""
    os.write(fd, b"behind the end")
    assert os.pread(fd, 20_000, 0) == bytes(10_000) + b"behind the end"
    os.close(fd)


def test_creating_with_a_mode_that_forbids_writing(mounted: Layerfs) -> None:
    fd = os.open(mounted.mnt / "new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o000)
    os.write(fd, b"text")
    assert os.pread(fd, 10, 0) == b"text"
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0
    os.close(fd)


def test_append(mounted: Layerfs) -> None:
    fds = [os.open(mounted.mnt / "other", os.O_WRONLY | os.O_APPEND) for _ in range(2)]
    for number in range(10):
        os.write(fds[number % 2], b"%d" % number)
    assert (mounted.mnt / "other").read_bytes() == b"other0123456789"
    for fd in fds:
        os.close(fd)


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("flag", ["a", "i"])
def test_flags_that_forbid_writing(mounted: Layerfs, flag: str) -> None:
    """chattr +a and +i of a file whose descriptor the daemon has kept."""
    path = mounted.mnt / "new"
    path.write_bytes(b"one")
    try:
        subprocess.run(["chattr", f"+{flag}", path], check=True)
        for how in (os.O_WRONLY, os.O_WRONLY | os.O_APPEND):
            fd = os.open(path, how)
            if flag == "a" and how & os.O_APPEND:
                assert os.write(fd, b"+two") == 4
            else:
                with pytest.raises(PermissionError):
                    os.write(fd, b"OVER")
            os.close(fd)
    finally:
        subprocess.run(["chattr", f"-{flag}", path], check=True)
    assert path.read_bytes() == (b"one+two" if flag == "a" else b"one")
    with open(path, "r+b") as file:
        file.write(b"ONE")
    assert path.read_bytes()[:3] == b"ONE"


# -- what a mapping does --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_a_store_through_a_mapping(mounted: Layerfs, where: str) -> None:
    path = mounted.mnt / "lower"
    if where == "upper":
        with open(path, "ab") as file:
            file.write(b"x")
    os.utime(path, (1, 1))
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 0) as mapped:
        mapped[3:6] = b"MAP"
        assert os.pread(fd, 6, 0) == b"lowMAP"
        mapped.flush()
        assert os.fstat(fd).st_mtime > 1e9
        mapped[0:3] = b"NEW"
    os.close(fd)
    assert path.read_bytes()[:6] == b"NEWMAP"
    mounted.remount()
    assert path.read_bytes()[:6] == b"NEWMAP"


def test_fresh_data_are_no_hole(mounted: Layerfs) -> None:
    fd = os.open(mounted.mnt / "new", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 1 << 20)
    os.pwrite(fd, b"data", 1 << 19)
    assert os.lseek(fd, 0, os.SEEK_DATA) <= 1 << 19
    assert os.lseek(fd, 1 << 19, os.SEEK_DATA) == 1 << 19
    os.close(fd)


# -- one file, whoever has it open ------------------------------------------------------------------------


def test_locks_hold_across_a_copy_up(mounted: Layerfs) -> None:
    before = os.open(mounted.mnt / "lower", os.O_RDWR)
    fcntl.flock(before, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.lockf(before, fcntl.LOCK_EX | fcntl.LOCK_NB, 10)
    os.write(before, b"x")

    def locked() -> tuple[bool, bool]:
        after = os.open(mounted.mnt / "lower", os.O_RDWR)
        found = []
        for lock in (fcntl.flock, lambda fd, how: fcntl.lockf(fd, how, 10)):
            try:
                lock(after, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(False)
            except BlockingIOError:
                found.append(True)
        return found[0], found[1]

    assert forked(locked) == (True, True)
    os.close(before)


def test_opening_again_by_descriptor(mounted: Layerfs) -> None:
    """/proc/self/fd/N of a file that was copied up, renamed, and unlinked."""
    fd = os.open(mounted.mnt / "lower", os.O_RDONLY)
    (mounted.mnt / "lower").write_bytes(b"upper")
    os.rename(mounted.mnt / "lower", mounted.mnt / "renamed")
    os.unlink(mounted.mnt / "renamed")
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.write(again, b"UP")
    assert os.pread(fd, 10, 0) == b"UPper"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    os.close(again)


def test_a_running_program_is_not_written_to(mounted: Layerfs) -> None:
    path = mounted.mnt / "program"
    path.write_bytes(Path("/bin/sleep").read_bytes())
    path.chmod(0o755)
    with subprocess.Popen([path, "60"]) as running:
        with pytest.raises(OSError) as raised:
            os.open(path, os.O_WRONLY)
        running.kill()
    assert raised.value.errno == errno.ETXTBSY


@pytest.mark.usefixtures("root")
def test_a_file_that_cannot_be_copied_up_stays_as_it_is(stack: Stack, tmp_path: Path) -> None:
    whole = os.urandom(16 << 20)
    (stack.lowers[0] / "big").write_bytes(whole)
    small = tmp_path / "small"
    small.mkdir()
    mounts.mount("tmpfs", small, "tmpfs", 0, "size=4m")
    try:
        stack.upper, stack.work = small / "upper", small / "work"
        stack.upper.mkdir()
        stack.work.mkdir()
        with Layerfs(stack, "data=cached") as mount:
            fd = os.open(mount.mnt / "big", os.O_RDWR)
            with pytest.raises(OSError) as raised:
                os.pwrite(fd, b"x", 0)
            assert raised.value.errno == errno.ENOSPC
            assert os.pread(fd, 16 << 20, 0) == whole
            os.close(fd)
            assert os.listdir(stack.upper) == []
    finally:
        mounts.umount(small)
        stack.upper = stack.work = None


# -- directories of a mount that cannot be written ----------------------------------------------------------


def test_listings_of_a_read_only_mount(make_stack: type[Stack]) -> None:
    """Each name once, with its own number and type, in pieces of any size, as where Python lists alone."""
    stack = make_stack(n_lowers=2)
    top, below = stack.lowers
    for number in range(700):
        (below / f"file{number:03}-{'x' * (number % 60)}").touch()
    for lower in stack.lowers:
        (lower / "merged").mkdir()
        (lower / "merged" / f"of-{lower.name}").touch()
    os.link(below / "merged" / f"of-{below.name}", below / "hard")
    (top / "link").symlink_to("nowhere")
    os.mkfifo(top / "pipe")
    (top / "twice").touch()
    os.link(top / "twice", top / "again")
    everything = sorted([*os.listdir(below), "link", "pipe", "twice", "again"])
    shown = []
    for data in ("data=cached", "data=python"):
        with Layerfs(stack, ["ro", data]) as mount:
            for size in (280, 4096, 1 << 20):
                items = listing(mount.mnt, size)
                assert sorted(os.fsdecode(item.name) for item in items) == sorted([".", "..", *everything])
                for item in items:
                    if item.name != b"..":
                        st = os.lstat(os.fsencode(mount.mnt) + b"/" + item.name)
                        assert (item.ino, item.kind) == (st.st_ino, stat.S_IFMT(st.st_mode) >> 12), item
            for _ in range(2):
                assert sorted(os.listdir(mount.mnt)) == everything
                merged = sorted(os.listdir(mount.mnt / "merged"))
                assert merged == sorted(f"of-{lower.name}" for lower in stack.lowers)
            shown.append({item.name: item.ino for item in items if item.name != b".."})
    assert shown[0] == shown[1]


# -- few descriptors ----------------------------------------------------------------------------------------


def few(make_stack: type[Stack], owner: tuple[int, int] | None, files: int) -> Layerfs:
    """A mount whose daemon may have 256 descriptors, over so many files, which `owner` owns."""
    stack = make_stack() if owner is None else make_stack(owner=owner)
    for number in range(files):
        path = stack.lowers[0] / f"f{number}"
        path.write_text(f"text of {number}")
        if owner is not None:
            os.chown(path, *owner)
    mount = Layerfs(stack, "data=cached", as_user=owner)
    mount.command = limited(mount.command())  # type: ignore[method-assign]
    return mount


def limited(command: list[str | os.PathLike[str]]) -> Callable[[], list[str | os.PathLike[str]]]:
    return lambda: ["sh", "-c", f'ulimit -n {FEW}; exec "$@"', "sh", *command]


@pytest.fixture(params=["root", "user"])
def owner(request: pytest.FixtureRequest) -> tuple[int, int] | None:
    if request.param == "root":
        return None
    who: tuple[int, int] = request.getfixturevalue("ordinary_user")
    return who


@pytest.fixture(autouse=True)
def many_of_our_own() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def as_(owner: tuple[int, int] | None, work: Callable[[], None]) -> None:
    uid, gid = owner or (0, 0)
    forked(work, uid=uid, gid=gid)


def test_thousands_of_files_are_open(make_stack: type[Stack], owner: tuple[int, int] | None) -> None:
    """Read, written, read; 0400 after create, 000 while open, renamed while open."""
    with few(make_stack, owner, MANY) as mount:
        m = mount.mnt

        def work() -> None:
            fds = [os.open(m / f"f{number}", os.O_RDWR) for number in range(MANY)]
            made = [os.open(m / f"new{number}", os.O_RDWR | os.O_CREAT, 0o400) for number in range(300)]
            for number, fd in enumerate(fds):
                assert os.pread(fd, 100, 0) == f"text of {number}".encode()
            for number, fd in enumerate(made):
                os.write(fd, b"made %d" % number)
            for number in range(0, MANY, 2):
                os.chmod(m / f"f{number}", 0)
            for fd in fds:
                os.pwrite(fd, b"TEXT", 0)
            for number in range(300):
                os.rename(m / f"new{number}", m / f"renamed{number}")
            for number, fd in enumerate(made):
                os.write(fd, b"!")
                assert os.pread(fd, 100, 0) == b"made %d!" % number
                assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o400
            for number, fd in enumerate(fds):
                # The page cache would answer for the mount.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(fd, 100, 0) == f"TEXT of {number}".encode()
                assert stat.S_IMODE(os.fstat(fd).st_mode) == (0o644 if number % 2 else 0)

        as_(owner, work)


def test_thousands_of_files_are_unlinked_while_open(
    make_stack: type[Stack], owner: tuple[int, int] | None
) -> None:
    """Half of them lie in the upper. Nothing of them is left when they are closed."""
    with few(make_stack, owner, MANY) as mount:
        m = mount.mnt

        def work() -> None:
            fds = [os.open(m / f"f{number}", os.O_RDWR) for number in range(MANY)]
            for fd in fds[::2]:
                os.pwrite(fd, b"TEXT", 0)
            for number in range(MANY):
                os.unlink(m / f"f{number}")
            assert os.listdir(m) == []
            (m / "another").write_text("there is room for it")
            for number, fd in enumerate(fds):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                begin = "text" if number % 2 else "TEXT"
                assert os.pread(fd, 100, 0) == f"{begin} of {number}".encode()
                assert os.fstat(fd).st_nlink == 0
                os.fchmod(fd, 0o600)
                if number % 4 == 0:
                    os.pwrite(fd, b"last", 0)
                    assert os.pread(fd, 100, 0) == f"last of {number}".encode()

        as_(owner, work)

        def what_is_left() -> None:
            assert os.listdir(m) == ["another"]

        as_(owner, what_is_left)
    assert mount.stack.work is not None
    assert os.listdir(mount.stack.work / "work") == []


def test_what_was_closed_for_want_of_room_is_synced(make_stack: type[Stack]) -> None:
    """An fsync long after the write, by a descriptor of the daemon's that was opened anew."""
    with few(make_stack, None, MANY) as mount:
        fd = os.open(mount.mnt / "f0", os.O_RDWR)
        os.write(fd, b"x" * 100_000)
        for number in range(1, MANY):
            # In the upper, where Python keeps the descriptors.
            with open(mount.mnt / f"f{number}", "ab") as file:
                file.write(b"!")
        os.fsync(fd)
        os.close(fd)
        mount.kill()
    assert (upper_of(mount) / "f0").read_bytes() == b"x" * 100_000


def test_a_file_that_a_pause_waits_for_can_be_written_back(
    make_stack: type[Stack], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor was closed for want of room after the daemon had told of it: its next WRITE counts as an
    open for writing, and those are held. The fsync that is to close it waits for that WRITE."""
    monkeypatch.setattr(client, "_PATIENCE", 5.0)
    stack = make_stack()
    assert stack.upper is not None
    for number in range(FEW):
        (stack.upper / f"f{number}").write_text(f"text of {number}")
    mount = Layerfs(stack, "data=cached")
    mount.command = limited(mount.command())  # type: ignore[method-assign]
    with mount:
        fd = os.open(mount.mnt / "f0", os.O_RDWR)
        with mmap.mmap(fd, 0) as pages, closing(Connection(str(mount.mnt), str(stack.work))) as connection:
            pages[:4] = b"once"
            pages.flush()
            (node,) = connection.ask("pause")["nodes"]
            for number in range(1, FEW):
                (mount.mnt / f"f{number}").read_text()
            pages[:4] = b"more"
            assert connection._fsync(b"f0", node)
            assert (stack.upper / "f0").read_text() == "more of 0"
        os.close(fd)


def test_a_read_only_mount_that_is_made_writable_is_not(make_stack: type[Stack]) -> None:
    """The kernel does not ask us when it remounts, nor when it opens."""
    stack = make_stack()
    (stack.lowers[0] / "lower").write_bytes(b"lower")
    with Layerfs(stack, ["ro", "data=cached"]) as mount:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mount(None, os.fsencode(mount.mnt), None, 32, None) == 0, "MS_REMOUNT"
        fd = os.open(mount.mnt / "lower", os.O_RDWR)
        with pytest.raises(OSError) as caught:
            os.write(fd, b"UPPER")
        assert caught.value.errno == errno.EROFS
        os.close(fd)
        assert (mount.mnt / "lower").read_bytes() == b"lower"
