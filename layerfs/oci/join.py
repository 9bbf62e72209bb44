"""Reads layers, each once and front to back, and writes the one layer that they are. The rules are
`flatten`'s.

Memory grows with the number of members (`packed`), not with their data. Every layer is verified before the
first byte of the result is written.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from layerfs.errors import LayerError, UsageError
from layerfs.fdutil import OwnedFd
from layerfs.oci.flatten import FlatTree
from layerfs.oci.member import Kind, Member, display, made_up_time
from layerfs.oci.progress import Progress, Silent
from layerfs.oci.spool import Spool
from layerfs.oci.streams import LayerSink, LayerSource
from layerfs.oci.tally import Tally
from layerfs.oci.tarreader import TarReader
from layerfs.oci.tarwriter import TarWriter


class OpenLayer(Protocol):
    """A layer being read, as `image.OpenLayer` is one."""

    @property
    def source(self) -> LayerSource: ...

    @property
    def place(self) -> tuple[int, int]: ...

    def verify(self) -> None: ...

    def __enter__(self) -> OpenLayer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Layer(Protocol):
    """A layer of an image, as `image.ImageLayer` is one, or a tarball by itself."""

    def open(self) -> OpenLayer: ...


class TarFile:
    """A layer tarball that is in no image: nobody says what its digest should be."""

    def __init__(self, path: str) -> None:
        self._path = path

    def open(self) -> OpenLayer:
        """Raises UsageError, TarError."""
        return _OpenTar(OwnedFd(self.open_raw()))

    def open_raw(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"{display(os.fsencode(self._path))}: {error.strerror}") from None


class _OpenTar:
    def __init__(self, fd: OwnedFd) -> None:
        self._fd = fd
        regular = stat.S_ISREG(os.fstat(fd.fd).st_mode)
        self.place = (fd.fd, os.lseek(fd.fd, 0, os.SEEK_CUR) if regular else 0)
        self.source = LayerSource(fd.fd)

    def verify(self) -> None:
        self.source.drain()

    def __enter__(self) -> _OpenTar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.source.close()
        self._fd.close()


@dataclass(frozen=True, slots=True)
class Joined:
    """What was written. `root`: whether the result says what attributes the root has. `notes` are single
    lines."""

    members: int
    root: bool
    notes: tuple[str, ...]


def join_layers(
    layers: Sequence[Layer],
    sink: LayerSink,
    *,
    whole: bool,
    below: Sequence[Layer] = (),
    name_root: bool = False,
    progress: Progress | None = None,
) -> Joined:
    """Writes to `sink`, which is not finished, what `layers` (lowest first) are together.

    `whole`: nothing lies below them, so no whiteout is left; else `below` are the layers there, which are
    read only where the result depends on them. `name_root`: a root that no layer names is written as one of
    0755.
    Raises LayerError (TarError, ImageError) for what cannot be read or joined, OSError as the sink does."""
    progress = progress or Silent()
    tally = Tally()
    notes: list[str] = []
    with Spool() as spool:
        tree = FlatTree(tally, whole=whole, marks_ns=made_up_time() * 1_000_000_000)
        for number, layer in enumerate(layers, 1):
            progress.describe(f"reading layer {number} of {len(layers)}")
            try:
                _read(layer, tree, tally, notes, progress, spool)
            except LayerError as error:
                raise type(error)(f"layer {number} of {len(layers)}: {error}", error.errno) from None
        spool.finish()

        def tree_below() -> FlatTree:
            lower = FlatTree(Tally(), whole=True)
            for layer in below:
                _read(layer, lower, Tally(), [], Silent())
            return lower

        progress.describe("writing")
        writer = TarWriter(sink.write)
        members = 0
        if name_root and not tree.names_root:
            members += 1
            writer.add(Member(b"", Kind.DIR, 0o755))
        for member, place in tree.members(tree_below if below else None):
            members += 1
            writer.add(member, spool.read(place, member.size, member.name) if place is not None else ())
            progress.advance(member.size)
        writer.finish()
    return Joined(members, name_root or tree.names_root, (*notes, *tally.lines()))


class CountedSource:
    """A source that knows its position. What the system refuses is a LayerError: the caller writes as well,
    and could not tell whose OSError it has."""

    def __init__(self, source: LayerSource) -> None:
        self._source = source
        self.position = 0

    def read(self, size: int) -> bytes:
        try:
            data = self._source.read(size)
        except OSError as error:
            raise unreadable(error) from error
        self.position += len(data)
        return data

    def skip(self, size: int) -> bool:
        self.position += size
        try:
            return self._source.skip(size)
        except OSError as error:
            raise unreadable(error) from error


def unreadable(error: OSError) -> LayerError:
    """What to raise when a layer cannot be read."""
    return LayerError(f"cannot be read: {error.strerror}", error.errno)


def _read(
    layer: Layer,
    tree: FlatTree,
    tally: Tally,
    notes: list[str],
    progress: Progress,
    spool: Spool | None = None,
) -> None:
    """Puts a layer into `tree`, and its data into `spool`."""
    with _open(layer) as opened:
        source = CountedSource(opened.source)
        reader = TarReader(source, notes)
        in_place, start = _in_place(opened) if spool is not None and spool.has_room else (None, 0)
        if spool is not None:
            spool.begin_layer(in_place)
        tree.begin_layer()
        for member in reader:
            offset = start + source.position
            if spool is not None and in_place is None and member.size:
                offset = spool.keep(reader.read)
            if not tree.add(member, offset):
                tally.add("is in a layer more than once: the last one counts", member.name)
            progress.advance(member.size)
        opened.verify()


def _open(layer: Layer) -> OpenLayer:
    try:
        return layer.open()
    except OSError as error:
        raise unreadable(error) from error


def _in_place(opened: OpenLayer) -> tuple[OwnedFd | None, int]:
    """A descriptor of the layer's tar and the offset at which it begins, when it lies in a file as it is.

    Data are read there once more, after the layer was verified: so not where a stranger may change them."""
    fd, start = opened.place
    st = os.fstat(fd)
    if opened.source.compression != "none" or not stat.S_ISREG(st.st_mode):
        return None, 0
    if st.st_uid not in (0, os.geteuid()) or stat.S_IMODE(st.st_mode) & 0o022:
        return None, 0
    return OwnedFd(os.dup(fd)), start
