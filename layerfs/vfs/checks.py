"""Tells whether a stack can be mounted, before anything is: one clear line for each thing that is wrong.

Leaves nothing behind and changes nothing that a user can see: probes live for an instant in the work
directory. Does not know FUSE (`layerfs.runtime.preflight` looks at /dev/fuse and the mount point) and takes
no lock: what it finds free may be taken a moment later, so whoever locks must still be ready to be refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from layerfs.errors import BusyError, MountError, UsageError
from layerfs.fdutil import clone_mount
from layerfs.fdutil.mountinfo import MountEntry, read_mountinfo
from layerfs.overlay import whiteout
from layerfs.upper.work import LOCK_NAME, VOLATILE_MARK
from layerfs.vfs.config import StackConfig

#: Shown inode numbers have 16 bits for the layer, 0 being the upper.
MAX_LOWERS = (1 << 16) - 2
#: Descriptors the daemon needs beside one for each layer.
_FDS_BESIDE_LAYERS = 64

_Identity = tuple[int, int]


def shown(path: str | bytes) -> str:
    """A path as it stands in a message: on one line, whatever its bytes."""
    text = os.fsdecode(path)
    return text if text.isprintable() else repr(text)


def reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _identity(fd: int) -> _Identity:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


@contextmanager
def _opened(path: str, what: str) -> Iterator[int]:
    """A readable descriptor of directory `path`. Raises MountError naming it as `what`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_open(path, what, error) from None
    except ValueError:  # a NUL in the path
        raise UsageError(f"{what} {shown(path)}: not a path") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _cannot_open(path: str, what: str, error: OSError) -> MountError:
    text = {
        errno.ENOENT: "no such directory",
        errno.ENOTDIR: "not a directory",
        errno.EACCES: "cannot be read: permission denied",
        errno.ENOTCONN: "is a dead mount; unmount it first",
    }.get(error.errno or 0, reason(error))
    return MountError(f"{what} {shown(path)}: {text}", error.errno)


class _Ancestry:
    """Which directories lie above which, by (device, inode), walking `..`: symlinks and spelling play no
    part.
    """

    def __init__(self) -> None:
        # Layers mostly are siblings: the walk above their parent is made once.
        self._above: dict[_Identity, tuple[_Identity, ...]] = {}

    def above(self, fd: int) -> tuple[_Identity, ...]:
        """Identities of all directories above `fd`, nearest first; as far up as the caller may look."""
        try:
            parent = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
        except OSError:
            return ()
        try:
            identity = _identity(parent)
            if identity == _identity(fd):
                return ()
            known = self._above.get(identity)
            if known is None:
                known = (identity, *self.above(parent))
                self._above[identity] = known
            return known
        finally:
            os.close(parent)


def check_stack(config: StackConfig, mountpoint: str | None = None) -> None:
    """Raise the first thing that keeps `config` from being mounted (on `mountpoint`, if given).

    Raises UsageError, MountError, BusyError.
    """
    check_counts(config)
    ancestry = _Ancestry()
    lowers: list[tuple[str, _Identity, tuple[_Identity, ...]]] = []
    for lower in config.lowers:
        with _opened(lower, "lower layer") as fd:
            try:
                with os.scandir(fd) as entries:
                    next(entries, None)
                if not os.access(".", os.X_OK, dir_fd=fd, effective_ids=True):
                    raise PermissionError(errno.EACCES, "search")
            except OSError as error:
                raise _cannot_open(lower, "lower layer", error) from None
            lowers.append((lower, _identity(fd), ancestry.above(fd)))
    if mountpoint is not None:
        _check_hole(mountpoint, lowers, ancestry)
    if config.upper is None:
        return
    with _opened(config.upper, "upper directory") as upper:
        if config.work is None:
            _check_apart(config.upper, "upper directory", upper, lowers, ancestry, mountpoint)
            if not config.read_only:
                raise UsageError("an upper directory needs a work directory on the same file system")
            return
        with _opened(config.work, "work directory") as work:
            _check_upper_and_work(config.upper, upper, config.work, work, ancestry)
            _check_apart(config.upper, "upper directory", upper, lowers, ancestry, mountpoint)
            _check_apart(config.work, "work directory", work, lowers, ancestry, mountpoint)
            _check_free(config.upper, upper, config.work, work)
            _check_volatile_mark(config.work, work)
            if not config.read_only:
                _check_writable(config, config.upper, upper, config.work, work)


