"""Who a caller is and whether he was interrupted, asked of real processes and threads."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from layerfs.fuse.adapter import caller_of
from layerfs.vfs import caller as caller_module
from layerfs.vfs.caller import Caller, sees_callers
from tests.support.processes import eventually, spawn


def _caller(pid: int) -> Caller:
    return Caller(0, 0, pid)


@contextmanager
def held(setup: str = "") -> Iterator[int]:
    """Pid of a process that takes no signals because it is stopped, as one that waits for an answer takes
    none.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal, os\n{setup}\nprint('ready', flush=True)\nsignal.pause()"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGSTOP)
    assert eventually(lambda: "T" in _state(process.pid))
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]


def test_nothing_pending() -> None:
    with held() as pid:
        assert not _caller(pid).interrupted()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
def test_a_signal_waits(number: signal.Signals) -> None:
    with held() as pid:
        os.kill(pid, number)
        assert _caller(pid).interrupted()


def test_a_handled_signal_counts() -> None:
    with held("signal.signal(signal.SIGUSR1, lambda *_: None)") as pid:
        os.kill(pid, signal.SIGUSR1)
        assert _caller(pid).interrupted()


def test_a_blocked_signal_does_not() -> None:
    with held("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])") as pid:
        os.kill(pid, signal.SIGUSR1)
        assert not _caller(pid).interrupted()
        os.kill(pid, signal.SIGUSR2)
        assert _caller(pid).interrupted()


def test_an_ignored_signal_does_not() -> None:
    with held("signal.signal(signal.SIGUSR1, signal.SIG_IGN)") as pid:
        os.kill(pid, signal.SIGUSR1)
        assert not _caller(pid).interrupted()


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG])
def test_a_signal_that_does_nothing_does_not(number: signal.Signals) -> None:
    with held() as pid:
        os.kill(pid, number)
        assert not _caller(pid).interrupted()


def test_the_dead_are_interrupted() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert _caller(process.pid).interrupted()


def test_who_cannot_be_seen_is_not() -> None:
    assert not _caller(0).interrupted()


def test_oneself() -> None:
    assert not _caller(os.getpid()).interrupted()


# -- whose ids the request does not tell -------------------------------------------------------------


@contextmanager
def acting_as(uid: int, gid: int, groups: list[int]) -> Iterator[int]:
    """Pid of a process of root whose access to files is that of somebody else (setfsuid(2))."""
    libc = ctypes.CDLL(None)
    ready, done = os.pipe(), os.pipe()

    def wait() -> None:
        os.close(done[1])
        os.setgroups(groups)
        libc.setfsgid(gid)
        libc.setfsuid(uid)
        os.write(ready[1], b"x")
        os.read(done[0], 1)

    pid = spawn(wait)
    os.read(ready[0], 1)
    try:
        yield pid
    finally:
        for fd in (*ready, *done):
            os.close(fd)
        os.waitpid(pid, 0)


def test_what_the_kernel_does_not_tell() -> None:
    untold = 2**32 - 1
    pid = os.getpid()
    assert caller_of(untold, untold, pid, 0o22) == Caller(None, None, pid, 0o22)
    assert caller_of(0, 5, pid) == Caller(0, 5, pid)


def test_who_is_told_is_believed() -> None:
    """Whatever /proc says: it is what the kernel compared."""
    me = Caller(1234, 5678, os.getpid())
    assert me.is_one_of(0, 1234) and not me.is_one_of(os.geteuid())
    assert me.in_group(5678)
    assert not me.is_shown_trusted() and Caller(0, 0, 0).is_shown_trusted()


def test_who_is_not_told_is_asked_of_proc(root: None) -> None:
    with acting_as(1234, 5678, [77, 78]) as pid:
        who = Caller(None, None, pid)
        assert who.is_one_of(0, 1234) and not who.is_one_of(0)
        assert [gid for gid in (0, 77, 78, 1234, 5678) if who.in_group(gid)] == [77, 78, 5678]
    assert Caller(None, None, os.getpid()).is_one_of(0)


