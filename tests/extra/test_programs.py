"""Random programs of fallocate, lseek, copy_file_range, writes and truncates: the same on files of a mount as
on plain files.

What was allocated and not written is a hole to ext4, unless a page of it is dirty (fs/iomap/seek.c), and a
copy is on the disk where a plain file is not yet: so files are synced at first, and before somebody looks for
holes.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerfs.vfs.vfs import Change
from tests.posix.calls import fallocate
from tests.support.stack import File, Stack, Tree, fs_type, scratch_root

from .frames import Kernel, kernel

BLOCK = 4096
FILES = ("a", "b")
TREE: Tree = {
    "a": File(data=bytes(range(256)) * 100),
    "b": File(data=b"end", offset=5 * BLOCK, size=12 * BLOCK),
}
#: of fallocate(2): with and without KEEP_SIZE, PUNCH_HOLE (alone it is an error), COLLAPSE, ZERO, INSERT
MODES = (0, 1, 2, 3, 8, 16, 17, 32, 64, 8 | 1)

# Often at the edges of blocks, where clones and collapses are possible.
places = st.one_of(st.integers(0, 16 * BLOCK), st.integers(0, 16).map(lambda n: n * BLOCK))
lengths = st.one_of(st.integers(0, 6 * BLOCK), st.integers(0, 6).map(lambda n: n * BLOCK))
files = st.sampled_from(FILES)
steps = st.one_of(
    st.tuples(st.just("allocate"), files, st.sampled_from(MODES), places, lengths),
    st.tuples(st.just("copy"), files, places, files, places, lengths),
    st.tuples(st.just("write"), files, places, st.binary(min_size=1, max_size=100)),
    st.tuples(st.just("cut"), files, places),
    st.tuples(st.just("seek"), files, places, st.sampled_from([os.SEEK_DATA, os.SEEK_HOLE])),
)
Program = list[tuple[Any, ...]]


@functools.cache
def exact() -> bool:
    """Whether holes are where nothing was written. File systems that allocate ahead do so for a copy
    otherwise than for its original."""
    return fs_type(scratch_root()) == "ext4"


def said(error: OSError) -> str:
    return errno.errorcode[error.errno or 0]


def by_plain_calls(stack: Stack, program: Program) -> list[object]:
    fds = {name: os.open(stack.mnt / name, os.O_RDWR) for name in FILES}
    for fd in fds.values():
        os.fsync(fd)

    def seek(f: str, at: int, whence: int) -> int:
        os.fsync(fds[f])
        return os.lseek(fds[f], at, whence)

    calls: dict[str, Callable[..., object]] = {
        "allocate": lambda f, *rest: fallocate(fds[f], *rest),
        "copy": lambda f, at, g, to, n: os.copy_file_range(fds[f], fds[g], n, at, to),
        "write": lambda f, at, data: os.pwrite(fds[f], data, at),
        "cut": lambda f, size: os.ftruncate(fds[f], size),
        "seek": seek,
    }
    found: list[object] = []
    for name, *rest in program:
        try:
            found.append(calls[name](*rest))
        except OSError as error:
            found.append(said(error))
    for fd in fds.values():
        os.fsync(fd)
        found += [os.pread(fd, 1 << 20, 0), holes(functools.partial(os.lseek, fd), os.fstat(fd).st_size)]
        os.close(fd)
    return found


def holes(seek: Callable[[int, int], int], size: int) -> list[int]:
    """Where data begins and ends."""
    found: list[int] = []
    at = 0 if exact() else size
    while at < size:
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            try:
                at = seek(at, whence)
            except OSError as error:
                assert error.errno == errno.ENXIO
                return found
            found.append(at)
    return found


async def by_requests(stack: Stack, program: Program) -> list[object]:
    async with kernel(stack) as k:
        return await carried_out(k, program)


async def carried_out(k: Kernel, program: Program) -> list[object]:
    fhs = {name: await k.open(name, os.O_RDWR) for name in FILES}
    nodes = {name: await k.find(name) for name in FILES}
    for fh in fhs.values():
        await k.vfs.fsync(fh, False)

    async def copy(f: str, at: int, g: str, to: int, n: int) -> int:
        # What the kernel does before it asks (fs/read_write.c generic_copy_file_checks).
        size = (await k.vfs.getattr(nodes[f])).st.st_size
        n = max(0, min(n, size - at))
        if f == g and to + n > at and to < at + n:
            raise OSError(errno.EINVAL, "overlap")
        return await k.copy(fhs[f], at, fhs[g], to, n) if n else 0

    async def cut(f: str, size: int) -> None:
        await k.vfs.setattr(nodes[f], Change(size=size), k.caller)

    async def seek(f: str, at: int, whence: int) -> int:
        await k.vfs.fsync(fhs[f], False)
        return await k.lseek(fhs[f], at, whence)

    calls: dict[str, Callable[..., Awaitable[object]]] = {
        "allocate": lambda f, *rest: k.fallocate(fhs[f], *rest),
        "copy": copy,
        "write": lambda f, at, data: k.vfs.write(fhs[f], at, data),
        "cut": cut,
        "seek": seek,
    }
    found: list[object] = []
    for name, *rest in program:
        try:
            found.append(await calls[name](*rest))
        except OSError as error:
            found.append(said(error))
    for name in FILES:
        size = (await k.vfs.getattr(nodes[name])).st.st_size
        await k.vfs.fsync(fhs[name], False)
        found.append(bytes(await k.vfs.files.read(fhs[name], 0, 1 << 20)))
        found.append(holes(functools.partial(k.vfs.files.seek, fhs[name]), size))
    return found


@pytest.mark.parametrize("arrangement", ["all-lower", "all-upper"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=st.lists(steps, max_size=15))
def test_same_as_on_plain_files(arrangement: str, program: Program) -> None:
    prefix = "trusted.overlay." if os.geteuid() == 0 else "user.overlay."
    stack = Stack.arranged(arrangement, prefix=prefix)
    try:
        program = [step for step in program if exact() or step[0] != "seek"]
        stack.populate(TREE, arrangement)
        stack.write(stack.mnt, TREE)
        got = trio.run(by_requests, stack, program)
        assert got == by_plain_calls(stack, program)  # right: on plain files
    finally:
        stack.remove()
