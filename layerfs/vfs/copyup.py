"""Bringing objects into the upper: directories at once, files once however many ask, their data in a worker
thread.

A file that needs its data copied gets a `Job`. All who need it wait for the job; a waiter that is interrupted
leaves, and when the last one has left the copy is given up. Publishing is one synchronous step on the event
loop, where the file's name is looked at again: it may have been renamed or unlinked while the data were
copied.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from functools import partial

import trio

from layerfs.fdutil import Cancelled, Copied, OwnedFd, fd_path
from layerfs.stack import Entry
from layerfs.upper import copyup, journal
from layerfs.upper.steps import step
from layerfs.upper.upper import Upper
from layerfs.upper.work import Parked, Pin
from layerfs.vfs import setid
from layerfs.vfs.caller import Caller
from layerfs.vfs.links import LinkIndex
from layerfs.vfs.node import Directory, File, Node
from layerfs.vfs.reopen import open_upper
from layerfs.vfs.tally import Tally
from layerfs.vfs.tree import Tree, fail

log = logging.getLogger("layerfs.vfs")

#: Seconds between two looks at whether a waiting caller was interrupted: a killed caller is gone well within
#: a second.
_POLL = 0.1
#: Copies that run at one time. More would only make the disk seek; fifty waiting ones cost nothing.
_COPIES = 4
#: Whiteouts of a removed directory that are unlinked before the answer (a few microseconds each).
_SWEPT_AT_ONCE = 100


class Job:
    """One copy-up of one file (with all its names) that is under way."""

    __slots__ = ("cancelled", "cutter", "done", "ending", "error", "size", "waiters")

    def __init__(self, size: int | None, cutter: Caller) -> None:
        #: None: all data are copied; else only so many bytes, for a caller who cuts the file there
        self.size = size
        #: that caller
        self.cutter = cutter
        self.done = trio.Event()
        self.error: OSError | None = None
        self.waiters = 0
        self.cancelled = False
        #: given up because the mount is going
        self.ending = False


class CopyUp:
    def __init__(
        self,
        tree: Tree,
        upper: Upper,
        links: LinkIndex,
        nursery: trio.Nursery,
        tally: Tally,
        *,
        metacopy: bool,
    ) -> None:
        self.tree = tree
        self.tally = tally
        self.upper = upper
        self.links = links
        self.metacopy = metacopy
        self.nursery = nursery
        self._limiter = trio.CapacityLimiter(_COPIES)
        self._jobs: set[Job] = set()

    def give_up(self) -> None:
        """Ends all copies that are under way: the mount is going. Those who wait get EINTR."""
        for job in self._jobs:
            job.cancelled = job.ending = True

    async def quiet(self) -> None:
        """Waits until no copy is under way: one whose last waiter has left may still be."""
        while self._jobs:
            await next(iter(self._jobs)).done.wait()

    # -- what has no name -------------------------------------------------------------------------

    def pin(self, node: Node, parent: OwnedFd, name: bytes) -> Pin | None:
        """What keeps an object of the upper reachable that is about to lose its last known name (None: it is
        not). Raises OSError."""
        if node.names:
            return None
        most = self.tree.most_pins
        try:
            if isinstance(node, Directory) or most is None or self.tree.pins < most:
                return self.upper.open_path(parent.fd, name)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or isinstance(node, Directory):
                raise
        return Parked(self.upper.work, parent.fd, name)

    # -- directories ------------------------------------------------------------------------------

    def directory(self, directory: Directory) -> OwnedFd:
        """Makes sure that a directory and its parents are in the upper; its upper descriptor. Synchronous.
        Raises OSError.
        """
        if directory.in_upper:
            return self.tree.upper_fd(directory)
        missing: list[Directory] = []
        here: Directory | None = directory
        if directory.unlinked:
            return self._removed_directory(directory)
        while here is not None and not here.in_upper:
            if here.parent is None:
                fail(errno.ENOENT)  # removed
            missing.append(here)
            here = here.parent
        for here in reversed(missing):
            self._one_directory(here)
        return self.tree.upper_fd(directory)

    def sweep(self, temporary: bytes, things: int) -> None:
        """Removes what was taken away into the work directory; many things in the background."""
        if things <= _SWEPT_AT_ONCE:
            self.upper.discard(temporary)
        else:
            self.nursery.start_soon(self._sweep, temporary)

    async def _sweep(self, temporary: bytes) -> None:
        try:
            await trio.to_thread.run_sync(self.upper.discard, temporary, limiter=self._limiter)
        except OSError as error:
            log.warning("work directory: %s stays until the next mount: %s", temporary, error.strerror)

    def mark_impure(self, directory: Directory) -> None:
        """Before an object that shows another number than its own comes into an upper directory. Raises
        OSError.
        """
        if not directory.marked:
            self.upper.set_impure(self.tree.upper_fd(directory))
            directory.impure = directory.marked = True

    def _removed_directory(self, directory: Directory) -> OwnedFd:
        """A lower directory that was removed while somebody has it open can still be given attributes: by a
        copy without a name.
        """
        assert directory.home is not None
        home = self.tree.stack.open(directory.home)
        st = self.tree.stat_real(directory)
        work = self.upper.work.fd.fd
        source = copyup.Source(home, directory.home_name, st, directory.id)
        temporary = copyup.make_directory(self.upper, source)
        pin = self.upper.open_path(work, temporary)
        self.tree.pin(directory, pin)
        self.upper.discard(temporary)
        self._moved_up(directory, None, b"")
        self.tally.directories += 1
        self.tree.keep_ctime(directory, st.st_ctime_ns)
        return pin

    def _one_directory(self, directory: Directory) -> None:
        parent = directory.parent
        assert parent is not None and directory.home is not None
        home = self.tree.stack.open(directory.home)
        st = self.tree.stat_real(directory)
        origin = self.upper.make_origin(home.fd, directory.home_name)
        source = copyup.Source(home, directory.home_name, st, directory.id, origin)
        temporary = copyup.make_directory(self.upper, source)
        parent_fd = self.tree.upper_fd(parent)
        parent_ctime = self.tree.shown_ctime(parent)
        try:
            self.mark_impure(parent)
        except OSError:
            self.upper.discard(temporary)
            raise
        copyup.publish(self.upper, temporary, parent_fd, directory.name, replace=False)
        self._moved_up(directory, parent, directory.name)
        self.tally.directories += 1
        self.tree.keep_ctime(parent, parent_ctime)
        self.tree.keep_ctime(directory, st.st_ctime_ns)

    def _moved_up(self, node: Node, parent: Directory | None, name: bytes) -> None:
        """The object now lies in the upper: says so on the node and on its entry."""
        node.in_upper = True
        node.home = None if isinstance(node, Directory) else node.home
        node.real, node.region = self.tree.stat_real(node).st_ino, b""
        if parent is not None:
            self._entry_moved_up(parent, name, node.real)
        self.tree.gate.retract_attributes(node.id)

    def _entry_moved_up(self, parent: Directory, name: bytes, real: int) -> None:
        entry = parent.merged.names.get(name) if parent.merged is not None else None
        if entry is not None:
            entry.home = None
            entry.real = real

    # -- files ------------------------------------------------------------------------------------

    async def settle(self, node: File, caller: Caller) -> None:
        """Waits until no copy-up of `node` is under way. Raises OSError(EINTR)."""
        while node.job is not None:
            await self._wait(node.job, caller)

    async def attributes_only(self, node: File, caller: Caller) -> None:
        """Makes sure that the file's attributes can be changed: its data need not be in the upper. Raises
        OSError.
        """
        while not node.in_upper:
            if node.job is not None:
                await self._wait(node.job, caller)
                continue
            st = self.tree.stat_real(node)
            single = node.parent is None or st.st_nlink == 1
            if single and (not stat.S_ISREG(st.st_mode) or st.st_size == 0 or self._may_metacopy(node)):
                metacopy = stat.S_ISREG(st.st_mode) and st.st_size > 0
                copy = copyup.make(
                    self.upper,
                    self._source(node, st),
                    data=None,
                    size=st.st_size,
                    metacopy=metacopy,
                    sync=False,
                )
                self._publish(node, copy, metacopy=metacopy)
            else:
                await self.data(node, caller)

    def _may_metacopy(self, node: File) -> bool:
        """A lower file that has attributes only is copied with its data: a chain of redirects would have to
        be rebuilt.
        """
        return self.metacopy and node.parent is not None and not self.tree.is_metacopy(node)

    async def data(self, node: File, caller: Caller, size: int | None = None) -> None:
        """Makes sure that the file is in the upper with its data, or the first `size` bytes of them when it
        is about to be cut there.

        Raises OSError: EINTR when the caller was interrupted while it waited; what the copy raised (ENOSPC,
        EIO, …)."""
        while not node.in_upper or self.tree.is_metacopy(node):
            job = node.job
            if job is None:
                st = self.tree.stat_real(node)
                if not stat.S_ISREG(st.st_mode) and (node.parent is None or st.st_nlink == 1):
                    copy = copyup.make(
                        self.upper, self._source(node, st), data=None, size=0, metacopy=False, sync=False
                    )
                    self._publish(node, copy, metacopy=False)
                    return
                job = node.job = Job(size, caller)
                node.users += 1
                self._jobs.add(job)
                self.nursery.start_soon(self._run, node, job, size)
            # Who needs other bytes than the job copies only waits for its end: it must not keep alive a copy
            # that cuts the file when the one who wanted it cut has gone.
            await self._wait(job, caller, counts=job.size == size)

    async def _wait(self, job: Job, caller: Caller, *, counts: bool = False) -> None:
        job.waiters += counts
        try:
            while not job.done.is_set():
                with trio.move_on_after(_POLL):
                    await job.done.wait()
                if not job.done.is_set() and caller.interrupted():
                    fail(errno.EINTR)
        finally:
            job.waiters -= counts
            if counts and job.waiters == 0 and not job.done.is_set():
                job.cancelled = True
        if job.error is not None:
            if job.error.errno == errno.ECANCELED:
                return  # given up by others: whoever still wants it starts again
            raise OSError(job.error.errno, job.error.strerror)

    async def _run(self, node: File, job: Job, size: int | None) -> None:
        try:
            await self._copy(node, job, size)
        except Cancelled:
            number = errno.EINTR if job.ending else errno.ECANCELED
            job.error = OSError(number, os.strerror(number))
        except OSError as error:
            job.error = error
        except Exception:
            log.exception("copy-up failed")
            job.error = OSError(errno.EIO, os.strerror(errno.EIO))
        finally:
            node.job = None
            self._jobs.discard(job)
            node.users -= 1
            job.done.set()
            self.tree.release(node)

    async def _copy(self, node: File, job: Job, size: int | None) -> None:
        st = self.tree.stat_real(node)
        regular = stat.S_ISREG(st.st_mode)
        data: OwnedFd | None = None
        # One of several names, or of names nobody looked up: filled where it is. Who wants it cut does that
        # afterwards.
        in_place = node.in_upper and (st.st_nlink > 1 or node.parent is None)
        length = st.st_size if size is None or in_place else min(size, st.st_size)
        if regular and length:
            data = self.tree.open_real(*self.tree.data_location(node), os.O_RDONLY)
        if in_place:
            await self._fill(node, job, data, st.st_size)
            return
        names: list[tuple[Directory, bytes]] = []
        if st.st_nlink > 1 and node.parent is not None:
            names = await self.links.names(node)
        try:
            copy = await trio.to_thread.run_sync(
                partial(
                    copyup.make,
                    self.upper,
                    self._source(node, st),
                    data=data,
                    size=length,
                    metacopy=False,
                    sync=regular and not self.upper.volatile,
                    cancelled=lambda: job.cancelled,
                ),
                limiter=self._limiter,
            )
            if job.cancelled:
                self.upper.discard(copy.temporary)
                raise Cancelled
            cut = length < st.st_size
            if cut and copy.fd is not None:
                self._cut_short(copy.fd, job.cutter)
            if len(names) > 1:
                record = await self._journal(node, copy, names)
                self._publish_links(node, copy, names, record)
            else:
                self._publish(node, copy, metacopy=False)
            if cut:
                self.tree.changed(node)
            if st.st_nlink > 1:
                # The copy has the names that are seen, the lower may have had more (links outside its layer).
                self.tree.attributes_moved(node.id)
        finally:
            self.links.unpin(names)

    async def _fill(self, node: File, job: Job, data: OwnedFd | None, size: int) -> None:
        fd = open_upper(self.tree, node, os.O_RDWR)
        if data is None:
            os.removexattr(fd.fd, self.upper.names.metacopy)
            copied = Copied(0, False)
        else:
            work = partial(copyup.fill, self.upper, fd, data, size, lambda: job.cancelled)
            copied = await trio.to_thread.run_sync(work, limiter=self._limiter)
        self.tally.copied_up(copied)
        node.metacopy = False
        self._switch_handles(node, fd, False)

    def _source(self, node: File, st: os.stat_result) -> copyup.Source:
        fd, name = self.tree.where(node)
        born = self.tree.birth_time(node)
        if not node.in_upper:
            return copyup.Source(fd, name, st, node.id, self.upper.make_origin(fd.fd, name), born)
        # The copy is made in a thread; meanwhile the name may come to mean another file, so the object itself
        # is held.
        fd = self.tree.object_path(fd, name)
        try:
            origin = os.getxattr(fd_path(fd.fd), self.upper.names.origin)
        except OSError:
            origin = b""
        return copyup.Source(fd, b"", st, node.id, origin, born)

    # -- publishing -------------------------------------------------------------------------------

    def _publish(self, node: File, copy: copyup.Copy, *, metacopy: bool) -> None:
        """Shows a finished copy under the name its file has now. Synchronous. Raises OSError, nothing
        left.
        """
        try:
            old_ctime = self.tree.shown_ctime(node)
            parent = node.parent
            parent_fd = self.directory(parent) if parent is not None else None
            parent_ctime = self.tree.shown_ctime(parent) if parent is not None else 0
            if parent is not None:
                self.mark_impure(parent)
        except OSError:
            self.upper.discard(copy.temporary)
            raise
        if parent is None:
            # Unlinked while open: nobody else can see it, so the copy needs no name either.
            self.tree.pin(node, self.pin(node, self.upper.work.fd, copy.temporary))
            self.upper.discard(copy.temporary)
            name = b""
        else:
            name = node.name
            replace = node.in_upper
            assert parent_fd is not None
            copyup.publish(self.upper, copy.temporary, parent_fd, name, replace=replace)
            self.tree.keep_ctime(parent, parent_ctime)
        node.metacopy = metacopy
        self._moved_up(node, parent, name)
        self.tally.copied_up(copy.copied, metacopy=metacopy)
        self._switch_handles(node, copy.fd, metacopy)
        self.tree.keep_ctime(node, old_ctime)

    def _link_paths(self, node: File, names: list[tuple[Directory, bytes]]) -> list[tuple[bytes, bytes]]:
        """(directory's path, name) of those names that still are the lower file's. Raises OSError(ENOENT)."""
        return [
            (self.tree.path(directory), name)
            for directory, name in names
            if self._lower_entry(node, directory, name) is not None
        ]

    @staticmethod
    def _lower_entry(node: File, directory: Directory, name: bytes) -> Entry | None:
        entry = directory.merged.names.get(name) if directory.merged is not None else None
        return entry if entry is not None and entry.home is not None and entry.real == node.real else None

    async def _journal(self, node: File, copy: copyup.Copy, names: list[tuple[Directory, bytes]]) -> str:
        """Drafts the journal of the names as they are now, in a thread (it syncs). Raises OSError, the copy
        discarded.
        """
        record: str | None = None
        try:
            while True:
                paths = self._link_paths(node, names)
                work = partial(
                    journal.draft, self.upper.work, copy.temporary, paths, sync=not self.upper.volatile
                )
                record = await trio.to_thread.run_sync(work, limiter=self._limiter)
                if self._link_paths(node, names) == paths:
                    return record
        except OSError:
            if record is not None:
                journal.remove(self.upper.work, record)
            self.upper.discard(copy.temporary)
            raise

    def _publish_links(
        self, node: File, copy: copyup.Copy, names: list[tuple[Directory, bytes]], record: str
    ) -> None:
        """Shows a copy under all names of its file. Synchronous; journalled (`record` is the draft), so that
        a crash leaves none or all after the next mount. Raises OSError, nothing left.
        """
        work = self.upper.work.fd.fd
        fresh: list[tuple[Directory, bytes, Entry]] = []
        try:
            old_ctime = self.tree.shown_ctime(node)
            for directory, name in names:
                entry = self._lower_entry(node, directory, name)
                if entry is not None:
                    self.directory(directory)
                    fresh.append((directory, name, entry))
            record = journal.commit(self.upper.work, record)
            step("links.journalled")
            for directory, name, _ in fresh:
                fd = self.tree.upper_fd(directory)
                before = os.fstat(fd.fd)
                ctime = self.tree.shown_ctime(directory)
                self.mark_impure(directory)
                os.link(copy.temporary, name, src_dir_fd=work, dst_dir_fd=fd.fd, follow_symlinks=False)
                step("links.linked")
                copyup.restore_times(fd, before)
                self.tree.keep_ctime(directory, ctime)
        except OSError:
            self._unlink_names(copy, fresh)
            journal.remove(self.upper.work, record)
            self.upper.discard(copy.temporary)
            raise
        self.upper.discard(copy.temporary)
        journal.remove(self.upper.work, record)
        step("links.done")
        node.metacopy = False
        for directory, name, entry in fresh:
            self._entry_moved_up(directory, name, copy.st.st_ino)
            if entry.node is None:
                entry.node = node
                self.tree.add_name(node, directory, name)
        self._moved_up(node, node.parent, node.name)
        self.tally.copied_up(copy.copied)
        self._switch_handles(node, copy.fd, False)
        self.tree.keep_ctime(node, old_ctime)

    def _unlink_names(self, copy: copyup.Copy, names: list[tuple[Directory, bytes, Entry]]) -> None:
        """Undoes a part of `_publish_links`: the lower file is seen again under every name."""
        for directory, name, _ in names:
            try:
                fd = self.tree.upper_fd(directory)
                if os.stat(name, dir_fd=fd.fd, follow_symlinks=False).st_ino == copy.st.st_ino:
                    os.unlink(name, dir_fd=fd.fd)
            except OSError:
                continue

    def _cut_short(self, fd: OwnedFd, cutter: Caller) -> None:
        """A copy of fewer bytes than the file has is half of a truncate: the other half, mtime and setuid,
        belongs to it before it is shown (the caller that truncates has yet to wake up).
        """
        setid.clear(self.tree, self.upper, fd, cutter, may_keep=True)
        os.utime(fd.fd, ns=(os.fstat(fd.fd).st_atime_ns, time.time_ns()))

    def _switch_handles(self, node: File, fd: OwnedFd | None, metacopy: bool) -> None:
        """Descriptors opened for reading before the copy-up read the upper file from now on (POSIX; the
        kernel's overlayfs does not).
        """
        if fd is None or metacopy:
            return
        for handle in node.handles or ():
            handle.fd = fd
            handle.lend(self.tree.gate, writes=False)
        self.tree.gate.switch(node.id, fd.fd)
