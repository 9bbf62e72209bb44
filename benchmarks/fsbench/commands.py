"""Commands of others: run, or run and timed. Knows nothing of file systems."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

COMMAND_TIMEOUT = 60  # seconds; no mount or unmount that is well takes as long

Command = Sequence[str | Path]


class BenchmarkError(Exception):
    """Something could not be had, could not be mounted, or showed something wrong; str() is one line."""


def run(
    command: Command,
    cwd: Path | None = None,
    timeout: float = COMMAND_TIMEOUT,
    env: Mapping[str, str] | None = None,
) -> str:
    """Standard output of a command that must succeed.

    Standard error goes to a file: a daemon may inherit it, and a pipe would then be waited on for ever."""
    with tempfile.TemporaryFile() as output:
        _run(command, output, cwd, timeout, env)
        output.seek(0)
        return output.read().decode(errors="replace")


def seconds(
    command: Command,
    cwd: Path | None = None,
    timeout: float = COMMAND_TIMEOUT,
    env: Mapping[str, str] | None = None,
    output: Path | None = None,
) -> float:
    """Wall time of a command that must succeed, its start included; what it says goes to `output` or
    nowhere."""
    with open(output or "/dev/null", "wb") as file:
        return _run(command, file, cwd, timeout, env)


def _run(
    command: Command,
    output: IO[bytes],
    cwd: Path | None,
    timeout: float,
    env: Mapping[str, str] | None,
) -> float:
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as errors:
        begin = time.perf_counter()
        try:
            process = subprocess.Popen(
                words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
            )
        except OSError as error:
            raise BenchmarkError(f"{words[0]}: {error.strerror}") from None
        # Popen.wait(timeout) looks every now and then, up to 50 ms late; this one wakes at once.
        limit = threading.Timer(timeout, process.kill)
        limit.start()
        try:
            status = process.wait()
            elapsed = time.perf_counter() - begin
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            limit.cancel()
        if status == -signal.SIGKILL and elapsed >= timeout:
            raise BenchmarkError(f"{words[0]}: no end after {timeout:.0f} s")
        if status != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise BenchmarkError(f"{Path(words[0]).name}: exit status {status}: {lines[-1]}")
        return elapsed
