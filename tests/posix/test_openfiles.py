"""Open files while names and layers change below them: copy-up, unlink, rename, replacement, /proc/self/fd,
bind mounts."""

from __future__ import annotations

import mmap
import os
import stat
import subprocess

import pytest

from tests.support.mounts import bind, umount, why_not_root
from tests.support.stack import OLD_NS, File

from .calls import (
    IN_ATTRIB,
    IN_CLOSE_WRITE,
    IN_CREATE,
    IN_DELETE,
    IN_MODIFY,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    Inotify,
    err,
    statx,
)
from .place import BIG, OTHER, USER, Place, as_user, compared, forked, people, tree

RO, RW = os.O_RDONLY, os.O_RDWR


@pytest.mark.parametrize("name", ["f", "big", "h1", "x", "d/sub/c"])
def test_read_only_descriptor_sees_a_later_write(fs: Place, name: str) -> None:
    old = fs.open(name, RO)
    first = os.pread(old, 1 << 20, 0)
    w = fs.open(name, RW)
    os.pwrite(w, b"NEW", 0)
    assert os.pread(old, 1 << 20, 0) == b"NEW" + first[3:]
    os.ftruncate(w, 1)
    assert os.fstat(old).st_size == 1 and os.pread(old, 10, 0) == b"N"
    a, b, c = os.fstat(old), os.fstat(w), fs.stat(name)
    assert a.st_ino == b.st_ino == c.st_ino
    assert a.st_mtime_ns == b.st_mtime_ns == c.st_mtime_ns


def test_read_only_descriptor_sees_attributes(fs: Place) -> None:
    fd = fs.open("f", RO)
    os.chmod(fs / "f", 0o751)
    os.chown(fs / "f", 3, 4)
    os.utime(fs / "f", ns=(5, 6))
    os.setxattr(fs / "f", "user.a", b"1")
    st = os.fstat(fd)
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns) == (0o751, 3, 4, 6)
    assert os.getxattr(fd, "user.a") == b"1"
    os.fchmod(fd, 0o600)
    assert fs.mode("f") == 0o600


def test_many_descriptors_across_copy_up(fs: Place) -> None:
    readers = [fs.open("big", RO) for _ in range(10)]
    paths = [fs.open("big", os.O_PATH) for _ in range(3)]
    w = fs.open("big", RW)
    os.pwrite(w, b"!", 100_000)
    for fd in readers:
        assert os.pread(fd, 2, 99_999) == BIG[99_999:100_000] + b"!"
    for fd in paths:
        assert os.fstat(fd).st_ino == os.fstat(w).st_ino


# --- unlinked, renamed, replaced ---


@pytest.mark.parametrize("name", ["f", "big", "empty", "x"])
def test_unlinked_but_open(fs: Place, name: str) -> None:
    fd = fs.open(name, RW)
    data = os.pread(fd, 1 << 20, 0)
    os.unlink(fs / name)
    assert os.fstat(fd).st_nlink == 0
    assert os.pread(fd, 1 << 20, 0) == data
    os.pwrite(fd, b"still here", 0)
    assert os.pread(fd, 10, 0) == b"still here"
    os.ftruncate(fd, 3)
    os.fchmod(fd, 0o600)
    os.fchown(fd, 1, 1)
    os.utime(fd, ns=(1, 2))
    os.fsync(fd)
    st = os.fstat(fd)
    assert (st.st_size, stat.S_IMODE(st.st_mode), st.st_uid, st.st_mtime_ns) == (3, 0o600, 1, 2)
    assert name not in fs.names()


def test_read_only_unlinked_but_open(fs: Place) -> None:
    """Nothing was copied up: the lower file goes on living behind the descriptor."""
    fd = fs.open("big", RO)
    os.unlink(fs / "big")
    assert os.fstat(fd).st_nlink == 0 and os.pread(fd, 1 << 20, 0) == BIG
    os.fchmod(fd, 0o640)
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as m:
        assert m[:100] == BIG[:100]


def test_unlinked_and_made_again_are_two_files(fs: Place) -> None:
    old = fs.open("f", RW)
    os.unlink(fs / "f")
    fs.write("f", b"another")
    new = fs.open("f", RW)
    assert os.fstat(old).st_ino != os.fstat(new).st_ino
    os.pwrite(old, b"OLD", 0)
    assert fs.read("f") == b"another" and os.pread(old, 20, 0) == b"OLDlo world\n"


