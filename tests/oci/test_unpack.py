"""Layers as directories of their own: merged, they are what applying the layers gives."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from layerfs.errors import TarError
from layerfs.oci.apply import apply_layer
from layerfs.oci.marking import Marks
from layerfs.oci.member import Kind, Member
from layerfs.oci.streams import LayerSource
from layerfs.oci.supplement import describe, make_supplement
from layerfs.oci.unpack import Leaning, Unpacked, unpack_layer
from layerfs.overlay.names import TRUSTED, XattrNames
from layerfs.stack import LowerDir, lower_directories, merge_directory
from layerfs.stack import Stack as Layers
from tests.oci import members as m
from tests.support.stack import scratch_root
from tests.support.tree import Entry, Snapshot, assert_equal, snapshot

Layer = list[tuple[Member, bytes]]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (owners, devices)")
_T = 1_500_000_000_123_456_789


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # the time of what nobody names, in both ways
    path = Path(tempfile.mkdtemp(prefix="unpack-", dir=scratch_root()))
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


@dataclass
class Stacked:
    """Layer directories, top first, and whether the root has been said to look somehow."""

    directories: list[str]
    root_named: bool = False


def fresh(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def unpack(directory: Path, layer: Layer, compression: str = "none") -> Unpacked:
    fd, tar = fresh(directory), os.open(m.layer_file(f"{directory}.tar", layer, compression), os.O_RDONLY)
    try:
        with LayerSource(tar, digests=True) as source:
            return unpack_layer(source, fd)
    finally:
        os.close(tar)
        os.close(fd)


def stack_up(place: Path, layers: Sequence[Layer]) -> Stacked:
    """As `cache` does it."""
    stacked = Stacked([])
    for number, layer in enumerate(layers):
        directory = place / f"layer{number}"
        unpacked = unpack(directory, layer)
        if unpacked.opaque_root:
            stacked.directories = []
        extra = place / f"extra{number}"
        fd = fresh(extra)
        root = None
        if not unpacked.root_named and stacked.root_named:
            root = describe(b"", os.fsencode(place / f"extra{number - 1}"), follow=True)
        used = make_supplement(fd, str(directory), unpacked.leaning, stacked.directories, root)
        os.close(fd)
        assert used == bool(set(snapshot(extra)) - {b"."})
        stacked.directories = [str(extra), str(directory), *stacked.directories]
        stacked.root_named |= unpacked.root_named
    return stacked


def merged(directories: Sequence[str]) -> Snapshot:
    """What the merge rules of layerfs make of layer directories."""
    layers = Layers(directories, None, XattrNames(TRUSTED))
    trees = [snapshot(path, hide_xattr=lambda name: b"overlay." in name) for path in directories]
    found = {b".": trees[0][b"."]}

    def walk(path: bytes, lowers: tuple[LowerDir, ...]) -> None:
        opened = [(lower, layers.open(lower)) for lower in lowers]
        for name, entry in merge_directory(None, opened, layers.names).names.items():
            here = path + name
            assert entry.home is not None
            found[here] = trees[entry.home.layer.index][
                entry.home.path + b"/" + name if entry.home.path else name
            ]
            if entry.is_dir:
                walk(here + b"/", lower_directories(layers, lowers, name, entry.lowers, None))

    walk(b"", tuple(layer.root for layer in layers.lowers))
    return with_seen_names(found)


def with_seen_names(tree: Snapshot) -> Snapshot:
    """Names that share an object, of those that are seen."""
    shared: dict[tuple[int, int], set[bytes]] = {}
    for name, entry in tree.items():
        if entry.type != "dir":
            shared.setdefault((entry.dev, entry.ino), set()).add(name)
    fields = [field for field in Entry.__dataclass_fields__ if field != "names"]

    def seen(name: bytes, entry: Entry) -> Entry:
        names = frozenset(shared.get((entry.dev, entry.ino), {name}))
        return Entry(**{field: getattr(entry, field) for field in fields}, names=names)

    return {name: seen(name, entry) for name, entry in tree.items()}


def check_law(place: Path, layers: Sequence[Layer]) -> list[str]:
    """To merge what was unpacked is to apply; a layer that one way refuses, the other refuses too."""
    target = place / "applied"
    target.mkdir(mode=0o755)
    os.utime(target, (0, 0))
    good = 0
    refused = False
    for number, layer in enumerate(layers):
        fd = os.open(m.layer_file(place / f"{number}.tar", layer), os.O_RDONLY)
        try:
            apply_layer(fd, str(target))
        except TarError:
            refused = True
            break
        finally:
            os.close(fd)
        good += 1
    stacked = stack_up(place, layers[:good])
    if stacked.directories:
        expected = snapshot(target, hide_xattr=lambda name: b"overlay." in name)
        assert_equal(expected, merged(stacked.directories), ignore=("nlink",), labels=("applied", "merged"))
    if refused and not replaces_its_own(layers[good]):
        (place / "again").mkdir()
        with pytest.raises(TarError):
            stack_up(place / "again", layers[: good + 1])
    return stacked.directories


def replaces_its_own(layer: Layer) -> bool:
    """What such a layer replaces or hides late was in the way of `apply`; it is not any more when the layer's
    directory is laid upon the others."""
    seen: list[bytes] = []
    links: list[bytes] = []
    for member, _ in layer:
        if any(member.name.startswith(link + b"/") for link in links):
            return True  # what the link joins may be known later only
        if member.kind is Kind.HARDLINK:
            links.append(member.name)
        directory, _, name = member.name.rpartition(b"/")
        gone = member.name
        if name == b".wh..wh..opq":
            gone = directory
        elif name.startswith(b".wh."):
            gone = directory + b"/" + name[4:] if directory else name[4:]
        inside = gone + b"/" if gone else b""
        if member.name in seen or gone in seen or any(name.startswith(inside) for name in seen):
            return True
        seen.append(member.name)
    return False


def test_attributes_and_the_result(place: Path) -> None:
    layer: Layer = [
        m.directory(b"", mode=0o751, uid=7, gid=8, mtime_ns=_T),
        m.directory(b"d", mode=0o2775, uid=1, gid=2, mtime_ns=_T + 1, xattrs={"user.d": b"1"}),
        m.file(b"d/f", b"hello", mode=0o4644, uid=1000, gid=1001, mtime_ns=_T, xattrs={"user.k": b"\0\xff"}),
        m.hardlink(b"d/h", b"d/f"),
        m.link(b"l", b"/nowhere"),
        (Member(b"null", Kind.CHAR, 0o666, rdev=(1, 3)), b""),
        m.file(b"x/y", b"1"),
    ]
    for compression in ("none", "gzip", "zstd"):
        result = unpack(place / compression, layer, compression)
        assert result.diff_id == m.write_to(os.open(os.devnull, os.O_WRONLY), layer).diff_id
        assert (result.members, result.root_named, result.opaque_root, result.notes) == (7, True, False, ())
        assert result.leaning == Leaning(implied=(b"x",))
        tree = snapshot(place / compression)
        assert set(tree) == {b".", b"d", b"d/f", b"d/h", b"l", b"null", b"x", b"x/y"}
        found = tree[b"d/f"]
        assert (found.mode, found.uid, found.gid, found.mtime_ns) == (0o4644, 1000, 1001, _T)
        assert found.names == {b"d/f", b"d/h"} and found.xattrs == ((b"user.k", b"\0\xff"),)
        assert (tree[b"."].mode, tree[b"d"].mode, tree[b"."].uid) == (0o751, 0o2775, 7)
        assert (tree[b"x"].mode, tree[b"x"].mtime_ns) == (0o755, 0)


def test_whiteouts_are_the_kernels(place: Path) -> None:
    layer: Layer = [
        m.directory(b"d"),
        m.file(b"d/.wh.gone"),
        m.directory(b"o"),
        m.file(b"o/own"),
        m.file(b"o/.wh..wh..opq"),
        m.file(b"o/.wh.inside"),
        m.directory(b"again"),
        m.file(b".wh.again"),
        m.file(b".wh.replaced"),
        m.file(b"replaced", b"new"),
        m.file(b".wh..wh.plnk/1.2"),
        (Member(b"gone", Kind.CHAR, rdev=(0, 0)), b""),
        m.directory(b"e", xattrs={"trusted.overlay.opaque": b"y", "user.fuseoverlayfs.opaque": b"y"}),
        m.file(b"loose/.wh.x"),
    ]
    result = unpack(place / "l", layer)
    tree = snapshot(place / "l")
    assert set(tree) == {b".", b"d", b"d/gone", b"o", b"o/own", b"again", b"replaced", b"e"}
    assert (tree[b"d/gone"].type, tree[b"d/gone"].rdev) == ("char", 0)
    opaque = ((b"trusted.overlay.opaque", b"y"),)
    assert (tree[b"o"].xattrs, tree[b"again"].xattrs, tree[b"e"].xattrs) == (opaque, opaque, ())
    assert result.leaning == Leaning(whiteouts=(b"loose/x",))
    assert len(result.notes) == 4


def test_leaning_on_what_is_below(place: Path) -> None:
    below: Layer = [
        m.directory(b"d", mode=0o700, uid=5, mtime_ns=_T, xattrs={"user.k": b"v"}),
        m.file(b"d/one", b"1", mode=0o600, mtime_ns=_T),
        m.hardlink(b"d/two", b"d/one"),
        m.directory(b"e", mode=0o711, mtime_ns=_T),
        m.file(b"e/gone"),
        m.file(b"e/kept"),
    ]
    layer: Layer = [
        m.file(b"d/new", b"2"),
        m.hardlink(b"linked", b"d/one"),
        m.file(b"e/.wh.gone"),
        m.file(b"absent/.wh.gone"),
    ]
    directories = check_law(place, [below, layer])
    extra = snapshot(directories[0])
    assert set(extra) == {b".", b"d", b"d/one", b"d/two", b"linked", b"e", b"e/gone"}
    assert extra[b"linked"].names == {b"linked", b"d/one", b"d/two"}


def test_links_to_one_file_by_several_of_its_names(place: Path) -> None:
    below: Layer = [m.file(b"d/one", b"1"), m.hardlink(b"d/two", b"d/one"), m.hardlink(b"three", b"d/one")]
    layer: Layer = [m.hardlink(b"h", b"d/one"), m.hardlink(b"i", b"d/two"), m.file(b"three", b"3")]
    extra = snapshot(check_law(place, [below, layer])[0])
    assert extra[b"h"].names == {b"h", b"i", b"d/one", b"d/two"}


def test_a_link_in_place_of_the_directory_of_its_partner(place: Path) -> None:
    layer: Layer = [m.hardlink(b"a/x", b"b"), m.hardlink(b"a", b"a/x")]
    extra = snapshot(check_law(place, [[m.file(b"b", b"1")], layer])[0])
    assert extra[b"a"].names == {b"a", b"b"}


@pytest.mark.parametrize(
    ("below", "layer"),
    [
        ([m.link(b"s", b"elsewhere")], [m.file(b"s/x")]),
        ([m.file(b"s")], [m.file(b"s/x")]),
        ([m.directory(b"d"), m.link(b"d/s", b"..")], [m.file(b"d/s/e/x")]),
        ([m.link(b"s", b"elsewhere")], [m.file(b"s/.wh.x")]),
        ([m.link(b"s", b"elsewhere")], [m.file(b"s/.wh..wh..opq")]),
        ([m.file(b"a")], [m.hardlink(b"b", b"c")]),
        ([m.file(b"a/x")], [m.hardlink(b"b", b"a")]),
        ([m.file(b"a/x"), m.link(b"s", b"a")], [m.hardlink(b"b", b"s/x")]),
        ([m.file(b"a")], [m.file(b".wh.a"), m.hardlink(b"b", b"a")]),
    ],
)
def test_refused_as_apply_refuses(place: Path, below: Layer, layer: Layer) -> None:
    assert len(check_law(place, [below, layer])) == 2, "the second one is refused"


def test_opaque_root_ends_the_stack(place: Path) -> None:
    directories = check_law(place, [[m.file(b"a")], [m.file(b"b"), m.file(b".wh..wh..opq")], [m.file(b"c")]])
    assert set(merged(directories)) == {b".", b"b", b"c"}


@pytest.mark.parametrize("marks", [Marks(False, None), Marks(True, "user.overlay.opaque")])
def test_every_form_of_marks(place: Path, marks: Marks, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are written where the better ones are not to be had."""
    monkeypatch.setattr(Marks, "probe", lambda directory: marks)
    below: Layer = [
        m.file(b"d/a"),
        m.file(b"d/b"),
        m.file(b"o/a"),
        m.directory(b"e", mode=0o700),
        m.file(b"e/a"),
    ]
    layer: Layer = [
        m.file(b"d/.wh.a"),
        m.directory(b"o"),
        m.file(b"o/.wh..wh..opq"),
        m.file(b"o/b"),
        m.file(b"e/.wh..wh..opq"),
    ]
    directories = check_law(place, [below, layer])
    tree = merged(directories)
    assert set(tree) == {b".", b"d", b"d/b", b"o", b"o/b", b"e"}
    forms = set(os.listdir(place / "layer1/o")) | set(os.listdir(place / "extra1/d"))
    assert (".wh.a" in forms, ".wh..wh..opq" in forms) == (not marks.device, marks.opaque is None)


