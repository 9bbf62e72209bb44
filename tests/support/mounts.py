"""Systems under test behind one interface: a plain directory, kernel overlayfs, fuse-overlayfs, layerfs.

Each is made from a `Stack`, is a context manager, and has `.mnt`, `.remount()` and `.close()`. layerfs is
started and ended by its real command line, as a daemon. Nothing in here knows what a file system should do.

What is open stands in `live`; `sweep()` finds what this test session left behind (mounts below its scratch
directory, processes carrying its mark in their environment) and removes it.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

from .stack import Stack, Tree, scratch_root, split_options

__all__ = [
    "FuseOverlayfs",
    "KernelOverlay",
    "Layerfs",
    "Mounted",
    "PlainDir",
    "live",
    "marked_processes",
    "mount_options",
    "mounts_below",
    "sweep",
    "why_no_fuse",
    "why_no_fuse_overlayfs",
    "why_no_kernel_overlay",
    "why_no_layerfs",
]

SESSION_MARK = "LAYERFS_TEST_SESSION"
MOUNT_MARK = "LAYERFS_TEST_MOUNT"
session_id = uuid.uuid4().hex

# A mount that is not there, or a daemon that is not gone, after this many seconds never will be.
PATIENCE = 20.0

# Lines of a daemon's log or of the command's stderr that fail the test.
SUSPICIOUS = re.compile(
    r"Traceback \(most recent|\bWARN(ING)?\b|\bERROR\b|\bCRITICAL\b|Exception ignored|was never awaited"
    r"|ResourceWarning|[A-Za-z]+Error:|fuse: |segfault|core dumped"
)

live: list[Mounted] = []
#: What --gate asks of layerfs mounts; None: nothing.
gate: str | None = None
#: What --data asks of them.
data: str | None = None

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_move_mount, _SYS_fsopen, _SYS_fsconfig, _SYS_fsmount = 429, 430, 431, 432
MNT_DETACH = 2
_CLONE_NEWNS = 0x20000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 1, 32, 4096, 16384, 1 << 18, 1 << 20


# --- mount(2) and friends -------------------------------------------------------------------------


def _check(result: int, what: str) -> int:
    if result < 0:
        e = ctypes.get_errno()
        raise OSError(e, f"{what}: {os.strerror(e)}")
    return result


def _c(path: str | bytes | os.PathLike[str]) -> bytes:
    return os.fsencode(path)


def umount(path: str | os.PathLike[str], flags: int = 0) -> None:
    _check(_libc.umount2(_c(path), flags), f"umount {os.fspath(path)}")


def mount(source: str, target: str | os.PathLike[str], kind: str, flags: int = 0, data: str = "") -> None:
    _check(_libc.mount(_c(source), _c(target), kind.encode(), flags, _c(data)), f"mount {kind} on {target}")


def bind(source: str | os.PathLike[str], target: str | os.PathLike[str], *, read_only: bool = False) -> None:
    """Bind-mount a directory or a file."""
    mount(os.fspath(source), target, "none", _MS_BIND)
    if read_only:
        mount("none", target, "none", _MS_BIND | _MS_REMOUNT | _MS_RDONLY)


def mounts_below(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(mount point, type) of every mount at or below `path`, newest last."""
    root = os.path.realpath(path)
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            left, _, right = line.partition(" - ")
            point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
            if point == root or point.startswith(root + "/"):
                found.append((point, right.split()[0]))
    return found


def mount_options(path: str | os.PathLike[str]) -> set[str]:
    """Per-mount options (`nodev`, `ro`, ...) of the mount at exactly `path`."""
    point, found = os.path.realpath(path), set[str]()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            fields = line.split()
            if re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4]) == point:
                found = set(fields[5].split(","))
    return found


