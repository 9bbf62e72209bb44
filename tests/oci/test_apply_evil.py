"""Hostile layers: each is refused in one line, or loses what it may not have, and nothing outside the target
changes.

The table is applied in both ways: from a file, which is read before anything is changed, and from a pipe,
where only the checks made while applying stand between the layer and the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerfs.errors import LayerError, TarError
from layerfs.oci.apply import apply_layer
from layerfs.oci.member import Kind, Member
from layerfs.oci.tarwriter import encode_header
from tests.support.stack import scratch_root
from tests.support.tree import assert_equal, snapshot


def raw_member(name: bytes, kind: Kind = Kind.FILE, data: bytes = b"", target: bytes = b"") -> bytes:
    """A member as the writer would never be asked to write it."""
    return encode_header(Member(name, kind, size=len(data), target=target)) + data + bytes(-len(data) % 512)


END = bytes(1024)
EVIL = {
    "dotdot at the root": (raw_member(b"/../outside/evil", data=b"x"), "'..'"),
    "dotdot behind a slash": (raw_member(b"//d/../../../tmp/layerfs-evil", data=b"x"), "'..'"),
    "dotdot": (raw_member(b"../outside/evil", data=b"x"), "'..'"),
    "dotdot inside": (raw_member(b"d/../../outside/evil", data=b"x"), "'..'"),
    "dotdot at the end": (raw_member(b"d/..", Kind.DIR), "'..'"),
    "dotdot directory": (raw_member(b"..", Kind.DIR), "'..'"),
    "through a symlink of the layer": (
        raw_member(b"s", Kind.SYMLINK, target=b"../outside") + raw_member(b"s/evil", data=b"x"),
        "symbolic link",
    ),
    "through an absolute symlink": (
        raw_member(b"s", Kind.SYMLINK, target=b"/tmp") + raw_member(b"s/evil", data=b"x"),
        "symbolic link",
    ),
    "through two symlinks": (
        raw_member(b"a", Kind.SYMLINK, target=b".")
        + raw_member(b"b", Kind.SYMLINK, target=b"a/../outside")
        + raw_member(b"b/evil"),
        "symbolic link",
    ),
    "directory behind a symlink": (
        raw_member(b"s", Kind.SYMLINK, target=b"../outside") + raw_member(b"s/evil", Kind.DIR),
        "symbolic link",
    ),
    "through a symlink below": (raw_member(b"out/evil", data=b"x"), "symbolic link"),
    "deep through a symlink below": (raw_member(b"out/a/b/evil", data=b"x"), "symbolic link"),
    "through a symlink to inside": (raw_member(b"in/evil", data=b"x"), "symbolic link"),
    "through a file": (raw_member(b"f") + raw_member(b"f/evil"), "no directory"),
    "through a file below": (raw_member(b"d/file/evil"), "no directory"),
    "hard link out": (raw_member(b"h", Kind.HARDLINK, target=b"../outside/secret"), "'..'"),
    "hard link to a path of this machine": (
        raw_member(b"h", Kind.HARDLINK, target=b"/etc/passwd"),
        "not there",
    ),
    "absolute through a symlink below": (raw_member(b"/out/evil", data=b"x"), "symbolic link"),
    "absolute whiteout through a symlink below": (raw_member(b"/out/.wh.secret"), "symbolic link"),
    "hard link to what AUFS kept": (
        raw_member(b".wh..wh.plnk/1.2", data=b"x")
        + raw_member(b"h", Kind.HARDLINK, target=b".wh..wh.plnk/1.2"),
        "AUFS",
    ),
    "hard link through a symlink": (
        raw_member(b"s", Kind.SYMLINK, target=b"../outside")
        + raw_member(b"h", Kind.HARDLINK, target=b"s/secret"),
        "symbolic link",
    ),
    "hard link through a symlink below": (
        raw_member(b"h", Kind.HARDLINK, target=b"out/secret"),
        "symbolic link",
    ),
    "hard link to nothing": (raw_member(b"h", Kind.HARDLINK, target=b"absent"), "not there"),
    "hard link to what it removed": (
        raw_member(b"d/.wh.file") + raw_member(b"h", Kind.HARDLINK, target=b"d/file"),
        "not there",
    ),
    "hard link to a directory": (raw_member(b"h", Kind.HARDLINK, target=b"d"), "directory"),
    "hard link to the root": (raw_member(b"h", Kind.HARDLINK, target=b"./"), "to itself or to the root"),
    "hard link to itself": (raw_member(b"h", Kind.HARDLINK, target=b"./h"), "to itself or to the root"),
    "write through a hard link to a symlink": (
        raw_member(b"h", Kind.HARDLINK, target=b"out") + raw_member(b"h/evil"),
        "symbolic link|no directory",
    ),
    "whiteout behind a hard link to a symlink": (
        raw_member(b"h", Kind.HARDLINK, target=b"out") + raw_member(b"h/.wh.secret"),
        "symbolic link",
    ),
    "whiteout of dotdot": (raw_member(b".wh..."), "whiteout of nothing"),
    "whiteout of dot": (raw_member(b"d/.wh.."), "whiteout of nothing"),
    "bare whiteout": (raw_member(b"d/.wh."), "whiteout of nothing"),
    "whiteout through dotdot": (raw_member(b"../outside/.wh.secret"), "'..'"),
    "whiteout with a slash": (raw_member(b".wh.d/file"), "below a whiteout"),
    "whiteout as a directory": (raw_member(b".wh.d", Kind.DIR), "no regular file"),
    "whiteout as a symlink": (raw_member(b".wh.d", Kind.SYMLINK, target=b"x"), "no regular file"),
    "whiteout through a symlink below": (raw_member(b"out/.wh.secret"), "symbolic link"),
    "whiteout through a symlink of the layer": (
        raw_member(b"s", Kind.SYMLINK, target=b"../outside") + raw_member(b"s/.wh.secret"),
        "symbolic link",
    ),
    "opaque through a symlink below": (raw_member(b"out/.wh..wh..opq"), "symbolic link"),
    "opaque through a symlink of the layer": (
        raw_member(b"s", Kind.SYMLINK, target=b"../outside") + raw_member(b"s/.wh..wh..opq"),
        "symbolic link",
    ),
    "replaced root": (raw_member(b"./", Kind.SYMLINK, target=b"../outside"), "root of a layer"),
    "name too long": (raw_member(b"n" * 300), "too long"),
    "path too long": (raw_member(b"n/" * 2100 + b"x"), "too long"),
    "good, then bad": (raw_member(b"good", data=b"x") + raw_member(b"../bad"), "'..'"),
    "good, then cut": (
        raw_member(b"good", data=b"x") + raw_member(b"cut", data=b"x" * 5000)[:1500],
        "truncated",
    ),
    "without an end": (raw_member(b"good", data=b"x"), "end mark"),
    "endless member": (
        encode_header(Member(b"big", Kind.FILE, size=1 << 62)) + b"x" * 2048,
        "more than any file",
    ),
    "claims more than there is": (
        encode_header(Member(b"big", Kind.FILE, size=1 << 40)) + b"x" * 2048,
        "truncated",
    ),
}
_CUT = {"good, then cut", "without an end", "claims more than there is"}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with `target` (to apply to) and `outside` (never to change)."""
    path = Path(tempfile.mkdtemp(prefix="evil-", dir=scratch_root()))
    (path / "outside").mkdir()
    (path / "outside/secret").write_text("secret")
    (path / "outside/dir").mkdir()
    fill(path / "target")
    yield path
    shutil.rmtree(path)


