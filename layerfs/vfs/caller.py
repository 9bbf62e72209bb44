"""Who makes a request, and whether it still waits."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import cache

from layerfs.fdutil import proc_path

#: Calls of the write(2) family whose first argument is the descriptor, by machine (asm/unistd.h): write,
#: pwrite64, writev, pwritev, pwritev2.
_WRITES = {
    "x86_64": frozenset((1, 18, 20, 296, 328)),
    "aarch64": frozenset((64, 68, 66, 70, 287)),
    "riscv64": frozenset((64, 68, 66, 70, 287)),
}.get(os.uname().machine, frozenset[int]())
#: chown(2) and its kin, by machine: chown, fchown, lchown, fchownat; and as programs of 32 bits number them.
_CHOWNS = {
    "x86_64": frozenset((92, 93, 94, 260, 16, 95, 182, 198, 207, 212, 298)),
    "aarch64": frozenset((54, 55, 16, 95, 182, 198, 207, 212, 325)),
    "riscv64": frozenset((54, 55)),
}.get(os.uname().machine, frozenset[int]())
#: Calls that list xattrs, by machine: listxattr, llistxattr, flistxattr, listxattrat; and the first three
#: as programs of 32 bits number them: what bears those numbers else lists none.
_LISTS_XATTRS = {
    "x86_64": frozenset((194, 195, 196, 465, 232, 233, 234)),
    "aarch64": frozenset((11, 12, 13, 465, 232, 233, 234)),
    "riscv64": frozenset((11, 12, 13, 465)),
}.get(os.uname().machine)
#: Set in numbers of system calls of the x32 ABI (asm/unistd.h).
_X32 = 1 << 30
#: Bits of CAP_FOWNER and CAP_FSETID in the masks of /proc/PID/status (linux/capability.h).
_CAP_FOWNER = 1 << 3
_CAP_FSETID = 1 << 4
_SIGKILL = 1 << signal.SIGKILL - 1
#: What /proc/PID/ns/user says of the first user namespace (linux/nsfs.h USER_NS_INIT_INO).
_FIRST_USER_NAMESPACE = b"user:[4026531837]"


@cache
def sees_callers() -> bool:
    """Whether the pids of requests are those of /proc. Where it is that of another pid namespace than this
    process is in, they mean other processes there."""
    try:
        with open(proc_path(b"self/status"), "rb") as status:
            # As many as there are namespaces from that of /proc to ours (proc(5)).
            return all(len(line.split()) == 2 for line in status if line.startswith(b"NSpid:"))
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Caller:
    """`pid` is the calling thread as the daemon's pid namespace sees it; 0 when it sees it not at all.

    `uid` and `gid` are what something new of the caller's belongs to; None: the request does not say. On a
    mount of which idmapped mounts may be made the kernel says it to requests that create, as mapped by the
    caller's mount, and to no others (fs/fuse/dev.c fuse_get_req). Then /proc says who the thread is, as the
    daemon's user namespace sees it, and nobody through which mount it came: to be asked only where the wrong
    answer does little harm. Where /proc does not say, the caller has no privilege.

    `umask` is what is still to be taken off the mode of something new: 0 where the kernel did it. `patient`:
    only what kills it ends its waiting, as in write(2) to a file of a disk."""

    uid: int | None
    gid: int | None
    pid: int
    umask: int = 0
    patient: bool = False

    def is_one_of(self, *users: int) -> bool:
        """Whether the caller acts as one of these users. False where it cannot be known."""
        uid = self.uid if self.uid is not None else self._acting_as(b"Uid:")
        return uid in users

    def is_shown_trusted(self) -> bool:
        """Whether a list of xattrs is to name `trusted.` ones: to the administrator alone (xattr(7)).

        Where the request does not say who asks there is one more: kernel overlayfs, of which a layer lies on
        the mount, asks with its mounter's rights in the thread of whoever changes a file, and copies up what
        it was told. /proc knows nothing of such rights. But whoever lists xattrs himself is in a call that
        does."""
        if self.is_one_of(0):
            return True
        if self.uid is not None or self.pid == 0 or _LISTS_XATTRS is None:
            return False
        try:
            number, _ = self._call()
        except (OSError, ValueError):
            return False
        return number & ~_X32 not in _LISTS_XATTRS

    def keeps_setid(self) -> bool:
        """Whether setuid and setgid stay when the caller writes to a file: CAP_FSETID in the first user
        namespace, as fs/attr.c setattr_should_drop_suidgid asks for it. False where it cannot be known.

        For callers that wait for our answer: they cannot change meanwhile."""
        try:
            return self._is_capable(_CAP_FSETID) and self._is_in_first_namespace()
        except (OSError, IndexError, ValueError):
            return False

    def owns(self, uid: int) -> bool:
        """Whether the caller may do what the owner `uid` of a file may (fs/inode.c inode_owner_or_capable).
        False where it cannot be known."""
        if self.is_one_of(uid):
            return True
        try:
            return self._is_capable(_CAP_FOWNER) and self._governs(b"uid_map", uid)
        except (OSError, IndexError, ValueError):
            return False

    def changes_owner(self) -> bool | None:
        """Whether the thread is in chown(2) or its kin; None where it cannot be known (an ordinary user's
        daemon is not told of every thread of his: ptrace(2), Yama)."""
        try:
            return self._call()[0] & ~_X32 in _CHOWNS if self.pid else None
        except (OSError, ValueError):
            return None

    def _is_capable(self, capability: int) -> bool:
        """In its own user namespace. Raises OSError."""
        return self.pid != 0 and bool(int(self._status(b"CapEff:")[0], 16) & capability)

    def _is_in_first_namespace(self) -> bool:
        return os.readlink(proc_path(b"%d/ns/user" % self.pid)) == _FIRST_USER_NAMESPACE

    def _governs(self, ids: bytes, number: int) -> bool:
        """Whether who has a capability in the caller's user namespace has it over what belongs to `number`
        (as the daemon counts; `ids`: uid_map or gid_map). Raises OSError, ValueError."""
        theirs = os.readlink(proc_path(b"%d/ns/user" % self.pid))
        # What one's own namespace maps, the file says as the one above counts (user_namespaces(7)).
        if theirs in (_FIRST_USER_NAMESPACE, os.readlink(proc_path(b"self/ns/user"))):
            return True
        with open(proc_path(b"%d/%b" % (self.pid, ids)), "rb") as lines:
            ranges = [tuple(map(int, line.split())) for line in lines]
        return any(outside <= number < outside + count for _, outside, count in ranges)

    def in_group(self, gid: int) -> bool:
        """Whether the caller is a member of a group, its supplementary ones included as far as they can be
        seen.

        Through an idmapped mount the kernel compares its groups with the group as that mount shows it, which
        is not known here."""
        if gid == (self.gid if self.gid is not None else self._acting_as(b"Gid:")):
            return True
        if self.pid == 0:
            return False
        try:
            return b"%d" % gid in self._status(b"Groups:")
        except OSError:
            return False

    def may_keep_setgid(self, gid: int) -> bool:
        """Whether setgid of a file of group `gid` stays when the caller changes its owner
        (fs/inode.c in_group_or_capable). False where it cannot be known."""
        try:
            return self.in_group(gid) or (self._is_capable(_CAP_FSETID) and self._governs(b"gid_map", gid))
        except (OSError, IndexError, ValueError):
            return False

    def _acting_as(self, field: bytes) -> int | None:
        """The id for access to files (fsuid, fsgid); None where it cannot be seen."""
        if self.pid == 0:
            return None
        try:
            return int(self._status(field)[3])  # real, effective, saved, and this
        except (OSError, IndexError, ValueError):
            return None

    def _status(self, field: bytes) -> list[bytes]:
        """The words of one line of /proc/PID/status. Raises OSError."""
        with open(proc_path(b"%d/status" % self.pid), "rb") as status:
            for line in status:
                if line.startswith(field):
                    return line.split()[1:]
        return []

    def _call(self) -> tuple[int, bytes]:
        """The system call that the thread is in, and its first argument. Raises OSError, ValueError."""
        with open(proc_path(b"%d/syscall" % self.pid), "rb") as file:
            number, first = file.read().split()[:2]
        return int(number), first

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
            number, first = self._call()
            if number not in _WRITES:
                return False
            with open(proc_path(b"%d/fdinfo/%d" % (self.pid, int(first, 16))), "rb") as file:
                if b"ino:\t%d\n" % ino not in file.read():
                    return False
        except (OSError, ValueError):
            return False
        return self.interrupted()
