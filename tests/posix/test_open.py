"""open(2) and creat(2): flags, errors, permissions, what a new file looks like."""

from __future__ import annotations

import os
import stat
import subprocess

import pytest

from .calls import AT_FDCWD, AT_SYMLINK_FOLLOW, err, linkat, listing
from .place import OTHER, USER, Place, as_user, compared, forked, people

O_TMPFILE = os.O_TMPFILE
ACCESS = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}


@pytest.mark.parametrize(
    "flags",
    [
        os.O_RDONLY,
        os.O_WRONLY,
        os.O_RDWR,
        os.O_RDONLY | os.O_CREAT,
        os.O_WRONLY | os.O_CREAT,
        os.O_WRONLY | os.O_CREAT | os.O_EXCL,
        os.O_WRONLY | os.O_TRUNC,
        os.O_RDONLY | os.O_DIRECTORY,
        os.O_WRONLY | os.O_DIRECTORY,
        os.O_RDONLY | os.O_NOFOLLOW,
        os.O_RDWR | os.O_NOFOLLOW | os.O_CREAT,
        os.O_PATH,
        os.O_PATH | os.O_NOFOLLOW,
        os.O_RDWR | os.O_APPEND,
        os.O_RDONLY | os.O_NOATIME,
        os.O_RDWR | os.O_SYNC,
        os.O_RDWR | os.O_DSYNC,
    ],
)
@compared
def test_errors_of_every_flag(fs: Place, flags: int) -> object:
    names = ["f", "d", "l", "ld", "loop", "f/x", "nothing/x", "e", "d/a", "lx", "nothing"]
    got = [(name, err(os.open, fs / name, flags, 0o640)) for name in names]
    return got, fs.names(), fs.read("f")


@pytest.mark.parametrize("kind", ["file", "dangling", "in new dir"])
def test_create_makes_an_empty_file(fs: Place, kind: str) -> None:
    name, real = {"file": ("n", "n"), "dangling": ("lx", "nowhere"), "in new dir": ("e/n", "e/n")}[kind]
    fd = fs.open(name, os.O_RDWR | os.O_CREAT, 0o640)
    st = fs.stat(real)
    assert stat.S_ISREG(st.st_mode) and fs.mode(real) == 0o640
    assert (st.st_size, st.st_nlink, st.st_uid, st.st_gid) == (0, 1, 0, 0)
    assert os.fstat(fd).st_ino == st.st_ino
    os.write(fd, b"abc")
    assert fs.read(real) == b"abc"


def test_excl_does_not_follow(fs: Place) -> None:
    for name in ("f", "d", "l", "lx", "loop", "fifo"):
        assert err(os.open, fs / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY) == "EEXIST", name


def test_creat_over_an_existing_file_keeps_its_mode_and_inode(fs: Place) -> None:
    before = fs.stat("f2")
    fd = fs.open("f2", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o777)
    after = fs.stat("f2")
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, 0)
    os.write(fd, b"x")
    assert fs.read("f2") == b"x"


def test_read_only_truncation(fs: Place) -> None:
    """O_RDONLY|O_TRUNC is unspecified by POSIX; Linux truncates."""
    fs.close(fs.open("f", os.O_RDONLY | os.O_TRUNC))
    assert fs.stat("f").st_size == 0


def test_trunc_of_a_hard_linked_file_shows_under_every_name(fs: Place) -> None:
    fs.close(fs.open("h1", os.O_WRONLY | os.O_TRUNC))
    assert fs.read("h2") == b""
    assert fs.stat("h1").st_ino == fs.stat("h2").st_ino


def test_append_always_writes_at_the_end(fs: Place) -> None:
    a = fs.open("f", os.O_RDWR | os.O_APPEND)
    b = fs.open("f", os.O_RDWR)
    os.pwrite(b, b"12345", 12)
    os.lseek(a, 0, os.SEEK_SET)
    os.write(a, b"end")
    assert fs.read("f") == b"hello world\n12345end"
    os.write(b, b"HELLO")
    assert fs.read("f") == b"HELLO world\n12345end"


