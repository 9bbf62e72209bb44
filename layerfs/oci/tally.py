"""Notes of which there may be thousands: gathered by reason, the first name stands for all."""

from __future__ import annotations

from collections.abc import Iterator

from layerfs.oci.member import display

#: Reasons may quote what a stranger wrote: there may be as many as he likes.
_MAX_REASONS = 200


class Tally:
    def __init__(self) -> None:
        self._first: dict[str, tuple[bytes, int]] = {}

    def add(self, reason: str, name: bytes) -> None:
        if len(self._first) >= _MAX_REASONS and reason not in self._first:
            reason = "left out or changed for one more reason"
        first, count = self._first.get(reason, (name, 0))
        self._first[reason] = (first, count + 1)

    def lines(self) -> Iterator[str]:
        for reason, (name, count) in self._first.items():
            more = f" (and {count - 1} more)" if count > 1 else ""
            yield f"{display(name) or '.'}: {reason}{more}"
