"""O_TMPFILE: a file without a name, and the name that link(2) gives it; owner, mode, ACL of what is made."""

from __future__ import annotations

import os
import stat
import struct

import pytest

from layerfs.ids import ROOT
from layerfs.vfs.vfs import Caller, Change, New
from tests.posix.calls import AT_FDCWD, AT_SYMLINK_FOLLOW, linkat
from tests.posix.place import forked
from tests.support.stack import Stack

from .frames import Kernel, kernel
from .test_frames import error_of

pytestmark = pytest.mark.trio

DEFAULT, ACCESS = "system.posix_acl_default", "system.posix_acl_access"
RW = os.O_RDWR


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 0xFFFFFFFF
#: u::rwx, u:1234:rw-, g::r-x, m::rwx, o::---
FOR_1234 = acl((1, 7, NOBODY), (2, 6, 1234), (4, 5, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY))


async def test_tmpfile(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        directory = await k.find("d")
        names = sorted(os.listdir(laid_out.mnt / "d"))
        made = await k.tmpfile(directory, RW, 0o640)
        node, fh = made.entry.nodeid, made.open.fh
        attr = made.entry.attr
        assert (attr.ino, attr.size, attr.nlink, attr.mode) == (node, 0, 0, stat.S_IFREG | 0o640)
        assert (attr.uid, attr.gid) == (os.geteuid(), os.getegid())
        assert made.entry.entry_valid == made.entry.attr_valid > 10**6

        assert await k.vfs.write(fh, 0, b"no name") == 7
        assert bytes(await k.vfs.files.read(fh, 0, 100)) == b"no name"
        changed = await k.vfs.setattr(node, Change(mode=0o600, size=2), k.caller)
        assert stat.S_IMODE(changed.st.st_mode) == 0o600 and changed.st.st_size == 2
        await k.vfs.setxattr(node, b"user.x", b"y", k.caller)
        assert await k.vfs.getxattr(node, b"user.x") == b"y"
        again = await k.vfs.open(node, os.O_RDONLY, k.caller)  # /proc/self/fd/N
        assert bytes(await k.vfs.files.read(again.id, 0, 100)) == b"no"
        await k.vfs.fsync(fh, False)

        handle = await k.vfs.opendir(directory)
        await k.vfs.rewind(handle)
        assert sorted(map(os.fsdecode, k.vfs.listing(handle).names)) == names
        k.vfs.files.release_directory(handle)


@pytest.mark.parametrize("where", ["d", "."])
async def test_link_gives_a_name(laid_out: Stack, where: str) -> None:
    async with kernel(laid_out) as k:
        made = await k.tmpfile(await k.find("d"), os.O_WRONLY, 0o644)
        node = made.entry.nodeid
        await k.vfs.write(made.open.fh, 0, b"late name")
        target = ROOT if where == "." else await k.find(where)
        linked = await k.vfs.link(node, target, b"named", k.caller)
        assert (linked.ino, linked.nlink) == (node, 1)
        assert laid_out.upper is not None
        assert (laid_out.upper / where / "named").read_bytes() == b"late name"
        assert await k.find("named" if where == "." else f"{where}/named") == node
        linked = await k.vfs.link(node, ROOT, b"second", k.caller)
        assert linked.nlink == 2
        await k.vfs.write(made.open.fh, 0, b"LATE")
        assert (laid_out.upper / "second").read_bytes() == b"LATE name"
        await k.vfs.unlink(ROOT, b"second", k.caller)
        assert (await k.vfs.getattr(node)).nlink == 1


async def test_link_over_a_whiteout(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        made = await k.tmpfile(ROOT, RW, 0o644)
        assert await error_of(k.vfs.link(made.entry.nodeid, ROOT, b"f", k.caller)) == "EEXIST"
        await k.vfs.unlink(ROOT, b"f", k.caller)
        await k.vfs.link(made.entry.nodeid, ROOT, b"f", k.caller)
        assert laid_out.upper is not None and (laid_out.upper / "f").read_bytes() == b""


async def test_nothing_is_left(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        made = await k.tmpfile(await k.find("d"), RW, 0o644)
        node, nodes = made.entry.nodeid, len(k.vfs.tree.nodes)
        k.vfs.files.release(made.open.fh)
        assert len(k.vfs.tree.nodes) == nodes  # the kernel still knows it
        k.vfs.forget(node, 1)
        assert len(k.vfs.tree.nodes) == nodes - 1
        assert laid_out.work is not None and os.listdir(laid_out.work / "work") == []


async def test_errors(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        assert await error_of(k.tmpfile(await k.find("f"), RW, 0o600)) == "ENOTDIR"
        assert await error_of(k.tmpfile(99999, RW, 0o600)) == "ESTALE"
        await k.vfs.unlink(await k.find("d"), b"k", k.caller)
        gone = await k.find("d")
        await k.vfs.rmdir(ROOT, b"d", k.caller)
        assert await error_of(k.tmpfile(gone, RW, 0o600)) == "ENOENT"


# -- owner, mode, ACL: as a plain directory gives them ----------------------------------------------


def shown(path: str) -> tuple[object, ...]:
    st = os.lstat(path)
    names = os.listxattr(path, follow_symlinks=False)
    lists = {name: os.getxattr(path, name) for name in names if name.startswith("system.")}
    return oct(st.st_mode), st.st_uid, st.st_gid, lists


@pytest.fixture(params=["plain", "setgid", "default ACL", "setgid and default ACL"])
def prepared(request: pytest.FixtureRequest, root: None, laid_out: Stack) -> Stack:
    """Where `d`, on both sides, is a directory of that kind."""
    assert laid_out.upper is not None
    for top in (*laid_out.lowers, laid_out.upper, laid_out.mnt):
        if (directory := top / "d").exists():
            if "ACL" in request.param:
                os.setxattr(directory, DEFAULT, FOR_1234)
            if "setgid" in request.param:
                os.chown(directory, 0, 77)
                os.chmod(directory, 0o2777)
    return laid_out


CALLERS = [Caller(0, 0, 0), Caller(1234, 5678, 0)]


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
@pytest.mark.parametrize("who", CALLERS, ids=["root", "user"])
@pytest.mark.parametrize("mode", [0o666, 0o600, 0o2755])
async def test_what_is_made_is_as_in_a_plain_directory(
    prepared: Stack, who: Caller, mask: int, mode: int
) -> None:
    """With the umask left to us (FUSE_DONT_MASK)."""
    for top in (prepared.mnt, *prepared.lowers, prepared.upper):
        if top is not None and (top / "d").exists():
            os.chmod(top / "d", 0o777 | os.stat(top / "d").st_mode & 0o2000)

    def make() -> None:
        top = str(prepared.mnt / "d")
        os.umask(mask)
        fd = os.open(top, os.O_TMPFILE | RW, mode)
        linkat(AT_FDCWD, f"/proc/self/fd/{fd}", f"{top}/tmpfile", AT_SYMLINK_FOLLOW)
        os.close(os.open(f"{top}/file", os.O_CREAT | RW, mode))
        os.mkdir(f"{top}/dir", mode)
        os.mkfifo(f"{top}/fifo", mode)
        os.symlink("x", f"{top}/link")

    forked(make, uid=who.uid, gid=who.gid, groups=[77])  # who is in the group of the setgid directory

    async with kernel(prepared) as k:
        directory = await k.find("d")
        k.caller = Caller(who.uid, who.gid, 0, mask)
        await through_vfs(k, directory, mode, mask)
    assert prepared.upper is not None
    for name in ("tmpfile", "file", "dir", "fifo", "link"):
        want, got = (shown(f"{top}/d/{name}") for top in (prepared.mnt, prepared.upper))
        assert got == want, name


async def test_who_has_no_id_in_his_idmapped_mount_makes_nothing(laid_out: Stack) -> None:
    """Else it would be the daemon's."""
    async with kernel(laid_out) as k:
        d = await k.find("d")
        for uid, gid in ((None, None), (0, None), (None, 0)):
            k.caller = Caller(uid, gid, os.getpid())
            assert await error_of(k.tmpfile(d, RW, 0o4755)) == "EOVERFLOW"
            assert await error_of(k.vfs.make(d, b"made", New(0o755 | stat.S_IFDIR), k.caller)) == "EOVERFLOW"
            assert await error_of(k.vfs.create(d, b"made", 0o644, RW, k.caller)) == "EOVERFLOW"
        assert await k.vfs.lookup(d, b"made") is None


async def test_default_acl_comes_and_goes(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        d = await k.find("d")
        k.caller = Caller(os.geteuid(), os.getegid(), 0, 0o077)

        async def mode_of(name: bytes) -> int:
            _, found = await k.vfs.create(d, name, 0o666 | stat.S_IFREG, RW, k.caller)
            return stat.S_IMODE(found.st.st_mode)

        assert await mode_of(b"one") == 0o600
        await k.vfs.setxattr(d, DEFAULT.encode(), FOR_1234, k.caller)
        assert await mode_of(b"two") == 0o660
        await k.vfs.removexattr(d, DEFAULT.encode(), k.caller)
        assert await mode_of(b"three") == 0o600


async def through_vfs(k: Kernel, directory: int, mode: int, mask: int) -> None:
    made = await k.tmpfile(directory, RW, mode, mask)
    await k.vfs.link(made.entry.nodeid, directory, b"tmpfile", k.caller)
    await k.vfs.create(directory, b"file", mode | stat.S_IFREG, RW, k.caller)
    # The kernel takes all but these bits off a mkdir's mode (fs/namei.c vfs_mkdir).
    await k.vfs.make(directory, b"dir", New(mode & 0o1777 | stat.S_IFDIR), k.caller)
    await k.vfs.make(directory, b"fifo", New(mode | stat.S_IFIFO), k.caller)
    await k.vfs.make(directory, b"link", New(stat.S_IFLNK | 0o777, target=b"x"), k.caller)