def check_counts(config: StackConfig) -> None:
    """Raises UsageError for no layers, MountError for more than can be held."""
    if not config.lowers:
        raise UsageError("at least one lower layer is needed (--lower DIR or -o lowerdir=DIR)")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = MAX_LOWERS
    if hard != resource.RLIM_INFINITY:
        most = min(most, max(1, hard - _FDS_BESIDE_LAYERS))
    if len(config.lowers) > most:
        why = "layers are counted in 16 bits" if most == MAX_LOWERS else f"the limit on open files is {hard}"
        raise MountError(
            f"{len(config.lowers)} lower layers are too many: at most {most} ({why})", errno.EMFILE
        )


def _check_upper_and_work(
    upper_path: str, upper: int, work_path: str, work: int, ancestry: _Ancestry
) -> None:
    if _identity(upper) == _identity(work):
        raise MountError(f"upper and work directory are the same: {shown(upper_path)}", errno.EINVAL)
    if _identity(upper) in ancestry.above(work):
        raise MountError(
            f"work directory {shown(work_path)} is inside the upper directory {shown(upper_path)}",
            errno.EINVAL,
        )
    if _identity(work) in ancestry.above(upper):
        raise MountError(
            f"upper directory {shown(upper_path)} is inside the work directory {shown(work_path)}",
            errno.EINVAL,
        )
    # rename(2) refuses to cross mounts before it looks for either name, so this asks without touching
    # anything (fs/namei.c `do_renameat2`); equal st_dev would not do: two bind mounts of one file system have
    # that too.
    nobody = f".layerfs-nobody-{os.getpid()}"
    try:
        os.rename(nobody, nobody, src_dir_fd=work, dst_dir_fd=upper)
    except OSError as error:
        if error.errno == errno.EXDEV:
            raise MountError(
                f"upper directory {shown(upper_path)} and work directory {shown(work_path)}"
                " are not on the same mounted file system",
                errno.EXDEV,
            ) from None


def _check_hole(
    mountpoint: str, lowers: list[tuple[str, _Identity, tuple[_Identity, ...]]], ancestry: _Ancestry
) -> None:
    """A mount point below a lower layer needs a private copy of that layer's mount, which is root's to make.

    Without it the daemon would meet its own mount in the layer and wait for itself, unkillably (tried). On
    the layer's root itself it is harmless: layers are opened before mounting.
    """
    try:
        target = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # what is wrong with the mount point is said by who mounts
    try:
        above = ancestry.above(target)
    finally:
        os.close(target)
    for lower, identity, _ in lowers:
        if identity not in above:
            continue
        clone = clone_mount(os.fsencode(lower))
        if clone is None:
            raise MountError(
                f"mount point {shown(mountpoint)} is inside the lower layer {shown(lower)}:"
                " only root can mount there",
                errno.EPERM,
            )
        os.close(clone)


