"""`layerfs mount IMAGE MOUNTPOINT`, as root and as an ordinary user. What the cache does is in
tests/oci/test_cache.py; images of other tools are in tests/oci/test_mounted_images.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from layerfs.oci.member import Kind, Member
from tests.oci import members as m
from tests.oci.images import make_image
from tests.support.processes import eventually

from .conftest import Box


def image(box: Box, *layers: list[tuple[Member, bytes]], tag: str = "t") -> str:
    """An image of the box's user; `DIR:TAG`."""
    box.env.setdefault("XDG_CACHE_HOME", box("cache"))
    owned = [
        [
            (Member(e.name, e.kind, e.mode, box.uid, box.uid, e.mtime_ns, e.size, e.target), data)
            for e, data in layer
        ]
        for layer in layers
    ]
    make_image(box.dir / "layout", tag, [m.tar_bytes(layer) for layer in owned])
    for directory, _, names in os.walk(box("layout")):
        for path in (directory, *(os.path.join(directory, name) for name in names)):
            box.own(path)
    return f"{box('layout')}:{tag}"


LOW = [m.directory(b""), m.directory(b"d"), m.file(b"d/low", b"low"), m.file(b"gone"), m.file(b"both", b"1")]
HIGH = [m.directory(b""), m.file(b".wh.gone"), m.file(b"both", b"2"), m.file(b"d/high", b"high")]


