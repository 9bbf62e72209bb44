"""How long work tells how far it is. Shows nothing (`layerfs.cli.progress` does)."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """All amounts are bytes. Calls are cheap and may come for every file."""

    def total(self, size: int | None) -> None:
        """How much there is to do, as far as is known; None: unknown."""

    def advance(self, size: int) -> None:
        """So much more is done."""

    def describe(self, text: str) -> None:
        """What is being done; one line."""


class Silent:
    """Progress that nobody sees."""

    def total(self, size: int | None) -> None:
        pass

    def advance(self, size: int) -> None:
        pass

    def describe(self, text: str) -> None:
        pass
