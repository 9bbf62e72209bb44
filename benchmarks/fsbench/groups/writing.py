"""New files: created, removed, unpacked from a tar."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..caches import drop_names
from ..contenders import Contender
from ..measures import Sizes
from ..rounds import Bench
from ..stacks import Stack
from ..work import make_tar
from .group import Group


class Create(Group):
    name = "create"

    def prepare(self, scratch: Path, sizes: Sizes) -> None:
        make_tar(scratch / "untar.tar", sizes.untarred)

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        made, unpacked, archive = bench.sizes.created, bench.sizes.untarred, bench.scratch / "untar.tar"
        with bench.place(contender, stack, own_disk=True) as place:
            drop_names()
            new, out, work = place.mnt / "new", place.mnt / "out", place.work
            for path in (new, out):
                path.mkdir()
            place.time(
                "create", f"create {made:,} small files", made, partial(work, "create", new, made),
                lambda: place.check("created", new, made),
            )  # fmt: skip
            place.time(
                "remove", f"remove {made:,} small files", made, partial(work, "remove", new),
                lambda: place.check("empty", new),
            )  # fmt: skip
            place.time(
                "untar", f"untar {unpacked:,} files", unpacked,
                lambda: place.program("tar", "-xf", archive, "-C", out),
                lambda: place.check("untarred", out, archive),
            )  # fmt: skip
