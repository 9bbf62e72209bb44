"""The file systems that are compared: how each is mounted and unmounted by its own command. Times nothing but
the mount."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from .commands import run
from .stacks import Stack


class Contender:
    name: str
    #: served by a daemon through /dev/fuse: its requests are counted, its daemon's memory is read
    fuse = True

    def missing(self) -> str | None:
        """Why this one cannot be had here, or None. That its options are taken shows only a mount."""
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
        probe = mnt / stack.probe
        command = self.mount_command(stack, upper, work, mnt)
        begin = time.perf_counter()
        run(command, cwd=stack.layers)
        probe.lstat()
        return time.perf_counter() - begin

    def unmount(self, mnt: Path) -> None:
        run(["umount", mnt])


def _version(command: str, name: str) -> str:
    """From the line that begins with the name: what libfuse says of itself may come first."""
    lines = run([command, "--version"]).splitlines()
    return next((line.split()[-1] for line in lines if line.startswith(name)), "unknown")


class KernelOverlay(Contender):
    fuse = False

    def __init__(self, options: str = "") -> None:
        self.name = "kernel overlayfs" + (f" {options}" if options else "")
        self.options = options

    def missing(self) -> str | None:
        if loader := shutil.which("modprobe"):  # small machines have none, and then no modules
            subprocess.run([loader, "overlay"], stderr=subprocess.DEVNULL, check=False)
        if "\toverlay\n" not in Path("/proc/filesystems").read_text():
            return "this kernel has no overlayfs"
        return None

    def version(self) -> str:
        return f"Linux {os.uname().release}, {self.options or 'default options'}"

    def mount_command(self, stack: Stack, upper: Path, work: Path, mnt: Path) -> list[str | Path]:
        options = f"lowerdir={':'.join(stack.names)},upperdir={upper},workdir={work}"
        if self.options:
            options += f",{self.options}"
        return ["mount", "-t", "overlay", "overlay", "-o", options, mnt]


class FuseOverlayfs(Contender):
    name = "fuse-overlayfs"

    def __init__(self, command: str = "fuse-overlayfs") -> None:
        self.command = command

    def missing(self) -> str | None:
        return None if shutil.which(self.command) else "not installed (scripts/setup bench)"

    def version(self) -> str:
        return _version(self.command, self.name)

    def mount_command(self, stack: Stack, upper: Path, work: Path, mnt: Path) -> list[str | Path]:
        options = f"lowerdir={':'.join(stack.names)},upperdir={upper},workdir={work}"
        return [self.command, "-o", options, mnt]


class UnionfsFuse(Contender):
    """Copies up, but knows neither the whiteouts nor the opaque directories of layers."""

    name = "unionfs-fuse"

    def missing(self) -> str | None:
        return None if shutil.which("unionfs") else "not installed (scripts/setup bench)"

    def version(self) -> str:
        return _version("unionfs", self.name)

    def mount_command(self, stack: Stack, upper: Path, work: Path, mnt: Path) -> list[str | Path]:
        branches = ":".join([f"{upper}=RW", *(f"{name}=RO" for name in stack.names)])
        return ["unionfs", "-o", "cow,allow_other,use_ino,suid,dev", branches, mnt]


class MergerFs(Contender):
    """Copies nothing up: what would change a lower layer is refused, because layers are sealed."""

    name = "mergerfs"

    def missing(self) -> str | None:
        return None if shutil.which("mergerfs") else "not installed (scripts/setup bench)"

    def version(self) -> str:
        return _version("mergerfs", self.name)

    def mount_command(self, stack: Stack, upper: Path, work: Path, mnt: Path) -> list[str | Path]:
        branches = ":".join([f"{upper}=RW", *(f"{name}=RO" for name in stack.names)])
        # The first branch that has a name, or that may be written; pages kept while a file has not changed.
        options = "allow_other,use_ino,suid,dev,minfreespace=0,cache.files=auto-full,category.create=ff"
        return ["mergerfs", "-o", options, branches, mnt]


class LayerFs(Contender):
    def __init__(self, command: str, options: str | None = None) -> None:
        self.name = f"layerfs {options}" if options else "layerfs"
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


#: What layerfs is mounted with besides its defaults. One that refuses them is left out, and reported.
LAYERFS_OPTIONS = ("gate=off,data=python", "gate=on,data=cached", "gate=on,data=passthrough")


def contenders(layerfs: str, fuse_overlayfs: str) -> Sequence[Contender]:
    """All of them; the first is what the others are compared with."""
    return (
        KernelOverlay(),
        KernelOverlay("redirect_dir=on,metacopy=on"),
        FuseOverlayfs(fuse_overlayfs),
        UnionfsFuse(),
        MergerFs(),
        LayerFs(layerfs),
        *(LayerFs(layerfs, options) for options in LAYERFS_OPTIONS),
    )