_names = st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=3).map(b"/".join)


@st.composite
def _entries(draw: st.DrawFn, number: int) -> tuple[Member, bytes]:
    name = draw(_names)
    mtime = draw(st.integers(1, 9)) * 10**9
    uid = draw(st.sampled_from([0, 0, 5]))
    what = draw(st.sampled_from(["file", "file", "dir", "dir", "link", "hard", "white", "white", "opaque"]))
    directory, _, last = name.rpartition(b"/")
    inside = directory + b"/" if directory else b""
    if what == "file":
        return m.file(name, b"%d" % draw(st.integers(0, 99)), mtime_ns=mtime, uid=uid)
    if what == "dir":
        mode = draw(st.sampled_from([0o755, 0o700, 0o2711]))
        xattrs = draw(st.sampled_from([{}, {"user.k": b"%d" % number}]))
        root = draw(st.integers(0, 9)) == 0
        return m.directory(b"" if root else name, mode=mode, mtime_ns=mtime, uid=uid, xattrs=xattrs)
    if what == "link":
        return Member(name, Kind.SYMLINK, 0o777, mtime_ns=mtime, target=draw(_names)), b""
    if what == "hard":
        return m.hardlink(name, draw(_names.filter(lambda other: other != name)))
    if what == "white":
        return m.file(inside + b".wh." + last)
    return m.file(name + b"/.wh..wh..opq" if draw(st.booleans()) else inside + b".wh..wh..opq")