def test_unlink_one_of_two_names_while_open(fs: Place) -> None:
    fd = fs.open("h1", RO)
    os.unlink(fs / "h1")
    assert os.fstat(fd).st_nlink == 1
    fs.append("h2", b"+")
    assert os.pread(fd, 20, 0) == b"linked\n+"
    os.unlink(fs / "h2")
    assert os.fstat(fd).st_nlink == 0 and os.pread(fd, 20, 0) == b"linked\n+"


@pytest.mark.parametrize("flags", [RO, RW])
def test_renamed_while_open(fs: Place, flags: int) -> None:
    fd = fs.open("f", flags)
    os.rename(fs / "f", fs / "d/moved")
    w = fs.open("d/moved", RW)
    os.pwrite(w, b"J", 0)
    assert os.pread(fd, 20, 0) == b"Jello world\n"
    if flags == RW:
        os.pwrite(fd, b"!", 11)
        assert fs.read("d/moved") == b"Jello world!"
    assert os.fstat(fd).st_ino == fs.stat("d/moved").st_ino
    assert os.readlink(f"/proc/self/fd/{fd}") == fs / "d/moved"
    assert "f" not in fs.names()


def test_open_below_a_moved_directory(fs: Place) -> None:
    fd, r = fs.open("d/sub/c", RW), fs.open("d/a", RO)
    os.rename(fs / "d", fs / "e/d")
    os.pwrite(fd, b"DEEP", 0)
    assert fs.read("e/d/sub/c") == b"DEEP\n"
    fs.append("e/d/a", b"+")
    assert os.pread(r, 20, 0) == b"in d/a\n+"


def test_directory_removed_while_open(fs: Place) -> None:
    fd = fs.open("e", RO)
    os.rmdir(fs / "e")
    os.mkdir(fs / "e")
    assert os.fstat(fd).st_ino != fs.stat("e").st_ino
    assert err(os.mkdir, "x", dir_fd=fd) == "ENOENT"
    assert fs.names("e") == []


# --- /proc/self/fd ---


def test_reopen_for_writing(fs: Place) -> None:
    fd = fs.open("f", RO)
    again = os.open(f"/proc/self/fd/{fd}", RW)
    try:
        os.write(again, b"HELLO")
        assert os.pread(fd, 20, 0) == b"HELLO world\n" == fs.read("f")
        assert os.fstat(again).st_ino == os.fstat(fd).st_ino
    finally:
        os.close(again)


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND])
def test_reopen_o_path(fs: Place, flags: int) -> None:
    fd = fs.open("big", os.O_PATH)
    again = os.open(f"/proc/self/fd/{fd}", flags)
    try:
        os.write(again, b"!!")
    finally:
        os.close(again)
    want = {os.O_TRUNC: b"!!", os.O_APPEND: BIG + b"!!"}.get(flags & ~3, b"!!" + BIG[2:])
    assert fs.read("big") == want


def test_reopen_an_unlinked_file(fs: Place) -> None:
    fd = fs.open("f", RO)
    os.unlink(fs / "f")
    again = os.open(f"/proc/self/fd/{fd}", RW)
    try:
        os.write(again, b"HELLO")
        assert os.pread(fd, 20, 0) == b"HELLO world\n"
    finally:
        os.close(again)
    os.truncate(f"/proc/self/fd/{fd}", 3)
    assert os.fstat(fd).st_size == 3


def test_chmod_and_xattr_through_proc(fs: Place) -> None:
    fd = fs.open("f", os.O_PATH)
    os.chmod(f"/proc/self/fd/{fd}", 0o611)
    os.setxattr(f"/proc/self/fd/{fd}", "user.a", b"1")
    assert fs.mode("f") == 0o611 and os.getxattr(fs / "f", "user.a") == b"1"


@people
@compared
def test_reopen_is_checked_again(fs: Place) -> object:
    fd = fs.open("open/theirs", RO)
    other = fs.open("open/f", RO)
    return as_user(lambda: [err(os.open, f"/proc/self/fd/{x}", fl) for x in (fd, other) for fl in (RO, RW)])