def _check_apart(
    path: str,
    what: str,
    fd: int,
    lowers: list[tuple[str, _Identity, tuple[_Identity, ...]]],
    ancestry: _Ancestry,
    mountpoint: str | None,
) -> None:
    """A directory that we write must not overlap a lower layer, and must not be hidden by the mount."""
    identity, above = _identity(fd), ancestry.above(fd)
    for lower, lower_identity, above_lower in lowers:
        if lower_identity == identity:
            raise MountError(f"{what} {shown(path)} is also the lower layer {shown(lower)}", errno.ELOOP)
        if lower_identity in above:
            raise MountError(f"{what} {shown(path)} is inside the lower layer {shown(lower)}", errno.ELOOP)
        if identity in above_lower:
            raise MountError(f"lower layer {shown(lower)} is inside the {what} {shown(path)}", errno.ELOOP)
    if mountpoint is None:
        return
    try:
        target = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # what is wrong with the mount point is said by who mounts
    try:
        target_identity, above_target = _identity(target), ancestry.above(target)
    finally:
        os.close(target)
    if target_identity == identity or target_identity in above:
        raise MountError(f"{what} {shown(path)} is inside the mount point {shown(mountpoint)}", errno.ELOOP)
    if identity in above_target:
        raise MountError(f"mount point {shown(mountpoint)} is inside the {what} {shown(path)}", errno.ELOOP)


def _check_free(upper_path: str, upper: int, work_path: str, work: int) -> None:
    try:
        lock = os.open(LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=work)
    except OSError:
        lock = -1  # no mount was here yet, or it is not ours to read: then taking the lock says so
    try:
        for fd, what, path in ((lock, "work", work_path), (upper, "upper", upper_path)):
            if fd >= 0 and is_locked(fd):
                raise BusyError(
                    f"{what} directory {shown(path)} is in use by another layerfs mount; unmount that first"
                )
    finally:
        if lock >= 0:
            os.close(lock)
    for entry in _kernel_overlays():
        for option, what, path, fd in (
            (b"upperdir", "upper directory", upper_path, upper),
            (b"workdir", "work directory", work_path, work),
        ):
            used = entry.super_option(option)
            if used is not None and _is_directory(used, _identity(fd)):
                raise BusyError(
                    f"{what} {shown(path)} is in use by the kernel overlay mounted on {shown(entry.target)};"
                    " unmount that first"
                )