def test_write_needs_a_writable_descriptor(fs: Place) -> None:
    fd = fs.open("f", os.O_RDONLY)
    assert err(os.write, fd, b"x") == "EBADF"
    assert err(os.ftruncate, fd, 0) == "EINVAL"
    fd = fs.open("f", os.O_WRONLY)
    assert err(os.read, fd, 1) == "EBADF"
    assert fs.read("f") == b"hello world\n"


def test_o_path(fs: Place) -> None:
    fd = fs.open("l", os.O_PATH | os.O_NOFOLLOW)
    assert stat.S_ISLNK(os.fstat(fd).st_mode)
    assert os.readlink(b"", dir_fd=fd) == b"f"
    fd = fs.open("d", os.O_PATH)
    assert os.stat("a", dir_fd=fd).st_ino == fs.stat("d/a").st_ino
    fd = fs.open("f", os.O_PATH)
    assert err(os.read, fd, 1) == "EBADF"
    assert err(os.fchmod, fd, 0) == "EBADF"
    assert os.stat(f"/proc/self/fd/{fd}").st_ino == fs.stat("f").st_ino


@pytest.mark.parametrize("tail", ["/", "/.", "/.."])
@compared
def test_trailing_slash(fs: Place, tail: str) -> object:
    return [
        err(os.open, fs / name + tail, os.O_RDONLY) for name in ("f", "d", "l", "ld", "lx", "nothing", "fifo")
    ] + [err(os.open, fs / name + tail, os.O_WRONLY | os.O_CREAT) for name in ("f", "d", "nothing")]


def test_o_directory_on_everything(fs: Place) -> None:
    for name in ("f", "l", "fifo", "sock", "chr", "h1", "empty"):
        assert err(os.open, fs / name, os.O_RDONLY | os.O_DIRECTORY) == "ENOTDIR", name
    for name in ("d", "ld", "e"):
        assert err(os.open, fs / name, os.O_RDONLY | os.O_DIRECTORY) == "", name


def test_read_of_a_directory(fs: Place) -> None:
    fd = fs.open("d", os.O_RDONLY)
    assert err(os.read, fd, 10) == "EISDIR"
    assert err(os.pread, fd, 10, 0) == "EISDIR"


def test_special_files_open(fs: Place) -> None:
    assert err(os.open, fs / "sock", os.O_RDONLY) == "ENXIO"
    assert err(os.open, fs / "fifo", os.O_WRONLY | os.O_NONBLOCK) == "ENXIO"
    r = fs.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    w = fs.open("fifo", os.O_WRONLY | os.O_NONBLOCK)
    os.write(w, b"through")
    assert os.read(r, 100) == b"through"


def test_device_node_opens_the_device(fs: Place) -> None:
    if fs.mounted and fs.system == "layerfs":
        from tests.support.mounts import mount_options

        if "nodev" in mount_options(fs.mounted.mnt):
            assert err(os.open, fs / "chr", os.O_RDONLY) == "EACCES"
            return
    fd = fs.open("chr", os.O_RDWR)
    assert os.read(fd, 10) == b""
    assert os.write(fd, b"gone") == 4


# --- O_TMPFILE ---


def test_tmpfile_has_no_name_and_can_be_linked(fs: Place) -> None:
    before = fs.names("e")
    fd = fs.open("e", O_TMPFILE | os.O_RDWR, 0o600)
    assert fs.names("e") == before
    assert os.fstat(fd).st_nlink == 0
    os.write(fd, b"late name")
    linkat(AT_FDCWD, f"/proc/self/fd/{fd}", fs / "e/named", AT_SYMLINK_FOLLOW)
    assert fs.read("e/named") == b"late name"
    assert os.fstat(fd).st_nlink == 1 and os.fstat(fd).st_ino == fs.stat("e/named").st_ino