def mount(box: Box, *arguments: str) -> None:
    done = box.layerfs("mount", *arguments, box("m"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def seen(box: Box) -> list[str]:
    found = box.run("find", box("m"), "-mindepth", "1", "-printf", "%P\n")
    assert found.returncode == 0, found.stderr
    return sorted(found.stdout.split())


def test_mount(box: Box) -> None:
    reference = image(box, LOW, HIGH)
    for _ in range(2):
        mount(box, reference)
        assert seen(box) == ["both", "d", "d/high", "d/low"]
        assert box.run("cat", box("m/both"), box("m/d/low")).stdout == "2low"
        assert "Read-only" in box.run("touch", box("m/x")).stderr
        box.umount()
    box.assert_gone()
    assert (box.dir / "cache/layerfs").stat().st_uid == box.uid


def test_writable_and_back(box: Box) -> None:
    """diff and commit see the cache's directories as they see any lower ones."""
    mount(box, "--upper", box("u"), "--work", box("w"), image(box, LOW, HIGH))
    assert box.run("sh", "-c", f"cd {box('m')}; echo new >d/new; rm -r both; chmod 700 d").returncode == 0
    assert box.layerfs("diff", box("m")).stdout.splitlines() == ["D /both", "C /d", "A /d/new"]
    done = box.layerfs("commit", "-o", box("layer.tar"), box("m"))
    assert done.returncode == 0 and "1 added, 1 changed, 1 deleted" in done.stdout, done
    box.umount()


def test_ephemeral(box: Box) -> None:
    mount(box, "--ephemeral", image(box, LOW, HIGH))
    assert box.run("sh", "-c", f"echo x >{box('m/both')}; cat {box('m/both')}").stdout == "x\n"
    box.umount()
    mount(box, image(box, LOW, HIGH))
    assert box.run("cat", box("m/both")).stdout == "2", "the cache is not written to"
    box.umount()


def test_lower_directories_lie_on_top_of_the_image(box: Box) -> None:
    (box.dir / "a/both").write_text("a")
    box.own(box("a/both"))
    mount(box, "--lower", box("a"), "--lower", box("b"), image(box, LOW, HIGH))
    assert seen(box) == ["both", "d", "d/high", "d/low", "in-a", "in-b"]
    assert box.run("cat", box("m/both")).stdout == "a"
    box.umount()
    mount(box, "-o", f"lowerdir={box('b')}", image(box, LOW, HIGH))
    assert seen(box) == ["both", "d", "d/high", "d/low", "in-b"]
    box.umount()


def test_foreground(box: Box) -> None:
    process = box.popen(*mounts_command(), "mount", "--foreground", image(box, LOW, HIGH), box("m"))
    assert eventually(box.is_mounted)
    assert seen(box) == ["both", "d", "d/high", "d/low"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    box.assert_gone()


def mounts_command() -> list[str]:
    from tests.support.mounts import layerfs_command

    return layerfs_command()


def test_notes_come_once(box: Box) -> None:
    device = (Member(b"null", Kind.CHAR), b"")  # 0/0
    reference = image(box, LOW, [device])
    done = box.layerfs("mount", reference, box("m"))
    assert done.returncode == 0
    assert done.stderr == (
        "layerfs mount: layer 2 of 2: null: a character device 0/0, which would be a whiteout: dropped\n"
    )
    box.umount()
    mount(box, reference)
    box.umount()


@pytest.mark.parametrize("what", ["absent", "no tag", "damaged", "no image", "not a mount point", "cache"])
def test_refused_in_one_line(box: Box, what: str) -> None:
    reference = image(box, LOW, HIGH)
    says = {
        "absent": "no such image",
        "no tag": "other",
        "damaged": "damaged",
        "no image": "oci-layout",
        "not a mount point": "no such directory",
        "cache": "the cache",
    }[what]
    target = box("m")
    if what == "absent":
        reference = box("nothing") + ":t"
    elif what == "no tag":
        reference = box("layout") + ":other"
    elif what == "damaged":
        for blob in (box.dir / "layout/blobs/sha256").iterdir():
            data = blob.read_bytes()
            if b"ustar" in data:
                blob.write_bytes(data[:-1] + b"x")
    elif what == "no image":
        reference = box("a")
    elif what == "not a mount point":
        target = box("nothing")
    elif what == "cache":
        (box.dir / "cache").write_text("")
    done = box.layerfs("mount", reference, target)
    assert done.returncode == 1, done
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
    box.assert_gone()
    left = [str(path) for path in (box.dir / "cache").rglob("tmp/*")]
    assert not left
    if what == "not a mount point":
        assert not (box.dir / "cache").exists(), "what can be known early is said early"


def test_three_names(box: Box) -> None:
    done = box.layerfs("mount", "a", "b", "c")
    assert done.returncode == 2 and "too many names: c" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_unpacking(box: Box, number: signal.Signals) -> None:
    """An image that takes a second or more, so that the signal comes in the middle."""
    reference = image(box, [m.file(b"f%d" % n, b"x" * 2000) for n in range(20_000)])
    process = box.popen(*mounts_command(), "mount", reference, box("m"))
    form = box.dir / "cache/layerfs" / ("root" if box.is_root else "user")
    assert eventually(lambda: list(form.glob("tmp/*/root/f1*")) or process.poll() is not None)
    assert process.poll() is None, "it was over too soon"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number and said == ""
    box.assert_gone()
    assert not list(form.glob("tmp/*")) and not list(form.glob("layers/*"))


@pytest.mark.parametrize("module", ["layerfs.cli.mount", "layerfs.cli.launching"])
def test_a_mount_of_directories_pays_nothing(module: str) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    absent = {"msgspec", "zstandard", "isal", "rich", "layerfs.oci", "hashlib"}
    assert not absent & set(loaded.split())


def test_progress_on_a_terminal(box: Box) -> None:
    reference = image(box, [m.file(b"f%d" % n, b"x" * 2000) for n in range(3000)])
    read_fd, write_fd = os.openpty()
    done = box.run(*mounts_command(), "mount", reference, box("m"), stderr=write_fd)
    os.close(write_fd)
    said = b""
    try:
        while piece := os.read(read_fd, 65536):
            said += piece
    except OSError:
        pass  # EIO: the other side is closed
    os.close(read_fd)
    assert done.returncode == 0 and b"unpacking layer 1 of 1" in said, said
    box.umount()


def test_the_users_cache_is_his(box: Box) -> None:
    """~/.cache when nothing else is said."""
    reference = image(box, LOW)
    box.env.pop("XDG_CACHE_HOME")
    home = Path(box("home"))
    home.mkdir()
    box.own(home)
    done = box.layerfs("mount", reference, box("m"), env=os.environ | box.env | {"HOME": str(home)})
    assert done.returncode == 0, done.stderr
    assert (home / ".cache/layerfs").stat().st_mode & 0o777 == 0o700
    box.umount()
