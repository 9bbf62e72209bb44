"""Has names dropped when too many are loaded: when is decided here, which by `vfs.unload`. Only with a gate:
pyfuse3 cannot ask the kernel to forget.

What the kernel forgets it says by FORGET requests, a moment later; names that lean on these can be dropped
then. Asking is done in a thread: the kernel may have to write pages back first, which takes answers.
"""

from __future__ import annotations

import errno
import logging
import math

import trio

from layerfs.fuse.counters import Counters
from layerfs.gate import Gate
from layerfs.vfs.unload import Unload

log = logging.getLogger("layerfs.fuse")

#: Seconds that the kernel may take to say what it has forgotten, and between two looks.
_PATIENCE = 0.2
_LOOK = 0.01
#: Seconds until it is tried again where nothing could be dropped, as all is in use: each time twice as long.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 60.0


class Bounded:
    def __init__(self, unload: Unload, gate: Gate, counters: Counters) -> None:
        self._unload = unload
        self._gate = gate
        self._counters = counters
        self._wanted = trio.Event()
        self._asks = True
        unload.tree.grown = self._look

    def _look(self) -> None:
        if self._unload.too_many:
            self._wanted.set()

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            pause = _FIRST_PAUSE
            while self._unload.too_many:
                if await self._drop_some():
                    pause = _FIRST_PAUSE
                else:
                    await trio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)

    async def _drop_some(self) -> bool:
        """Whether names were dropped."""
        if self._asks and (ids := self._unload.to_forget()):
            try:
                await trio.to_thread.run_sync(self._gate.prune, ids)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    return False  # the mount is going, or the kernel has no memory for it now
                self._asks = False
                log.info("this kernel cannot be asked to forget: names are kept until it wants memory back")
        dropped = 0
        for _ in range(math.ceil(_PATIENCE / _LOOK)):
            if not self._counters.under_way:
                dropped += self._unload.drop()
            if not self._unload.too_many:
                break
            await trio.sleep(_LOOK)
        return dropped > 0
