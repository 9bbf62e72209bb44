"""What a hostile layer can cost: four times the members are four times the steps, whatever they do to each
other. Lines of layerfs that are run are counted, no time is taken.

A table that is searched for all that lies below a name makes it sixteen times, and a layer of some megabytes
hours."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import layerfs
from layerfs.errors import LayerError, TarError
from layerfs.oci import unpack
from layerfs.oci.apply import apply_layer
from layerfs.oci.flatten import FlatTree
from layerfs.oci.importing import import_tar
from layerfs.oci.member import Member
from layerfs.oci.streams import LayerSink, LayerSource
from layerfs.oci.supplement import make_supplement
from layerfs.oci.tally import Tally
from layerfs.oci.unpack import unpack_layer
from tests.oci import members as m
from tests.support.stack import scratch_root

Layer = list[tuple[Member, bytes]]
#: Linear is 4; sorting, or a level more of some table, is a little more.
_AT_MOST = 4.3
_FEW = 50
_HOME = os.path.dirname(layerfs.__file__)


# --- layers ---


def below(n: int) -> Layer:
    """What lies below: directories with a file of two names each."""
    return [
        entry
        for i in range(n)
        for entry in (m.file(b"below/%06d/f" % i, b"x"), m.hardlink(b"below/%06d/g" % i, b"below/%06d/f" % i))
    ]


def files(n: int, name: bytes = b"f%06d") -> Layer:
    return [m.file(name % i) for i in range(n)]


def links(n: int) -> Layer:
    return [m.hardlink(b"h%06d" % i, b"below/%06d/f" % i) for i in range(n)]


LAYERS: dict[str, Callable[[int], Layer]] = {
    "opaque directories": lambda n: files(n, b"d%06d/.wh..wh..opq"),
    "the root opaque again and again": lambda n: files(n) + [m.file(b".wh..wh..opq")] * n,
    "new directories between opaque marks": lambda n: [
        entry for i in range(n) for entry in (m.directory(b"d%06d" % i), m.file(b".wh..wh..opq"))
    ],
    "an own directory hidden again and again": lambda n: files(n, b"d/f%06d") + [m.file(b".wh.d")] * n,
    "a directory, a file, a directory beside many": lambda n: [
        *(m.directory(b"x%06d" % i) for i in range(n)),
        *(entry for i in range(n) for entry in (m.file(b"d/%06d" % i), m.file(b"d"), m.directory(b"d"))),
    ],
    "the same beside many whiteouts": lambda n: [
        *files(n, b"w/.wh.%06d"),
        *files(n, b"w/o%06d/.wh..wh..opq"),
        *(entry for _ in range(n) for entry in (m.file(b"d"), m.directory(b"d"))),
    ],
    "many names twice beside many whiteouts": lambda n: [
        *files(n, b"w/.wh.%06d"),
        *files(n, b"x%06d/f"),
        *files(n, b"x%06d/f"),
    ],
    "directories touched, then hidden": lambda n: [
        entry for i in range(n) for entry in (m.file(b"below/%06d/.wh.f" % i), m.file(b"below/.wh.%06d" % i))
    ],
    "a chain of hard links": lambda n: [
        m.hardlink(b"h000000", b"below/000000/f"),
        *(m.hardlink(b"h%06d" % i, b"h%06d" % (i - 1)) for i in range(1, n)),
    ],
    "a fan of hard links": lambda n: [m.hardlink(b"h%06d" % i, b"below/000000/f") for i in range(n)],
    "hard links to as many": links,
    "the same, and a name again and again": lambda n: links(n) + [m.file(b"z")] * n,
    "the same, and their partners hidden": lambda n: links(n) + files(n, b"below/%06d/.wh.f"),
    "whiteouts below a file": lambda n: [m.file(b"z"), *files(n, b"z/d/.wh.%06d")],
    "a name of many directories": lambda n: [m.file(b"deep/" * n + b"f")],
}


# --- ways ---


class Steps:
    """Counts the lines of layerfs that are run in it."""

    def __init__(self) -> None:
        self.taken = 0

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_HOME) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.taken += 1
        return self._line

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="work-", dir=scratch_root()))
    yield path
    subprocess.run(["rm", "-rf", str(path)], check=True)  # shutil.rmtree's stack grows with the depth


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def _lower(place: Path, lowest: Layer) -> Path:
    directory = place / "below"
    directory.mkdir()
    fd = _open(Path(m.layer_file(place / "below.tar", lowest)))
    apply_layer(fd, str(directory))
    os.close(fd)
    return directory


def applied(place: Path, lowest: Layer, layer: Layer) -> int:
    steps, target = Steps(), _lower(place, lowest)
    fd = _open(Path(m.layer_file(place / "layer.tar", layer)))
    with steps.counted():
        apply_layer(fd, str(target))
    os.close(fd)
    return steps.taken


def unpacked(place: Path, lowest: Layer, layer: Layer) -> int:
    """With its supplement."""
    steps, lower = Steps(), _lower(place, lowest)
    (place / "layer").mkdir()
    (place / "supplement").mkdir()
    fds = [_open(Path(m.layer_file(place / "layer.tar", layer))), _open(place / "layer")]
    fds.append(_open(place / "supplement"))
    with steps.counted(), LayerSource(fds[0], digests=True) as source:
        leaning = unpack_layer(source, fds[1]).leaning
        make_supplement(fds[2], str(place / "layer"), leaning, [str(lower)], None)
    for fd in fds:
        os.close(fd)
    return steps.taken


def joined(place: Path, lowest: Layer, layer: Layer) -> int:
    steps = Steps()
    with steps.counted():
        for layers, whole in (((lowest, layer), True), ((layer,), False)):
            tree = FlatTree(Tally(), whole=whole)
            for each in layers:
                tree.begin_layer()
                for member, _ in each:
                    tree.add(member)
            with contextlib.suppress(LayerError):  # a layer may lean on what it hides; the steps count
                for _ in tree.members():
                    pass
    return steps.taken


WAYS = {"apply": applied, "unpack": unpacked, "join": joined}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", LAYERS)
def test_four_times_the_members_are_four_times_the_steps(place: Path, what: str, way: str) -> None:
    taken = []
    for n in (_FEW, 4 * _FEW):
        lowest = [m.file(b"deep/" * n + b"g")] if "many directories" in what else below(n)
        (place / str(n)).mkdir()
        taken.append(WAYS[way](place / str(n), lowest, LAYERS[what](n)))
    assert taken[1] <= _AT_MOST * taken[0], taken


def test_importing(place: Path) -> None:
    """A flat tar has no whiteouts, and no name twice but directories."""
    taken = []
    for n in (_FEW, 4 * _FEW):
        steps = Steps()
        flat = [
            *below(n),
            *([m.directory(b"d")] * n),
            *(m.hardlink(b"h%06d" % i, b"below/%06d/f" % i) for i in range(n)),
            *(m.hardlink(b"i%06d" % i, b"i%06d" % (i - 1) if i else b"h000000") for i in range(n)),
        ]
        fd = _open(Path(m.layer_file(place / "flat.tar", flat)))
        with open(place / "out.tar", "wb") as out, LayerSink(out.fileno()) as sink, steps.counted():
            import_tar(LayerSource(fd), sink)
        os.close(fd)
        taken.append(steps.taken)
    assert taken[1] <= _AT_MOST * taken[0], taken


def test_a_directory_is_listed_once_for_all_that_hides_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = []

    def listdir(fd: int) -> list[str]:
        listed.append(fd)
        return real(fd)

    real = os.listdir
    layer = [
        *files(20, b"d/f%06d"),
        *([m.file(b".wh..wh..opq"), m.file(b".wh.d"), m.file(b"d/.wh..wh..opq")] * 50),
    ]
    target = _lower(place, below(3))
    fd = _open(Path(m.layer_file(place / "layer.tar", layer)))
    monkeypatch.setattr(os, "listdir", listdir)
    apply_layer(fd, str(target))
    os.close(fd)
    monkeypatch.undo()
    assert sorted(os.listdir(target)) == ["d"] and len(os.listdir(target / "d")) == 20
    # the root, `below` with 3 directories that goes with it; `d` is the layer's own from the beginning
    assert len(listed) == 5


def test_a_layer_that_leaves_too_many_names_to_others_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One member can imply 2,000 directories, whose names together take 4 MiB."""
    monkeypatch.setattr(unpack, "MAX_LEANING", 1 << 20)
    layer = [m.file(b"d/" * 1900 + b"f")]
    (place / "layer").mkdir()
    fd, directory = _open(Path(m.layer_file(place / "layer.tar", layer))), _open(place / "layer")
    with LayerSource(fd, digests=True) as source, pytest.raises(TarError, match="more than 1 MiB"):
        unpack_layer(source, directory)
    os.close(fd)
    os.close(directory)
