"""Starts the process that serves a mount, and hears from it whether the mount is usable.

The daemon is forked before anything is known of the mount, as the first thing a command does: importing trio
and pyfuse3 takes about 100 ms, in which the parent reads its options and looks at the layers. What is to be
mounted then goes down one pipe, the outcome comes up another:

    parent   fork ── read options ── check ── request ────────────── verify ── exit 0
    daemon        └─ setsid ── import trio, pyfuse3, layerfs ── serve ── ready ── runs on

Either pipe ending early means that the other side is gone: the daemon then undoes what it did, the parent
says why. Decides nothing about layers (`layerfs.vfs`), speaks no FUSE: whoever starts a daemon says what
loads the file system.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import NoReturn

from layerfs.errors import LayerfsError, MountError
from layerfs.overlay.owners import Owners
from layerfs.vfs.config import StackConfig

_READY = b"R"
_FAILED = b"E"
#: The parent's last word: the mount stays.
_KEEP = b"K"
#: Lines that libfuse and its helper write to stderr when a mount fails: the reason behind pyfuse3's bare
#: RuntimeError.
_REASONS = ("fuse:", "fusermount")

#: `serve(config, mountpoint, fuse_options, ready)`: opens, mounts, calls `ready`, runs until unmounted,
#: releases.
Serve = Callable[[StackConfig, str, "set[str]", Callable[[], None]], None]
#: Imports the file system and returns its `Serve`.
Loader = Callable[[], Serve]


@dataclass(frozen=True)
class MountRequest:
    """All that the daemon is told. Paths are absolute or will be resolved in the caller's working
    directory.
    """

    config: StackConfig
    mountpoint: str
    #: `st_dev` of the mount point before mounting.
    device_before: int
    fuse_options: frozenset[str] = field(default_factory=frozenset)
    ephemeral: bool = False
    #: File to append the daemon's log to; None: no log.
    log: str | None = None

    def encode(self) -> bytes:
        values = asdict(self)
        values["fuse_options"] = sorted(self.fuse_options)
        return marshal.dumps(values)  # same interpreter on both ends; loads nothing, unlike pickle

    @staticmethod
    def decode(data: bytes) -> MountRequest:
        values = marshal.loads(data)
        values["config"]["owners"] = Owners.from_dict(values["config"]["owners"])
        values["config"] = StackConfig(**values["config"])
        values["fuse_options"] = frozenset(values["fuse_options"])
        return MountRequest(**values)


class Daemon:
    """The forked process, seen from its parent. Needs `start` and then `keep_and_exit`, or it ends with its
    parent.
    """

    def __init__(self, pid: int, request_fd: int, status_fd: int) -> None:
        self.pid = pid
        self._request_fd = request_fd
        self._status_fd = status_fd
        self._mountpoint: str | None = None

    def start(self, request: MountRequest) -> None:
        """Have `request` served; returns when the mount is usable. Raises LayerfsError, the daemon being gone
        then.
        """
        from layerfs.runtime import mounts

        try:
            data = request.encode()
            self._mountpoint = request.mountpoint
            _write_all(self._request_fd, len(data).to_bytes(8, "little") + data)
            said = _read_all(self._status_fd)
        except BaseException:
            self.abandon()
            raise
        if said[:1] == _READY:
            try:
                mounts.verify(request.mountpoint, request.device_before)
            except BaseException:
                self.abandon()
                raise
            return
        status = self._reap()
        # The daemon unmounts what it mounted; if it could not (it was killed), the dead mount is ours to take
        # away.
        mounts.clear_dead(request.mountpoint)
        if said[:1] == _FAILED:
            exit_code, number, message = marshal.loads(said[1:])
            error = MountError(message, number)
            error.exit_code = exit_code
            raise error
        ended = f"signal {-status}" if status < 0 else f"exit code {status}"
        raise MountError(f"the daemon ended before the mount was usable ({ended})")

    def keep_and_exit(self) -> NoReturn:
        """Let the daemon live on, and end this process with success: one act, as far as signals are
        concerned.

        Whoever sees another exit code than 0 may rely on there being no mount; only SIGKILL between the last
        two system calls could tell a lie.
        """
        import signal

        _flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        _write_all(self._request_fd, _KEEP)
        os._exit(0)

    def abandon(self) -> None:
        """End the daemon, whatever it is doing, and wait for it: a mount it made is unmounted by it."""
        import signal

        try:
            os.kill(self.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
        self._reap()
        if self._mountpoint is not None:
            from layerfs.runtime import mounts

            mounts.clear_dead(self._mountpoint)

    def _reap(self) -> int:
        for fd in (self._request_fd, self._status_fd):
            if fd >= 0:
                os.close(fd)
        self._request_fd = self._status_fd = -1
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:
            return 0


def fork_daemon(load: Loader) -> Daemon:
    """Fork the daemon, which calls `load` and waits for its request. Call before any thread is started."""
    request_read, request_write = _pipe()
    status_read, status_write = _pipe()
    _flush()
    pid = os.fork()
    if pid == 0:
        _daemon_main(load, request_read, status_write)
    os.close(request_read)
    os.close(status_write)
    return Daemon(pid, request_write, status_read)


def run_foreground(load: Loader, request: MountRequest, announce: Callable[[], None]) -> None:
    """Serve `request` in this process until it is unmounted or told to end; `announce` is called when it is
    usable.

    Raises LayerfsError."""
    stderr = _CapturedStderr(keep=True)

    def ready() -> None:
        stderr.restore()
        if request.log is not None:
            log = _open_log(request.log)
            os.dup2(log, 2)
            os.close(log)
        from layerfs.fdutil import stand_in_proc

        stand_in_proc()
        announce()

    try:
        _serve(request, _load_quickly(load), ready)
    except LayerfsError:
        raise
    except Exception as error:
        raise _as_mount_error(error, stderr.text()) from error
    finally:
        stderr.restore()


# --- in the daemon --------------------------------------------------------------------------------


def _daemon_main(load: Loader, request_fd: int, status_fd: int) -> NoReturn:
    """Everything the child does. Never returns into the parent's code, never lets an exception out."""
    code = 1
    try:
        os.setsid()
        # The caller may read our stdout or stderr until its last holder is gone, and may have passed us more.
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        # Python's own streams may be missing or something else by now: a caller may have closed or replaced
        # them.
        sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
        low, high = sorted((request_fd, status_fd))
        os.closerange(3, low)
        os.closerange(low + 1, high)
        os.closerange(high + 1, os.sysconf("SC_OPEN_MAX"))
        code = _daemon(load, request_fd, status_fd, _CapturedStderr(keep=False))
    except BaseException:  # noqa: BLE001 - the last line of defence: there is nobody above
        code = 1
        _log_exception()
    finally:
        os._exit(code)


