"""Flattening: what one tar of several layers does to a directory is what the layers do, one after the other.
`apply` is the oracle; what it does itself is test_apply.py's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from layerfs.errors import LayerError, TarError
from layerfs.oci.apply import apply_layer
from layerfs.oci.flatten import FlatTree
from layerfs.oci.member import Kind, Member
from layerfs.oci.tally import Tally
from tests.oci import members as m
from tests.support.stack import scratch_root
from tests.support.tree import Snapshot, assert_equal, snapshot

OWNERS = [0, 1000] if os.geteuid() == 0 else [os.geteuid()]
Layer = list[tuple[Member, bytes]]


@pytest.fixture(autouse=True)
def made_up_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")  # as those of the layer cache


def tree_of(layers: Sequence[Layer], *, whole: bool, tally: Tally | None = None) -> FlatTree:
    """The offsets given are indexes into the layers, so that `flat` finds the data."""
    tree = FlatTree(tally or Tally(), whole=whole)
    for layer in layers:
        tree.begin_layer()
        for number, (member, _) in enumerate(layer):
            tree.add(member, number)
    return tree


def flat(
    layers: Sequence[Layer], *, whole: bool, below: Sequence[Layer] | None = None, tally: Tally | None = None
) -> Layer:
    """The one layer that these are."""
    tree = tree_of(layers, whole=whole, tally=tally)
    ask = None if below is None else lambda: tree_of(below, whole=True)
    return [
        (member, b"" if place is None else layers[place.layer][place.offset][1])
        for member, place in tree.members(ask)
    ]


class Place:
    """Directories to apply layers to, all of one time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def directory(self, name: str) -> Path:
        path = self.path / name
        path.mkdir()
        os.utime(path, (1, 1))
        return path

    def apply(self, target: Path, layer: Layer) -> bool:
        """False when the layer cannot be applied; the directory is as it was then."""
        fd = os.open(m.layer_file(self.path / "layer.tar", layer), os.O_RDONLY)
        try:
            apply_layer(fd, str(target))
        except TarError:
            return False
        finally:
            os.close(fd)
        return True


@pytest.fixture
def place() -> Iterator[Place]:
    path = Path(tempfile.mkdtemp(prefix="flatten-", dir=scratch_root()))
    yield Place(path)
    shutil.rmtree(path)


# --- random layers ---

_DIRS = [b"d", b"d/e", b"d/e/g", b"f"]
_LEAVES = [b"a", b"b", b"d/a", b"d/b", b"d/e/a", b"d/e/b", b"d/e/g/a", b"f/a"]
_attributes = st.fixed_dictionaries(
    {
        "mode": st.sampled_from([0o755, 0o700, 0o644]),
        "uid": st.sampled_from(OWNERS),
        "mtime_ns": st.sampled_from([1, 10**18 + 7]),
        "xattrs": st.sampled_from([{}, {}, {"user.k": b"v"}]),
    }
)
_file = st.builds(
    lambda name, data, more: m.file(name, data, **more),
    st.sampled_from(_LEAVES + _LEAVES + _DIRS),
    st.binary(max_size=3),
    _attributes,
)
_directory = st.builds(
    lambda name, more: m.directory(name, **more), st.sampled_from([b"", *_DIRS, *_DIRS, b"a"]), _attributes
)
_link = st.builds(m.link, st.sampled_from([b"a", b"d/b", b"f"]), st.sampled_from([b"d", b".."]))
_hardlink = st.builds(m.hardlink, st.sampled_from(_LEAVES), st.sampled_from(_LEAVES)).filter(
    lambda entry: entry[0].name != entry[0].target
)
_whiteout = st.builds(
    lambda path: m.file(b"/".join([*path.split(b"/")[:-1], b".wh." + path.split(b"/")[-1]])),
    st.sampled_from(_LEAVES + _DIRS),
)
_opaque = st.builds(
    lambda path: m.file((path + b"/" if path else b"") + b".wh..wh..opq"), st.sampled_from([b"", *_DIRS])
)
_fifo = st.builds(lambda name: (Member(name, Kind.FIFO), b""), st.sampled_from(_LEAVES))
_layer = st.lists(
    st.one_of(
        _file,
        _file,
        _directory,
        _directory,
        _hardlink,
        _hardlink,
        _whiteout,
        _whiteout,
        _opaque,
        _link,
        _fifo,
    ),
    max_size=8,
)
_stack = st.lists(_layer, max_size=3)
_settings = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def sensible(layers: Sequence[Layer], below: Sequence[Layer] = ()) -> list[Layer]:
    """The layers without the members that are refused: so that most examples get somewhere."""
    kept: list[Layer] = [*below]
    for layer in layers:
        kept.append([])
        for entry in layer:
            kept[-1].append(entry)
            try:
                tree_of(kept, whole=True)
            except TarError:
                kept[-1].pop()
    return kept[len(below) :]


