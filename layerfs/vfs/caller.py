"""Who makes a request, and whether it still waits."""

from __future__ import annotations

from dataclasses import dataclass

from layerfs.fdutil import proc_path


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