@people
def test_a_descriptor_keeps_its_rights(fs: Place) -> None:
    """Opened while it was allowed; neither chmod nor chown nor copy-up takes that back."""
    if reason := why_not_root():
        pytest.skip(reason)
    opened, changed = os.pipe(), os.pipe()

    def user() -> tuple[int, bytes]:
        fd = os.open(fs / "open/f", RW)
        os.write(opened[1], b"x")
        os.read(changed[0], 1)
        return os.pwrite(fd, b"A", 0), os.pread(fd, 3, 0)

    def root() -> None:
        os.read(opened[0], 1)
        os.chmod(fs / "open/f", 0o000)
        os.chown(fs / "open/f", OTHER, OTHER)
        os.write(changed[1], b"x")

    pid = os.fork()
    if pid == 0:
        try:
            root()
        finally:
            os._exit(0)
    try:
        assert as_user(user) == (1, b"Any")
    finally:
        os.waitpid(pid, 0)
        for fd in (*opened, *changed):
            os.close(fd)


# --- bind mounts ---


@pytest.fixture
def bound(fs: Place, tmp_path_factory: pytest.TempPathFactory) -> object:
    """The file `f`, bind-mounted elsewhere."""
    if os.geteuid() != 0:
        pytest.skip("bind mounts need root")
    target = tmp_path_factory.mktemp("bind") / "target"
    target.touch()
    bind(fs / "f", target)
    yield str(target)
    umount(target)


def test_bind_mounted_file(fs: Place, bound: str) -> None:
    with open(bound, "rb") as f:
        assert f.read() == b"hello world\n"
        fs.append("f", b"from the mount\n")
        assert f.read() == b"from the mount\n"
    with open(bound, "r+b") as f:
        f.write(b"JELLO")
    assert fs.read("f") == b"JELLO world\nfrom the mount\n"
    os.chmod(bound, 0o640)
    assert fs.mode("f") == 0o640
    assert statx(bound).ino == fs.stat("f").st_ino


def test_bind_mounted_file_written_first_through_the_bind(fs: Place, bound: str) -> None:
    old = fs.open("f", RO)
    with open(bound, "ab") as f:
        f.write(b"more\n")
    assert fs.read("f") == os.pread(old, 100, 0) == b"hello world\nmore\n"


def test_bind_mounted_file_outlives_its_name(fs: Place, bound: str) -> None:
    """The name is a mount point only in this namespace's other place: it may go."""
    os.rename(fs / "f", fs / "g")
    with open(bound, "ab") as f:
        f.write(b"+")
    assert fs.read("g") == b"hello world\n+"
    os.unlink(fs / "g")
    with open(bound, "rb") as f:
        assert f.read() == b"hello world\n+"