def check_form(layer: Layer) -> None:
    """What the specification asks of a layer, and the order that ours have."""
    seen: dict[bytes, Kind] = {}
    for member, _ in layer:
        assert member.name not in seen, member
        seen[member.name] = member.kind
        if member.kind is Kind.HARDLINK and member.target in seen:
            assert seen[member.target] not in (Kind.DIR, Kind.HARDLINK)
    assert m.read_bytes(m.tar_bytes(layer)) == layer


@given(_stack)
@_settings
def test_applying_the_flat_layer_is_applying_each_in_turn(place: Place, layers: list[Layer]) -> None:
    with tempfile.TemporaryDirectory(dir=place.path) as path:
        here = Place(Path(path))
        expected = here.directory("in turn")
        accepted: list[Layer] = []
        for layer in layers:
            if here.apply(expected, layer):
                accepted.append(layer)
                continue
            with pytest.raises(TarError):
                tree_of([*accepted, layer], whole=True)
            (rest,) = sensible([layer], accepted)
            assert here.apply(expected, rest)
            accepted.append(rest)
        one = flat(accepted, whole=True)
        check_form(one)
        names = [member.name for member, _ in one]
        assert not [name for name in names if b".wh." in name]
        assert names == sorted(names, key=lambda name: name.split(b"/") if name else [])
        found = here.directory("flat")
        assert here.apply(found, one)
        assert_equal(snapshot(expected), snapshot(found), labels=("in turn", "flat"))


def is_made_up(tree: Snapshot, name: bytes) -> bool:
    """An empty directory as one that nobody named."""
    entry = tree[name]
    alone = not any(other.startswith(name + b"/") and not is_made_up(tree, other) for other in tree)
    return alone and (entry.type, entry.mode, entry.mtime_ns, entry.xattrs) == ("dir", 0o755, 0, ())


@given(_stack, _stack)
@settings(_settings, max_examples=150)
def test_the_same_over_whatever_lies_below(place: Place, below: list[Layer], layers: list[Layer]) -> None:
    with tempfile.TemporaryDirectory(dir=place.path) as path:
        here = Place(Path(path))
        expected, known, unknown = (here.directory(name) for name in ("in turn", "known", "unknown"))
        below = sensible(below)
        layers = sensible(layers, below)
        for layer in below:
            assert all(here.apply(target, layer) for target in (expected, known, unknown))
        under = snapshot(expected)
        for layer in layers:
            assert here.apply(expected, layer)
        try:
            one = flat(layers, whole=False, below=below)
        except LayerError as error:
            assert not isinstance(error, TarError), error
            links = {entry.target for layer in layers for entry, _ in layer if entry.kind is Kind.HARDLINK}
            assert links & under.keys()
            event("a hard link to what is hidden later")
            return
        check_form(one)
        assert here.apply(known, one)
        whole = snapshot(expected)
        assert_equal(whole, snapshot(known), labels=("in turn", "flat"))

        tally = Tally()
        assert here.apply(unknown, flat(layers, whole=False, tally=tally))
        found = snapshot(unknown)
        missing = whole.keys() - found.keys()
        if missing:
            event("an empty directory that nobody named")
            assert all(is_made_up(whole, name) for name in missing) and list(tally.lines())
        assert_equal(
            {name: whole[name] for name in whole.keys() - missing}, found, labels=("in turn", "flat")
        )


@given(_layer)
@_settings
def test_flattening_twice_changes_nothing(layer: Layer) -> None:
    for whole in (True, False):
        try:
            one = flat([layer], whole=whole)
        except LayerError:
            continue
        assert flat([one], whole=whole) == one


# --- one at a time ---


def told(layer: Layer) -> list[str]:
    """The layer in short: path, and what it is or where it leads."""
    words = {Kind.DIR: "/", Kind.HARDLINK: " -> ", Kind.FILE: "", Kind.SYMLINK: " @", Kind.FIFO: " |"}
    return [
        os.fsdecode(entry.name + words[entry.kind].encode() + entry.target + (b"=" + data if data else b""))
        for entry, data in layer
    ]


