"""Whether a waiting caller was interrupted, asked of real processes and threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from layerfs.vfs.caller import Caller
from tests.support.processes import eventually


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
