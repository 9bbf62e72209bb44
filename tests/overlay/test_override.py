"""Owners, modes and types in xattrs (`xattr_permissions`), against fuse-overlayfs and a plain directory."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.overlay.override import CONTAINERS, FUSE_OVERLAYFS, PRIVILEGED
from tests.overlay import work
from tests.support import mounts
from tests.support.mounts import FuseOverlayfs, Layerfs
from tests.support.processes import spawn
from tests.support.stack import Stack
from tests.support.tree import Snapshot, assert_equal, snapshot

FORMS = {1: PRIVILEGED, 2: FUSE_OVERLAYFS}


def look(root: Path) -> Snapshot:
    # fuse-overlayfs 1.10 shows containers/storage's mark; its directories' times are those of its copy-up.
    return snapshot(root, hide_xattr=lambda name: name.endswith(b".override_stat"))


def force_masked(root: Path) -> None:
    """A layer as containers/storage unpacks it under `force_mask`: all root's, mode 0700, the truth in the
    xattr.
    """

    def mark(path: Path, value: str) -> None:
        os.chmod(path, 0o700)
        os.setxattr(path, CONTAINERS, value.encode())

    for name in ("etc", "home", "home/user"):
        (root / name).mkdir()
    for name in ("etc/passwd", "etc/shadow", "home/user/mine", "su"):
        (root / name).write_text(name)
    (root / "home/user/link").symlink_to("mine")
    mark(root / "etc/passwd", "0:0:0644")
    mark(root / "etc/shadow", "0:42:0640")
    mark(root / "etc", "0:0:0755:dir")
    mark(root / "home/user/mine", "1000:1001:0600:file")
    mark(root / "home/user", "1000:1001:0750")
    mark(root / "home", "0:0:01777")
    mark(root / "su", "0:0:04755")
    mark(root, "0:0:0555")


@pytest.fixture
def masked(root: None) -> Iterator[Stack]:
    made = Stack(n_lowers=1)
    force_masked(made.lowers[0])
    yield made
    made.remove()


def facts(path: Path) -> tuple[int, int, str]:
    st = os.lstat(path)
    return st.st_uid, st.st_gid, oct(st.st_mode)


@pytest.mark.parametrize("options", ["xattr_permissions=2", ""])
def test_a_force_masked_layer(masked: Stack, options: str) -> None:
    with Layerfs(masked, options) as m:
        assert facts(m.mnt / "etc") == (0, 0, "0o40755")
        assert facts(m.mnt / "etc/shadow") == (0, 42, "0o100640")
        assert facts(m.mnt / "home") == (0, 0, "0o41777")
        assert facts(m.mnt / "home/user/mine") == (1000, 1001, "0o100600")
        assert facts(m.mnt / "su") == (0, 0, "0o104755")
        assert os.listxattr(m.mnt / "su") == []
        with pytest.raises(OSError, match="No data"):
            os.getxattr(m.mnt / "su", CONTAINERS)
        with pytest.raises(OSError) as refused:
            os.setxattr(m.mnt / "su", CONTAINERS, b"0:0:0777")
        assert refused.value.errno == errno.EPERM
        # Access is judged by what is shown.
        done = subprocess.run(["cat", m.mnt / "etc/passwd"], user=1234, group=1234, capture_output=True)
        assert done.stdout == b"etc/passwd"
        done = subprocess.run(["cat", m.mnt / "etc/shadow"], user=1234, group=1234, capture_output=True)
        assert done.returncode and b"Permission denied" in done.stderr
        # A write takes setuid away, here too (but for whoever has CAP_FSETID).
        os.chmod(m.mnt / "su", 0o4777)
        write = 'echo ! >>"$0"'
        subprocess.run(["sh", "-c", write, m.mnt / "su"], user=1234, group=1234, check=True)
        assert facts(m.mnt / "su") == (0, 0, "0o100777")


@pytest.mark.parametrize("options", ["", "xattr_permissions=2"])
def test_a_force_masked_layer_as_fuse_overlayfs_shows_it(masked: Stack, options: str) -> None:
    if reason := mounts.why_no_fuse_overlayfs():
        pytest.skip(reason)
    masked.upper = masked.work = None
    with FuseOverlayfs(masked, options) as theirs:
        seen = look(theirs.mnt)
    with Layerfs(masked, options) as ours:
        assert_equal(seen, look(ours.mnt), labels=("fuse-overlayfs", "layerfs"))


def test_a_layer_of_somebody_else_is_not_believed(masked: Stack) -> None:
    """Whose own layer it is could say "root's, setuid" of any file: only the option has that read."""
    subprocess.run(["chown", "-Rh", "1000:1000", masked.lowers[0]], check=True)
    for path in ("su", "etc"):
        assert os.stat(masked.lowers[0] / path).st_uid == 1000
    with Layerfs(masked) as m:
        assert facts(m.mnt / "su") == (1000, 1000, "0o100700")
    with Layerfs(masked, "xattr_permissions=2") as m:
        assert facts(m.mnt / "su") == (0, 0, "0o104755")


def change(root: Path) -> None:
    """A day's work on `force_masked`, in forms that fuse-overlayfs 1.10 gets right: it adds 0755 to the mode
    of all that it makes, and a chmod gives what it is done to to root.
    """
    os.chmod(root / "etc/passwd", 0o755)
    os.chown(root / "etc/passwd", 3, 4)
    (root / "etc/new").write_text("new")
    os.chmod(root / "etc/new", 0o640)
    (root / "made").mkdir()
    os.chmod(root / "made", 0o700)
    os.chown(root / "made", 5, 6)
    with open(root / "home/user/mine", "a") as file:
        file.write("more")
    os.chmod(root / "home/user/mine", 0o600)
    os.chown(root / "home/user/mine", 1000, 1001)
    os.unlink(root / "su")
    for name in ("etc/passwd", "etc/new", "made", "home/user/mine", "home/user", "home", "etc"):
        os.utime(root / name, (1e9, 1e9))


def change_back(root: Path) -> None:
    os.chmod(root / "etc/new", 0o604)
    os.chmod(root / "made", 0o711)
    os.chown(root / "made", 50, 60)
    with open(root / "etc/passwd", "a") as file:
        file.write("more")
    os.chmod(root / "etc/passwd", 0o644)
    os.chown(root / "etc/passwd", 3, 5)
    (root / "made/sub").mkdir()
    os.chmod(root / "made/sub", 0o750)
    (root / "made/sub/f").write_text("f")
    os.chmod(root / "made/sub/f", 0o444)
    os.unlink(root / "home/user/mine")
    for name in ("etc/passwd", "etc/new", "made/sub/f", "made/sub", "made", "home/user", "etc"):
        os.utime(root / name, (1e9, 1e9))


@pytest.mark.parametrize("option", [1, 2])
@pytest.mark.parametrize("first", ["fuse-overlayfs", "layerfs"])
def test_each_goes_on_with_the_others_upper(masked: Stack, option: int, first: str) -> None:
    if reason := mounts.why_no_fuse_overlayfs():
        pytest.skip(reason)
    kinds: list[type[FuseOverlayfs | Layerfs]] = [FuseOverlayfs, Layerfs]
    if first == "layerfs":
        kinds.reverse()
    one, two = kinds
    # Metadata-only copies are not a form that fuse-overlayfs knows.
    options = f"xattr_permissions={option},redirect_dir=off,metacopy=off"
    with one(masked, options) as m:
        change(m.mnt)
        made = look(m.mnt)
    assert masked.upper is not None
    assert os.getxattr(masked.upper / "etc/passwd", FORMS[option]).startswith(b"3:4:")
    assert os.stat(masked.upper / "etc/passwd").st_uid == 0
    with two(masked, options) as m:
        assert_equal(made, look(m.mnt), labels=(one.name, two.name))
        change_back(m.mnt)
        made = look(m.mnt)
    with one(masked, options) as m:
        assert_equal(made, look(m.mnt), labels=(two.name, one.name))


def kinds_of_objects(root: Path) -> None:
    """Everything that fuse-overlayfs 1.10 has no form for."""
    os.umask(0)
    root = root / "kinds"
    root.mkdir()
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "loop", stat.S_IFBLK | 0o660, os.makedev(7, 1234))
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(root)
        server.bind("socket")
        os.chdir(here)
    os.chown(root / "fifo", 12, 13)
    os.chown(root / "null", 14, 15)
    os.chmod(root / "loop", 0o600)
    os.rename(root / "loop", root / "renamed")
    os.link(root / "null", root / "linked")
    (root / "setgid").mkdir()
    os.chown(root / "setgid", 20, 21)
    os.chmod(root / "setgid", 0o2775)
    (root / "setgid/inside").write_text("x")
    (root / "setgid/dir").mkdir()
    os.mkfifo(root / "setgid/fifo")
    os.symlink("x", root / "setgid/link")
    (root / "program").write_text("#!/bin/sh\n")
    os.chmod(root / "program", 0o6755)
    os.chown(root / "program", 1, 1)  # takes setuid away
    (root / "program2").write_text("#!/bin/sh\n")
    os.chmod(root / "program2", 0o4711)
    os.truncate(root / "program2", 5)  # so does this
    os.setxattr(root / "program2", "system.posix_acl_access", work.ACL)
    os.chmod(root / "program2", 0o640)
    (root / "default").mkdir()
    os.setxattr(root / "default", "system.posix_acl_default", work.ACL)
    (root / "default/inherits").write_text("x")
    os.mkdir(root / "default/dir", 0o755)


def plain_objects(upper: Path) -> None:
    """In an upper of this kind everything is its owner's, and nothing is special but whiteouts."""
    for here, dirs, files in os.walk(upper):
        for name in (*dirs, *files):
            st = os.lstat(os.path.join(here, name))
            if stat.S_ISLNK(st.st_mode) or (stat.S_ISCHR(st.st_mode) and st.st_rdev == 0):
                continue
            assert stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode), name
            assert (st.st_uid, st.st_gid) == (0, 0) and not st.st_mode & 0o7000, name


