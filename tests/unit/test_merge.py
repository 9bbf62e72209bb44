"""Merging directories of layers: whiteouts of every form, opaque marks, and what covers what."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerfs.overlay.names import TRUSTED, USER, XattrNames
from layerfs.stack import Entry, Merged, Stack, lower_directories, merge_directory

NAMES = XattrNames(TRUSTED if os.geteuid() == 0 else USER)


class Layers:
    """Layers made by hand, top first; `merge` merges the directory `at` of all of them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.paths: list[Path] = []

    def layer(self, **content: object) -> Path:
        """The next layer, below those made so far. Content: name -> bytes (file), dict (directory), or one
        of the marks below.
        """
        path = self.base / f"layer{len(self.paths)}"
        path.mkdir()
        self.paths.append(path)
        fill(path, content)
        return path

    def stack(self, *, upper: bool) -> Stack:
        paths = [str(path) for path in self.paths]
        return Stack(paths[1:], paths[0], NAMES) if upper else Stack(paths, None, NAMES)

    def merge(self, *, upper: bool = False) -> Merged:
        """Merges the layers' roots."""
        stack = self.stack(upper=upper)
        lowers = [(layer.root, layer.fd) for layer in stack.lowers]
        return merge_directory(stack.upper.fd if stack.upper else None, lowers, NAMES)

    def lowers_of(self, name: bytes, *, upper: bool = False) -> list[Path]:
        """The directories that make up the directory `name` of the root."""
        stack = self.stack(upper=upper)
        roots = tuple(layer.root for layer in stack.lowers)
        entry = self.merge(upper=upper).names[name]
        upper_fd = stack.upper.fd if stack.upper and entry.home is None else None
        found = lower_directories(stack, roots, name, entry.lowers, upper_fd)
        return [Path(each.layer.path) / os.fsdecode(each.path) for each in found]


DEVICE, XATTR = "a whiteout device", "a whiteout as xattr"


def fill(directory: Path, content: dict[str, object]) -> None:
    for name, what in content.items():
        path = directory / name
        if name == "OPAQUE":
            os.setxattr(directory, str(what), b"y")
        elif name == "X":
            os.setxattr(directory, NAMES.opaque, b"x")
        elif isinstance(what, dict):
            path.mkdir()
            fill(path, what)
        elif what == DEVICE:
            os.mknod(path, stat.S_IFCHR, 0)
        elif what == XATTR:
            path.touch()
            os.setxattr(path, NAMES.whiteout, b"y")
        else:
            assert isinstance(what, bytes)
            path.write_bytes(what)


@pytest.fixture
def layers(tmp_path: Path, root: None) -> Layers:
    return Layers(tmp_path)


def seen(merged: Merged) -> dict[bytes, tuple[int, bool]]:
    """name -> (index of the layer that holds it, is a directory); -1 is the upper."""
    return {
        name: (entry.home.layer.index if entry.home is not None else -1, entry.is_dir)
        for name, entry in merged.names.items()
    }


def test_the_first_layer_that_holds_a_name_decides(layers: Layers) -> None:
    layers.layer(a=b"top", b=b"top")
    layers.layer(b=b"middle", c=b"middle")
    layers.layer(a=b"bottom", c=b"bottom", d={})
    assert seen(layers.merge()) == {b"a": (0, False), b"b": (0, False), b"c": (1, False), b"d": (2, True)}


def test_entry_home(layers: Layers) -> None:
    """`home` is None for objects in the upper and for no others; `lower` says whether a lower layer shows
    the name.
    """
    layers.layer(mine=b"", both=b"", dir={}, only={})
    layers.layer(both=b"", dir={}, theirs=b"")
    names = layers.merge(upper=True).names
    assert {name: (entry.home is None, entry.lower) for name, entry in names.items()} == {
        b"mine": (True, False),
        b"only": (True, False),
        b"both": (True, True),
        b"dir": (True, True),
        b"theirs": (False, True),
    }
    for name, entry in names.items():
        layer = layers.paths[0 if entry.home is None else 1]
        assert entry.real == (layer / os.fsdecode(name)).stat().st_ino