def _daemon(load: Loader, request_fd: int, status_fd: int, stderr: _CapturedStderr) -> int:
    import threading

    serve: Serve | None = None
    failure: Exception | None = None
    try:
        serve = _load_quickly(load)
    except Exception as error:  # noqa: BLE001 - reported once there is somebody who asked
        failure = error
    data = _read_exactly(request_fd, int.from_bytes(_read_exactly(request_fd, 8), "little"))
    if not data:
        return 0  # the parent found something wrong and said so
    request = MountRequest.decode(data)
    announced = False
    log = -1

    def ready() -> None:
        nonlocal announced
        from layerfs.fdutil import stand_in_proc  # not before the fork: the file system loads it anyway

        # From here on the caller's working directory is not ours to hold, and its stderr already is not.
        stand_in_proc()
        stderr.replace_by(log)
        announced = True
        _write_all(status_fd, _READY)
        os.close(status_fd)
        # The parent looks at the mount before it says "keep", so the loop must run meanwhile.
        threading.Thread(target=_end_unless_kept, args=(request_fd,), daemon=True).start()

    try:
        log = _open_log(request.log)
        if serve is None:
            raise failure or MountError("nothing to serve with")
        _serve(request, serve, ready)
        if not announced:
            raise MountError("ended before the mount was usable")
    except Exception as error:  # noqa: BLE001 - to the caller as one line, or to the log
        if announced:
            _log_exception()
            return 1
        if not isinstance(error, LayerfsError):
            _log_exception()
        if log >= 0:
            stderr.copy_to(log)
        mount_error = _as_mount_error(error, stderr.text())
        _write_all(
            status_fd, _FAILED + marshal.dumps((mount_error.exit_code, mount_error.errno, str(mount_error)))
        )
        return 1
    return 0


def _end_unless_kept(request_fd: int) -> None:
    """Whoever wanted this mount may be killed before it could tell anybody that it is there: then it is
    not.
    """
    import signal

    if os.read(request_fd, 1) != _KEEP:
        os.kill(os.getpid(), signal.SIGTERM)
    os.close(request_fd)


