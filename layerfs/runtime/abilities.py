"""What this machine, its kernel and this user allow, found by looking and trying. Prints nothing, keeps
nothing.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from dataclasses import dataclass

from layerfs import gate
from layerfs.errors import LayerfsError, MountError
from layerfs.fdutil.mountinfo import read_mountinfo
from layerfs.gate import passthrough
from layerfs.runtime import mounts, preflight
from layerfs.vfs import checks


@dataclass(frozen=True)
class Finding:
    """One fact. `ok` None: neither good nor bad."""

    name: str
    ok: bool | None
    text: str
    #: Without it nothing can be mounted.
    needed: bool = False


def machine() -> list[Finding]:
    """Everything that does not depend on a directory."""
    return [
        Finding("kernel", None, f"{os.uname().sysname} {os.uname().release} {os.uname().machine}"),
        Finding("user", None, _user()),
        Finding("python", None, sys.version.split()[0]),
        _library(),
        _gate(),
        _fuse_device(),
        _fusermount(),
        _allow_other(),
        _passthrough(),
        _kernel_overlay(),
        _mount_helper(),
    ]


def _user() -> str:
    uid = os.geteuid()
    where = "" if _initial_user_namespace() else " in a user namespace"
    return ("root" if uid == 0 else f"uid {uid}") + where


def _initial_user_namespace() -> bool:
    try:
        with open("/proc/self/uid_map") as file:
            return file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return True


def _library() -> Finding:
    import importlib.metadata

    try:
        versions = {name: importlib.metadata.version(name) for name in ("pyfuse3", "trio")}
        gate.import_pyfuse3()  # it is the loading that may fail: a missing libfuse3
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        return Finding("pyfuse3", False, str(error), needed=True)
    return Finding("pyfuse3", True, f"{versions['pyfuse3']}, trio {versions['trio']}", needed=True)


def _gate() -> Finding:
    if gate.unavailable is not None:
        return Finding("gate", None, f"no: {gate.unavailable}; mounts work without, only slower")
    return Finding("gate", True, "native code answers what is known (-o gate=off: Python answers all)")


def _fuse_device() -> Finding:
    try:
        preflight.check_fuse_device()
    except MountError as error:
        return Finding("/dev/fuse", False, str(error).removeprefix("/dev/fuse: "), needed=True)
    return Finding("/dev/fuse", True, "can be opened", needed=True)


def _fusermount() -> Finding:
    needed = os.geteuid() != 0
    program = mounts.find_fusermount()
    if program is None:
        return Finding(
            "fusermount3", False if needed else None, "not installed (package fuse3)", needed=needed
        )
    status = os.stat(program)
    if status.st_mode & stat.S_ISUID and status.st_uid == 0:
        return Finding("fusermount3", True, f"{program}, set-uid root", needed=needed)
    text = f"{program} is not set-uid root: only root can mount through it"
    return Finding("fusermount3", False if needed else None, text, needed=needed)


def _allow_other() -> Finding:
    if preflight.user_allow_other():
        return Finding("allow_other", True, "ordinary users may let others in (user_allow_other)")
    return Finding("allow_other", None, f"only root's mounts ({preflight.FUSE_CONF} has no user_allow_other)")


def _passthrough() -> Finding:
    obstacle = passthrough.obstacle()
    if obstacle is None and gate.unavailable is not None:
        obstacle = "it takes the gate"
    if obstacle is not None:
        return Finding("passthrough", None, f"no: {obstacle}")
    return Finding("passthrough", True, "the kernel may read and write files itself (-o data=passthrough)")


def _kernel_overlay() -> Finding:
    try:
        with open("/proc/filesystems") as file:
            present = any(line.split()[-1:] == ["overlay"] for line in file)
    except OSError:
        present = False
    if not present:
        return Finding("kernel overlay", None, "not loaded (modprobe overlay); layerfs does not need it")
    defaults = []
    for parameter in ("redirect_dir", "metacopy", "index", "xino_auto"):
        try:
            with open(f"/sys/module/overlay/parameters/{parameter}") as file:
                defaults.append(f"{parameter}={'on' if file.read().strip() == 'Y' else 'off'}")
        except OSError:
            pass
    return Finding(
        "kernel overlay", True, "present; defaults " + " ".join(defaults) if defaults else "present"
    )


def _mount_helper() -> Finding:
    """mount(8) looks for helpers in /sbin and its like only (libmount, FS_SEARCH_PATH)."""
    for directory in ("/sbin", "/sbin/fs.d", "/sbin/fs", "/usr/sbin"):
        if os.access(os.path.join(directory, "mount.layerfs"), os.X_OK):
            return Finding("mount -t layerfs", True, f"{directory}/mount.layerfs")
    found = shutil.which("mount.layerfs") or os.path.join(os.path.dirname(sys.argv[0]), "mount.layerfs")
    if not os.access(found, os.X_OK):
        return Finding("mount -t layerfs", None, "mount.layerfs is not installed")
    return Finding("mount -t layerfs", None, f"no: link {os.path.realpath(found)} into /sbin for it")


@dataclass(frozen=True)
class UpperAbilities:
    """What an upper directory's file system can carry; `probe` None: not tried, `problem` says why."""

    fstype: str
    probe: checks.UpperProbe | None
    problem: str | None


def upper(path: str) -> UpperAbilities:
    """Try what the file system of `path` can carry, beside it if possible, so that it stays as it is. Raises
    MountError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(
            f"upper directory {checks.shown(path)}: {checks.reason(error)}", error.errno
        ) from None
    try:
        fstype = _fstype(path)
        if checks.is_locked(fd):
            return UpperAbilities(fstype, None, "in use by a layerfs mount")
        problem = "not writable"
        for place in ("..", "."):
            try:
                found = _probe_in(fd, place)
            except (OSError, LayerfsError) as error:
                problem = checks.reason(error) if isinstance(error, OSError) else str(error)
                continue
            if found is not None:
                return UpperAbilities(fstype, found, None)
        return UpperAbilities(fstype, None, problem)
    finally:
        os.close(fd)


def _probe_in(upper_fd: int, place: str) -> checks.UpperProbe | None:
    """Probe in a temporary directory in `place` relative to the upper; None when that is another file
    system.
    """
    parent = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=upper_fd)
    try:
        before = os.fstat(parent)
        if before.st_dev != os.fstat(upper_fd).st_dev:
            return None
        name = f".layerfs-doctor-{os.getpid()}"
        os.mkdir(name, 0o700, dir_fd=parent)
        try:
            directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
            try:
                return checks.probe(directory, thorough=True)
            finally:
                os.close(directory)
        finally:
            os.rmdir(name, dir_fd=parent)
            try:
                os.utime(parent, ns=(before.st_atime_ns, before.st_mtime_ns))
            except OSError:
                pass  # somebody else's directory: its time moves on
    finally:
        os.close(parent)


def _fstype(path: str) -> str:
    """Type of the file system that holds `path`, as mountinfo names it."""
    real = os.fsencode(os.path.realpath(path))
    best = b""
    fstype = b"?"
    for entry in read_mountinfo():
        if (real == entry.target or real.startswith(entry.target.rstrip(b"/") + b"/")) and len(
            entry.target
        ) >= len(best):
            best, fstype = entry.target, entry.fstype
    return os.fsdecode(fstype)