WHITEOUTS = {
    "device": {"gone": DEVICE},
    "file": {".wh.gone": b""},
    "file with content": {".wh.gone": b"by a careless tool"},
    "xattr": {"X": True, "gone": XATTR},
}


@pytest.mark.parametrize("form", WHITEOUTS)
@pytest.mark.parametrize("below", [b"a file", {"a": b"directory"}], ids=["file", "directory"])
def test_a_whiteout_hides_what_is_below(layers: Layers, form: str, below: object) -> None:
    layers.layer(other=b"")
    layers.layer(**WHITEOUTS[form])
    layers.layer(gone=below, other=b"", stays=b"")
    assert seen(layers.merge()) == {b"other": (0, False), b"stays": (2, False)}


@pytest.mark.parametrize("form", WHITEOUTS)
def test_a_whiteout_does_not_hide_what_is_above(layers: Layers, form: str) -> None:
    layers.layer(gone=b"back again")
    layers.layer(**WHITEOUTS[form])
    layers.layer(gone=b"old")
    merged = layers.merge()
    assert seen(merged) == {b"gone": (0, False)}


@pytest.mark.parametrize("form", WHITEOUTS)
def test_a_directory_ends_at_a_whiteout(layers: Layers, form: str) -> None:
    layers.layer(gone={"new": b""})
    layers.layer(**WHITEOUTS[form])
    layers.layer(gone={"old": b""})
    assert layers.lowers_of(b"gone") == [layers.paths[0] / "gone"]


def test_a_file_beside_its_own_whiteout_is_seen(layers: Layers) -> None:
    layers.layer(**{".wh.a": b"", "a": b"of this layer", ".wh.d": b"", "d": {}})
    layers.layer(a=b"below", d={"below": b""})
    assert seen(layers.merge()) == {b"a": (0, False), b"d": (0, True)}
    assert layers.lowers_of(b"d") == [layers.paths[0] / "d"]


def test_marks_are_no_names(layers: Layers) -> None:
    layers.layer(
        **{".wh.a": b"", ".wh..wh..plnk": b"", ".wh.": b"", "X": True, "x": XATTR, "d": DEVICE, "kept": b""}
    )
    layers.layer(kept=b"")
    assert set(layers.merge().names) == {b"kept"}


def test_other_devices_are_no_whiteouts(layers: Layers) -> None:
    top = layers.layer()
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "block", stat.S_IFBLK | 0o600, 0)
    os.mkfifo(top / "fifo")
    layers.layer(null=b"", block=b"", fifo=b"")
    assert {layer for layer, _ in seen(layers.merge()).values()} == {0}


def test_an_xattr_whiteout_needs_its_directory_to_say_so_and_to_be_empty(layers: Layers) -> None:
    top = layers.layer(d=XATTR)
    layers.layer(d=b"")
    assert seen(layers.merge()) == {b"d": (0, False)}
    fill(top, {"X": True})
    assert seen(layers.merge()) == {}
    (top / "d").write_bytes(b"content")
    assert seen(layers.merge()) == {b"d": (0, False)}


def test_what_covers_what(layers: Layers) -> None:
    layers.layer(file_over_dir=b"", dir_over_file={"new": b""}, dir_over_link={})
    bottom = layers.layer(file_over_dir={"old": b""}, dir_over_file=b"")
    os.symlink("/etc", bottom / "dir_over_link")
    layers.layer(dir_over_file={"never": b""}, dir_over_link={"never": b""}, file_over_dir={"never": b""})
    assert seen(layers.merge()) == {
        b"file_over_dir": (0, False),
        b"dir_over_file": (0, True),
        b"dir_over_link": (0, True),
    }
    for name in (b"dir_over_file", b"dir_over_link"):
        assert layers.lowers_of(name) == [layers.paths[0] / os.fsdecode(name)]


OPAQUE = {
    "ours": {"OPAQUE": NAMES.opaque},
    "trusted": {"OPAQUE": "trusted.overlay.opaque"},
    "user": {"OPAQUE": "user.overlay.opaque"},
    "fuse-overlayfs": {"OPAQUE": "user.fuseoverlayfs.opaque"},
    "oci": {".wh..wh..opq": b""},
}