@pytest.mark.parametrize("pid", [0, 2**22 + 1])
def test_who_is_neither_told_nor_seen_is_nobody(pid: int) -> None:
    who = Caller(None, None, pid)
    assert not who.is_one_of(0, os.geteuid(), 65534)
    assert not who.in_group(0) and not who.in_group(65534)
    assert not who.is_shown_trusted() and not who.keeps_setid()


@pytest.mark.parametrize("words", [[], [b"0"], [b"0", b"0", b"0"], [b"0", b"0", b"0", b"x"]])
def test_a_line_of_proc_that_is_cut(words: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Caller, "_status", lambda self, field: words)
    assert not Caller(None, None, os.getpid()).is_one_of(0)


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        (b"194 0x7f00 0x7f00", False),  # listxattr
        (b"196 0x3 0x7f00", False),
        (b"465 0xffffff9c 0x7f00", False),  # listxattrat
        (b"1073742018 0x7f00 0x7f00", False),  # listxattr, x32
        (b"232 0x7f00 0x7f00", False),  # listxattr, i386
        (b"257 0xffffff9c 0x7f00", True),  # openat, which made kernel overlayfs copy up
        (b"-1 0x7f00 0x7f00", True),  # a thread of the kernel's
        (b"running", False),
        (b"", False),
    ],
)
def test_trusted_names_of_who_is_not_told(
    root: None, call: bytes, shown: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    x86_64 = frozenset((194, 195, 196, 465, 232, 233, 234))
    monkeypatch.setattr(caller_module, "_LISTS_XATTRS", x86_64)
    with acting_as(1234, 5678, []) as pid:
        stand_in = os.path.join(tmp_path, "syscall")
        with open(stand_in, "wb") as file:
            file.write(call)
        real = caller_module.proc_path
        monkeypatch.setattr(
            caller_module,
            "proc_path",
            lambda below: os.fsencode(stand_in) if below.endswith(b"/syscall") else real(below),
        )
        assert Caller(None, None, pid).is_shown_trusted() == shown
        assert not Caller(1234, 5678, pid).is_shown_trusted()


def test_trusted_names_on_a_machine_whose_calls_are_unknown(
    root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_module, "_LISTS_XATTRS", None)
    with acting_as(1234, 5678, []) as pid:
        assert not Caller(None, None, pid).is_shown_trusted()


def test_pids_of_another_namespace(root: None) -> None:
    """In a pid namespace whose /proc is the one of the namespace above, pids mean others."""
    assert sees_callers()
    code = "from layerfs.fuse.adapter import caller_of; print(caller_of(1, 2, 3).pid)"
    for options, pid in (([], "0"), (["--mount-proc"], "3")):
        done = subprocess.run(
            ["unshare", "--pid", "--fork", *options, sys.executable, "-c", code],
            capture_output=True,
            text=True,
        )
        assert (done.stdout.strip(), done.stderr) == (pid, ""), options


def test_whose_files_are_his(root: None) -> None:
    """Of whom it is not told, /proc says what he may: his own, all with CAP_FOWNER, in a user namespace those
    of its users."""
    with held() as administrator, held("os.setresuid(7, 7, 7)") as user:
        assert Caller(None, None, administrator).owns(5)
        assert Caller(None, None, user).owns(7) and not Caller(None, None, user).owns(5)
        assert not Caller(None, None, 0).owns(0)
    argv = ["unshare", "--user", "--map-root-user", sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as inside:
        assert inside.stdin is not None and inside.stdout is not None and inside.stdout.readline() == "\n"
        there = Caller(None, None, inside.pid)
        assert there.owns(0) and not there.owns(5)
        inside.stdin.write("\n")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls are x86_64's")
@pytest.mark.parametrize(
    ("number", "does"), [(92, True), (260, True), (1073741916, True), (1, False), (90, False), (-1, False)]
)
def test_who_changes_owners(number: int, does: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """(`tests/posix` has the real ones.)"""
    monkeypatch.setattr(Caller, "_call", lambda self: (number, b"0x0"))
    assert Caller(0, 0, os.getpid()).changes_owner() is does


def test_whether_one_changes_owners_that_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Caller(0, 0, 0).changes_owner() is None

    def hidden(self: Caller) -> tuple[int, bytes]:
        raise PermissionError

    monkeypatch.setattr(Caller, "_call", hidden)
    assert Caller(0, 0, os.getpid()).changes_owner() is None