@pytest.mark.parametrize("option", [1, 2])
def test_as_a_plain_directory(root: None, make_stack: type[Stack], option: int) -> None:
    stack, plain = make_stack(n_lowers=2), make_stack(n_lowers=0, writable=False)
    work.lay_out(stack)
    work.plain(plain)
    with Layerfs(stack, f"xattr_permissions={option}") as m:
        assert_equal(look(plain.mnt), look(m.mnt), labels=("plain", "layerfs"), ignore=["mtime_ns"])
        for where in (plain.mnt, m.mnt):
            work.work_in(where)
            assert os.waitpid(spawn(lambda where=where: kinds_of_objects(where)), 0)[1] == 0  # type: ignore[misc]

        def same(message: str) -> None:
            ignore = ["mtime_ns"]
            assert_equal(
                look(plain.mnt), look(m.mnt), ignore=ignore, labels=("plain", "layerfs"), message=message
            )

        same("after the work")
        m.remount()
        same("mounted again")
    assert stack.upper is not None
    plain_objects(stack.upper)
    # As a layer of somebody's next mount.
    again = make_stack(n_lowers=0)
    again.lowers = [stack.upper, *stack.lowers]
    with Layerfs(again) as m:
        same("as a lower")


def test_links_kept_as_files(root: None, make_stack: type[Stack]) -> None:
    """containers/storage's `symlink` type: the target is the file's content."""
    stack = make_stack(n_lowers=1)
    (stack.lowers[0] / "link").write_text("to/there")
    os.setxattr(stack.lowers[0] / "link", CONTAINERS, b"7:8:0777:symlink")
    os.setxattr(stack.lowers[0], CONTAINERS, b"0:0:0755")
    with Layerfs(stack, "xattr_permissions=2") as m:
        assert os.readlink(m.mnt / "link") == "to/there"
        assert os.lstat(m.mnt / "link").st_uid == 7
        os.chown(m.mnt / "link", 9, 9, follow_symlinks=False)
        assert os.readlink(m.mnt / "link") == "to/there"
        assert os.lstat(m.mnt / "link").st_uid == 9
