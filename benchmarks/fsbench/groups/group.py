"""What a group of jobs is: jobs that are run together, in one mount or in several of the same stack."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..commands import BenchmarkError

if TYPE_CHECKING:
    from ..contenders import Contender
    from ..measures import Sizes
    from ..rounds import Bench
    from ..stacks import Stack


class Group:
    #: for `--jobs`
    name: str
    #: what it runs on; `stacks.MAKERS` knows how to make it unless `make` does
    stack = "mixed"
    #: takes minutes to prepare, so the short form leaves it out
    laborious = False

    def rounds(self, sizes: Sizes) -> int:
        return sizes.rounds

    def stacks(self, sizes: Sizes) -> Sequence[str]:
        return (self.stack,)

    def prepare(self, scratch: Path, sizes: Sizes) -> None:
        """Whatever comes before all rounds. Raises BenchmarkError where the jobs cannot be run here."""

    def make(self, base: Path, sizes: Sizes) -> Stack | None:
        """A stack that only this group knows, made at `base`; its name is `stack`."""
        return None

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        """One contender's turn in one round."""
        raise NotImplementedError


def lacking(*programs: str) -> None:
    """Raises BenchmarkError, which names the program that is not installed."""
    for program in programs:
        if not shutil.which(program):
            raise BenchmarkError(f"{program} is not installed (scripts/setup bench)")