def is_locked(fd: int) -> bool:
    """Whether a live mount holds its lock (flock) on what `fd` is."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    return False


def _kernel_overlays() -> list[MountEntry]:
    try:
        return [entry for entry in read_mountinfo() if entry.fstype == b"overlay"]
    except OSError:
        return []


def _is_directory(path: bytes, identity: _Identity) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == identity


def _check_volatile_mark(work_path: str, work: int) -> None:
    try:
        os.stat(VOLATILE_MARK, dir_fd=work, follow_symlinks=False)
    except OSError:
        return
    raise MountError(
        f"work directory {shown(work_path)} carries the mark of a volatile mount that did not end cleanly:"
        f" discard upper and work, or remove {shown(os.path.join(work_path, VOLATILE_MARK))} to trust them",
        errno.EINVAL,
    )


def _check_writable(config: StackConfig, upper_path: str, upper: int, work_path: str, work: int) -> None:
    for what, path, fd in (("upper directory", upper_path, upper), ("work directory", work_path, work)):
        if os.fstatvfs(fd).f_flag & os.ST_RDONLY:
            raise MountError(f"{what} {shown(path)} is on a read-only file system", errno.EROFS)
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=True):
            raise MountError(f"{what} {shown(path)}: cannot be written: permission denied", errno.EACCES)
    try:
        found = probe(work, config.userxattr)
    except OSError as error:
        raise MountError(f"work directory {shown(work_path)}: {reason(error)}", error.errno) from None
    if found.prefix is None:
        wanted = {None: "extended attributes", True: "user.* attributes", False: "trusted.* attributes"}[
            config.userxattr
        ]
        raise MountError(
            f"upper directory {shown(upper_path)}: its file system does not keep {wanted} for this user",
            errno.EOPNOTSUPP,
        )
    if not _can_hide(work):
        raise MountError(
            f"upper directory {shown(upper_path)}: its file system ({_fstype(upper)}) takes no whiteouts,"
            " neither as devices nor as .wh. files; put upper and work directory outside of that mount",
            errno.EOPNOTSUPP,
        )


def _can_hide(directory: int) -> bool:
    """Whether a whiteout can be made in either form. Not in a layerfs or fuse-overlayfs mount, where both are
    what hides a name of that mount; kernel overlayfs takes the files.
    """
    name = f".layerfs-hide-{os.getpid()}"
    if _can_mknod(directory, name):
        return True
    mark = os.fsdecode(whiteout.PREFIX) + name
    try:
        os.close(
            os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        )
        os.unlink(mark, dir_fd=directory)
    except OSError as error:
        # Anything else (a full disk, a quota) is not for us to say.
        return error.errno not in (errno.EINVAL, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP)
    return True


def _fstype(fd: int) -> str:
    """Type of the file system of `fd`, as mountinfo names it."""
    device = os.fstat(fd).st_dev
    try:
        found = [entry.fstype for entry in read_mountinfo() if entry.device == device]
    except OSError:
        found = []
    return os.fsdecode(found[0]) if found else "of unknown type"


@dataclass(frozen=True)
class UpperProbe:
    """What a directory for writing can carry, as tried."""

    #: `trusted.overlay.` or `user.overlay.`; None: neither can be set.
    prefix: str | None
    trusted_xattr: bool
    user_xattr: bool
    #: mknod of a character device 0/0, the kernel's whiteout.
    whiteout_device: bool
    #: renameat2 with RENAME_WHITEOUT: renames and leaves the whiteout in one step.
    rename_whiteout: bool
    #: FICLONE: copy-up shares blocks.
    reflink: bool


def probe(directory: int, userxattr: bool | None = None, *, thorough: bool = False) -> UpperProbe:
    """Try what the file system of `directory` (a descriptor, writable) can carry, and clean up.

    `userxattr` as in StackConfig. Only `thorough` tries more than xattrs. Raises OSError when not even a file
    can be made.
    """
    name = f".layerfs-probe-{os.getpid()}"
    made = [name, name + ".to"]
    fd = os.open(
        name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory
    )
    try:
        trusted = userxattr is not True and _can_set(fd, "trusted.overlay.probe")
        user = userxattr is not False and (thorough or not trusted) and _can_set(fd, "user.overlay.probe")
        prefix = "trusted.overlay." if trusted else "user.overlay." if user else None
        device = whiteout = reflink = False
        if thorough:
            device = _can_mknod(directory, name + ".dev")
            whiteout = _can_rename_whiteout(directory, name, name + ".to")
            reflink = _can_reflink(directory, fd, name + ".clone")
        return UpperProbe(prefix, trusted, user, device, whiteout, reflink)
    finally:
        os.close(fd)
        for each in made:
            try:
                os.unlink(each, dir_fd=directory)
            except FileNotFoundError:
                pass


def _can_set(fd: int, attribute: str) -> bool:
    try:
        os.setxattr(fd, attribute, b"y")
        os.removexattr(fd, attribute)
    except OSError:
        return False
    return True


def _can_mknod(directory: int, name: str) -> bool:
    try:
        os.mknod(name, stat.S_IFCHR | 0o600, 0, dir_fd=directory)
    except OSError:
        return False
    os.unlink(name, dir_fd=directory)
    return True


def _can_rename_whiteout(directory: int, old: str, new: str) -> bool:
    from layerfs.fdutil.syscalls import RENAME_WHITEOUT, renameat2

    try:
        renameat2(directory, os.fsencode(old), directory, os.fsencode(new), RENAME_WHITEOUT)
    except OSError:
        return False
    return True


def _can_reflink(directory: int, source: int, name: str) -> bool:
    ficlone = 0x40049409
    os.write(source, b"x" * 4096)
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        fcntl.ioctl(fd, ficlone, source)
    except OSError:
        return False
    finally:
        os.close(fd)
        os.unlink(name, dir_fd=directory)
    return True
