"""Has names dropped when too many are loaded: when is decided here, which by `vfs.unload`. Only with a gate:
pyfuse3 cannot ask the kernel to forget.

What the kernel forgets it says by FORGET requests, a moment later; names that lean on these can be dropped
then, as soon as no request is under way. Asking is done in a thread: the kernel may have to write pages back
first, which takes answers.
"""

from __future__ import annotations

import errno
import logging

import trio

from layerfs.fuse.counters import Counters
from layerfs.gate import Gate
from layerfs.vfs.unload import Unload

log = logging.getLogger("layerfs.fuse")

#: Seconds between two looks, and how often it is looked for what the kernel has forgotten.
_LOOK = 0.01
_LOOKS = 20
#: Seconds until it is tried again where what is left is in use.
_PAUSE = 60.0


class Bounded:
    def __init__(self, unload: Unload, gate: Gate, counters: Counters) -> None:
        self._unload = unload
        self._gate = gate
        self._counters = counters
        self._wanted = trio.Event()
        self._asks = True
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        unload.tree.grown = self._look

    def _look(self) -> None:
        if self._unload.too_many:
            self._wanted.set()

    async def run(self) -> None:
        try:
            with self._scope:
                await self._watch()
        finally:
            self._ended.set()

    async def end(self) -> None:
        """To be awaited while requests are still answered: a thread that waits in the kernel needs that."""
        self._scope.cancel()
        await self._ended.wait()

    async def _watch(self) -> None:
        pause = float("inf")
        while True:
            with trio.move_on_after(pause):
                await self._wanted.wait()
            self._wanted = trio.Event()
            while await self._drop_some():
                pass
            pause = _PAUSE if self._unload.bear() else float("inf")

    async def _drop_some(self) -> bool:
        """Whether names were dropped, and there are still too many."""
        asked = await self._ask()
        dropped = 0
        for _ in range(_LOOKS if asked else 1):
            await self._counters.at_rest()
            # No await since: nothing has begun.
            dropped += self._unload.drop()
            if not self._unload.too_many:
                return False
            if asked:
                await trio.sleep(_LOOK)
        return dropped > 0

    async def _ask(self) -> bool:
        """Whether the kernel was asked to forget something."""
        ids = self._unload.to_forget() if self._asks else []
        if not ids:
            return False
        try:
            await trio.to_thread.run_sync(self._gate.prune, ids)
        except OSError as error:
            # Others: the mount is going, or the kernel has no memory for it now.
            if error.errno == errno.EINVAL:
                self._asks = False
                log.info("this kernel cannot be asked to forget: names are kept until it wants memory back")
            return False
        return True