def test_the_first_name_that_is_left_becomes_the_file() -> None:
    below = [m.file(b"a", b"1", mode=0o600), m.hardlink(b"b", b"a"), m.hardlink(b"c", b"b")]
    assert told(flat([below, [m.file(b".wh.a")]], whole=True)) == ["b=1", "c -> b"]
    assert told(flat([below, [m.file(b"a", b"2")]], whole=True)) == ["a=2", "b=1", "c -> b"]
    assert told(flat([below, [m.hardlink(b"0", b"c"), m.file(b".wh.b")]], whole=True)) == [
        "0=1",
        "a -> 0",
        "c -> 0",
    ]
    (first, _), (second, _) = flat([below, [m.file(b".wh.a")]], whole=True)
    assert (first.kind, first.mode, second.kind) == (Kind.FILE, 0o600, Kind.HARDLINK)


def test_marks_are_kept_where_they_hide_something_below() -> None:
    one = [m.directory(b"d"), m.file(b"d/.wh..wh..opq"), m.file(b"d/n", b"1"), m.file(b"x"), m.file(b".wh.y")]
    two = [
        m.file(b".wh.x"),
        m.file(b"d/.wh.n"),
        m.directory(b"y"),
        m.file(b"s/.wh.t"),
        m.file(b"d/e/f", b"2"),
    ]
    assert told(flat([one, two], whole=False)) == [
        ".wh.x",
        "d/",
        "d/.wh..wh..opq",
        "d/e/",
        "d/e/f=2",
        "s/.wh.t",
        "y/",
        "y/.wh..wh..opq",
    ]
    assert told(flat([one, two], whole=True)) == ["d/", "d/e/", "d/e/f=2", "y/"]


def test_implied_directories_keep_the_attributes_below() -> None:
    one = [m.directory(b"d", mode=0o700), m.file(b"d/e/f")]
    two = [m.file(b"d/g")]
    assert told(flat([two], whole=False)) == ["d/g"]
    found = {entry.name: entry for entry, _ in flat([one, two], whole=True)}
    assert (found[b"d"].mode, found[b"d/e"].mode, found[b"d/e"].mtime_ns) == (0o700, 0o755, 0)


def test_a_directory_in_place_of_a_whiteout_is_new() -> None:
    below = [m.directory(b"d", mode=0o700), m.file(b"d/old")]
    new = ["d/", "d/.wh..wh..opq", "d/f=1"]
    for layers in (
        [[m.file(b".wh.d")], [m.file(b"d/f", b"1")]],
        [[m.file(b".wh.d"), m.file(b"d/f", b"1")]],
        [[m.file(b".wh.d")], [m.directory(b"d"), m.file(b"d/f", b"1")]],
        [[m.file(b"d")], [m.directory(b"d"), m.file(b"d/f", b"1")]],
    ):
        assert told(flat(layers, whole=False)) == new
        assert told(flat([below, *layers], whole=True)) == ["d/", "d/f=1"]
        assert {entry.mode for entry, _ in flat([below, *layers], whole=True)} == {0o755, 0o644}
    # the whiteout comes last: what it hides gives no attributes either
    late = [m.file(b"d/f", b"1"), m.file(b".wh.d")]
    assert [entry.mode for entry, _ in flat([below, late], whole=True)] == [0o755, 0o644]
    assert told(flat([late], whole=False)) == new


def test_nothing_is_put_into_what_was_replaced() -> None:
    for layer in (
        [m.file(b"d/x"), m.file(b"d"), m.file(b"d/y")],
        [m.file(b"d/e/x"), m.file(b"d"), m.file(b"d/e/y")],
        [m.file(b"d/x"), m.link(b"d", b"/etc"), m.hardlink(b"h", b"d/x")],
    ):
        for whole in (True, False):
            with pytest.raises(TarError, match=r"no directory|symbolic link"):
                flat([layer], whole=whole)
    again = [m.file(b"d/x"), m.file(b"d"), m.directory(b"d"), m.file(b"d/y")]
    assert told(flat([again], whole=True)) == ["d/", "d/y"]


def test_an_empty_directory_that_nobody_named_depends_on_what_is_below() -> None:
    layers = [[m.file(b"d/f")], [m.file(b"d/.wh.f")]]
    tally = Tally()
    assert told(flat(layers, whole=False, tally=tally)) == ["d/.wh.f"]
    assert [line.partition(":")[0] for line in tally.lines()] == ["d"]
    assert told(flat(layers, whole=False, below=[[m.directory(b"d")]])) == ["d/.wh.f"]
    assert told(flat(layers, whole=False, below=[[m.directory(b"e")]])) == ["d/", "d/.wh.f"]
    assert told(flat(layers, whole=True)) == ["d/"]


