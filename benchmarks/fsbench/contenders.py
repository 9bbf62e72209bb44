"""The file systems that are compared: how each is mounted and unmounted by its own command. Times nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .stacks import Stack

COMMAND_TIMEOUT = 60  # seconds; no mount or unmount that is well takes as long


class BenchmarkError(Exception):
    """A contender could not be mounted, or showed something wrong; str() is one line."""


def run(command: Sequence[str | Path], cwd: Path | None = None, timeout: float = COMMAND_TIMEOUT) -> str:
    """Standard output of a command that must succeed.

    Standard error goes to a file: a daemon may inherit it, and a pipe would then be waited on for ever."""
    with tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(
                [str(word) for word in command], cwd=cwd, timeout=timeout, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=errors, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"{command[0]}: no end after {timeout:.0f} s") from None
        except OSError as error:
            raise BenchmarkError(f"{command[0]}: {error.strerror}") from None
        if done.returncode != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["no message"]
            raise BenchmarkError(f"{Path(command[0]).name}: exit status {done.returncode}: {lines[-1]}")
        return done.stdout


class Contender:
    name: str

    def missing(self) -> str | None:
        """Why this one cannot be had here, or None."""
        raise NotImplementedError

    def version(self) -> str:
        raise NotImplementedError

    def mount_command(self, stack: Stack, upper: Path, work: Path, mnt: Path) -> list[str | Path]:
        """Run with `stack.layers` as current directory; returns when the mount is usable."""
        raise NotImplementedError

    def mount(self, stack: Stack, upper: Path, work: Path, mnt: Path) -> float:
        """Seconds from the start of the command until a file of the bottom layer has answered a stat."""
        for directory in (upper, work, mnt):
            directory.mkdir(parents=True)
        probe = mnt / next(reversed(stack.contents))
        command = self.mount_command(stack, upper, work, mnt)
        begin = time.perf_counter()
        run(command, cwd=stack.layers)
        probe.lstat()
        return time.perf_counter() - begin

    def unmount(self, mnt: Path) -> None:
        run(["umount", mnt])


class KernelOverlay(Contender):
    name = "kernel overlayfs"

    def missing(self) -> str | None:
        subprocess.run(["modprobe", "overlay"], stderr=subprocess.DEVNULL, check=False)
        if "\toverlay\n" not in Path("/proc/filesystems").read_text():
            return "this kernel has no overlayfs"
        return None

    def version(self) -> str:
        return f"Linux {os.uname().release}, default options"

    def mount_command(self, stack: Stack, upper: Path, work: Path, mnt: Path) -> list[str | Path]:
        options = f"lowerdir={':'.join(stack.names)},upperdir={upper},workdir={work}"
        return ["mount", "-t", "overlay", "overlay", "-o", options, mnt]


class FuseOverlayfs(Contender):
    name = "fuse-overlayfs"

    def __init__(self, command: str = "fuse-overlayfs") -> None:
        self.command = command

    def missing(self) -> str | None:
        return None if shutil.which(self.command) else "not installed (scripts/setup bench)"

    def version(self) -> str:
        lines = run([self.command, "--version"]).splitlines()
        return next((line.split(": ")[-1] for line in lines if line.startswith(self.name)), "unknown")

    def mount_command(self, stack: Stack, upper: Path, work: Path, mnt: Path) -> list[str | Path]:
        options = f"lowerdir={':'.join(stack.names)},upperdir={upper},workdir={work}"
        return [self.command, "-o", options, mnt]


class LayerFs(Contender):
    name = "layerfs"

    def __init__(self, command: str, options: str | None = None) -> None:
        self.command = command
        self.options = options

    def missing(self) -> str | None:
        return None if shutil.which(self.command) else f"no {self.command} (scripts/setup bench)"

    def version(self) -> str:
        return run([self.command, "--version"]).strip() + (f", -o {self.options}" if self.options else "")

    def mount_command(self, stack: Stack, upper: Path, work: Path, mnt: Path) -> list[str | Path]:
        command: list[str | Path] = [self.command, "mount"]
        for name in stack.names:
            command += ["--lower", name]
        if self.options:
            command += ["-o", self.options]
        return [*command, "--upper", upper, "--work", work, mnt]

    def unmount(self, mnt: Path) -> None:
        run([self.command, "umount", mnt])
