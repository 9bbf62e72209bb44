"""`layerfs umount`: takes a mount away and waits until its daemon has written everything and ended."""

from __future__ import annotations

import errno
import json
import os
import select
from collections.abc import Collection
from dataclasses import dataclass

import click

from layerfs.cli import talk
from layerfs.errors import MountError
from layerfs.fdutil import syncfs
from layerfs.runtime import mounts
from layerfs.vfs.checks import reason, shown

#: Attribute of a mount's root that tells whose it is (JSON with pid, upper, volatile…).
INFO_ATTRIBUTE = "layerfs.mount"
#: How often to look whether the daemon has reasons of its own to stay, in ms.
_LOOK_AGAIN_MS = 1000


@dataclass
class _Served:
    """What has to end and be on disk before we may return. -1: unknown, or nothing to do."""

    pid: int = 0
    pidfd: int = -1
    upper_fd: int = -1
    upper: str = ""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-l", "--lazy", is_flag=True, help="Detach a busy mount now; it ends when the last user has left."
)
@click.argument("mountpoint", metavar="MOUNTPOINT")
def command(lazy: bool, mountpoint: str) -> int:
    """Unmount MOUNTPOINT. Returns when the daemon has ended and the upper directory is on disk.

    Clears a dead mount too, whose daemon was killed.
    """
    umount(mountpoint, lazy=lazy)
    return 0


def umount(mountpoint: str, *, lazy: bool) -> None:
    """Raises MountError, BusyError when it cannot be unmounted or did not reach the disk."""
    try:
        entry = mounts.mount_at(mountpoint)
    except OSError as error:
        raise MountError(f"{shown(mountpoint)}: {reason(error)}", error.errno) from None
    if entry is None:
        raise MountError(f"{shown(mountpoint)} is not a mount point", errno.EINVAL)
    if entry.fstype != mounts.FSTYPE:
        raise MountError(
            f"{shown(mountpoint)} is not a layerfs mount but {os.fsdecode(entry.fstype)}: use umount",
            errno.EINVAL,
        )
    owner = entry.super_option(b"user_id")
    if os.geteuid() != 0 and owner is not None and owner != b"%d" % os.getuid():
        raise MountError(
            f"{shown(mountpoint)} was mounted by user {os.fsdecode(owner)}: only they or root may unmount it",
            errno.EPERM,
        )
    # --lazy is for mounts that may not answer any more: then nothing is asked of them.
    dead = not lazy and mounts.is_dead(mountpoint)
    served = _Served() if dead else _who_serves(None if lazy else mountpoint, entry.device)
    try:
        before = mounts.mounts_of(entry.device).keys() - {entry.mount_id}
        # Nobody can do anything in a dead mount any more: what still works in it must not keep it here.
        mounts.detach(entry.target, lazy=lazy or dead)
        if not dead:
            _wait_until_gone(served, entry.device, before, lazy=lazy)
            _check_written(served)
    finally:
        for fd in (served.pidfd, served.upper_fd):
            if fd >= 0:
                os.close(fd)
    if dead:
        from layerfs.runtime import ephemeral

        ephemeral.sweep()


def _who_serves(mountpoint: str | None, device: int) -> _Served:
    served = _Served()
    try:
        if mountpoint is None:
            raise ValueError
        info = json.loads(os.getxattr(mountpoint, INFO_ATTRIBUTE))
        served.pid = int(info["pid"])
        if info.get("upper") and not info.get("volatile"):
            served.upper = str(info["upper"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # root may not look into a user's mount, but may end it
    # A number from another pid namespace may mean anybody here: it must hold the mount's connection.
    if not mounts.serves(served.pid, device):
        served.pid = mounts.find_daemon(device) or 0
    if served.pid:
        try:
            served.pidfd = os.pidfd_open(served.pid)
        except OSError:
            pass  # it ended meanwhile
    if served.upper:
        try:
            # Opened before the unmount: syncfs(2) reports the write-back errors since the descriptor was
            # opened.
            served.upper_fd = os.open(served.upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            pass
    return served


def _wait_until_gone(served: _Served, device: int, before: Collection[int], *, lazy: bool) -> None:
    """Wait for the daemon's end, unless what was unmounted was not the last of its mounts (`before`: their
    ids).
    """
    if served.pidfd < 0:
        return
    poll = select.poll()
    poll.register(served.pidfd, select.POLLIN)
    while not poll.poll(_LOOK_AGAIN_MS):
        left = {mount_id: where for mount_id, where in mounts.mounts_of(device).items() if mount_id in before}
        for pid, target in left.values():
            where = (
                shown(target) if pid == os.getpid() else f"{shown(target)} of process {pid}'s mount namespace"
            )
            talk.note("layerfs umount", f"still mounted on {where}: the daemon goes on")
            return
        if lazy:
            return


def _check_written(served: _Served) -> None:
    if served.upper_fd < 0:
        return
    try:
        syncfs(served.upper_fd)
    except OSError as error:
        raise MountError(
            f"unmounted, but not everything reached the disk of {shown(served.upper)}: {reason(error)}",
            error.errno,
        ) from None