def fill(target: Path) -> None:
    """What is in the target before a layer comes: a file, a link to the outside and one to the inside."""
    shutil.rmtree(target, ignore_errors=True)
    (target / "d").mkdir(parents=True)
    (target / "d/file").write_text("below")
    os.symlink("../outside", target / "out")
    os.symlink("d", target / "in")


def run(raw: bytes, target: Path, *, piped: bool) -> None:
    if not piped:
        with tempfile.TemporaryFile() as file:
            file.write(raw)
            file.seek(0)
            apply_layer(file.fileno(), str(target))
        return
    read_fd, write_fd = os.pipe()

    def feed() -> None:
        with os.fdopen(write_fd, "wb") as pipe:
            try:
                pipe.write(raw)
            except BrokenPipeError:
                pass

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        apply_layer(read_fd, str(target))
    finally:
        os.close(read_fd)
        feeder.join()


@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
@pytest.mark.parametrize("what", EVIL)
def test_refused_and_nothing_outside_changed(place: Path, what: str, piped: bool) -> None:
    raw, says = EVIL[what]
    raw = raw + (b"" if what in _CUT else END)
    outside, target = snapshot(place / "outside"), snapshot(place / "target")
    with pytest.raises(TarError, match=says) as caught:
        run(raw, place / "target", piped=piped)
    assert "\n" not in str(caught.value)
    assert_equal(
        outside,
        snapshot(place / "outside"),
        strict=("ino", "ctime_ns") if "hard link" not in what else ("ino",),
    )
    assert "layerfs-evil" not in os.listdir("/tmp") and "evil" not in os.listdir("/tmp")
    if not piped:  # test_refused_before_the_first_change
        assert_equal(target, snapshot(place / "target"), strict=("ino", "ctime_ns"))
    else:
        assert not [name for name in snapshot(place / "target") if b".wh." in name], (
            "half-made things are left"
        )


