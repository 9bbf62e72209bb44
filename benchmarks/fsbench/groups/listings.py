"""find -ls over a tree, ls -lU of one large directory."""

from __future__ import annotations

from ..caches import drop_names
from ..commands import BenchmarkError
from ..contenders import Contender
from ..place import Place
from ..rounds import Bench
from ..stacks import Stack
from .group import Group


class Find(Group):
    name = "find"

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        lines = len(stack.contents) + len(stack.directories) + 1
        with bench.place(contender, stack) as place:
            drop_names()
            for how in ("cold", "warm"):
                time_listing(
                    bench, place, f"{how}_find", f"{how} find -ls, {lines:,} names", lines, "find", "-ls"
                )


class Ls(Group):
    name = "ls"
    stack = "flat"

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        count = len(stack.contents)
        with bench.place(contender, stack) as place:
            drop_names()
            for how in ("cold", "warm"):
                title = f"{how} ls -lU of {count:,} names in one directory"
                time_listing(bench, place, f"{how}_ls", title, count + 1, "ls", "-lU", "all")


def time_listing(bench: Bench, place: Place, key: str, title: str, lines: int, *command: str) -> None:
    """Times a program that must print as many lines."""
    output = bench.scratch / "listing"

    def check() -> None:
        found = output.read_bytes().count(b"\n")
        if found != lines:
            raise BenchmarkError(f"{command[0]}: {found} lines in place of {lines}")

    place.time(key, title, lines, lambda: place.program(*command, output=output), check)