def test_tmpfile_excl_cannot_be_linked(fs: Place) -> None:
    fd = fs.open("d", O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    assert err(linkat, AT_FDCWD, f"/proc/self/fd/{fd}", fs / "n", AT_SYMLINK_FOLLOW) == "ENOENT"


@compared
def test_tmpfile_errors(fs: Place) -> object:
    return [
        err(os.open, fs / name, O_TMPFILE | flags, 0o600)
        for name in ("f", "nothing", "d", "ld")
        for flags in (os.O_RDONLY, os.O_WRONLY)
    ]


# --- O_DIRECT ---


def test_direct_io(fs: Place) -> None:
    import mmap

    fd = fs.open("big", os.O_RDWR | os.O_DIRECT)
    buf = mmap.mmap(-1, 8192)
    assert os.preadv(fd, [buf], 4096) == 8192
    assert bytes(buf) == (bytes(range(256)) * 32)
    buf[:] = b"D" * 8192
    assert os.pwritev(fd, [buf], 4096) == 8192
    data = fs.read("big")
    assert data[4096:12288] == b"D" * 8192 and data[:4096] == bytes(range(256)) * 16
    assert len(data) == 1200 * 256


# --- permissions ---


@people
@pytest.mark.parametrize("how", ["r", "w", "rw"])
@compared
def test_permission_to_open(fs: Place, how: str) -> object:
    names = ["f", "f2", "open/theirs", "open/mine", "open/f", "closed/f", "noexec/f", "d/sub/c"]
    return as_user(lambda: [(n, err(os.open, fs / n, ACCESS[how])) for n in names])


@pytest.mark.parametrize(
    "mode", [0o000, 0o400, 0o200, 0o040, 0o020, 0o004, 0o002, 0o444, 0o222, 0o604, 0o640]
)
@compared
def test_permission_by_class(fs: Place, mode: int) -> object:
    os.chown(fs / "f", USER, OTHER)
    os.chmod(fs / "f", mode)
    who = [(USER, USER, ()), (99, OTHER, ()), (99, 99, (OTHER,)), (99, 99, ())]
    return [
        as_user(lambda: [err(os.open, fs / "f", a) for a in ACCESS.values()], uid, gid, groups)
        for uid, gid, groups in who
    ]


@people
@compared
def test_permission_to_create(fs: Place) -> object:
    flags = os.O_CREAT | os.O_WRONLY
    return as_user(
        lambda: [
            err(os.open, fs / n, flags)
            for n in ("n", "open/n", "closed/n", "noexec/n", "open/mydir/n", "sticky/n")
        ]
    )


@people
def test_new_file_belongs_to_its_maker(fs: Place) -> None:
    as_user(lambda: os.close(os.open(fs / "open/n", os.O_CREAT | os.O_WRONLY, 0o666)), USER, OTHER)
    st = fs.stat("open/n")
    assert (st.st_uid, st.st_gid) == (USER, OTHER)


@people
def test_create_read_only_file_for_writing(fs: Place) -> None:
    """The mode counts from the next open on, not for the descriptor that made the file."""

    def user() -> tuple[int, str]:
        fd = os.open(fs / "open/n", os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o000)
        return os.write(fd, b"abc"), err(os.open, fs / "open/n", os.O_RDONLY)

    assert as_user(user) == (3, "EACCES")
    assert fs.read("open/n") == b"abc"


@people
def test_noatime_only_for_the_owner(fs: Place) -> None:
    flags = os.O_RDONLY | os.O_NOATIME
    assert as_user(lambda: err(os.open, fs / "open/mine", flags)) == ""
    assert as_user(lambda: err(os.open, fs / "open/f", flags)) == "EPERM"


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077, 0o777])
def test_umask(fs: Place, mask: int) -> None:
    def child() -> None:
        os.umask(mask)
        os.close(os.open(fs / "e/file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(fs / "e/dir", 0o777)
        os.mkfifo(fs / "e/fifo", 0o666)
        os.symlink("x", fs / "e/link")

    forked(child)
    assert fs.mode("e/file") == 0o666 & ~mask
    assert fs.mode("e/dir") == 0o777 & ~mask
    assert fs.mode("e/fifo") == 0o666 & ~mask
    assert fs.mode("e/link") == 0o777


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6777, 0o1644, 0o7777, 0o0001])
def test_create_with_special_bits(fs: Place, mode: int) -> None:
    def child() -> None:
        os.umask(0)
        os.close(os.open(fs / "n", os.O_CREAT | os.O_WRONLY, mode))

    forked(child)
    assert fs.mode("n") == mode