def test_mount_point_inside_the_mount(fs: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("bind mounts need root")
    bind(fs / "d2", fs / "e")
    try:
        assert fs.names("e") == ["k"]
        assert err(os.rmdir, fs / "e") == "EBUSY"
        assert err(os.rename, fs / "e", fs / "n") == "EBUSY"
        assert err(os.rename, fs / "e/k", fs / "k") == "EXDEV"
        fs.append("e/k", b"+")
        assert fs.read("d2/k") == b"in d2/k\n+"
    finally:
        umount(fs / "e")
    assert fs.names("e") == []


# --- inotify ---


def test_inotify_on_a_directory(fs: Place) -> None:
    with Inotify(fs / "d", IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_CLOSE_WRITE) as watch:
        fs.write("d/n", b"x")
        os.rename(fs / "d/n", fs / "d/m")
        os.unlink(fs / "d/m")
        os.mkdir(fs / "d/nd")
        events = [(mask & 0xFFFF, name) for mask, name in watch.events()]
    assert events == [
        (IN_CREATE, b"n"), (IN_CLOSE_WRITE, b"n"), (IN_MOVED_FROM, b"n"), (IN_MOVED_TO, b"m"),
        (IN_DELETE, b"m"), (IN_CREATE, b"nd"),
    ]  # fmt: skip


def test_inotify_on_a_file_across_copy_up(fs: Place) -> None:
    with Inotify(fs / "f", IN_MODIFY | IN_ATTRIB) as watch:
        fs.append("f", b"x")
        os.chmod(fs / "f", 0o600)
        assert {mask for mask, _ in watch.events()} == {IN_MODIFY, IN_ATTRIB}


# --- processes ---


def test_two_writers_at_once(fs: Place) -> None:
    """Both open before either writes; one copy-up, both see both."""
    a, b = fs.open("big", RW), fs.open("big", RW)
    os.pwrite(a, b"A", 0)
    os.pwrite(b, b"B", 200_000)
    for fd in (a, b):
        assert os.pread(fd, 1, 0) == b"A" and os.pread(fd, 1, 200_000) == b"B"
    data = fs.read("big")
    assert data[0:1] == b"A" and data[200_000:200_001] == b"B" and len(data) == len(BIG)


def test_twenty_processes_append(fs: Place) -> None:
    pids = []
    for i in range(20):
        pid = os.fork()
        if pid == 0:
            try:
                fd = os.open(fs / "f", os.O_WRONLY | os.O_APPEND)
                for _ in range(20):
                    os.write(fd, b"%02d\n" % i)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    lines = fs.read("f").split(b"\n")
    assert lines[0] == b"hello world" and len(lines) == 402
    assert sorted(lines[1:-1]) == sorted(b"%02d" % i for i in range(20) for _ in range(20))


def test_processes_create_in_one_directory(fs: Place) -> None:
    def child(i: int) -> None:
        for n in range(20):
            os.close(os.open(fs / f"e/{i}-{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))

    pids = []
    for i in range(8):
        pid = os.fork()
        if pid == 0:
            try:
                child(i)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    assert len(fs.names("e")) == 160


def test_only_one_of_many_creates_exclusively(fs: Place) -> None:
    winners = 0
    pids = []
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if err(os.open, fs / "e/lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY) == "" else 1)
        pids.append(pid)
    for pid in pids:
        winners += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert winners == 1


def test_umask_and_ids_are_the_callers(fs: Place) -> None:
    os.mkdir(fs / "w")
    os.chmod(fs / "w", 0o777)
    forked(lambda: os.close(os.open(fs / "w/n", os.O_CREAT | os.O_WRONLY)), uid=USER, gid=OTHER)
    assert (fs.stat("w/n").st_uid, fs.stat("w/n").st_gid) == (USER, OTHER)


def test_fifo_across_copy_up(fs: Place) -> None:
    """Both ends meet in one pipe, whichever layer the name lies in when each is opened."""
    r = fs.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    os.chmod(fs / "fifo", 0o600)
    os.link(fs / "fifo", fs / "e/fifo")
    os.rename(fs / "fifo", fs / "d/fifo")
    for name in ("d/fifo", "e/fifo"):
        w = fs.open(name, os.O_WRONLY | os.O_NONBLOCK)
        os.write(w, name.encode())
        assert os.read(r, 100) == name.encode()


with open("/bin/sleep", "rb") as _program:
    _SLEEP = _program.read()


@tree({"sleep": File(data=_SLEEP, mode=0o755), "script": File(data=b"#!/bin/sh\necho $0\n", mode=0o755)})
def test_program_in_a_layer(fs: Place) -> None:
    """Runs from where it lies; cannot be written while it runs; runs on after copy-up, rename and unlink."""
    assert subprocess.run([fs / "script"], capture_output=True).stdout == os.fsencode(fs / "script") + b"\n"
    running = subprocess.Popen([fs / "sleep", "60"])
    try:
        assert err(os.open, fs / "sleep", os.O_WRONLY) == "ETXTBSY"
        os.chmod(fs / "sleep", 0o700)
        os.rename(fs / "sleep", fs / "moved")
        assert err(os.open, fs / "moved", os.O_RDWR) == "ETXTBSY"
        assert os.readlink(f"/proc/{running.pid}/exe") == fs / "moved"
        os.unlink(fs / "moved")
        assert running.poll() is None
    finally:
        running.kill()
        running.wait()


def test_pwritev2_append(fs: Place) -> None:
    fd = fs.open("f", RW)
    assert os.pwritev(fd, [b"end"], 0, os.RWF_APPEND) == 3
    assert os.pwritev(fd, [b"J"], 0, os.RWF_DSYNC) == 1
    assert fs.read("f") == b"Jello world\nend"


def test_mtime_is_kept_when_data_follow_metadata(fs: Place) -> None:
    """A chmod copies attributes only; the first open for writing brings the data, and changes no time of
    them."""
    for name in ("big", "sparse", "f"):
        os.chmod(fs / name, 0o600)
        before = fs.stat(name).st_mtime_ns
        fs.close(fs.open(name, RW))
        assert fs.stat(name).st_mtime_ns == before == OLD_NS, name
        if fs.mounted and name == "f":
            fs.mounted.remount()
            assert fs.stat(name).st_mtime_ns == before
