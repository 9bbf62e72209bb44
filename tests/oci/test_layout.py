"""An OCI layout on disk: what appears is whole, whoever dies or writes at the same time."""

from __future__ import annotations

import errno
import fcntl
import gc
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from layerfs.errors import ImageError, LayerError, UsageError
from layerfs.oci.append import ImageOptions, append_layer
from layerfs.oci.image import Descriptor, digest_of
from layerfs.oci.layout import Layout
from layerfs.oci.references import open_image
from layerfs.oci.streams import LayerSink, Written
from tests.oci.images import PLAIN, make_image, scratch_place, tar_of

REF = "org.opencontainers.image.ref.name"


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch_place("lay") as path:
        yield path


def tags(layout: Path) -> list[str]:
    return [each["annotations"][REF] for each in json.loads((layout / "index.json").read_text())["manifests"]]


def check_whole(layout: Path) -> None:
    """Every blob is what its name says, and everything in the index can be read."""
    for path in (layout / "blobs/sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    for tag in tags(layout):
        for layer in open_image(f"{layout}:{tag}").layers:
            with layer.open() as opened:
                opened.verify()


def temporaries(layout: Path) -> list[str]:
    return [name for name in os.listdir(layout) if name not in ("blobs", "index.json", "oci-layout")]


def test_a_blob_goes_in_and_out(place: Path) -> None:
    layout = Layout.create(str(place / "l"))
    descriptor = layout.put(b"bytes", PLAIN)
    assert descriptor == Descriptor(PLAIN, digest_of(b"bytes"), 5)
    assert layout.read_blob(descriptor, 5) == b"bytes"
    with pytest.raises(ImageError):
        layout.read_blob(descriptor, 4)
    assert temporaries(place / "l") == []


def test_what_was_damaged_is_healed_by_writing_it_again(place: Path) -> None:
    layout = Layout.create(str(place / "l"))
    descriptor = layout.put(b"bytes", PLAIN)
    path = place / "l/blobs" / descriptor.digest.replace(":", "/")
    path.write_bytes(b"BYTES")
    with pytest.raises(ImageError):
        layout.read_blob(descriptor, 5)
    layout.put(b"bytes", PLAIN)
    assert layout.read_blob(descriptor, 5) == b"bytes"


def test_a_blob_that_was_not_written_whole_is_not_published(place: Path) -> None:
    layout = Layout.create(str(place / "l"))
    with pytest.raises(ImageError):
        with layout.new_blob() as blob:
            os.write(blob.fd, b"byt")
            blob.commit(digest_of(b"bytes"), 5)
    with pytest.raises(ZeroDivisionError):
        with layout.new_blob() as blob:
            os.write(blob.fd, bytes([1 // 0]))
    assert os.listdir(place / "l/blobs/sha256") == []
    assert temporaries(place / "l") == []


@pytest.mark.parametrize("wrong", [b"BYTES", b"byte", b"", b"bytes and more"])
def test_a_copied_blob_is_verified(place: Path, wrong: bytes) -> None:
    layout = Layout.create(str(place / "l"))
    (place / "source").write_bytes(wrong)
    with open(place / "source", "rb") as source:
        if wrong.startswith(b"bytes"):  # no more is read than the blob has
            layout.copy_blob(source.fileno(), Descriptor(PLAIN, digest_of(b"bytes"), 5))
            return
        with pytest.raises(ImageError):
            layout.copy_blob(source.fileno(), Descriptor(PLAIN, digest_of(b"bytes"), 5))
    assert os.listdir(place / "l/blobs/sha256") == []
    assert temporaries(place / "l") == []


def test_sha512_is_read(place: Path) -> None:
    layout = Layout.create(str(place / "l"))
    name = hashlib.sha512(b"bytes").hexdigest()
    (place / "l/blobs/sha512").mkdir()
    (place / "l/blobs/sha512" / name).write_bytes(b"bytes")
    descriptor = Descriptor(PLAIN, f"sha512:{name}", 5)  # type: ignore[arg-type]
    assert layout.read_blob(descriptor, 5) == b"bytes"
    (place / "l/blobs/sha512" / name).write_bytes(b"BYTES")
    with pytest.raises(ImageError):
        layout.read_blob(descriptor, 5)


def test_a_tag_moves_and_the_rest_of_the_index_stays(place: Path) -> None:
    path = place / "l"
    first = make_image(path, "a")
    raw = json.loads((path / "index.json").read_text())
    raw["annotations"] = {"of": "the index"}
    raw["manifests"][0]["unknown"] = [1.5, None, {"x": "ü"}]
    raw["manifests"].append({"mediaType": "application/x", "digest": first.digest, "size": 1})
    (path / "index.json").write_text(json.dumps(raw))
    second = make_image(path, "b", author="b")
    third = make_image(path, "b", author="c")
    now = json.loads((path / "index.json").read_text())
    assert second != third
    assert {**now, "manifests": now["manifests"][:2]} == raw
    (entry,) = now["manifests"][2:]
    assert entry["digest"] == third.digest and entry["annotations"] == {REF: "b"}


def test_the_layout_is_made_where_there_is_nothing(place: Path) -> None:
    (place / "empty").mkdir()
    for name in ("new", "empty"):
        Layout.create(str(place / name))
        assert json.loads((place / name / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (place / "full").mkdir()
    (place / "full/file").write_text("")
    with pytest.raises(UsageError):
        Layout.create(str(place / "full"))
    assert os.listdir(place / "full") == ["file"]
    with pytest.raises(UsageError):
        Layout.create(str(place / "full/file"))
    with pytest.raises(UsageError):
        Layout.create(str(place / "no/such/way"))


@pytest.mark.parametrize(
    "left",
    [("blobs",), ("blobs", "blobs/sha256"), ("blobs", "index.json"), (".layerfs-" + "0" * 16 + ".tmp",)],
)
def test_what_a_killed_maker_left_is_finished(place: Path, left: tuple[str, ...]) -> None:
    path = place / "l"
    path.mkdir()
    for name in left:
        if "blobs" in name:
            (path / name).mkdir()
        else:
            (path / name).write_text('{"schemaVersion":2,"manifests":[]}')
    make_image(path)
    check_whole(path)
    assert temporaries(path) == []


def test_temporary_files_go_when_nobody_writes_them(place: Path) -> None:
    path = place / "l"
    layout = Layout.create(str(path))
    (path / f".layerfs-{'0' * 16}.tmp").write_text("left by a killed writer")
    (path / ".layerfs-not-ours.tmp").write_text("")
    with layout.new_blob() as writing:
        os.write(writing.fd, b"bytes")
        make_image(path)
        assert len(temporaries(path)) == 2  # the one that is written, and the one that is not ours
        writing.commit(digest_of(b"bytes"), 5)
    assert temporaries(path) == [".layerfs-not-ours.tmp"]
    assert layout.read_blob(Descriptor(PLAIN, digest_of(b"bytes"), 5), 5) == b"bytes"


def test_two_threads_of_one_layout(place: Path) -> None:
    layout = Layout.create(str(place / "l"))
    manifest = make_image(place / "l", "first")

    def tag_some(number: int) -> None:
        for each in range(20):
            layout.tag(f"t{number}-{each}", manifest)

    threads = [threading.Thread(target=tag_some, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tags(place / "l")) == sorted(["first", *(f"t{n}-{i}" for n in range(4) for i in range(20))])


COMMITTER = """
import os, sys
from layerfs.oci.append import ImageOptions, append_layer
from layerfs.oci.references import open_image
from tests.oci.test_layout import layer
path, name, count, base = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
for number in range(count):
    image = open_image(f"{path}:{base}") if base else None
    append_layer(path, f"{name}{number}", image, ImageOptions(name), layer(f"{name}{number}"))
    print(number, flush=True)
"""


def layer(text: str, size: int = 5000) -> Callable[[int], Written]:
    """What `append_layer` calls: writes a layer with one file."""

    def write(fd: int) -> Written:
        with LayerSink(fd, "gzip") as sink:
            sink.write(tar_of({text: hashlib.sha256(text.encode()).digest() * (size // 32)}))
            return sink.finish()

    return write


def committer(path: Path, name: str, count: int, base: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMMITTER, str(path), name, str(count), base],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_many_processes_commit_at_once(place: Path) -> None:
    path = place / "l"
    make_image(path, "base", [tar_of({"base": b"b"})])
    committers = [committer(path, name, 8, "base") for name in "abcd"]
    for each in committers:
        each.communicate()
        assert each.returncode == 0
    assert sorted(tags(path)) == sorted(
        ["base", *(f"{name}{number}" for name in "abcd" for number in range(8))]
    )
    check_whole(path)
    assert temporaries(path) == []


def test_one_tag_by_many_processes_is_one_of_theirs(place: Path) -> None:
    path = place / "l"
    Layout.create(str(path))
    command = COMMITTER.replace('f"{name}{number}", image', '"same", image')
    committers = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(path), name, "5", ""],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.DEVNULL,
        )
        for name in "abc"
    ]
    for each in committers:
        assert each.wait() == 0
    assert tags(path) == ["same"]
    check_whole(path)


def test_killed_at_any_moment(place: Path) -> None:
    """SIGKILL while commits run: old images and new ones are whole, and the next commit clears up."""
    path = place / "l"
    make_image(path, "old", [tar_of({"old": b"o"})])
    done = 0
    for round_number in range(12):
        writer = committer(path, f"r{round_number}-", 100)
        assert writer.stdout is not None
        for _ in range(round_number % 3):
            writer.stdout.readline()
        threading.Event().wait(round_number * 0.004)
        writer.send_signal(signal.SIGKILL)
        done += len(writer.communicate()[0].splitlines())
        check_whole(path)
    assert "old" in tags(path)
    make_image(path, "new")
    check_whole(path)
    assert temporaries(path) == []


#: System calls of a commit that change what is on disk; each is made to be the last one.
STEPS: list[tuple[object, str]] = [
    (os, "open"),
    (os, "write"),
    (os, "fsync"),
    (os, "rename"),
    (os, "mkdir"),
    (os, "unlink"),
    (fcntl, "flock"),
]


def dying_commit(path: Path, module: object, step: str, count: int, how: int | None) -> int | str:
    """Commits in a process of its own, in which call number `count` of a kind gives the errno `how`, or
    SIGKILL. Returns the signal that ended it, or what it raised, "" for nothing."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        said = ""
        try:
            real = getattr(module, step)
            calls = itertools.count(1)

            def counted(*arguments: object, **named: object) -> object:
                if next(calls) == count:
                    if how is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    assert how is not None
                    raise OSError(how, os.strerror(how))
                return real(*arguments, **named)

            base = open_image(f"{path}:old") if path.exists() else None
            setattr(module, step, counted)
            try:
                append_layer(str(path), "new", base, ImageOptions("dying", changes=("CMD x",)), layer("new"))
            finally:
                setattr(module, step, real)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode())
            os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else said


@pytest.mark.parametrize("how", [None, errno.ENOSPC, errno.EIO], ids=["kill", "ENOSPC", "EIO"])
@pytest.mark.parametrize(("module", "step"), STEPS, ids=[step for _, step in STEPS])
@pytest.mark.parametrize("exists", [True, False], ids=["append", "from-nothing"])
def test_every_step_may_be_the_last(
    place: Path, module: object, step: str, how: int | None, exists: bool
) -> None:
    """Killed, or told ENOSPC or EIO, at the first, the second, ... call of a kind: the old image stays, the
    new one is there or not, an error is one line, and nothing is left over for long."""
    path = place / "l"
    for count in range(1, 60):
        if exists:
            make_image(path, "old", [tar_of({"old": b"o"})])
        said = dying_commit(path, module, step, count, how)
        if (path / "oci-layout").exists():
            check_whole(path)
            assert ("old" in tags(path)) == exists
        if said == "":
            assert "new" in tags(path)
            if how is None or not temporaries(path):
                return
        elif how is None:
            assert said == signal.SIGKILL
        else:
            assert isinstance(said, str)
            assert said.startswith(
                tuple(f"{kind}: {path}: " for kind in ("LayerError", "ImageError", "UsageError"))
            )
            assert len(said.splitlines()) == 1
        make_image(path, "after")
        check_whole(path)
        assert temporaries(path) == []
        subprocess.run(["rm", "-rf", path], check=True)
    pytest.fail("more steps than a commit has")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root (mounts a small tmpfs)")
def test_a_full_disk(place: Path) -> None:
    """With more and more room the layer, the config, the manifest or the index is what does not fit: one
    line, and the old image as it was."""
    disk, page = place / "disk", 4096
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
    try:
        path = disk / "l"
        make_image(path, "old", [tar_of({"old": b"o"})])
        before = (path / "index.json").read_bytes()
        base = open_image(f"{path}:old")
        failures = 0
        for room in range(40):
            filler = disk / "filler"
            filler.write_bytes(b"")
            free = os.statvfs(disk).f_bavail
            filler.write_bytes(bytes((free - room) * page))
            try:
                append_layer(str(path), "new", base, ImageOptions("test"), layer("new", 20_000))
                break
            except LayerError as error:
                assert str(error) == f"{path}: cannot be written: No space left on device"
            failures += 1
            assert (path / "index.json").read_bytes() == before
            assert temporaries(path) == []
            check_whole(path)
        del base  # it holds the layout open
        assert failures >= 3
        assert sorted(tags(path)) == ["new", "old"]
        check_whole(path)
    finally:
        gc.collect()
        subprocess.run(["umount", disk], check=True)