def test_hard_links_to_what_lies_below() -> None:
    link = [m.hardlink(b"n", b"d/p")]
    assert told(flat([link, [m.file(b"d/q")]], whole=False)) == ["d/q", "n -> d/p"]
    hiding = [m.file(name) for name in (b"d/.wh.p", b"d/p", b".wh.d", b"d/.wh..wh..opq", b"d/p/q")]
    for entry in (*hiding, m.directory(b"d/p")):
        with pytest.raises(LayerError, match="hard link n to d/p: that lies below the layers"):
            flat([link, [entry]], whole=False)
    # a whiteout below it says nothing of what it is
    assert told(flat([link, [m.file(b"d/p/.wh.q")]], whole=False)) == ["d/p/.wh.q", "n -> d/p"]
    with pytest.raises(TarError, match="that is a directory"):
        flat([[m.file(b"d/p/q")], link], whole=False)
    assert told(flat([link, [m.file(b"d/.wh.p"), m.file(b"n", b"1")]], whole=False)) == ["d/.wh.p", "n=1"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ([m.link(b"l", b"/etc"), m.file(b"l/x")], "behind a symbolic link"),
        ([m.link(b"l", b"/etc"), m.file(b"l/.wh.x")], "behind a symbolic link"),
        ([m.link(b"l", b"/etc"), m.file(b"l/.wh..wh..opq")], "behind a symbolic link"),
        ([m.link(b"l", b"d"), m.file(b"d/x"), m.hardlink(b"h", b"l/x")], "behind a symbolic link"),
        ([m.file(b"f"), m.file(b"f/x")], "no directory"),
        ([m.directory(b"d"), m.hardlink(b"h", b"d")], "that is a directory"),
        ([m.file(b"a"), m.file(b"d/.wh.a/b")], "below a whiteout"),
        ([m.directory(b".wh.a")], "no regular file"),
        ([m.file(b".wh.")], "nothing that can be named"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_refused_as_by_apply(place: Place, layer: Layer, message: str, whole: bool) -> None:
    assert not place.apply(place.directory("t"), layer)
    with pytest.raises(TarError, match=message):
        flat([layer[:-1], layer[-1:]], whole=whole)


def test_what_would_steer_a_merge_is_dropped_with_a_note() -> None:
    tally = Tally()
    layer = [
        m.directory(b"d", xattrs={"trusted.overlay.opaque": b"y", "user.mine": b"1"}),
        m.file(b"e", xattrs={"trusted.overlay.opaque": b"y"}),
        (Member(b"gone", Kind.CHAR, rdev=(0, 0)), b""),
        m.file(b".wh..wh.plnk"),
        m.file(b".wh..wh.orph/.wh.a"),
    ]
    found = flat([layer], whole=True, tally=tally)
    assert [(entry.name, entry.xattrs) for entry, _ in found] == [(b"d", {"user.mine": b"1"}), (b"e", {})]
    assert list(tally.lines()) == [
        "d: xattr trusted.overlay.opaque would steer a merge: dropped (and 1 more)",
        "gone: a character device 0/0, which would be a whiteout: dropped",
        ".wh..wh.plnk: book-keeping of AUFS: ignored (and 1 more)",
    ]


def test_too_much_to_remember_is_refused() -> None:
    def fill(entries: Layer) -> None:
        tree = FlatTree(Tally(), whole=True, max_held=1 << 20)
        tree.begin_layer()
        for member, _ in entries:
            tree.add(member)

    for entries in (
        [m.file(b"%d" % number) for number in range(8000)],
        [m.file(b"a", xattrs={"user.k": bytes(60_000)}) for _ in range(20)],
        [m.file(b"a/" * 2000 + b"%d/f" % number) for number in range(1500)],
        [m.file(b"%d" % number + b"/a" * 1000) for number in range(5)],
    ):
        with pytest.raises(LayerError, match="take more than 1 MiB"):
            fill(entries)


def test_names_and_numbers_of_all_sizes() -> None:
    """Whatever a layer can hold comes out as it went in."""
    layer = [
        m.file(b"\xff" * 255, b"1", uid=2**32 - 2, gid=2**32 - 2, mtime_ns=-(2**40) * 10**9 + 1, mode=0o7777),
        (Member(b"dev", Kind.BLOCK, rdev=(4095, 2**20 - 1), mtime_ns=2**40 * 10**9), b""),
        (Member(b"huge", Kind.FILE, size=16 << 40), b""),
        (Member(b"link", Kind.SYMLINK, 0o777, target=b"t" * 4095), b""),
    ]
    tree = tree_of([layer], whole=True)
    assert sorted((entry for entry, _ in tree.members()), key=lambda entry: entry.name) == sorted(
        (entry for entry, _ in layer), key=lambda entry: entry.name
    )
