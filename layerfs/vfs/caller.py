"""Who makes a request, and whether it still waits."""

from __future__ import annotations

import os
from dataclasses import dataclass

from layerfs.fdutil import proc_path

#: Calls of the write(2) family whose first argument is the descriptor, by machine (asm/unistd.h): write,
#: pwrite64, writev, pwritev, pwritev2.
_WRITES = {
    "x86_64": frozenset((1, 18, 20, 296, 328)),
    "aarch64": frozenset((64, 68, 66, 70, 287)),
    "riscv64": frozenset((64, 68, 66, 70, 287)),
}.get(os.uname().machine, frozenset[int]())


@dataclass(frozen=True, slots=True)
class Caller:
    """`pid` is the calling thread as the daemon's pid namespace sees it; 0 when it sees it not at all."""

    uid: int
    gid: int
    pid: int
    umask: int = 0

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
