"""Mapped owners (`uidmapping`, `gidmapping`) against the kernel's own: an idmapped mount of a plain
directory, in which root of a user namespace does the same.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.mounts import FuseOverlayfs, Layerfs
from tests.support.processes import spawn
from tests.support.stack import Stack
from tests.support.tree import assert_equal, snapshot

FIRST, COUNT = 100_000, 65_536
OPTIONS = f"uidmapping=0:{FIRST}:{COUNT},gidmapping=0:{FIRST}:{COUNT}"
_libc = ctypes.CDLL(None, use_errno=True)
_SYS_open_tree, _SYS_move_mount, _SYS_mount_setattr = 428, 429, 442
_CLONE_NEWUSER = 0x10000000
_MOUNT_ATTR_IDMAP = 0x00100000
CAP_NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
ACL_U7_G8 = struct.pack(
    "<I" + "HHI" * 6,
    2,
    1,
    6,
    2**32 - 1,
    2,
    4,
    7,
    4,
    4,
    2**32 - 1,
    8,
    6,
    8,
    0x10,
    6,
    2**32 - 1,
    0x20,
    4,
    2**32 - 1,
)


@contextmanager
def user_namespace() -> Iterator[int]:
    """A process in a user namespace whose ids 0.. are FIRST.. of the host."""
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(done[1])
        _libc.unshare(_CLONE_NEWUSER)
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{kind}").write_text(f"0 {FIRST} {COUNT}")
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for fd in (*ready, *done):
            os.close(fd)


@contextmanager
def idmapped(source: Path, target: Path, child: int) -> Iterator[None]:
    """`source` on `target`, ids mapped as in the namespace of `child` (mount_setattr(2))."""

    def check(result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    space = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    tree = check(_libc.syscall(_SYS_open_tree, -100, os.fsencode(source), 1))
    try:
        change = struct.pack("<QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, space)
        check(_libc.syscall(_SYS_mount_setattr, tree, b"", 0x1000, change, len(change)))
        check(_libc.syscall(_SYS_move_mount, tree, b"", -100, os.fsencode(target), 4))
    finally:
        os.close(tree)
        os.close(space)
    try:
        yield
    finally:
        mounts.umount(target)


def as_root_of(child: int, call: Callable[[], object]) -> None:
    """Runs `call` as root of the namespace of `child`. Fails when it does."""
    space = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)

    def inside() -> None:
        if _libc.setns(space, _CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "setns")
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        call()

    _, status = os.waitpid(spawn(inside), 0)
    os.close(space)
    assert status == 0


def lay_out(root: Path) -> None:
    (root / "dir").mkdir(mode=0o775)
    for name, owner in (
        ("f", (5, 6)),
        ("dir/g", (0, 0)),
        ("mine", (1000, 1000)),
        ("foreign", (70_000, 70_000)),
    ):
        (root / name).write_text(name)
        os.chown(root / name, *owner)
    os.setxattr(root / "f", "system.posix_acl_access", ACL_U7_G8)
    (root / "link").symlink_to("f")
    os.chown(root / "link", 9, 9, follow_symlinks=False)
    program = root / "program"
    program.write_bytes(Path("/bin/cat").read_bytes())
    program.chmod(0o755)
    os.setxattr(program, "security.capability", CAP_NET_RAW)
    os.chown(root / "dir", 0, 33)
    os.chmod(root / "dir", 0o2775)


def work(root: Path) -> None:
    """What root of a container does. Everything here is seen from inside the namespace."""
    os.chdir(root)
    os.umask(0)  # which pyfuse3 applies even under a default ACL (tests/posix/known.py)
    assert (os.stat("f").st_uid, os.stat("f").st_gid) == (5, 6)
    assert os.stat("foreign").st_uid == 65_534
    assert os.getxattr("f", "system.posix_acl_access") == ACL_U7_G8
    assert os.getxattr("program", "security.capability") == CAP_NET_RAW
    Path("new").write_text("new")
    os.mkdir("dir/sub")
    os.symlink("x", "dir/new-link")
    os.mkfifo("dir/fifo")
    os.chown("f", 33, 34)
    os.chown("link", 10, 11, follow_symlinks=False)
    os.chown("dir/sub", 12, 13)
    os.setxattr("dir/g", "system.posix_acl_access", ACL_U7_G8)
    os.setxattr("dir/sub", "system.posix_acl_default", ACL_U7_G8)
    Path("dir/sub/inherits").write_text("i")
    Path("dir/program").write_bytes(Path("program").read_bytes())
    os.setxattr("dir/program", "security.capability", CAP_NET_RAW)
    with pytest.raises(OSError):
        os.chown("new", 70_000, -1)
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1000, 1000, 1000)
    Path("mine").write_text("changed")
    with pytest.raises(PermissionError):
        Path("foreign").write_text("changed")
    with pytest.raises(PermissionError):
        Path("dir/no").write_text("no")


@pytest.fixture
def stack(root: None) -> Iterator[Stack]:
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)
    made = Stack(n_lowers=1)
    lay_out(made.lowers[0])
    os.chmod(made.upper, 0o755)  # type: ignore[arg-type]
    yield made
    made.remove()


def test_as_an_idmapped_mount(stack: Stack) -> None:
    """Seen from the host, from inside, and on disk: what the kernel makes of the same work."""
    plain, oracle = stack.dir / "plain", stack.dir / "oracle"
    plain.mkdir()
    oracle.mkdir()
    subprocess.run(["cp", "-a", f"{stack.lowers[0]}/.", plain], check=True)
    assert stack.upper is not None
    shutil.copystat(plain, stack.upper)  # the root's times are the upper's
    with user_namespace() as child, idmapped(plain, oracle, child), Layerfs(stack, OPTIONS) as m:
        assert_equal(snapshot(oracle), snapshot(m.mnt), message="before the work")
        before = snapshot(stack.lowers[0])
        for root in (oracle, m.mnt):
            as_root_of(child, lambda root=root: work(root))  # type: ignore[misc]
        assert_equal(snapshot(oracle), snapshot(m.mnt), ignore=["mtime_ns"], labels=("idmapped", "layerfs"))
        m.remount()
        assert_equal(
            snapshot(oracle), snapshot(m.mnt), ignore=["mtime_ns"], labels=("idmapped", "layerfs, remounted")
        )
        assert_equal(before, snapshot(stack.lowers[0]), message="a lower was changed")
    # The upper holds ids of the image: without a map the mount shows what the plain directory holds.
    with Layerfs(stack) as m:
        assert_equal(snapshot(plain), snapshot(m.mnt), ignore=["mtime_ns"], labels=("plain", "stored"))


def test_root_of_the_namespace_keeps_setgid_when_he_sets_an_acl(stack: Stack) -> None:
    """He may, though he is not in the group (fs/posix_acl.c posix_acl_update_mode)."""
    with user_namespace() as child, Layerfs(stack, OPTIONS) as m:
        if not m.has_gate():
            pytest.skip("pyfuse3 does not hand on what the kernel says of that")
        as_root_of(child, lambda: os.setxattr(m.mnt / "dir", "system.posix_acl_access", ACL_U7_G8))
        assert stat.S_IMODE((m.mnt / "dir").stat().st_mode) == 0o2664


def test_a_file_capability_works_in_the_namespace(stack: Stack) -> None:
    """execve(2) gives the capability to an ordinary user of the container, as with an idmapped mount."""

    def call(root: Path) -> None:
        os.setresgid(1000, 1000, 1000)
        os.setresuid(1000, 1000, 1000)
        status = subprocess.run(
            [root / "program", "/proc/self/status"], capture_output=True, text=True, check=True
        )
        permitted = next(line for line in status.stdout.splitlines() if line.startswith("CapPrm:"))
        assert int(permitted.split()[1], 16) == 1 << 13

    with user_namespace() as child, Layerfs(stack, OPTIONS) as m:
        as_root_of(child, lambda: call(m.mnt))


def test_root_of_the_host_is_nobody(stack: Stack) -> None:
    """What it makes belongs to the overflow id, as with fuse-overlayfs; ids that nobody has are refused."""
    with Layerfs(stack, OPTIONS) as m:
        (m.mnt / "made").write_text("x")
        assert os.stat(m.mnt / "made").st_uid == FIRST + 65_534
        with pytest.raises(OSError, match="Invalid argument"):
            os.chown(m.mnt / "made", 3, -1)
        os.chown(m.mnt / "made", FIRST, FIRST)
    assert os.stat(stack.upper / "made").st_uid == 0  # type: ignore[operator]


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        f"uidmapping=:0:{FIRST}:1:1:200000:1000,gidmapping=:0:{FIRST}:{COUNT}",
        "squash_to_root",
        "squash_to_uid=12,squash_to_gid=13",
        f"squash_to_uid=12,{OPTIONS}",
    ],
)
def test_owners_as_with_fuse_overlayfs(stack: Stack, options: str) -> None:
    if reason := mounts.why_no_fuse_overlayfs():
        pytest.skip(reason)

    def look(root: Path) -> dict[str, tuple[int, int]]:
        found = {}
        for here, dirs, files in os.walk(root):
            for name in (*dirs, *files):
                st = os.lstat(os.path.join(here, name))
                found[os.path.relpath(os.path.join(here, name), root)] = (st.st_uid, st.st_gid)
        return found

    def use(root: Path) -> None:
        (root / "made").write_text("x")
        (root / "made-dir").mkdir()
        os.chown(root / "made-dir", FIRST, FIRST + 3)

    seen = []
    for kind in (FuseOverlayfs, Layerfs):
        other = Stack(n_lowers=1)
        lay_out(other.lowers[0])
        with kind(other, options) as m:
            use(m.mnt)
            seen.append(look(m.mnt))
        assert other.upper is not None
        seen.append(
            {
                name: (os.stat(other.upper / name).st_uid, os.stat(other.upper / name).st_gid)
                for name in ("made", "made-dir")
            }
        )
        assert stat.S_ISREG(os.stat(other.upper / "made").st_mode)
        other.remove()
    assert seen[:2] == seen[2:]