def mount_overlay(
    target: str | os.PathLike[str],
    lowers: Sequence[str | os.PathLike[str]],
    upper: str | os.PathLike[str] | None,
    work: str | os.PathLike[str] | None,
    options: Sequence[str] = (),
) -> None:
    """Mount a kernel overlay through the new mount API: no limit of 4096 bytes, no escaping of `:` and `,`.

    Raises OSError with the kernel's own words, where it gave any.
    """
    flags = 0
    fs = _check(_libc.syscall(_SYS_fsopen, b"overlay", 1), "fsopen overlay")
    try:

        def set_(key: str, value: str | os.PathLike[str] | None) -> None:
            command = 0 if value is None else 1  # FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING
            if (
                _libc.syscall(
                    _SYS_fsconfig, fs, command, key.encode(), None if value is None else _c(value), 0
                )
                < 0
            ):
                e = ctypes.get_errno()
                raise OSError(e, f"overlay option {key}={value}: {os.strerror(e)}{_kernel_log(fs)}")

        for lower in lowers:
            set_("lowerdir+", lower)
        if upper is not None:
            set_("upperdir", upper)
            set_("workdir", work)
        for option in options:
            key, eq, value = option.partition("=")
            if key == "ro":
                flags |= 1  # MOUNT_ATTR_RDONLY
            else:
                set_(key, value if eq else None)
        if _libc.syscall(_SYS_fsconfig, fs, 6, None, None, 0) < 0:  # FSCONFIG_CMD_CREATE
            e = ctypes.get_errno()
            raise OSError(e, f"overlay on {target}: {os.strerror(e)}{_kernel_log(fs)}")
        mfd = _check(_libc.syscall(_SYS_fsmount, fs, 1, flags), "fsmount overlay")
        try:
            _check(_libc.syscall(_SYS_move_mount, mfd, b"", -100, _c(target), 4), "move_mount overlay")
        finally:
            os.close(mfd)
    finally:
        os.close(fs)


def _kernel_log(fs: int) -> str:
    lines = []
    try:
        while True:
            lines.append(os.read(fs, 4096).decode(errors="replace").strip())
    except OSError:
        pass
    return "".join(f"; {line}" for line in lines)


# --- processes ------------------------------------------------------------------------------------


def marked_processes(mark: str = "", key: str = SESSION_MARK) -> list[int]:
    """Pids of live processes, other than this one, whose environment holds `key`=`mark` (default: this
    session).
    """
    needle = f"{key}={mark or session_id}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{name}/environ", "rb") as f:
                    if needle in f.read().split(b"\0"):
                        found.append(int(name))
            except OSError:
                continue
    return found


