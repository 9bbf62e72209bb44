"""lstat of names that are there and of names that are not: cold and warm, and at 1 to 128 layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..caches import drop_all, drop_names
from ..contenders import Contender
from ..measures import Sizes
from ..rounds import Bench
from ..stacks import Stack
from .group import Group

_WHAT = {"present": "stat", "absent": "absent names"}


class Stat(Group):
    """Start-up, too: its mounts are those of the first jobs."""

    name = "stat"

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        count = len(stack.contents)
        for which, what in _WHAT.items():
            with bench.place(contender, stack) as place:
                if which == "present":
                    place.note_start_up()
                drop_names()
                for how in ("cold", "warm"):
                    title = f"{how} {what}, {count:,}"
                    place.time(f"{how}_{which}", title, count, partial(place.many, bench.many, "stat", which))


class Shapes(Group):
    """Two kinds of cold: names forgotten, every round; and all caches, once."""

    name = "shapes"

    def rounds(self, sizes: Sizes) -> int:
        return sizes.slow_rounds

    def stacks(self, sizes: Sizes) -> Sequence[str]:
        return [f"{shape} {count}" for shape in ("wide", "deep") for count in sizes.shape_layers]

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        shape = stack.base.name.partition("-")[0]
        layers = f"{stack.count} layer{'s' * (stack.count > 1)}"
        for which, what in _WHAT.items():
            with bench.place(contender, stack) as place:
                take = partial(place.many, bench.many, "stat", which)
                drop_names()
                key, title = f"{shape}_{which}_{stack.count}", f"{shape}, cold {what}, {layers}"
                place.time(key, title, len(stack.contents), take)
                if place.first_round:
                    drop_all()
                    place.time(f"{key}_disk", f"{title}, from disk", len(stack.contents), take)
