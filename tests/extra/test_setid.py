"""What changing a file takes from its mode, by who changes it: as the kernel does it on a plain file."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from layerfs.fuse.adapter import KEEPS_SETID, Operations
from layerfs.fuse.counters import Counters
from layerfs.vfs.vfs import Caller, Change
from tests.posix.calls import fallocate
from tests.posix.place import forked
from tests.support.stack import Stack

from .frames import Kernel, kernel

pytestmark = pytest.mark.trio

GROUP = 1234
#: uid, gid, supplementary groups
PEOPLE = {
    "root": (0, 0, [0]),
    "member": (65534, 65534, [GROUP]),
    "by gid": (65534, GROUP, [0]),
    "stranger": (65534, 65534, [0]),
}
MODES = [0o6777, 0o4777, 0o2777, 0o2767, 0o6767, 0o777]
RW = os.O_RDWR


@contextmanager
def person(uid: int, gid: int, groups: list[int]) -> Iterator[Caller]:
    """Somebody who really runs, as far as /proc can tell."""
    ready, to_child = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        os.close(to_child[1])
        os.write(ready[1], b"x")
        os.read(to_child[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        yield Caller(uid, gid, pid)
    finally:
        for fd in (*ready, *to_child):
            os.close(fd)
        os.waitpid(pid, 0)


def _write(fd: int) -> None:
    os.pwrite(fd, b"x", 0)


PLAIN: dict[str, Callable[[int], object]] = {
    "write": _write,
    "truncate": lambda fd: os.ftruncate(fd, 3),
    "fallocate": lambda fd: fallocate(fd, 0, 0, 100),
    "copy": lambda fd: os.copy_file_range(fd, fd, 1, 0, 5),
}


async def ask(k: Kernel, how: str, node: int, fh: int) -> None:
    if how == "write":
        # As the gate has it from the kernel.
        keeps = KEEPS_SETID if k.caller.uid == 0 else 0
        operations = Operations(lambda name: None, Counters())
        operations.vfs = k.vfs
        await operations.write(fh | keeps, 0, b"x")
    elif how == "truncate":
        await k.vfs.setattr(node, Change(size=3), k.caller)
    elif how == "fallocate":
        await k.fallocate(fh, 0, 0, 100)
    else:
        assert await k.copy(fh, 0, fh, 5, 1) == 1


@pytest.mark.parametrize("who", PEOPLE)
@pytest.mark.parametrize("how", PLAIN)
async def test_what_goes(root: None, laid_out: Stack, how: str, who: str) -> None:
    uid, gid, groups = PEOPLE[who]
    plain = laid_out.mnt / "f"
    os.chown(plain, 0, GROUP)
    want = []
    for mode in MODES:
        os.chmod(plain, mode)
        fd = os.open(plain, RW)
        forked(lambda fd=fd: PLAIN[how](fd), uid=uid, gid=gid, groups=groups)
        os.close(fd)
        want.append(oct(stat.S_IMODE(plain.stat().st_mode)))
    got = []
    with person(uid, gid, groups) as caller:
        async with kernel(laid_out) as k:
            node = await k.find("f")
            await k.vfs.setattr(node, Change(gid=GROUP), k.caller)
            k.caller = caller
            for mode in MODES:
                await k.vfs.setattr(node, Change(mode=mode), k.caller)
                handle = await k.vfs.open(node, RW, k.caller)
                await ask(k, how, node, handle.id)
                got.append(oct(stat.S_IMODE((await k.vfs.getattr(node)).st.st_mode)))
                k.vfs.files.release(handle.id)
    assert got == want


async def test_a_lower_file_that_is_cut(root: None, laid_out: Stack) -> None:
    """Copied up in part: what is shown first has the right mode."""
    for top in (*laid_out.lowers, laid_out.upper):
        if top is not None and (top / "big").exists():
            os.chmod(top / "big", 0o4755)
    for who, left in (("root", 0o4755), ("stranger", 0o755)):
        with person(*PEOPLE[who]) as caller:
            async with kernel(laid_out) as k:
                node = await k.find("big")
                found = await k.vfs.setattr(node, Change(size=100), caller)
                assert stat.S_IMODE(found.st.st_mode) == left


async def test_without_a_gate_every_write_clears(root: None, laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        node = await k.find("f")
        await k.vfs.setattr(node, Change(mode=0o4755), k.caller)
        handle = await k.vfs.open(node, RW, k.caller)
        await k.vfs.write(handle.id, 0, b"x")
        assert stat.S_IMODE((await k.vfs.getattr(node)).st.st_mode) == 0o755


async def test_who_cannot_be_seen_keeps_nothing() -> None:
    for pid in (0, 2**22 + 1):
        assert not Caller(0, 0, pid).keeps_setid()
        assert not Caller(5, 5, pid).in_group(6) and Caller(5, 5, pid).in_group(5)