def _serve(request: MountRequest, serve: Serve, ready: Callable[[], None]) -> None:
    import resource
    import signal

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0)  # the kernel has applied the caller's
    # Killed between mounting and listening for these, `serve` would leave a dead mount: they wait until it is
    # ready, which is after it listens. Once the first was heard, a second must not kill it while it syncs: it
    # is dropped.
    ends = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_SETMASK, ends)
    handlers = [signal.signal(number, lambda *_: None) for number in ends]

    def ready_and_listening() -> None:
        ready()
        # All of them, whatever the caller had blocked.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    scratch = None
    try:
        config = request.config
        if request.ephemeral:
            from layerfs.runtime import ephemeral

            ephemeral.sweep()
            scratch, config = ephemeral.make(config)
        serve(config, request.mountpoint, set(request.fuse_options), ready_and_listening)
    finally:
        if scratch is not None:
            scratch.remove()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number, handler in zip(ends, handlers, strict=True):
            signal.signal(number, handler)


def _load_quickly(load: Loader) -> Serve:
    """Import the file system. The slowest step of a mount, so no garbage is collected meanwhile."""
    import gc

    gc.disable()
    try:
        serve = load()
    finally:
        gc.enable()
    gc.freeze()
    return serve


def _open_log(path: str | None) -> int:
    """Descriptor for what the daemon says. Raises MountError."""
    target = os.devnull if path is None else path
    try:
        return os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise MountError(f"log file {target}: {os.strerror(error.errno or 0)}", error.errno) from None


def _as_mount_error(error: Exception, said: str) -> LayerfsError:
    """`error` as one line; what libfuse or fusermount3 `said` on stderr is the better reason where there is
    one.
    """
    while (
        isinstance(error, ExceptionGroup) and len(error.exceptions) == 1
    ):  # what a trio nursery makes of one error
        error = error.exceptions[0]
    reasons = [line.strip() for line in said.splitlines() if line.startswith(_REASONS)]
    if isinstance(error, LayerfsError):
        if reasons and isinstance(error, MountError):
            wrapped = MountError(f"{error} ({reasons[-1]})", error.errno)
            wrapped.exit_code = error.exit_code
            return wrapped
        return error
    if reasons:
        return MountError(f"cannot mount: {reasons[-1]}")
    if isinstance(error, ImportError):
        return MountError(f"cannot load the file system: {error}")
    if isinstance(error, OSError) and error.errno:
        where = f": {os.fsdecode(error.filename)}" if error.filename else ""
        return MountError(f"{os.strerror(error.errno)}{where}", error.errno)
    return MountError(f"internal error: {type(error).__name__}: {error}")


def _log_exception() -> None:
    """The traceback, to stderr: the log, or nowhere."""
    import traceback

    traceback.print_exc()
    _flush()


class _CapturedStderr:
    """Descriptor 2 turned into memory until it is restored or replaced."""

    def __init__(self, *, keep: bool) -> None:
        """`keep`: so that `restore` can give it back."""
        _flush()
        self._saved: int | None = None
        if keep:
            try:
                self._saved = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
            except OSError:
                pass  # the caller closed it
        self._memory = _above_stderr(os.memfd_create("layerfs-stderr", os.MFD_CLOEXEC))
        os.dup2(self._memory, 2)
        self._captured = True

    def text(self) -> str:
        _flush()
        try:
            size = os.fstat(self._memory).st_size
            return os.pread(self._memory, min(size, 1 << 16), 0).decode(errors="replace")
        except OSError:
            return ""

    def copy_to(self, fd: int) -> None:
        os.write(fd, self.text().encode())

    def restore(self) -> None:
        """Give stderr back to whoever had it."""
        if not self._captured:
            return
        self._captured = False
        _flush()
        if self._saved is not None:
            os.dup2(self._saved, 2)
            os.close(self._saved)

    def replace_by(self, fd: int) -> None:
        """Point descriptors 1 and 2 to `fd` for good, what was captured first."""
        self.copy_to(fd)
        self._captured = False
        _flush()
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
        os.close(self._memory)
        if self._saved is not None:
            os.close(self._saved)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None: the caller closed the descriptor
            stream.flush()


def _above_stderr(fd: int) -> int:
    """`fd` moved out of the places of stdin, stdout and stderr, where it lands for a caller that closed
    these.
    """
    if fd > 2:
        return fd
    moved: int = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return moved


# --- pipes ----------------------------------------------------------------------------------------


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    return _above_stderr(read), _above_stderr(write)


def _write_all(fd: int, data: bytes) -> None:
    view: memoryview | bytes = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except BrokenPipeError:
        pass  # the reader is gone; the other pipe tells why


def _read_all(fd: int) -> bytes:
    pieces = []
    while piece := os.read(fd, 65536):
        pieces.append(piece)
    return b"".join(pieces)


def _read_exactly(fd: int, size: int) -> bytes:
    """`size` bytes; empty when the writer went away before."""
    data = b""
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        if not piece:
            return b""
        data += piece
    return data
