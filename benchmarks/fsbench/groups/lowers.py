"""Changes of what lies in lower layers: owners, names, removal, the first append to a large file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..caches import drop_names
from ..commands import BenchmarkError
from ..contenders import Contender
from ..measures import Sizes
from ..place import Place
from ..rounds import Bench
from ..stacks import Stack
from .group import Group

_APPENDED = b"one more\n"


class Lowers(Group):
    """Four jobs, cold, each on directories of its own: a sixth of the tree to chown, a twelfth to rename file
    by file, a twelfth to move as directories, a quarter to rm."""

    name = "lowers"

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        directories = sorted(stack.directories)
        n = len(directories) // 12
        owned, renamed, moved, removed = (
            directories[: 2 * n], directories[2 * n : 3 * n], directories[3 * n : 4 * n],
            directories[4 * n : 7 * n],
        )  # fmt: skip
        files = {name: len(_inside(stack, what)) for name, what in _named(owned, renamed, moved, removed)}
        with bench.place(contender, stack, own_disk=True) as place:
            drop_names()
            place.time(
                "chown", f"chown -R of {files['owned']:,} lower files", files["owned"],
                lambda: place.program("chown", "-R", "1234:1234", *owned),
                partial(_check_owners, place, owned),
            )  # fmt: skip
            drop_names()
            place.time(
                "rename", f"rename {files['renamed']:,} lower files", files["renamed"],
                lambda: place.work("rename", *(place.mnt / one for one in renamed)),
                partial(_check_renamed, place, renamed),
            )  # fmt: skip
            drop_names()
            (place.mnt / "there").mkdir()
            place.time(
                "move", f"mv of {n} lower directories, {files['moved']:,} files", n,
                lambda: place.program("mv", *moved, "there"),
                partial(_check_moved, place, moved),
            )  # fmt: skip
            drop_names()
            place.time(
                "rm", f"rm -r of {files['removed']:,} lower files", files["removed"],
                lambda: place.program("rm", "-r", *removed),
                partial(_check_removed, place, removed),
            )  # fmt: skip


def _named(*directories: list[str]) -> list[tuple[str, list[str]]]:
    return list(zip(("owned", "renamed", "moved", "removed"), directories, strict=True))


def _inside(stack: Stack, directories: list[str]) -> list[str]:
    wanted = set(directories)
    return [name for name in stack.contents if name.rpartition("/")[0] in wanted]


def _check_owners(place: Place, directories: list[str]) -> None:
    for name in [*directories, *_inside(place.stack, directories)]:
        found = (place.mnt / name).lstat()
        if (found.st_uid, found.st_gid) != (1234, 1234):
            raise BenchmarkError(f"{name}: owner {found.st_uid}:{found.st_gid} after chown")


def _check_renamed(place: Place, directories: list[str]) -> None:
    _check_contents(place, directories, lambda name: f"{name}.renamed")
    for name in directories:
        if any(not path.name.endswith(".renamed") for path in (place.mnt / name).iterdir()):
            raise BenchmarkError(f"{name}: an old name is still there")


def _check_moved(place: Place, directories: list[str]) -> None:
    _check_contents(place, directories, lambda name: f"there/{name}")
    _check_removed(place, directories)


def _check_removed(place: Place, directories: list[str]) -> None:
    for name in directories:
        if (place.mnt / name).exists():
            raise BenchmarkError(f"{name}: still there")


def _check_contents(place: Place, directories: list[str], now: Callable[[str], str]) -> None:
    for name in _inside(place.stack, directories):
        if (place.mnt / now(name)).read_bytes() != place.stack.contents[name]:
            raise BenchmarkError(f"{now(name)}: wrong content")


class Append(Group):
    """The lower file is in the page cache before; the copy goes to a disk of its own."""

    name = "append"
    stack = "big"

    def rounds(self, sizes: Sizes) -> int:
        return sizes.slow_rounds

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        lower = stack.layers / str(stack.count - 1) / "big"
        size = stack.others["big"]
        with bench.place(contender, stack, own_disk=True) as place:
            place.time(
                "append", f"first append to a {size >> 20} MiB lower file", 1,
                lambda: place.work("append", place.mnt / "big", _APPENDED.decode()),
                lambda: _check_appended(lower, place.mnt / "big"), unit="ms",
            )  # fmt: skip


def _check_appended(lower: Path, shown: Path) -> None:
    with open(lower, "rb") as before, open(shown, "rb") as after:
        while block := before.read(1 << 20):
            if after.read(len(block)) != block:
                raise BenchmarkError("big: what was there before the append has changed")
        if after.read() != _APPENDED:
            raise BenchmarkError("big: the append is not at its end")
    if lower.stat().st_size + len(_APPENDED) != shown.stat().st_size:
        raise BenchmarkError("big: wrong size after the append")