@people
def test_sticky_protects_regular_files_from_o_creat(fs: Place) -> None:
    """fs.protected_regular: O_CREAT of another's file in a world-writable sticky directory."""
    with open("/proc/sys/fs/protected_regular") as f:
        protected = int(f.read())
    got = as_user(lambda: err(os.open, fs / "sticky/theirs", os.O_WRONLY | os.O_CREAT))
    assert got == ("EACCES" if protected else "")
    assert as_user(lambda: err(os.open, fs / "sticky/theirs", os.O_WRONLY)) == ""


# --- executing ---


def test_execute_from_the_mount(fs: Place) -> None:
    fs.write("script", b"#!/bin/sh\necho ran $1\n")
    os.chmod(fs / "script", 0o755)
    assert subprocess.run([fs / "script", "it"], capture_output=True).stdout == b"ran it\n"
    os.chmod(fs / "script", 0o644)
    with pytest.raises(PermissionError):
        subprocess.run([fs / "script"])


def test_writing_to_a_running_program(fs: Place) -> None:
    import shutil

    shutil.copy("/bin/sleep", fs / "sleep")
    os.chmod(fs / "sleep", 0o755)
    p = subprocess.Popen([fs / "sleep", "30"])
    try:
        # Popen returns after execve has succeeded.
        assert err(os.open, fs / "sleep", os.O_WRONLY) == "ETXTBSY"
        assert err(os.truncate, fs / "sleep", 0) == "ETXTBSY"
    finally:
        p.kill()
        p.wait()
    assert err(os.open, fs / "sleep", os.O_WRONLY) == ""


def test_executing_a_file_open_for_writing(fs: Place) -> None:
    fs.write("prog", b"#!/bin/sh\n")
    os.chmod(fs / "prog", 0o755)
    fs.open("prog", os.O_WRONLY)
    assert err(os.execv, fs / "prog", ["prog"]) == "ETXTBSY"


def test_setuid_program_takes_effect_unless_nosuid(fs: Place) -> None:
    import shutil

    shutil.copy("/usr/bin/id", fs / "id")
    os.chmod(fs / "id", 0o4755)
    done = subprocess.run(
        [fs / "id", "-u"], user=USER, group=USER, extra_groups=[], capture_output=True, cwd="/"
    )
    nosuid = bool(os.statvfs(fs.path).f_flag & os.ST_NOSUID)
    assert done.stdout.strip() == (str(USER).encode() if nosuid else b"0")


@compared
def test_listing_is_what_was_laid_out(fs: Place) -> object:
    """Nothing of what the layers hide may show, nothing of the tree may miss."""
    found = {}
    for at, dirs, files in os.walk(fs.path):
        here = os.path.relpath(at, fs.path)
        found[here] = sorted(dirs), sorted(files), sorted((d.name, d.kind) for d in listing(at))
    return found


@compared
def test_attributes_are_what_was_laid_out(fs: Place) -> object:
    found = {}
    for at, dirs, files in os.walk(fs.path):
        for name in dirs + files:
            st = os.lstat(f"{at}/{name}")
            isdir = stat.S_ISDIR(st.st_mode)
            key = os.path.relpath(f"{at}/{name}", fs.path)
            found[key] = (
                oct(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns, st.st_rdev,
                None if isdir else (st.st_size, st.st_nlink),
            )  # fmt: skip
    return found


@compared
def test_contents_are_what_was_laid_out(fs: Place) -> object:
    return {name: fs.read(name) for name in fs.tree if stat.S_ISREG(os.lstat(fs / str(name)).st_mode)}
