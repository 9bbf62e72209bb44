"""Who makes a request, and whether it still waits."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from layerfs.fdutil import proc_path

#: Calls of the write(2) family whose first argument is the descriptor, by machine (asm/unistd.h): write,
#: pwrite64, writev, pwritev, pwritev2.
_WRITES = {
    "x86_64": frozenset((1, 18, 20, 296, 328)),
    "aarch64": frozenset((64, 68, 66, 70, 287)),
    "riscv64": frozenset((64, 68, 66, 70, 287)),
}.get(os.uname().machine, frozenset[int]())


#: Bit of CAP_FSETID in the masks of /proc/PID/status (linux/capability.h).
_CAP_FSETID = 1 << 4
_SIGKILL = 1 << signal.SIGKILL - 1
#: What /proc/PID/ns/user says of the first user namespace (linux/nsfs.h USER_NS_INIT_INO).
_FIRST_USER_NAMESPACE = b"user:[4026531837]"


@dataclass(frozen=True, slots=True)
class Caller:
    """`pid` is the calling thread as the daemon's pid namespace sees it; 0 when it sees it not at all.

    `umask` is what is still to be taken off the mode of something new: 0 where the kernel did it. `patient`:
    only what kills it ends its waiting, as in write(2) to a file of a disk."""

    uid: int
    gid: int
    pid: int
    umask: int = 0
    patient: bool = False

    def keeps_setid(self) -> bool:
        """Whether setuid and setgid stay when the caller writes to a file: CAP_FSETID in the first user
        namespace, as fs/attr.c setattr_should_drop_suidgid asks for it. False where it cannot be known.

        For callers that wait for our answer: they cannot change meanwhile."""
        if self.pid == 0:
            return False
        try:
            if not int(self._status(b"CapEff:")[0], 16) & _CAP_FSETID:
                return False
            return os.readlink(proc_path(b"%d/ns/user" % self.pid)) == _FIRST_USER_NAMESPACE
        except (OSError, IndexError):
            return False

    def in_group(self, gid: int) -> bool:
        """Whether the caller is a member of a group, its supplementary ones included as far as they can be
        seen."""
        if gid == self.gid:
            return True
        if self.pid == 0:
            return False
        try:
            return b"%d" % gid in self._status(b"Groups:")
        except OSError:
            return False

    def _status(self, field: bytes) -> list[bytes]:
        """The words of one line of /proc/PID/status. Raises OSError."""
        with open(proc_path(b"%d/status" % self.pid), "rb") as status:
            for line in status:
                if line.startswith(field):
                    return line.split()[1:]
        return []

    def interrupted(self) -> bool:
        """Whether a signal waits for the calling thread that it has neither blocked nor ignored.

        pyfuse3 does not hand on FUSE_INTERRUPT. But a thread that waits for our answer cannot take its
        signals, so they stand in /proc/PID/status (SigPnd, ShdPnd) until we answer. A caller that is gone
        counts as interrupted; an invisible one never does."""
        if self.pid == 0:
            return False
        try:
            with open(proc_path(b"%d/status" % self.pid), "rb") as status:
                masks = {
                    line[:6]: int(line.split()[1], 16)
                    for line in status
                    if line.startswith((b"SigPnd", b"ShdPnd", b"SigBlk", b"SigIgn"))
                }
        except FileNotFoundError:
            return True
        except OSError:
            return False
        pending = masks.get(b"SigPnd", 0) | masks.get(b"ShdPnd", 0)
        if self.patient:
            # What ends a process is made SIGKILL for each of its threads (kernel/signal.c complete_signal).
            return bool(pending & _SIGKILL)
        return bool(pending & ~masks.get(b"SigBlk", 0) & ~masks.get(b"SigIgn", 0))

    def interrupted_write(self, ino: int) -> bool:
        """Whether the thread is in a write(2) to the file that is shown as `ino`, waits there for our answer,
        and was interrupted.

        For WRITE requests, which pyfuse3 hands on without their caller: this is who opened the descriptor.
        Asked more closely than others, because a WRITE may also come of write-back, on nobody's behalf, and
        then an error would lose data. False wherever it cannot be known."""
        if self.pid == 0:
            return False
        try:
            with open(proc_path(b"%d/wchan" % self.pid), "rb") as file:
                if file.read() != b"request_wait_answer":
                    return False
            with open(proc_path(b"%d/syscall" % self.pid), "rb") as file:
                number, fd = file.read().split()[:2]
            if int(number) not in _WRITES:
                return False
            with open(proc_path(b"%d/fdinfo/%d" % (self.pid, int(fd, 16))), "rb") as file:
                if b"ino:\t%d\n" % ino not in file.read():
                    return False
        except (OSError, ValueError):
            return False
        return self.interrupted()
