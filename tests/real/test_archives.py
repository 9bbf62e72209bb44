"""tar and rsync there and back: everything that a root file system may hold arrives as it was sent."""

from __future__ import annotations

import os
import random
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.tree import Snapshot, assert_equal, snapshot

from .conftest import Place, run

pytestmark = [pytest.mark.long, pytest.mark.root, pytest.mark.timeout(600)]

TAR = ["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--sparse", "--format=posix"]
# Times are compared to the nanosecond; by default rsync takes two within the same second for equal.
RSYNC = ["rsync", "-aHAXS", "--numeric-ids", "--modify-window=-1"]


ODD_NAMES = (
    b"a\nb",
    b"tab\there",
    b"\xff\xfe not utf-8",
    b" leading",
    b"back\\slash",
    b"colon:comma,",
    b"n" * 255,
)
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # cap_net_bind_service=ep


def fill(top: Path) -> None:
    """A tree with one of everything, and enough plain files."""
    chance = random.Random(20)
    for number in range(600):
        path = top / f"d{number % 12}" / f"sub{number % 5}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(chance.randrange(20_000)))
        path.chmod(chance.choice([0o644, 0o600, 0o755, 0o4755, 0o2755, 0o444, 0o000]))
    odd = top / "odd"
    odd.mkdir()
    for name in ODD_NAMES:
        with open(os.fsencode(odd) + b"/" + name, "wb") as file:
            file.write(name)
    for name in ("one", "two/deep", "three"):
        path = top / "links" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "one":
            path.write_text("shared")
        else:
            path.hardlink_to(top / "links/one")
    (top / "links/soft").symlink_to("one")
    (top / "links/dangling").symlink_to("/nowhere/" + "x" * 200)
    with open(top / "sparse", "wb") as file:
        for offset in (0, 1 << 20, 5 << 20):
            file.seek(offset)
            file.write(b"data" * 1024)
        file.truncate(8 << 20)
    os.mkfifo(top / "fifo")
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "loop", stat.S_IFBLK | 0o660, os.makedev(7, 99))
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(top)  # a socket's path is at most 107 bytes long
        try:
            listener.bind("socket")
        finally:
            os.chdir(here)
    (top / "empty").mkdir(mode=0o1777)
    (top / "setgid").mkdir()
    (top / "setgid").chmod(0o2775)
    (top / "attributes").write_text("x")
    os.setxattr(top / "attributes", "user.comment", b"\0binary\xff")
    os.setxattr(top / "attributes", "trusted.note", b"for root")
    os.setxattr(top / "attributes", "security.capability", CAPABILITY)
    run(["setfacl", "-m", "u:1234:rw,g:4321:r", top / "attributes"])
    run(["setfacl", "-m", "u:1234:rwx", "-m", "d:u:1234:rx,d:g::r", top / "setgid"])
    for number, where in enumerate((top / "attributes", top / "links/one", top / "d3", top / "setgid")):
        os.chown(where, 1000 + number, 2000 + number)
    os.lchown(top / "links/soft", 77, 88)
    (top / "d3").chmod(0o751)
    for number, (where, directories, files) in enumerate(os.walk(top, topdown=False)):
        for name in files + directories:
            when = 1_200_000_000_123_456_789 + number * 1_000_000_007
            os.utime(os.path.join(where, name), ns=(when, when), follow_symlinks=False)
    os.utime(top, ns=(1_100_000_000_000_000_001,) * 2)


def look(top: Path, **more: object) -> Snapshot:
    return snapshot(str(top), **more)  # type: ignore[arg-type]


def tar_to(source: Path, target: Path, archive: Path) -> None:
    run(["tar", *TAR, "-cf", archive, "-C", source, "."])
    said = run(["tar", *TAR, "--delay-directory-restore", "-xpf", archive, "-C", target])
    assert not [line for line in said.stderr.splitlines() if "socket ignored" not in line]


