"""A flat tar (a whole root, as `docker export` or tar make it) as the one layer of an image: every member
checked and written anew. Makes no image (`append` does).

The order of the archive is kept, so the archive may be a pipe and its data are in memory one piece at a time;
names and attributes are all remembered (`packed`), because a layer may not hold a path twice. What differs
from the archive is the form: pax, owners by number, no global headers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from layerfs.errors import TarError
from layerfs.oci.flatten import FlatTree, as_link, without_steering
from layerfs.oci.member import Kind, Mark, display
from layerfs.oci.plan import check_names, is_whiteout_device
from layerfs.oci.progress import Progress, Silent
from layerfs.oci.streams import LayerSink
from layerfs.oci.tally import Tally
from layerfs.oci.tarreader import Source, TarReader
from layerfs.oci.tarwriter import TarWriter

_CHUNK = 256 << 10


@dataclass(frozen=True, slots=True)
class Imported:
    members: int
    notes: tuple[str, ...]


def import_tar(source: Source, sink: LayerSink, progress: Progress | None = None) -> Imported:
    """Writes the flat tar in `source` to `sink`, which is not finished.

    Raises TarError for what a layer cannot hold or what is no flat tar, LayerError for too many names,
    OSError."""
    progress = progress or Silent()
    tally = Tally()
    notes: list[str] = []
    reader = TarReader(source, notes)
    writer = TarWriter(sink.write)
    tree = FlatTree(tally, whole=True)
    tree.begin_layer()
    members = 0
    for member in reader:
        if check_names(member)[0] is not Mark.ENTRY:
            raise TarError(
                f"member {display(member.name)} is a whiteout: this is a layer and no flat tar; "
                "`layerfs apply` takes layers"
            )
        member = without_steering(member, tally)
        before = tree.find(member.name) if member.kind is Kind.DIR else None
        if not tree.add(member):
            if member == before:
                tally.add("a directory that comes more than once: written once", member.name)
                continue
            raise TarError(
                f"member {display(member.name)} comes more than once, and a layer holds a path once: "
                "unpack the archive and pack it again"
            )
        if is_whiteout_device(member):
            continue
        if member.kind is Kind.HARDLINK and (joined := tree.find(member.target)) is not None:
            member = as_link(joined, member.name, member.target)
        writer.add(member, _chunks(reader, progress))
        members += 1
    writer.finish()
    return Imported(members, (*notes, *tally.lines()))


def _chunks(reader: TarReader, progress: Progress) -> Iterator[bytes]:
    while chunk := reader.read(_CHUNK):
        progress.advance(len(chunk))
        yield chunk
