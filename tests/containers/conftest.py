"""Stores for containers, the base image, and the machine's own stores out of reach."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.containers.store import BUSYBOX, Store, why_not
from tests.support import mounts
from tests.support.stack import scratch_root

MakeStore = Callable[..., Store]
LONG_AGO = 1_500_000_000
#: security.capability: cap_net_raw+ep
CAP_NET_RAW = "0100000200200000000000000000000000000000"

#: Directories that the programs read or write whatever they are told.
_HIDDEN = (
    "/var/lib/containers",
    "/run/containers",
    "/run/libpod",
    "/run/runc",
    "/etc/containers",
)


@pytest.fixture(scope="package", autouse=True)
def machine_out_of_reach() -> Iterator[None]:
    """The machine's own stores and configuration are covered by empty directories while these tests run, and
    mounts are shared, as on a real host: podman runs the cleanup of a container with ids of its own in a copy
    of the mount namespace and counts on its unmounts reaching ours. Where they do not, `userdata/shm` stays
    mounted, and one `podman rm` in some thirty fails with EBUSY, with any storage driver.
    """
    if os.geteuid() != 0 or os.readlink("/proc/self/ns/mnt") == _ns_of_parent():
        yield
        return
    groups = set(_control_groups())
    made = [path for path in _HIDDEN if not os.path.isdir(path)]
    for path in made:
        os.mkdir(path)
    for path in _HIDDEN:
        mounts.mount("none", path, "tmpfs", data="mode=755,size=64m")
    # the one file that no variable names
    Path("/etc/containers/policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}\n')
    mounts.mount("none", "/", "none", mounts.MS_REC | mounts.MS_SHARED)
    try:
        yield
    finally:
        mounts.mount("none", "/", "none", mounts.MS_REC | mounts.MS_PRIVATE)
        for path in _HIDDEN:
            mounts.umount(path, mounts.MNT_DETACH)
        for path in (*made, *(set(_control_groups()) - groups)):
            try:
                os.rmdir(path)
            except OSError:
                pass  # somebody else uses it by now


def _control_groups() -> list[str]:
    """The parents that podman makes for its containers, and leaves."""
    return [
        str(path)
        for top in ("*", "")
        for path in Path("/sys/fs/cgroup").glob(f"{top}/libpod_parent".strip("/"))
    ]


def _ns_of_parent() -> str:
    try:
        return os.readlink(f"/proc/{os.getppid()}/ns/mnt")
    except OSError:
        return ""


@pytest.fixture
def make_store() -> Iterator[MakeStore]:
    """Makes stores, and removes them: what is left in one then fails the test."""
    made: list[Store] = []

    def make(kind: str = "layerfs", uid: int = 0) -> Store:
        store = Store(kind, uid)
        made.append(store)
        return store

    yield make
    wrong = [f"{store.kind}: {line}" for store in made for line in store.close()]
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def store(make_store: MakeStore) -> Store:
    """A store on layerfs that holds the image `base`."""
    if reason := why_not("podman", "runc"):
        pytest.skip(reason)
    made = make_store()
    made.podman("import", "-q", "-", "base", stdin=base_tar())
    return made


@pytest.fixture(params=["layerfs", "fuse-overlayfs"])
def either(request: pytest.FixtureRequest, make_store: MakeStore) -> Store:
    """A store with the image `base`: on layerfs, and on fuse-overlayfs as the control."""
    if reason := why_not("podman", "runc"):
        pytest.skip(reason)
    made = make_store(request.param)
    made.podman("import", "-q", "-", "base", stdin=base_tar())
    return made


@pytest.fixture(scope="session")
def xattr_tool() -> Iterator[Path]:
    """A static program for images: `xattr set PATH NAME HEX`; busybox has none."""
    source = r"""
        #include <stdio.h>
        #include <string.h>
        #include <sys/xattr.h>
        int main(int argc, char **argv) {
            unsigned char value[256]; size_t n = 0;
            if (argc != 4) return 2;
            for (const char *p = argv[3]; *p && n < sizeof value; p += 2, n++)
                if (sscanf(p, "%2hhx", &value[n]) != 1) return 2;
            if (setxattr(argv[1], argv[2], value, n, 0)) { perror(argv[1]); return 1; }
            return 0;
        }
    """
    with tempfile.TemporaryDirectory(dir=scratch_root()) as where:
        tool = Path(where) / "xattr"
        done = subprocess.run(
            ["gcc", "-static", "-O1", "-x", "c", "-", "-o", tool],
            input=source,
            text=True,
            capture_output=True,
        )
        if done.returncode:
            pytest.skip(f"no static C program can be made: {done.stderr[-200:]}")
        yield tool


def base_tar() -> bytes:
    """A root with busybox: /bin/sh and its kin, and some files to work on."""
    applets = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, kind: bytes, mode: int, data: bytes = b"", link: str = "", owner: int = 0) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.linkname, info.mtime = kind, mode, link, LONG_AGO
            info.uid = info.gid = owner
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        for name in (
            "bin",
            "dev",
            "etc",
            "proc",
            "root",
            "run",
            "sys",
            "srv",
            "srv/old",
            "srv/old/deep",
            "home",
        ):
            add(name, tarfile.DIRTYPE, 0o755)
        add("tmp", tarfile.DIRTYPE, 0o1777)
        add("bin/busybox", tarfile.REGTYPE, 0o755, BUSYBOX.read_bytes())
        for applet in applets:
            if "/" not in applet and applet != "busybox":
                add(f"bin/{applet}", tarfile.SYMTYPE, 0o777, link="busybox")
        add("etc/passwd", tarfile.REGTYPE, 0o644, b"root:x:0:0::/root:/bin/sh\nuser:x:7:8::/home:/bin/sh\n")
        add("etc/group", tarfile.REGTYPE, 0o644, b"root:x:0:\nuser:x:8:\n")
        add("srv/big", tarfile.REGTYPE, 0o644, b"big" * 700_000)
        add("srv/owned", tarfile.REGTYPE, 0o640, b"7:8", owner=7)
        add("srv/first", tarfile.REGTYPE, 0o644, b"two names")
        add("srv/second", tarfile.LNKTYPE, 0o644, link="srv/first")
        add("srv/gone", tarfile.REGTYPE, 0o644, b"to be removed")
        for number in range(5):
            add(f"srv/old/deep/{number}", tarfile.REGTYPE, 0o644, b"%d" % number)
    return out.getvalue()


@pytest.fixture
def subordinate_ids(root: None) -> Iterator[None]:
    """/etc/subuid and /etc/subgid with ranges for `containers` (podman's --userns=auto) and for an ordinary
    user, in this mount namespace alone."""
    with tempfile.TemporaryDirectory(dir=scratch_root()) as where:
        ranges = Path(where) / "ranges"
        ranges.write_text(f"containers:400000:200000\n{_name(65534)}:600000:65536\n")
        covered = []
        try:
            for path in ("/etc/subuid", "/etc/subgid"):
                if not os.path.exists(path):
                    pytest.skip(f"no {path} to cover")
                mounts.bind(ranges, path)
                covered.append(path)
            yield
        finally:
            for path in covered:
                mounts.umount(path, mounts.MNT_DETACH)


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@pytest.fixture
def context(xattr_tool: Path) -> Iterator[Path]:
    """A directory to build in: `files`, and `base.tar`, to which `bin/xattr` was added."""
    with tempfile.TemporaryDirectory(dir=scratch_root(), prefix="context-") as made:
        where = Path(made)
        files = where / "files"
        for directory in ("sub/empty", "tree/deep"):
            (files / directory).mkdir(parents=True)
        for path, text in (
            ("tool", "#!/bin/sh\n"),
            ("note", "n"),
            ("sub/a", "a"),
            ("tree/one", "1"),
            ("tree/deep/two", "2"),
        ):
            (files / path).write_text(text)
        (files / "link").symlink_to("sub/a")
        os.setxattr(files / "sub/a", "user.from", b"context")
        os.setxattr(files / "sub/a", "security.capability", bytes.fromhex(CAP_NET_RAW))
        if shutil.which("setfacl"):
            subprocess.run(["setfacl", "-m", "u:7:rw", files / "note"], check=True)
        (where / "base.tar").write_bytes(_with_tool(xattr_tool))
        for each in [*where.rglob("*"), where]:
            os.utime(each, (LONG_AGO, LONG_AGO), follow_symlinks=False)
        yield where


def _with_tool(tool: Path) -> bytes:
    out = io.BytesIO(base_tar())
    with tarfile.open(fileobj=out, mode="a", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("bin/xattr")
        info.size, info.mode, info.mtime = tool.stat().st_size, 0o755, LONG_AGO
        with tool.open("rb") as file:
            tar.addfile(info, file)
    return out.getvalue()