def test_refused_before_the_first_change(place: Path) -> None:
    """Whatever the order: a file is read to its end, every member is judged with what those before it will
    have done."""
    good = raw_member(b"new", data=b"1") + raw_member(b"d/.wh.file") + raw_member(b"out", Kind.DIR)
    before = snapshot(place / "target")
    for bad in (
        "dotdot",
        "hard link to nothing",
        "through a file",
        "bare whiteout",
        "through a symlink to inside",
    ):
        with pytest.raises(TarError):
            run(good + EVIL[bad][0] + END, place / "target", piped=False)
        assert_equal(before, snapshot(place / "target"), strict=("ino", "ctime_ns"))


@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
def test_absolute_names_count_from_the_root_of_the_layer(place: Path, piped: bool) -> None:
    outside = snapshot(place / "outside")
    inside = os.fsencode(place / "outside/secret")
    raw = (
        raw_member(b"/etc/", Kind.DIR)
        + raw_member(b"//etc/layerfs-evil", data=b"x")
        + raw_member(b"linked", Kind.HARDLINK, target=b"/etc/layerfs-evil")
        + raw_member(inside, data=b"changed")
        + raw_member(b"/d/.wh.file")
    )
    run(raw + END, place / "target", piped=piped)
    tree = snapshot(place / "target")
    assert tree[b"etc/layerfs-evil"].names == {b"etc/layerfs-evil", b"linked"}
    assert (inside[1:] in tree, b"d/file" in tree) == (True, False)
    assert_equal(outside, snapshot(place / "outside"), strict=("ino", "ctime_ns"))
    assert not os.path.exists("/etc/layerfs-evil")


def test_a_symlink_that_the_layer_replaces_is_no_obstacle(place: Path) -> None:
    layers = [
        raw_member(b"out", Kind.DIR) + raw_member(b"out/f", data=b"1"),
        raw_member(b".wh.in") + raw_member(b"in/f", data=b"2"),
        raw_member(b"d/.wh.file") + raw_member(b"d/file/f", data=b"3"),
        raw_member(b"s", Kind.SYMLINK, target=b"../outside")
        + raw_member(b"s", Kind.DIR)
        + raw_member(b"s/f", data=b"4"),
        raw_member(b"t/x") + raw_member(b"t", Kind.SYMLINK, target=b"../outside") + raw_member(b".wh.t"),
    ]
    outside = snapshot(place / "outside")
    for raw in layers:
        run(raw + END, place / "target", piped=False)
    assert_equal(outside, snapshot(place / "outside"), strict=("ino", "ctime_ns"))
    tree = snapshot(place / "target")
    assert {name for name, entry in tree.items() if entry.type == "file"} == {
        b"out/f",
        b"in/f",
        b"d/file/f",
        b"s/f",
    }
    assert tree[b"t"].type == "symlink"


