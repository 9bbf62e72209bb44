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

_T = 1_234_567_890
OWNERS = [0, 1000] if os.geteuid() == 0 else [os.geteuid()]
Layer = list[tuple[Member, bytes]]


@pytest.fixture(autouse=True)
def made_up_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(_T))


def tree_of(layers: Sequence[Layer], *, whole: bool, tally: Tally | None = None) -> FlatTree:
    """The offsets given are indexes into the layers, so that `flat` finds the data."""
    tree = FlatTree(tally or Tally(), whole=whole, time_ns=_T * 10**9)
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
        "mtime_ns": st.sampled_from([0, 10**18 + 7]),
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
    max_size=7,
)
_stack = st.lists(_layer, max_size=4)
_settings = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


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
    return alone and (entry.type, entry.mode, entry.mtime_ns, entry.xattrs) == ("dir", 0o755, _T * 10**9, ())


@given(_stack, _stack)
@settings(_settings, max_examples=300)
def test_the_same_over_whatever_lies_below(place: Place, below: list[Layer], layers: list[Layer]) -> None:
    with tempfile.TemporaryDirectory(dir=place.path) as path:
        here = Place(Path(path))
        expected, known, unknown = (here.directory(name) for name in ("in turn", "known", "unknown"))
        below = [layer for layer in below if here.apply(expected, layer)]
        for layer in below:
            assert here.apply(known, layer) and here.apply(unknown, layer)
        under = snapshot(expected)
        layers = [layer for layer in layers if here.apply(expected, layer)]
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
