"""Joining layer tarballs: the data of files find their names, whatever the layers are compressed with. The
rules of names are test_flatten.py's."""

from __future__ import annotations

import gzip
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfs.errors import LayerError, TarError, UsageError
from layerfs.oci.join import Joined, TarFile, join_layers
from layerfs.oci.member import Kind, Member
from layerfs.oci.packed import Place
from layerfs.oci.spool import Spool
from layerfs.oci.streams import COMPRESSIONS, LayerSink
from layerfs.oci.tarwriter import TarWriter
from tests.oci import members as m
from tests.oci.test_apply_evil import _CUT as CUT
from tests.oci.test_apply_evil import END, EVIL
from tests.oci.test_flatten import flat, made_up_time
from tests.support.mounts import mount, umount

__all__ = ["made_up_time"]  # a fixture for every test here
Layer = list[tuple[Member, bytes]]
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (a small file system)")


def join(paths: Sequence[Path], *, whole: bool = True, below: Sequence[Path] = ()) -> tuple[Layer, Joined]:
    with tempfile.TemporaryFile() as out:
        with LayerSink(out.fileno()) as sink:
            lower = [TarFile(str(path)) for path in below]
            joined = join_layers([TarFile(str(path)) for path in paths], sink, whole=whole, below=lower)
            sink.finish()
        out.seek(0)
        return m.read_bytes(out.read()), joined


def write(directory: Path, layers: Sequence[Layer], compressions: Sequence[str]) -> list[Path]:
    return [
        Path(m.layer_file(directory / f"{number}.tar", layer, compression))
        for number, (layer, compression) in enumerate(zip(layers, compressions, strict=True))
    ]


_names = st.sampled_from([b"a", b"b", b"d/a", b"d/b", b"e"])
_sizes = st.sampled_from([0, 1, 511, 512, 513, 70_000, 300_000])


@given(
    st.lists(
        st.tuples(st.lists(st.tuples(_names, _sizes), max_size=4), st.sampled_from(COMPRESSIONS)), max_size=4
    ),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=40)
def test_data_find_their_names(drawn: list[tuple[list[tuple[bytes, int]], str]], seed: int) -> None:
    random = Random(seed)
    layers = [[m.file(name, random.randbytes(size)) for name, size in files] for files, _ in drawn]
    with tempfile.TemporaryDirectory() as path:
        paths = write(Path(path), layers, [compression for _, compression in drawn])
        for whole in (True, False):
            assert join(paths, whole=whole)[0] == flat(layers, whole=whole)


