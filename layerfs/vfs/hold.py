"""Holds changes back, for those who want to read the upper as of one moment (`layerfs commit`). Knows nothing
of sockets: who asks is a `Session`, and what it holds goes when it ends.

What is held waits before it has begun; what has begun is waited for. Reads are never held.

FALLOCATE and COPY_FILE_RANGE are held as WRITE is: the kernel has the inode's lock in all three.

One write(2) may come as several WRITE requests, so a WRITE that is held may be the middle of one: the reader
would see half of it. The kernel keeps the inode's lock for the whole write(2) (fs/fuse/file.c
fuse_cache_write_iter), and takes the same lock for an fsync (fuse_fsync). So while an FSYNC is answered no
write(2) on that file is half done. A file is therefore closed in two steps: somebody `expect`s its fsync and
makes one through the mount; when it arrives (`reached`) the file is closed to writes and to changes of its
own. The whole tree is closed in three: first whatever opens a file for writing is held, so that those that
are open become no more; then each of these is closed by its fsync; then everything.

The order matters. A change that waits here keeps locks in the kernel: of its directory, and of the object
that it changes or removes. An fsync would wait for these, and the change for whoever makes the fsync. What
opens a file has the lock of a directory at most, so that is all that may be held while somebody makes an
fsync. For the same reason listing a directory waits where a change in it is held. Of a file that is opened
without asking the first WRITE counts as an open (`vfs.unasked`), and it has the inode's lock: it is not held
while an fsync of that very file is expected.

Writes that the kernel makes itself (`vfs.passthrough`) do not come here. It makes them under the inode's lock
too (fuse_passthrough_write_iter), so there the fsync that closes the file is not answered before it is given
free (`until_free`). Files that are open have all names on their way in the kernel, so an fsync of another
needs no lock of a directory that waits for this one.

fsync makes the kernel write back what was stored through mappings *before* it is sent. What is stored later
stays in the page cache, as its WRITE waits here.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Awaitable, Callable

import trio

from layerfs.gate import Gate, NoGate
from layerfs.vfs.caller import Caller
from layerfs.vfs.tree import fail

#: Seconds between two looks at whether a waiting caller was interrupted.
_POLL = 0.1


class Session:
    """What one reader holds. Made by `Hold.session`; `end` gives everything free."""

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self._has_turn = False
        #: nothing is opened for writing
        self.opens = False
        #: no change begins, WRITE apart
        self.changes = False
        #: no WRITE begins
        self.writes = False
        #: nodes whose next fsync closes them
        self.expected: set[int] = set()
        #: nodes that nobody changes
        self.closed: set[int] = set()

    async def hold_opens(self) -> None:
        """Holds what opens a file for writing and waits for what has begun. May be called again. One session
        at a time gets from here to the end of `hold_all`."""
        if not self._has_turn:
            await self._hold.turn.acquire()
            self._has_turn = True
        self.opens = True
        await self._hold.until(lambda: not self._hold.opening)

    async def hold_all(self) -> None:
        """Holds the rest, once every file that is open for writing was closed by its fsync."""
        self.changes = True
        await self._hold.until(lambda: not self._hold.changing)
        await self._hold.quiet()
        self.writes = True
        await self._hold.until(lambda: not self._hold.writing)
        await self._hold.settle()
        self._give_turn()

    def expect(self, node: int) -> None:
        self.expected.add(node)

    async def wait_closed(self, node: int) -> bool:
        """Whether the fsync of `node` was seen; then what had begun on it has ended."""
        if node not in self.closed:
            return False
        await self._hold.until(lambda: not self._hold.writing[node] and not self._hold.changing[node])
        await self._hold.settle()
        return True

    def open(self, node: int) -> None:
        """Gives a node free again."""
        self.expected.discard(node)
        self.closed.discard(node)
        self._hold.stir()

    def end(self) -> None:
        """May be called again."""
        self.opens = self.changes = self.writes = False
        self.expected.clear()
        self.closed.clear()
        self._give_turn()
        self._hold.forget(self)

    def _give_turn(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._hold.turn.release()


class Hold:
    def __init__(self, quiet: Callable[[], Awaitable[None]], gate: Gate | None = None) -> None:
        """`quiet` waits until nothing changes the upper in the background. `gate` shows every WRITE while
        there are sessions."""
        self.quiet = quiet
        self._gate = gate if gate is not None else NoGate()
        self.turn = trio.Lock()
        #: node id -> changes under way that name it first
        self.changing: Counter[int] = Counter()
        #: those among them that open a file for writing
        self.opening: Counter[int] = Counter()
        #: node id -> WRITEs under way
        self.writing: Counter[int] = Counter()
        self._waiting: Counter[int] = Counter()
        self._sessions: set[Session] = set()
        self._stirred = trio.Event()
        #: the mount is going: nothing is held any more
        self._over = False

    def session(self) -> Session:
        session = Session(self)
        self._sessions.add(session)
        self._gate.hold_writes(True)
        return session

    def forget(self, session: Session) -> None:
        self._sessions.discard(session)
        self._gate.hold_writes(bool(self._sessions))
        self.stir()

    def give_up(self) -> None:
        """The mount is going: who waits goes on. Who held them learns it from the end of the connection."""
        self._over = True
        self.stir()

    def stir(self) -> None:
        """Has everybody who waits look again."""
        self._stirred.set()
        self._stirred = trio.Event()

    async def settle(self) -> None:
        """Until the WRITEs have ended that the gate began before there was a session. Direct writes by
        io_submit(2) do not keep the inode's lock, so no fsync tells (fs/fuse/file.c fuse_direct_IO)."""
        await trio.to_thread.run_sync(self._gate.settle_writes)

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():
            await self._stirred.wait()

    # -- those who change something -----------------------------------------------------------------

    async def begin(self, node: int, caller: Caller, *, opens: bool) -> None:
        """Before a change to `node`, or below it; `opens`: it opens a file for writing. Raises OSError(EINTR)
        when the caller was interrupted while it was held. `end` must follow."""
        while not self._over and any(
            each.changes or (opens and each.opens and node not in each.expected) or node in each.closed
            for each in self._sessions
        ):
            await self._wait(caller.interrupted)
        self.changing[node] += 1
        if opens:
            self.opening[node] += 1

    def end(self, node: int, *, opens: bool) -> None:
        _less(self.changing, node)
        if opens:
            _less(self.opening, node)
        if self._sessions:
            self.stir()

    async def begin_write(self, node: int, writer: Caller, *, known: bool) -> None:
        """Before the content of `node` changes through a descriptor. `known`: `writer` makes this very
        request; else it is who opened the descriptor. Raises OSError(EINTR); `end_write` must follow."""

        def interrupted() -> bool:
            if known:
                return writer.interrupted()
            # A second one that waits is of write-back, and that must not fail: its data would be lost.
            return self._waiting[node] == 1 and writer.interrupted_write(node)

        while not self._over and any(each.writes or node in each.closed for each in self._sessions):
            self._waiting[node] += 1
            try:
                await self._wait(interrupted)
            finally:
                _less(self._waiting, node)
        self.writing[node] += 1

    def end_write(self, node: int) -> None:
        _less(self.writing, node)
        if self._sessions:
            self.stir()

    async def _wait(self, interrupted: Callable[[], bool]) -> None:
        stirred = self._stirred
        with trio.move_on_after(_POLL):
            await stirred.wait()
        if not stirred.is_set() and interrupted():
            fail(errno.EINTR)

    async def until_free(self, node: int) -> None:
        """Until nobody has closed the file. Raises nothing."""
        await self.until(lambda: self._over or not any(node in each.closed for each in self._sessions))

    # -- what closes a file ---------------------------------------------------------------------------

    def reached(self, node: int) -> None:
        """An FSYNC of `node` has arrived: no write(2) on it is half done, and none begins before it is
        answered."""
        for session in self._sessions:
            if node in session.expected:
                session.expected.discard(node)
                session.closed.add(node)


def _less(counts: Counter[int], key: int) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