def test_removing_never_follows_links(place: Path) -> None:
    run(
        raw_member(b"x/y/z/s", Kind.SYMLINK, target=b"../../../../outside") + END,
        place / "target",
        piped=False,
    )
    outside = snapshot(place / "outside")
    run(
        raw_member(b".wh.x") + raw_member(b".wh.out") + raw_member(b".wh..wh..opq") + END,
        place / "target",
        piped=False,
    )
    assert_equal(outside, snapshot(place / "outside"), strict=("ino", "ctime_ns"))
    assert set(snapshot(place / "target")) == {b"."}


def test_an_endless_stream_is_given_up(place: Path) -> None:
    """A gzip bomb behind the end mark, and a member that never ends, on a pipe that never closes."""
    raw = raw_member(b"good") + END
    for endless in (raw, encode_header(Member(b"p", Kind.FILE, size=100 << 20))[:156] + b"x"):
        read_fd, write_fd = os.pipe()
        stop = threading.Event()

        def feed(first: bytes, fd: int = write_fd, stop: threading.Event = stop) -> None:
            try:
                os.write(fd, first)
                while not stop.is_set():
                    os.write(fd, bytes(1 << 16))
            except BrokenPipeError:
                pass
            finally:
                os.close(fd)

        feeder = threading.Thread(target=feed, args=(endless,))
        feeder.start()
        try:
            with pytest.raises(TarError):
                apply_layer(read_fd, str(place / "target"))
        finally:
            stop.set()
            os.close(read_fd)
            feeder.join()


def test_the_command_says_one_line(place: Path) -> None:
    for what, (raw, _) in list(EVIL.items())[:8]:
        layer = place / "layer.tar"
        layer.write_bytes(raw + END)
        done = subprocess.run(
            [sys.executable, "-m", "layerfs", "apply", str(layer), str(place / "target")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, what
        assert done.stdout == "" and len(done.stderr.splitlines()) == 1, what
        assert done.stderr.startswith(f"layerfs apply: {layer}: "), what


_pieces = st.sampled_from(
    [
        b"a",
        b"b",
        b"out",
        b"in",
        b"d",
        b"file",
        b"s",
        b"..",
        b".",
        b"",
        b".wh.a",
        b".wh.d",
        b".wh.out",
        b".wh..wh..opq",
        b".wh.",
    ]
)
_any_path = st.lists(_pieces, min_size=1, max_size=3).map(b"/".join)


@st.composite
def _any_member(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from(list(Kind)))
    target = draw(
        st.one_of(_any_path, st.sampled_from([b"../outside", b"../outside/secret", b"/", b"out", b"d"]))
    )
    return raw_member(draw(_any_path), kind, b"x" if kind is Kind.FILE else b"", target)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_any_member(), max_size=7), st.booleans(), st.booleans())
def test_no_layer_changes_anything_outside(place: Path, parts: list[bytes], piped: bool, fresh: bool) -> None:
    """Random hostile layers, one after the other on the same target. From a file: refused without a change,
    or applied as the plan said."""
    if fresh:
        fill(place / "target")
    outside = snapshot(place / "outside")
    before = snapshot(place / "target")
    try:
        run(b"".join(parts) + END, place / "target", piped=piped)
    except TarError as error:
        assert "\n" not in str(error)
        if not piped:
            assert "holds a part" not in str(error), "the plan did not foresee what applying met"
            assert_equal(before, snapshot(place / "target"))
    except LayerError as error:
        raise AssertionError(f"not the layer's fault: {error}") from error
    assert_equal(outside, snapshot(place / "outside"), strict=("ino", "ctime_ns"))
    assert sorted(os.listdir(place)) == ["outside", "target"]