@pytest.fixture
def spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; nothing may be left of them."""
    path = tmp_path / "spools"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    return path


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_layer_in_which_much_is_zero(tmp_path: Path, spools: Path, compression: str) -> None:
    layer = [
        m.file(b"a", bytes(3 << 20)),
        m.file(b"b", bytes(1 << 20) + b"1" + bytes(1 << 20)),
        m.file(b"c", b"2" + bytes(600_000)),
    ]
    assert join(write(tmp_path, [layer], [compression]))[0] == layer
    assert os.listdir(spools) == []


def test_only_what_needs_it_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompressed layers are read where they lie: there is no temporary file at all."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    layers = [[m.file(b"a", b"1")], [m.file(b"b", b"2")]]
    assert join(write(tmp_path, layers, ["none", "none"]))[0] == [m.file(b"a", b"1"), m.file(b"b", b"2")]
    with pytest.raises(LayerError, match=r"absent: No such file or directory; .* point TMPDIR"):
        join(write(tmp_path, layers, ["none", "gzip"]))


@root
def test_a_full_disk_is_one_line(tmp_path: Path, spools: Path) -> None:
    (path,) = write(tmp_path, [[m.file(b"a", os.urandom(4 << 20))]], ["gzip"])
    mount("none", spools, "tmpfs", data="size=1m")
    try:
        with pytest.raises(LayerError, match=r"layer 1 of 1: .*spools: No space left on device; .* TMPDIR"):
            join([path])
    finally:
        umount(spools)


def test_a_layer_from_a_pipe(tmp_path: Path, spools: Path) -> None:
    layer = [m.file(b"a", b"1" * 100_000), m.file(b"b", b"2")]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', *write(tmp_path, [layer], ["none"]), fifo]):
        # A pipe is opened once: /dev/stdin, as a shell gives it.
        fd = os.open(fifo, os.O_RDONLY)
        try:
            assert join([Path(f"/proc/self/fd/{fd}")])[0] == layer
        finally:
            os.close(fd)


def test_what_lies_below_is_read_only_where_it_matters(tmp_path: Path) -> None:
    layers = [[m.file(b"d/f")], [m.file(b"d/.wh.f")]]
    paths = write(tmp_path, layers, ["none", "none"])
    (lower,) = write(tmp_path / "..", [[m.file(b"x")]], ["none"])
    assert join(paths, whole=False, below=[lower])[0] == flat(layers, whole=False, below=[[m.file(b"x")]])
    assert join(paths[:1], whole=False, below=[tmp_path / "absent"])[0] == layers[0]
    with pytest.raises(UsageError, match="absent: No such file"):
        join(paths, whole=False, below=[tmp_path / "absent"])


def test_notes_and_the_last_one_counts(tmp_path: Path) -> None:
    layer = [m.file(b"a", b"1"), m.file(b"a", b"22"), m.directory(b"d"), m.directory(b"d", mode=0o700)]
    found, joined = join(write(tmp_path, [layer], ["gzip"]))
    assert found == [layer[1], layer[3]]
    assert joined.notes == ("a: is in a layer more than once: the last one counts (and 1 more)",)
    assert (joined.members, joined.root) == (2, False)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "end mark"),
        (m.tar_bytes([m.file(b"a", b"1" * 5000)])[:2000], "truncated"),
        (m.tar_bytes([m.file(b"a", b"1" * 5000)], "gzip")[:-9], "truncated|damaged"),
        (m.tar_bytes([m.file(b"a", b"1" * 5000)], "zstd")[:-9], "truncated|damaged"),
        (m.tar_bytes([m.link(b"l", b"/"), m.file(b"l/x")]), "behind a symbolic link"),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_bad_layers_are_named(tmp_path: Path, spools: Path, raw: bytes, message: str, number: int) -> None:
    paths = write(tmp_path, [[m.file(b"a")], [m.file(b"b")]], ["none", "gzip"])
    paths[number - 1].write_bytes(raw)
    with pytest.raises(TarError, match=rf"^layer {number} of 2: .*({message})"):
        join(paths)
    assert os.listdir(spools) == []


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("what", EVIL)
def test_evil_layers_are_refused_as_by_apply(
    tmp_path: Path, spools: Path, what: str, compression: str
) -> None:
    """As by apply: its table, over the layer that it has below. Nothing is written of what was refused."""
    raw, says = EVIL[what]
    below = [m.directory(b"d"), m.file(b"d/file"), m.link(b"out", b"../outside"), m.link(b"in", b"d")]
    paths = write(tmp_path, [below, below], ["none", "none"])
    raw += b"" if what in CUT else END
    paths[1].write_bytes(gzip.compress(raw) if compression == "gzip" else raw)
    out = tmp_path / "out"
    with (
        open(out, "wb") as file,
        LayerSink(file.fileno()) as sink,
        pytest.raises(TarError, match=says) as caught,
    ):
        join_layers([TarFile(str(path)) for path in paths], sink, whole=True)
    assert str(caught.value).startswith("layer 2 of 2: ") and "\n" not in str(caught.value)
    assert out.stat().st_size == 0 and os.listdir(spools) == []


@pytest.mark.parametrize(
    ("path", "message"), [("/", "Is a directory"), ("/proc/self/mem", "Input/output error")]
)
def test_what_cannot_be_read(tmp_path: Path, path: str, message: str) -> None:
    (good,) = write(tmp_path, [[m.file(b"a")]], ["none"])
    with pytest.raises(LayerError, match=rf"^layer 2 of 2: cannot be read: {message}$"):
        join([good, Path(path)])


def test_more_layers_than_descriptors(tmp_path: Path, spools: Path) -> None:
    layers = [
        [m.file(b"%04d" % number, b"%d" % number), m.file(b"last", b"%d" % number)] for number in range(600)
    ]
    paths = write(tmp_path, layers, ["none"] * len(layers))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, hard))
    try:
        found, _ = join(paths)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [*(layer[0] for layer in layers), layers[-1][1]]


def test_no_descriptor_is_left(tmp_path: Path, spools: Path) -> None:
    paths = write(tmp_path, [[m.file(b"a", b"1")], [m.file(b"b", b"2")]], ["none", "zstd"])
    join(paths)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        join(paths)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_spool_gives_back_what_it_got(spools: Path) -> None:
    pieces = [b"x", bytes(300_000), b"", b"y" * 300_000, bytes(5)]
    with Spool() as spool:
        spool.begin_layer(None)
        places = []
        for data in pieces:
            left = [data]
            places.append(Place(0, spool.keep(lambda size, left=left: left.pop() if left else b"")))
        spool.finish()
        order = [*range(len(pieces)), *reversed(range(len(pieces))), *([0, 1, 3] * 2)]
        for place, data in [(places[number], pieces[number]) for number in order]:
            assert b"".join(spool.read(place, len(data), b"f")) == data


_LIMITED = """
import resource, sys
from layerfs.oci.join import TarFile, join_layers
from layerfs.oci.streams import LayerSink
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
with open("/dev/null", "wb") as out, LayerSink(out.fileno()) as sink:
    join_layers([TarFile(path) for path in sys.argv[1:]], sink, whole=True)
    print(sink.finish().tar_size)
"""


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_memory_does_not_grow_with_data(tmp_path: Path, spools: Path, compression: str) -> None:
    """Two files of 300 MiB, in 400 MiB of address space."""
    path = tmp_path / "big.tar"

    def big() -> Iterator[bytes]:
        for _ in range(300):
            yield bytes(1 << 20)

    with open(path, "wb") as file, LayerSink(file.fileno(), compression) as sink:
        writer = TarWriter(sink.write)
        for name in (b"b", b"a"):
            writer.add(Member(name, Kind.FILE, size=300 << 20), big())
        writer.finish()
        sink.finish()
    done = subprocess.run([sys.executable, "-c", _LIMITED, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * (512 + (300 << 20)) + 1024


def test_the_hash_is_of_the_bytes(tmp_path: Path) -> None:
    """The sink that the caller gave says what was written."""
    (path,) = write(tmp_path, [[m.file(b"a", b"1")]], ["zstd"])
    out = tmp_path / "out"
    with open(out, "wb") as file, LayerSink(file.fileno(), "gzip") as sink:
        join_layers([TarFile(str(path))], sink, whole=True)
        written = sink.finish()
    assert written.digest == "sha256:" + hashlib.sha256(out.read_bytes()).hexdigest()