_layers = st.integers(0, 9).flatmap(lambda number: st.lists(_entries(number), max_size=6))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_layers, min_size=1, max_size=4))
@example([[m.file(b"a/b")], [m.file(b"a"), m.directory(b"a")]])
@example([[m.file(b"a/b")], [m.file(b".wh.a"), m.file(b"a/c")]])
@example([[m.file(b"a/b")], [m.file(b"a/c"), m.file(b".wh.a")]])
@example([[m.file(b"a"), m.file(b"a/a/.wh.a")]])
@example([[m.file(b"b/b/b")], [m.hardlink(b"b", b"b/b/b")]])
@example([[m.link(b"b/b/b", b"a")], [m.hardlink(b"b", b"b/b/b"), m.file(b"b/.wh.a")]])
@example([[m.file(b"a")], [m.hardlink(b"b", b"a"), m.directory(b"b")]])
def test_merging_is_applying(layers: list[Layer]) -> None:
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    here = Path(tempfile.mkdtemp(prefix="unpack-", dir=scratch_root()))
    try:
        check_law(here, layers)
    finally:
        del os.environ["SOURCE_DATE_EPOCH"]
        shutil.rmtree(here)


def test_full_disk_is_one_line(place: Path) -> None:
    from layerfs.errors import LayerError
    from tests.support.mounts import mount, umount

    (place / "t").mkdir()
    mount("none", place / "t", "tmpfs", data="size=1m")
    try:
        fd, tar = (
            fresh(place / "t/l"),
            os.open(m.layer_file(place / "l.tar", [m.file(b"big", os.urandom(2 << 20))]), os.O_RDONLY),
        )
        with LayerSource(tar, digests=True) as source:
            with pytest.raises(LayerError, match="No space left") as caught:
                unpack_layer(source, fd)
        assert "\n" not in str(caught.value)
        os.close(fd)
        os.close(tar)
        del caught
    finally:
        umount(place / "t")


def test_holes_and_big_files(place: Path) -> None:
    data = b"a" + bytes(1 << 20) + b"b" * (128 << 10) + bytes(256 << 10)
    unpack(place / "l", [m.file(b"f", data), m.file(b"z", bytes(1 << 20)), m.file(b"s", bytes(65536))])
    assert (place / "l/f").read_bytes() == data
    assert stat.S_ISREG((place / "l/z").stat().st_mode) and (place / "l/z").stat().st_blocks == 0
    assert (place / "l/s").read_bytes() == bytes(65536)
