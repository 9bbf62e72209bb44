"""A tar being read, with somebody who looks on. Reads and judges nothing itself."""

from __future__ import annotations

from collections.abc import Iterator

from layerfs.oci.member import Member
from layerfs.oci.progress import Progress, Silent
from layerfs.oci.streams import LayerSource
from layerfs.oci.tarreader import Contents, TarReader


class ToldReader(TarReader):
    """Tells `progress` how many of the layer's bytes were read, as they are stored: compressed ones."""

    def __init__(self, source: LayerSource, progress: Progress, contents: Contents | None) -> None:
        super().__init__(source, contents=contents)
        self._stored = source
        self._progress = progress
        self._told = source.raw_size

    def __iter__(self) -> Iterator[Member]:
        for member in super().__iter__():
            self._tell()
            yield member
        self._tell()

    def read(self, size: int) -> bytes:
        data = super().read(size)
        self._tell()
        return data

    def _tell(self) -> None:
        now = self._stored.raw_size
        if now != self._told:
            self._progress.advance(now - self._told)
            self._told = now


def reader(source: LayerSource, progress: Progress | None, contents: Contents | None = None) -> TarReader:
    """One that costs nothing where nobody looks. `contents` as for `TarReader`."""
    if progress is None or type(progress) is Silent:
        return TarReader(source, contents=contents)
    return ToldReader(source, progress, contents)
