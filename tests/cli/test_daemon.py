"""The daemon's side of starting, with file systems that fail in every way there is. Mounts nothing."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from layerfs.errors import BusyError, LayerfsError, MountError, UsageError
from layerfs.runtime import daemon as runtime
from layerfs.runtime.daemon import MountRequest, fork_daemon
from layerfs.vfs.config import StackConfig

Ready = Callable[[], None]


def request(tmp_path: Path, log: str | None = None) -> MountRequest:
    return MountRequest(
        config=StackConfig(lowers=("/ü\udcff", "/b"), upper="/u", work="/w", volatile=True),
        mountpoint=str(tmp_path),
        device_before=os.stat(tmp_path).st_dev,
        fuse_options=frozenset({"a", "b=1"}),
        log=log,
    )


def test_request_comes_back(tmp_path: Path) -> None:
    wanted = request(tmp_path, "/log")
    assert MountRequest.decode(wanted.encode()) == wanted


def raising(error: BaseException) -> Callable[..., None]:
    def serve(*_: object) -> None:
        raise error

    return serve


def said_by_c(text: str, error: BaseException) -> Callable[..., None]:
    def serve(*_: object) -> None:
        os.write(2, text.encode())
        raise error

    return serve


def exiting(code: int) -> Callable[..., None]:
    return lambda *_: os._exit(code)


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def threads_and_all(*_: object) -> None:
    assert os.getsid(0) == os.getpid()
    open_now = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
    raise MountError(f"open: {len(open_now)}")


@pytest.mark.parametrize(
    ("serve", "kind", "code", "said"),
    [
        (raising(MountError("a reason", errno.EACCES)), MountError, 1, "a reason"),
        (raising(UsageError("wrong")), LayerfsError, 2, "wrong"),
        (raising(BusyError("taken")), LayerfsError, 1, "taken"),
        (raising(OSError(errno.EIO, "x", "/some/file")), LayerfsError, 1, "Input/output error: /some/file"),
        (raising(ValueError("two\nlines")), LayerfsError, 1, "internal error: ValueError: two\nlines"),
        (
            raising(SystemExit(3)),
            LayerfsError,
            1,
            "the daemon ended before the mount was usable (exit code 1)",
        ),
        (
            raising(ExceptionGroup("nursery", [OSError(errno.EIO, "x")])),
            LayerfsError,
            1,
            "Input/output error",
        ),
        (
            said_by_c("fuse: nope\nfusermount3: no\n", RuntimeError("failed")),
            LayerfsError,
            1,
            "cannot mount: fusermount3: no",
        ),
        (said_by_c("fuse: nope\n", MountError("cannot mount")), LayerfsError, 1, "cannot mount (fuse: nope)"),
        (said_by_c("a warning\n", MountError("cannot mount")), LayerfsError, 1, "cannot mount"),
        (exiting(7), LayerfsError, 1, "the daemon ended before the mount was usable (exit code 7)"),
        (killed, LayerfsError, 1, "the daemon ended before the mount was usable (signal 9)"),
        (lambda *_: None, LayerfsError, 1, "ended before the mount was usable"),
        # 0, 1, 2, two pipes, the memory that stands for stderr, the log, the listing itself
        (threads_and_all, LayerfsError, 1, "open: 8"),
    ],
)
def test_what_fails_before_it_is_ready(
    tmp_path: Path, serve: Callable[..., None], kind: type[LayerfsError], code: int, said: str
) -> None:
    daemon = fork_daemon(lambda: serve)
    with pytest.raises(kind) as caught:
        daemon.start(request(tmp_path))
    assert str(caught.value).endswith(said) and caught.value.exit_code == code
    with pytest.raises(ProcessLookupError):
        os.kill(daemon.pid, 0)


def test_a_file_system_that_cannot_be_loaded(tmp_path: Path) -> None:
    def load() -> Callable[..., None]:
        raise ImportError("libfuse3.so.3: cannot open")

    daemon = fork_daemon(load)
    with pytest.raises(MountError, match=r"cannot load the file system: libfuse3"):
        daemon.start(request(tmp_path))


def test_ready_without_a_mount_is_found_out(tmp_path: Path) -> None:
    def serve(config: StackConfig, mountpoint: str, options: set[str], ready: Ready) -> None:
        ready()
        time.sleep(60)

    daemon = fork_daemon(lambda: serve)
    with pytest.raises(MountError, match="not visible"):
        daemon.start(request(tmp_path))
    with pytest.raises(ProcessLookupError):
        os.kill(daemon.pid, 0)


def test_a_daemon_that_is_not_needed_goes(tmp_path: Path) -> None:
    daemon = fork_daemon(lambda: raising(ValueError()))
    daemon.abandon()
    with pytest.raises(ProcessLookupError):
        os.kill(daemon.pid, 0)


def test_what_happens_after_ready_goes_to_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(config: StackConfig, mountpoint: str, options: set[str], ready: Ready) -> None:
        print("before", file=sys.stderr)
        ready()
        print("after", file=sys.stderr, flush=True)
        os.write(1, b"stdout\n")
        raise ValueError("late")

    monkeypatch.setattr("layerfs.runtime.mounts.verify", lambda *_: None)
    log = tmp_path / "log"
    daemon = fork_daemon(lambda: serve)
    daemon.start(request(tmp_path, str(log)))
    assert os.waitstatus_to_exitcode(os.waitpid(daemon.pid, 0)[1]) == 1
    text = log.read_text()
    assert text.startswith("before\nafter\nstdout\n") and text.endswith("ValueError: late\n")
    assert "Traceback" in text


def test_the_daemon_ends_when_its_caller_is_gone_before_keeping_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(config: StackConfig, mountpoint: str, options: set[str], ready: Ready) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        ready()
        time.sleep(60)

    monkeypatch.setattr("layerfs.runtime.mounts.verify", lambda *_: None)
    daemon = fork_daemon(lambda: serve)
    daemon.start(request(tmp_path))
    os.close(daemon._request_fd)
    daemon._request_fd = -1
    os.waitpid(daemon.pid, 0)


def test_the_foreground_gives_stderr_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    umask = os.umask(0)
    os.umask(umask)
    try:
        with pytest.raises(MountError, match=r"cannot mount: fuse: nope"):
            runtime.run_foreground(
                lambda: said_by_c("fuse: nope\n", RuntimeError("failed")), request(tmp_path), lambda: None
            )
    finally:
        os.umask(umask)
    os.write(2, b"mine again\n")
    assert capfd.readouterr().err == "mine again\n"
