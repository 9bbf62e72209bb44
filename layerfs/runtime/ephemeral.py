"""Throw-away upper and work directories for `layerfs mount --ephemeral`: on disk, gone when the daemon is.

A daemon that was killed cannot clean up; the next ephemeral mount of the same user does it for it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from dataclasses import replace

from layerfs.errors import MountError
from layerfs.fdutil import temporary_place
from layerfs.vfs.checks import reason, shown
from layerfs.vfs.config import StackConfig

PREFIX = "layerfs-ephemeral-"
_LOCK = "alive"


class Ephemeral:
    """A directory holding `upper` and `work`, locked while its maker lives."""

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        #: Held with flock(2) until the process ends: tells a directory in use from a forgotten one.
        self._lock = lock

    @property
    def upper(self) -> str:
        return os.path.join(self.path, "upper")

    @property
    def work(self) -> str:
        return os.path.join(self.path, "work")

    def remove(self) -> None:
        remove_tree(self.path)
        os.close(self._lock)


def make(config: StackConfig) -> tuple[Ephemeral, StackConfig]:
    """A new ephemeral upper for `config`, its root with the mode and owner of the top lower's. Raises
    MountError.
    """
    base = temporary_place()
    path = os.path.join(base, f"{PREFIX}{os.getpid()}-{os.urandom(6).hex()}")
    try:
        os.mkdir(path, 0o700)
        lock = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made = Ephemeral(path, lock)
        os.mkdir(made.upper, 0o755)
        os.mkdir(made.work, 0o700)
        if config.lowers:
            status = os.stat(config.lowers[0])
            if os.geteuid() == 0:
                os.chown(made.upper, status.st_uid, status.st_gid)
            os.chmod(made.upper, stat.S_IMODE(status.st_mode) | (0 if os.geteuid() == 0 else 0o700))
    except OSError as error:
        remove_tree(path)
        raise MountError(
            f"no ephemeral directory in {shown(base)}: {reason(error)} (TMPDIR chooses another place)",
            error.errno,
        ) from None
    return made, replace(config, upper=made.upper, work=made.work)


def sweep() -> int:
    """Remove what killed daemons of this user left in `temporary_place()`. Returns how many; raises
    nothing.
    """
    removed = 0
    base = temporary_place()
    try:
        names = [name for name in os.listdir(base) if name.startswith(PREFIX)]
    except OSError:
        return 0
    for name in names:
        path = os.path.join(base, name)
        try:
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # just being made, or just gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(path)
            removed += 1
        except OSError:
            pass
        finally:
            os.close(lock)
    return removed


def remove_tree(path: str) -> None:
    """Remove a tree of ours, directories that we may not even read included. What cannot be removed stays."""
    import shutil

    def again(function: Callable[..., object], failed: str, error: BaseException) -> None:
        if not isinstance(error, OSError) or error.errno not in (errno.EACCES, errno.EPERM):
            return
        for each in (os.path.dirname(failed), failed):
            try:
                if stat.S_ISDIR(os.lstat(each).st_mode):
                    os.chmod(each, 0o700)
            except OSError:
                pass
        try:
            if stat.S_ISDIR(os.lstat(failed).st_mode):
                shutil.rmtree(failed, ignore_errors=True)
            else:
                os.unlink(failed)
        except OSError:
            pass

    shutil.rmtree(os.fsencode(path), onerror=lambda function, failed, info: again(function, failed, info[1]))