@pytest.mark.parametrize("form", OPAQUE)
def test_an_opaque_directory_ends_it(layers: Layers, form: str) -> None:
    layers.layer(d={"top": b""})
    layers.layer(d={"middle": b"", **OPAQUE[form]})
    layers.layer(d={"bottom": b""})
    assert layers.lowers_of(b"d") == [layers.paths[0] / "d", layers.paths[1] / "d"]


@pytest.mark.parametrize("form", ["ours", "oci"])
def test_an_opaque_upper_directory_has_nothing_below(layers: Layers, form: str) -> None:
    layers.layer(d={"top": b"", **OPAQUE[form]})
    layers.layer(d={"bottom": b""})
    assert layers.lowers_of(b"d", upper=True) == []


def test_other_values_of_opaque_mean_nothing(layers: Layers) -> None:
    top = layers.layer(d={})
    layers.layer(d={})
    for value in (b"x", b"n", b"", b"yes"):
        os.setxattr(top / "d", NAMES.opaque, value)
        assert len(layers.lowers_of(b"d")) == 2


def test_upper_whiteouts_are_known(layers: Layers) -> None:
    layers.layer(**{"a": DEVICE, ".wh.b": b"", "kept": b""})
    layers.layer(a=b"", b=b"", **{".wh.c": b""})
    merged = layers.merge(upper=True)
    assert merged.hides(b"a") and merged.hides(b"b")
    assert not merged.hides(b"c") and not merged.hides(b"kept")


# -- the law: one merge is the same as layer by layer ----------------------------------------------

_names = st.sampled_from(["a", "b", "c", "d"])
_what = st.sampled_from([b"file", "dir", DEVICE, ".wh.", XATTR])
_layer = st.fixed_dictionaries(
    {
        "opaque": st.sampled_from([False, False, False, True]),
        "x": st.booleans(),
        "names": st.dictionaries(_names, _what),
    }
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("merge")


def _by_hand(described: list[dict[str, object]]) -> dict[bytes, tuple[int, bool]]:
    """The rule as the specifications have it, one layer after the other from the bottom up."""
    tree: dict[bytes, tuple[int, bool]] = {}
    for index in range(len(described) - 1, -1, -1):
        layer = described[index]
        is_lowest = index == len(described) - 1
        if layer["opaque"]:
            tree = {}
        for name, what in layer["names"].items():  # type: ignore[attr-defined]
            key = name.encode()
            if what == DEVICE or what == ".wh." or (what == XATTR and layer["x"] and not is_lowest):
                tree.pop(key, None)
        for name, what in layer["names"].items():  # type: ignore[attr-defined]
            if what in (b"file", "dir") or (what == XATTR and not (layer["x"] and not is_lowest)):
                tree[name.encode()] = (index, what == "dir")
    return tree


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(described=st.lists(_layer, min_size=1, max_size=4))
def test_one_merge_is_the_same_as_layer_by_layer(
    root: None, bench: Path, described: list[dict[str, object]]
) -> None:
    base = bench / "run"
    base.mkdir()
    try:
        layers = Layers(base)
        for each in described:
            content: dict[str, object] = {}
            for name, what in each["names"].items():  # type: ignore[attr-defined]
                content.update(
                    {f".wh.{name}": b""} if what == ".wh." else {name: {} if what == "dir" else what}
                )
            if each["opaque"]:
                content[".wh..wh..opq"] = b""
            if each["x"]:
                content["X"] = True
            layers.layer(**content)
        assert seen(layers.merge()) == _by_hand(described)
    finally:
        shutil.rmtree(base)


def test_an_unreadable_layer_is_an_error_and_no_partial_answer(layers: Layers) -> None:
    layers.layer(a=b"")
    layers.layer(b=b"")
    stack = layers.stack(upper=False)
    gone = stack.lowers[1].root.child(b"not-there")
    with pytest.raises(OSError):
        merge_directory(None, [(stack.lowers[0].root, stack.lowers[0].fd), (gone, stack.open(gone))], NAMES)


def test_many_names_keep_small() -> None:
    assert not hasattr(Entry(None, 1, False), "__dict__")
