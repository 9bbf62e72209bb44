"""Whoever reads the upper as of one moment holds these requests as well (`layerfs.vfs.hold`)."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from layerfs.ids import ROOT
from layerfs.vfs.caller import Caller
from tests.support.stack import Stack

from .frames import Kernel, kernel
from .test_frames import SETFLAGS, error_of, ioctl

pytestmark = pytest.mark.trio


class Signalled(Caller):
    __slots__ = ()

    def interrupted(self) -> bool:
        return True


CHANGES: dict[str, Callable[[Kernel, int, int], Awaitable[Any]]] = {
    "fallocate": lambda k, node, fh: k.fallocate(fh, 0, 0, 5000),
    "copy": lambda k, node, fh: k.copy(fh, 0, fh, 100, 5),
    "tmpfile": lambda k, node, fh: k.tmpfile(ROOT, os.O_RDWR, 0o600),
    "set flags": lambda k, node, fh: ioctl(k, node, SETFLAGS, bytes(4)),
}


@pytest.mark.parametrize("what", CHANGES)
async def test_waits(laid_out: Stack, what: str) -> None:
    async with kernel(laid_out) as k:
        node, fh = await k.find("f"), await k.open("f", os.O_RDWR)
        session = k.vfs.hold.session()
        await session.hold_opens()
        await session.hold_all()
        done = trio.Event()

        async def change() -> None:
            await CHANGES[what](k, node, fh)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await trio.sleep(0.05)
            assert not done.is_set()
            session.end()
            with trio.fail_after(5):
                await done.wait()
        assert not k.vfs.hold.writing and not k.vfs.hold.changing


@pytest.mark.parametrize("what", CHANGES)
async def test_interrupted(laid_out: Stack, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with kernel(laid_out) as k:
        node, fh = await k.find("f"), await k.open("f", os.O_RDWR)
        session = k.vfs.hold.session()
        await session.hold_opens()
        await session.hold_all()
        for module in ("adapter", "extra"):
            monkeypatch.setattr(f"layerfs.fuse.{module}.Caller", Signalled)
        with trio.fail_after(5):
            assert await error_of(CHANGES[what](k, node, fh)) == "EINTR"
        session.end()


async def test_a_closed_file_alone(laid_out: Stack) -> None:
    async with kernel(laid_out) as k:
        fh, other = await k.open("f", os.O_RDWR), await k.open("d/k", os.O_RDWR)
        session = k.vfs.hold.session()
        session.expect(await k.find("f"))
        await k.vfs.fsync(fh, False)
        await k.fallocate(other, 0, 0, 100)
        await k.copy(fh, 0, other, 0, 5)  # reads are never held
        with trio.move_on_after(0.05) as waited:
            await k.fallocate(fh, 0, 0, 100)
        assert waited.cancelled_caught
        session.end()