def _describe(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return f"{pid} ({f.read().replace(bytes(1), b' ').decode(errors='replace').strip()})"
    except OSError:
        return str(pid)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def private_mount_namespace() -> str | None:
    """Move this process to a mount namespace of its own with an accessible /dev/fuse; None, or why that
    failed.

    Everything that tests mount then vanishes with the test process at the latest, and opening /dev/fuse
    (mode 0600 on some machines) to ordinary users changes nothing outside.
    """
    if os.geteuid() != 0:
        return "not root"
    try:
        _check(_libc.unshare(_CLONE_NEWNS), "unshare mount namespace")
        mount("none", "/", "none", MS_REC | MS_PRIVATE)
    except OSError as e:
        return str(e)
    if os.path.exists("/dev/fuse") and os.stat("/dev/fuse").st_mode & 0o666 != 0o666:
        node = scratch_root() / "dev-fuse"
        try:
            os.mknod(node, 0o20666, os.makedev(10, 229))
            os.chmod(node, 0o666)
            os.close(os.open(node, os.O_RDWR))
            bind(node, "/dev/fuse")
        except OSError as e:
            return f"mount namespace is private, but /dev/fuse stays closed: {e}"
    _open_the_way_to_python()
    return None


def _open_the_way_to_python() -> None:
    """Let ordinary users run this Python although it lives below, say, root's home directory of mode 0700.

    Only in our own namespace: an overlay shows that directory with a mode that may be passed. Where the tests
    themselves lie below it their writes would be lost in that overlay, so it is left alone, and tests of
    ordinary users skip with `why_no_fuse`'s reason.
    """
    for needed in {os.path.realpath(sys.executable), os.path.realpath(sys.prefix)}:
        for parent in reversed(Path(needed).parents):
            mode = os.stat(parent).st_mode
            if mode & 0o001 or Path(__file__).resolve().is_relative_to(parent):
                continue
            upper, work = (
                scratch_root() / f"{kind}{str(parent).replace('/', '-')}" for kind in ("way", "work")
            )
            try:
                for path in (upper, work):
                    path.mkdir()
                os.chmod(upper, mode & 0o7777 | 0o011)
                mount_overlay(parent, [parent], upper, work)
            except OSError:
                return


def sweep(keep: Sequence[Mounted] = ()) -> list[str]:
    """Close and remove whatever is open apart from `keep`; one line for each thing found."""
    found = []
    for m in [m for m in live if m not in keep]:
        found.append(f"still mounted: {m}")
        try:
            m.close()
        except Exception as e:
            found.append(f"and closing it failed: {e}")
        if m in live:
            live.remove(m)
    kept_points = {os.path.realpath(m.mnt) for m in keep}
    kept_pids = {pid for m in keep for pid in m.pids()}
    strays = [p for p in marked_processes() if p not in kept_pids]
    deadline = time.monotonic() + 2  # a child of the test that just exited may still be on its way out
    while strays and time.monotonic() < deadline:
        time.sleep(0.02)
        strays = [p for p in strays if p in marked_processes()]
    found += [f"process left behind: {_describe(p)}" for p in strays]
    _kill(strays)
    for point, kind in reversed(mounts_below(scratch_root())):
        if point not in kept_points and point != str(scratch_root()):
            found.append(f"mount left behind: {kind} on {point}")
            umount(point, MNT_DETACH)
    return found


# --- the systems ----------------------------------------------------------------------------------


class Mounted:
    """One stack, mounted. Opened by `with` or `open()`."""

    name = "?"

    def __init__(self, stack: Stack, options: str | Sequence[str] = "") -> None:
        self.stack = stack
        self.options = split_options(options)

    @property
    def mnt(self) -> Path:
        return self.stack.mnt

    def open(self) -> Self:
        assert self not in live
        self._open()
        live.append(self)
        return self

    def close(self) -> None:
        """Unmount and wait until nothing of it is left. Raises when that went other than it should."""
        if self in live:
            live.remove(self)
            self._close()

    def remount(self) -> None:
        self.close()
        self.open()

    def pids(self) -> list[int]:
        """The daemon's processes."""
        return []

    def _open(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, kind: object, value: BaseException | None, tb: object) -> None:
        try:
            self.close()
        except Exception as e:
            if value is None:
                raise
            value.add_note(f"and then closing {self} failed: {e}")

    def __repr__(self) -> str:
        return f"<{self.name} {','.join(self.options)} on {self.mnt}>"


class PlainDir(Mounted):
    """The oracle: a plain directory. `tree` is laid out in it by whoever made the stack, through
    `Stack.write`.
    """

    name = "plain"

    def __init__(self, stack: Stack, tree: Tree | None = None) -> None:
        super().__init__(stack)
        if tree is not None:
            stack.write(stack.mnt, tree)

    def _open(self) -> None:
        pass

    def _close(self) -> None:
        pass


class KernelOverlay(Mounted):
    name = "kernel"

    def __init__(self, stack: Stack, options: str | Sequence[str] = "redirect_dir=on,metacopy=on") -> None:
        super().__init__(stack, options)

    def _open(self) -> None:
        s = self.stack
        mount_overlay(s.mnt, s.lowers, s.upper, s.work, self.options)

    def _close(self) -> None:
        umount(self.mnt)


class _Daemon(Mounted):
    """A file system served by a process that carries this mount's mark in its environment."""

    as_user: tuple[int, int] | None = None

    def __init__(self, stack: Stack, options: str | Sequence[str] = "") -> None:
        super().__init__(stack, options)
        self.mark = uuid.uuid4().hex

    def pids(self) -> list[int]:
        return marked_processes(self.mark, MOUNT_MARK)

    def env(self) -> dict[str, str]:
        env = dict(os.environ)
        env[SESSION_MARK] = session_id
        env[MOUNT_MARK] = self.mark
        return env

    def run(
        self, *argv: str | os.PathLike[str], timeout: float = PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the mount's user, in the mount's environment; its output is captured."""
        who: dict[str, Any] = {}
        if self.as_user and os.geteuid() == 0:
            who = {"user": self.as_user[0], "group": self.as_user[1], "extra_groups": []}
        return subprocess.run(
            [os.fspath(a) for a in argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=self.env(),
            cwd="/",
            check=False,
            **who,
        )

    def wait_gone(self, patience: float = PATIENCE) -> bool:
        """Wait until the mount point is free and the daemon has ended; False when it did not happen."""
        deadline = time.monotonic() + patience
        while mounts_below(self.mnt) or self.pids():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def remove_by_force(self) -> None:
        for point, _ in reversed(mounts_below(self.mnt)):
            try:
                umount(point, MNT_DETACH)
            except OSError:
                subprocess.run(["fusermount3", "-uz", point], check=False, capture_output=True)
        _kill(self.pids())
        self.wait_gone(2)


class FuseOverlayfs(_Daemon):
    name = "fuse-overlayfs"

    def _open(self) -> None:
        s = self.stack
        lowers = ":".join(re.sub(r"([:\\])", r"\\\1", os.fspath(p)) for p in s.lowers)
        options = [f"lowerdir={lowers}", *self.options]
        if s.upper:
            options += [f"upperdir={s.upper}", f"workdir={s.work}"]
        done = self.run("fuse-overlayfs", "-o", ",".join(options), s.mnt)
        if done.returncode or not os.path.ismount(s.mnt):
            self.remove_by_force()
            raise RuntimeError(f"fuse-overlayfs: exit {done.returncode}: {done.stderr.strip()}")

    def _close(self) -> None:
        umount(self.mnt)
        if not self.wait_gone():
            self.remove_by_force()
            raise RuntimeError("fuse-overlayfs did not end after umount")


class Layerfs(_Daemon):
    """layerfs, by its command line.

    `as_user`: (uid, gid) to run as, when the tests run as root; the stack should have that owner. `args`:
    further arguments of `layerfs mount`. `expected_log`: a regular expression of suspicious log lines that
    this test expects.
    """

    name = "layerfs"

    def __init__(
        self,
        stack: Stack,
        options: str | Sequence[str] = "",
        as_user: tuple[int, int] | None = None,
        *,
        args: Sequence[str] = (),
        expected_log: str | None = None,
    ) -> None:
        super().__init__(stack, options)
        self.as_user = as_user
        self.args = list(args)
        self.expected_log = expected_log
        self.log = stack.dir / "daemon.log"
        self._log_seen = 0
        self.stderr = ""

    def env(self) -> dict[str, str]:
        return super().env() | {
            "LAYERFS_LOG": str(self.log),
            "PYTHONWARNINGS": "default",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def has_gate(self) -> bool:
        """Whether requests reach the daemon through the native gate (virtual xattr `layerfs.gate`)."""
        try:
            return os.getxattr(self.mnt, "layerfs.gate") == b"on"
        except OSError as e:
            if e.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
            return False

    def command(self) -> list[str | os.PathLike[str]]:
        """The mount command, for tests that start the daemon in a way of their own."""
        s = self.stack
        argv: list[str | os.PathLike[str]] = [*layerfs_command(), "mount"]
        for lower in s.lowers:
            argv += ["--lower", lower]
        if s.upper:
            argv += ["--upper", s.upper]
        if s.work:
            argv += ["--work", s.work]
        if options := [*self._asked(), *self.options]:
            argv += ["-o", ",".join(options)]
        return [*argv, *self.args, s.mnt]

    def statistics(self) -> dict[str, Any]:
        """What `layerfs stat --json` prints."""
        done = self.run(*layerfs_command(), "stat", "--json", self.mnt)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def known(self) -> int:
        """Objects that the kernel has, from Python and from the gate."""
        found = self.statistics()
        return int(found["nodes"]) + int((found["gate"] or {}).get("known", 0))

    def _asked(self) -> list[str]:
        """What --gate and --data ask for, unless the test asks for something itself."""
        if any(option.startswith(("gate=", "data=")) for option in self.options):
            return []
        asked = [f"gate={gate}"] if gate is not None else []
        # Others may not have it, and modes in xattrs do not go with it.
        kept_apart = self.as_user or any(option.startswith("xattr_permissions=") for option in self.options)
        if data is not None and not (data == "passthrough" and kept_apart):
            asked.append(f"data={data}")
        return asked

    def _open(self) -> None:
        if not self.log.exists():
            self.log.touch()
            if self.as_user:
                os.chown(self.log, *self.as_user)
        try:
            done = self.run(*self.command())
        except subprocess.TimeoutExpired as e:
            self.remove_by_force()
            raise RuntimeError(f"layerfs mount did not return: {e}\n{self.log_text()}") from None
        self.stderr = done.stderr
        if done.returncode or not mounts_below(self.mnt):
            self.remove_by_force()
            raise RuntimeError(
                f"layerfs mount: exit {done.returncode}: {done.stderr.strip()}\n{self.log_text()}"
            )
        if bad := self._suspicious(done.stderr):
            self.remove_by_force()
            raise RuntimeError(f"layerfs mount said: {bad}")

    def _close(self) -> None:
        wrong = []
        try:
            done = self.run(*layerfs_command(), "umount", self.mnt)
            if done.returncode or done.stderr:
                wrong.append(f"layerfs umount: exit {done.returncode}: {done.stderr.strip()}")
        except subprocess.TimeoutExpired:
            wrong.append(f"layerfs umount did not return; daemon: {[_stack_of(p) for p in self.pids()]}")
        if not self.wait_gone(0.5 if wrong else PATIENCE):
            wrong.append(
                f"left: mounts {mounts_below(self.mnt)}, processes {[_describe(p) for p in self.pids()]}"
            )
            self.remove_by_force()
        if bad := self.new_complaints():
            wrong.append(f"daemon's log:\n{bad}")
        if wrong:
            raise RuntimeError("\n".join(wrong))

    def info(self) -> dict[str, Any]:
        """What the mount says of itself (virtual xattr `layerfs.mount` of its root)."""
        loaded: dict[str, Any] = json.loads(os.getxattr(self.mnt, "layerfs.mount"))
        return loaded

    def kill(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Signal the daemon and wait for its end; a SIGKILLed one leaves its dead mount behind."""
        pids = self.pids()
        for pid in pids:
            os.kill(pid, sig)
        deadline = time.monotonic() + PATIENCE
        while any(p in self.pids() for p in pids):
            assert time.monotonic() < deadline, f"daemon survived {sig.name}"
            time.sleep(0.005)

    def log_text(self) -> str:
        try:
            return self.log.read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def new_complaints(self) -> str:
        """Suspicious lines of the log since the last call, with what stands around them; "" when there are
        none.
        """
        text = self.log_text()
        fresh, self._log_seen = text[self._log_seen :], len(text)
        return fresh[-6000:] if self._suspicious(fresh) else ""

    def _suspicious(self, text: str) -> str:
        lines = [ln for ln in text.splitlines() if SUSPICIOUS.search(ln)]
        if self.expected_log:
            lines = [ln for ln in lines if not re.search(self.expected_log, ln)]
        return "\n".join(lines)


def layerfs_command() -> list[str]:
    """$LAYERFS, else the installed command beside this Python, else the package itself."""
    if override := os.environ.get("LAYERFS"):
        return override.split()
    installed = Path(sys.executable).with_name("layerfs")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "layerfs"]


def _stack_of(pid: int) -> str:
    spy = Path(sys.executable).with_name("py-spy")
    if spy.exists():
        done = subprocess.run(
            [spy, "dump", "--pid", str(pid)], capture_output=True, text=True, check=False, timeout=20
        )
        return done.stdout
    return _describe(pid)


# --- why something cannot be tested here ----------------------------------------------------------
# Each function tries the real thing once and returns None, or the reason for a skip.


@cache
def why_no_kernel_overlay(options: str = "redirect_dir=on,metacopy=on") -> str | None:
    stack = Stack(name="probe")
    try:
        with KernelOverlay(stack, options):
            return None
    except OSError as e:
        return f"kernel overlayfs ({options}) cannot be mounted: {e}"
    finally:
        stack.remove()


@cache
def why_no_python(uid: int) -> str | None:
    """Why `uid` cannot run this Python with the modules of layerfs."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import trio"],
            user=uid,
            group=uid,
            extra_groups=[],
            capture_output=True,
            text=True,
            check=False,
            cwd="/",
        )
    except OSError as e:
        return f"uid {uid} cannot run {sys.executable}: {e.strerror}"
    return f"uid {uid} cannot import: {done.stderr.strip().splitlines()[-1]}" if done.returncode else None


@cache
def why_no_fuse(uid: int | None = None) -> str | None:
    """Why `uid` (None: this process) cannot open /dev/fuse, or lacks fusermount3 where it needs it."""

    def attempt() -> None:
        os.close(os.open("/dev/fuse", os.O_RDWR))

    try:
        if uid is None:
            attempt()
        elif reason := why_no_python(uid):
            return reason
        else:
            done = subprocess.run(
                [sys.executable, "-c", "import os; os.open('/dev/fuse', os.O_RDWR)"],
                user=uid,
                group=uid,
                extra_groups=[],
                capture_output=True,
                text=True,
                check=False,
                cwd="/",
            )
            if done.returncode:
                return f"uid {uid} cannot open /dev/fuse: {done.stderr.strip().splitlines()[-1]}"
    except OSError as e:
        return f"/dev/fuse: {e.strerror}"
    if (uid or os.geteuid()) != 0 and not shutil.which("fusermount3"):
        return "no fusermount3 for an ordinary user"
    return None


@cache
def why_no_fuse_overlayfs() -> str | None:
    if not shutil.which("fuse-overlayfs"):
        return "fuse-overlayfs is not installed"
    return why_no_fuse()


@cache
def why_no_layerfs(uid: int | None = None) -> str | None:
    return why_no_fuse(uid)


def why_not_root() -> str | None:
    return None if os.geteuid() == 0 else "needs root"


@cache
def passthrough_of_kernel() -> str:
    """ "yes", or why the kernel offers no FUSE passthrough."""
    import gzip

    try:
        with gzip.open("/proc/config.gz", "rt") as f:
            return "yes" if "CONFIG_FUSE_PASSTHROUGH=y" in f.read() else "no: CONFIG_FUSE_PASSTHROUGH is off"
    except OSError:
        release = tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2])
        return "unknown (no /proc/config.gz)" if release >= (6, 9) else "no: kernel older than 6.9"


def facts() -> Iterator[str]:
    """Lines for the header of a test run."""
    u = os.uname()
    who = f"uid {os.geteuid()}"
    yield f"kernel {u.release} {u.machine}, {who}, scratch {scratch_root()}"
    no_overlay, no_fuse = why_no_kernel_overlay(), why_no_fuse()
    yield f"kernel overlayfs: {no_overlay or 'yes'}; fuse: {no_fuse or 'yes'}"
    yield f"passthrough: {passthrough_of_kernel()}; fuse-overlayfs: {why_no_fuse_overlayfs() or 'yes'}"
    try:
        import pyfuse3

        p = f"pyfuse3 {pyfuse3.__version__}"
    except ImportError as e:
        p = f"no pyfuse3 ({e})"
    yield f"{p}, libfuse {_libfuse_version()}, gate: {_gate_state()}"


def _libfuse_version() -> str:
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        try:
            lib = ctypes.CDLL(name)
        except OSError:
            continue
        lib.fuse_pkgversion.restype = ctypes.c_char_p
        version: bytes = lib.fuse_pkgversion()
        return version.decode()
    return "not found"


def _gate_state() -> str:
    built = importlib.util.find_spec("layerfs.gate.native") is not None
    return f"{'built' if built else 'not built'}, asked for: {gate or 'as layerfs likes'}"


def is_dead_mount(path: str | os.PathLike[str]) -> bool:
    """Is this a FUSE mount whose daemon is gone?"""
    try:
        os.stat(path)
    except OSError as e:
        return e.errno == errno.ENOTCONN
    return False
