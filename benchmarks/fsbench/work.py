"""Work that is timed and is no program of its own, and checks of what was made.

Run as a program (`python3 work.py NAME ARGUMENTS...`, prints seconds; a check prints nothing): a file system
that hangs then hangs a process that can be killed, and no job finds another one's heap."""

from __future__ import annotations

import gc
import os
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

FILES_PER_DIRECTORY = 100


def _data(number: int) -> bytes:
    return b"%06d " % number * 16


def _places(top: str, count: int) -> tuple[list[str], list[tuple[str, bytes]]]:
    directories = [f"{top}/{number:03}" for number in range(-(-count // FILES_PER_DIRECTORY))]
    files = [(f"{directories[n // FILES_PER_DIRECTORY]}/{n:06}", _data(n)) for n in range(count)]
    return directories, files


def create(top: str, count: int) -> float:
    """`count` files of 112 bytes, a hundred to a new directory."""
    directories, files = _places(top, count)
    begin = time.perf_counter()
    for directory in directories:
        os.mkdir(directory)
    for name, data in files:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, data)
        os.close(fd)
    return time.perf_counter() - begin


def check_created(top: str, count: int) -> None:
    for name, data in _places(top, count)[1]:
        with open(name, "rb") as file:
            if file.read() != data:
                raise SystemExit(f"{name}: not what was written")


def remove(top: str) -> float:
    """Everything that `create` made, in the order in which a listing gives it."""
    begin = time.perf_counter()
    for entry in list(os.scandir(top)):
        for file in list(os.scandir(entry.path)):
            os.unlink(file.path)
        os.rmdir(entry.path)
    return time.perf_counter() - begin


def check_empty(top: str) -> None:
    if os.listdir(top):
        raise SystemExit(f"{top}: names left after removing all")


def rename(directories: list[str]) -> float:
    """Every file of these directories gets another name where it is."""
    begin = time.perf_counter()
    for directory in directories:
        for name in os.listdir(directory):
            os.rename(f"{directory}/{name}", f"{directory}/{name}.renamed")
    return time.perf_counter() - begin


def append(path: str, text: str) -> float:
    begin = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, text.encode())
    os.close(fd)
    return time.perf_counter() - begin


def make_tar(path: Path, count: int) -> None:
    """`count` files of 0 to 16 KiB, twenty to a directory, each directory with a symlink and a hard link."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(count):
            directory = f"top/{number // 400:02}/{number // 20 % 20:02}"
            if number % 20 == 0:
                for name in ([f"top/{number // 400:02}"] if number % 400 == 0 else []) + [directory]:
                    member = tarfile.TarInfo(name)
                    member.type, member.mode, member.mtime = tarfile.DIRTYPE, 0o755, 1_000_000_000
                    tar.addfile(member)
            member = tarfile.TarInfo(f"{directory}/file{number % 20:02}")
            data = (_data(number) * 150)[: number * 997 % 16384]
            member.size, member.mode, member.mtime = len(data), 0o644, 1_000_000_000 + number
            tar.addfile(member, BytesIO(data))
            if number % 20 == 19:
                for kind, name in ((tarfile.SYMTYPE, "symlink"), (tarfile.LNKTYPE, "hardlink")):
                    member = tarfile.TarInfo(f"{directory}/{name}")
                    member.type, member.mode, member.mtime = kind, 0o777, 1_000_000_000
                    member.linkname = "file00" if kind == tarfile.SYMTYPE else f"{directory}/file00"
                    tar.addfile(member)


def check_untarred(top: str, archive: str) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            path = f"{top}/{member.name}"
            found = os.lstat(path)
            if member.isreg() and (found.st_size != member.size or int(found.st_mtime) != member.mtime):
                raise SystemExit(f"{path}: size or time differs from the archive's")
            if member.isreg() and int(member.name[-2:]) % 5 == 0:
                data = tar.extractfile(member)
                with open(path, "rb") as file:
                    if data is None or file.read() != data.read():
                        raise SystemExit(f"{path}: content differs from the archive's")
            if member.issym() and os.readlink(path) != member.linkname:
                raise SystemExit(f"{path}: wrong link")
            if member.islnk() and not os.path.samefile(path, f"{top}/{member.linkname}"):
                raise SystemExit(f"{path}: not the same file as {member.linkname}")


WORK: dict[str, Callable[[list[str]], float | None]] = {
    "create": lambda words: create(words[0], int(words[1])),
    "created": lambda words: check_created(words[0], int(words[1])),
    "remove": lambda words: remove(words[0]),
    "empty": lambda words: check_empty(words[0]),
    "rename": rename,
    "append": lambda words: append(words[0], words[1]),
    "untarred": lambda words: check_untarred(words[0], words[1]),
}

if __name__ == "__main__":
    gc.disable()
    print(WORK[sys.argv[1]](sys.argv[2:]) or "")
