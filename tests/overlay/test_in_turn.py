"""layerfs and kernel overlayfs write one upper in turn, at random, and stay equal to a plain directory.

After each round both read the upper. Lower files with several names are left out: with index=off the kernel
parts them (tests/overlay/test_both_ways.py has them).
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerfs.fdutil import RENAME_EXCHANGE, renameat2
from tests.support import mounts
from tests.support.mounts import KernelOverlay, Layerfs
from tests.support.stack import Dir, Entry, File, Stack, Symlink
from tests.support.tree import assert_equal, lowers_guard

from . import work

NAMES = ["a", "b", "c", "d", "é", "with space"]
DEPTH = 3


def random_tree(chance: random.Random) -> dict[str | bytes, Entry]:
    tree: dict[str | bytes, Entry] = {}

    def fill(prefix: str, depth: int) -> None:
        for name in NAMES:
            kind = chance.random()
            path = prefix + name
            if kind < 0.35 and depth < DEPTH:
                tree[path] = Dir(mode=chance.choice((0o755, 0o700, 0o1777)))
                fill(path + "/", depth + 1)
            elif kind < 0.7:
                tree[path] = File(data=chance.randbytes(chance.choice((0, 10, 5000, 70_000))))
            elif kind < 0.8:
                tree[path] = Symlink(target=chance.choice(NAMES))

    fill("", 0)
    return tree


def random_path(chance: random.Random, existing: list[str]) -> str:
    """Of something that exists, of something beside or below it, or any."""
    match chance.randrange(6):
        case 0:
            return "/".join(chance.choice(NAMES) for _ in range(chance.choice((1, 2, 3))))
        case 1 | 2:
            return os.path.join(os.path.dirname(chance.choice(existing)), chance.choice(NAMES))
        case 3:
            return os.path.join(chance.choice(existing), chance.choice(NAMES))
        case _:
            return chance.choice(existing)


def operations(chance: random.Random, existing: list[str]) -> list[Any]:
    """Random operations, each with the same arguments for whatever directory it is done in. No setuid: that
    layerfs takes it from a file that root writes is a known gap.
    """
    one, two = random_path(chance, existing), random_path(chance, existing)
    data, at, mode = (
        chance.randbytes(20),
        chance.randrange(80_000),
        chance.choice((0o600, 0o755, 0o711, 0o640)),
    )

    def write(p: Path) -> None:
        fd = os.open(p / one, os.O_WRONLY | os.O_NOFOLLOW)
        os.pwrite(fd, data, at)
        os.close(fd)

    def create(p: Path) -> None:
        fd = os.open(p / one, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        os.write(fd, data)
        os.close(fd)

    def exchange(p: Path) -> None:
        renameat2(-100, os.fsencode(p / one), -100, os.fsencode(p / two), RENAME_EXCHANGE)

    def remove(p: Path) -> None:
        if os.path.islink(p / one):
            raise NotADirectoryError(errno.ENOTDIR, "link")
        for root, dirs, files in os.walk(p / one, topdown=False):
            for name in files:
                os.unlink(os.path.join(root, name))
            for name in dirs:
                path = os.path.join(root, name)
                os.unlink(path) if os.path.islink(path) else os.rmdir(path)
        os.rmdir(p / one)

    def plain_file(path: Path) -> None:
        if path.is_symlink():  # its xattrs and mode are another matter
            raise OSError(errno.ELOOP, "link")

    def attribute(p: Path) -> None:
        plain_file(p / one)
        os.setxattr(p / one, f"user.{mode:o}", data)

    def chmod(p: Path) -> None:
        plain_file(p / one)
        os.chmod(p / one, mode)

    def cut(p: Path) -> None:
        plain_file(p / one)
        os.truncate(p / one, at)

    found: list[Any] = [
        write,
        create,
        exchange,
        remove,
        attribute,
        chmod,
        chmod,
        cut,
        lambda p: os.rename(p / one, p / two),
        lambda p: os.rename(p / one, p / two),
        lambda p: os.rename(p / one, p / two),
        lambda p: os.unlink(p / one),
        lambda p: os.mkdir(p / one, mode),
        lambda p: os.symlink(two, p / one),
        lambda p: os.chown(p / one, mode, mode, follow_symlinks=False),
        lambda p: os.utime(p / one, ns=(at, at * 10**9), follow_symlinks=False),
        lambda p: os.link(p / one, p / two, follow_symlinks=False),
    ]
    for each in found:
        each.__doc__ = f"{one!r} {two!r} {mode:o} {at}"
    return found


def outcome(operation: Callable[[Path], object], root: Path) -> str:
    try:
        operation(root)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")
    return "done"


def in_turn(make_stack: type[Stack], seed: int, rounds: int, each: int) -> None:
    chance = random.Random(seed)
    began = time.time_ns() - 10**9
    layers = chance.choice((1, 2, 4))
    stack, plain = make_stack(n_lowers=layers), make_stack()
    # The lowers' merged view, by the kernel, is what the plain directory starts with.
    for lower in stack.lowers:
        stack.write(lower, random_tree(chance))
    read_only = make_stack(n_lowers=0, writable=False)
    read_only.lowers = list(stack.lowers) if layers > 1 else [stack.lowers[0], read_only._mkdir("empty")]
    with KernelOverlay(read_only, "redirect_dir=on,metacopy=on") as kernel:
        assert os.system(f"cp -a '{kernel.mnt}/.' '{plain.mnt}/'") == 0
    options = chance.choice(["", "", "redirect_dir=off,metacopy=off", "metacopy=off"])
    said: list[str] = []
    with lowers_guard(stack.lowers):
        for number in range(rounds):
            by_kernel = bool((number + seed) % 2)
            system = (
                KernelOverlay(stack, "redirect_dir=on,metacopy=on") if by_kernel else Layerfs(stack, options)
            )
            said.append(f"-- round {number}: {system.name} {options}")
            with system as m:
                for _ in range(each):
                    existing = sorted(os.path.relpath(p, plain.mnt) for p in plain.mnt.rglob("*")) or ["a"]
                    which = chance.randrange(len(operations(chance, existing)))
                    operation = operations(chance, existing)[which]
                    one, two = outcome(operation, plain.mnt), outcome(operation, m.mnt)
                    said.append(f"{operation.__doc__ or ''} {operation.__name__} {which}: {one}")
                    assert one == two, "\n".join(said)
                    if one != "done":
                        said.pop()
            expected = work.look(plain.mnt)
            for reader in (KernelOverlay(stack, "redirect_dir=on,metacopy=on"), Layerfs(stack, options)):
                with reader as m:
                    assert_equal(
                        expected,
                        work.look(m.mnt),
                        recent_ns=began,
                        labels=("plain", reader.name),
                        message="\n".join(said),
                    )
                    if isinstance(reader, Layerfs):
                        work.unique_numbers(m.mnt)


@pytest.mark.parametrize("seed", range(3))
def test_in_turn(kernel_overlay: None, make_stack: type[Stack], seed: int) -> None:
    if reason := mounts.why_no_layerfs():
        pytest.skip(reason)
    in_turn(make_stack, seed, 3, 40)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 110))
def test_in_turn_for_long(kernel_overlay: None, make_stack: type[Stack], seed: int) -> None:
    in_turn(make_stack, seed, 6, 60)