def rsync_to(source: Path, target: Path) -> None:
    run([*RSYNC, f"{source}/", f"{target}/"])


def test_tar_there_and_back(place: Place, needs: Callable[..., None], layer: Callable[[], Path]) -> None:
    needs("tar", "setfacl")
    source, back, archive = layer(), layer(), layer() / "archive.tar"
    fill(source)
    (source / "socket").unlink()  # tar leaves sockets out
    os.utime(source, ns=(1_100_000_000_000_000_001,) * 2)
    mounted = place()
    tar_to(source, mounted.mnt, archive)
    expected = look(source)
    assert_equal(expected, look(mounted.mnt), labels=("sent", "on the mount"))
    mounted.remount()
    assert_equal(expected, look(mounted.mnt), labels=("sent", "after the remount"))
    tar_to(mounted.mnt, back, archive)
    assert_equal(expected, look(back), labels=("sent", "back"))


def test_tar_over_a_lower_tree(place: Place, needs: Callable[..., None], layer: Callable[[], Path]) -> None:
    """Extracting over what a layer already holds: every file is replaced, directories are set again."""
    needs("tar", "setfacl")
    source, archive = layer(), layer() / "archive.tar"
    fill(source)
    (source / "socket").unlink()
    os.utime(source, ns=(1_100_000_000_000_000_001,) * 2)
    lower = layer()
    run(["cp", "-a", f"{source}/.", lower])
    for number in range(0, 600, 3):  # what is not in the archive stays
        path = lower / f"d{number % 12}" / f"sub{number % 5}" / f"file{number}"
        path.write_text("older")
    mounted = place(lower)
    tar_to(source, mounted.mnt, archive)
    assert_equal(look(source), look(mounted.mnt), labels=("sent", "on the mount"))
    mounted.remount()
    assert_equal(look(source), look(mounted.mnt), labels=("sent", "after the remount"))


def test_rsync_there_and_back(place: Place, needs: Callable[..., None], layer: Callable[[], Path]) -> None:
    needs("rsync", "setfacl")
    source, back = layer(), layer()
    fill(source)
    mounted = place()
    rsync_to(source, mounted.mnt)
    expected = look(source, holes=False)
    assert_equal(expected, look(mounted.mnt), labels=("sent", "on the mount"))
    assert run([*RSYNC, "-nic", "--delete", f"{source}/", f"{mounted.mnt}/"]).stdout == ""
    mounted.remount()
    assert run([*RSYNC, "-nic", "--delete", f"{source}/", f"{mounted.mnt}/"]).stdout == ""
    rsync_to(mounted.mnt, back)
    assert_equal(expected, look(back), labels=("sent", "back"))


def test_rsync_updates_a_lower_tree(
    place: Place, needs: Callable[..., None], layer: Callable[[], Path]
) -> None:
    """The mount shows an older version from a layer; rsync brings it up to date, deletions included."""
    needs("rsync", "setfacl")
    source, lower = layer(), layer()
    fill(source)
    rsync_to(source, lower)
    run(["rm", "-r", source / "d1", source / "odd", source / "links/two"])
    (source / "d2").rename(source / "renamed")
    (source / "d3/sub3/file3").write_text("changed")
    (source / "d4").chmod(0o700)
    (source / "sparse").unlink()
    (source / "sparse").mkdir()
    os.setxattr(source / "attributes", "user.comment", b"other")
    mounted = place(lower)
    run([*RSYNC, "--delete", f"{source}/", f"{mounted.mnt}/"])
    assert_equal(look(source), look(mounted.mnt), labels=("sent", "on the mount"))
    mounted.remount()
    assert_equal(look(source), look(mounted.mnt), labels=("sent", "after the remount"))
    run([*RSYNC, "--inplace", "--no-S", "--delete", f"{lower}/", f"{mounted.mnt}/"])
    assert_equal(look(lower), look(mounted.mnt), labels=("the lower", "turned back"))
