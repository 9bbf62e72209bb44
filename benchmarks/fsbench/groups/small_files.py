"""Small files opened and read to the end; xattrs asked for, as a commit and `ls -l` do."""

from __future__ import annotations

from functools import partial
from itertools import islice

from ..caches import drop_names
from ..contenders import Contender
from ..rounds import Bench
from ..stacks import Stack
from .group import Group


class Read(Group):
    name = "read"

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        some = Stack(
            stack.base / "some", stack.count, dict(islice(stack.contents.items(), bench.sizes.small_files))
        )
        some.base.mkdir(exist_ok=True)
        some.write_lists()
        count = len(some.contents)
        with bench.place(contender, stack) as place:
            drop_names()
            for how in ("cold", "warm"):
                title = f"{how} open, fstat, read, close of {count:,} small files"
                place.time(f"{how}_read", title, count, partial(place.many, bench.many, "read", of=some))


class Xattr(Group):
    name = "xattr"

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        count = len(stack.contents)
        with bench.place(contender, stack) as place:
            drop_names()
            for how in ("cold", "warm"):
                title = f"{how} lstat, listxattr, getxattr of {count:,} files"
                place.time(f"{how}_xattr", title, count, partial(place.many, bench.many, "xattr"))
