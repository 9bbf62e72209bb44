"""What names cost: in the gate at most 160 bytes and the name for one that the kernel has, in Python 400; and
memory comes back when the kernel forgets."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from layerfs.fdutil import RESOLVE_INSIDE
from layerfs.overlay.names import TRUSTED, XattrNames
from layerfs.stack import Stack, merge_directory
from tests.gate import frames as f
from tests.gate.driver import Driver
from tests.gate.pair import LISTS_ROOT, ROOT, SHIFT
from tests.gate.twin import Home, Plain, Verdict
from tests.support import mounts

MANY = 500_000
KNOWN = 50_000
GATE_EACH, PYTHON_EACH = 160, 400
HOME = Home(0, b"", 1 << SHIFT)


def _name(number: int) -> bytes:
    return b"name-%07d" % number


LENGTH = len(_name(0))


def test_half_a_million_names_in_the_gate(plain_core: Path, tmp_path: Path) -> None:
    driver = Driver(plain_core, descriptors=8)
    driver.add_layer(str(tmp_path))
    driver.publish(ROOT, [HOME], {_name(0): Plain(0, 2)})  # what the process needs once it has
    driver.forget_directory(ROOT)
    before = driver.counts()
    driver.publish(ROOT, [HOME], {_name(number): Plain(0, number + 2) for number in range(MANY)})
    counts = driver.counts()
    assert counts.names == MANY
    assert counts.bytes / MANY <= GATE_EACH + LENGTH
    assert counts.taken - before.taken <= counts.bytes * 1.1 + 10_000, "it takes more than it says"
    driver.forget_directory(ROOT)
    after = driver.counts()
    assert (after.names, after.bytes) == (0, 0)
    assert after.taken <= before.taken + 10_000
    driver.close()


@pytest.mark.slow
def test_known_objects_in_the_gate(plain_core: Path, tmp_path: Path) -> None:
    for number in range(KNOWN):
        os.mknod(tmp_path / os.fsdecode(_name(number)))
    with os.scandir(os.fsencode(tmp_path)) as found:
        names: dict[bytes, Plain | None] = {each.name: Plain(0, each.inode()) for each in found}
    driver = Driver(plain_core, descriptors=8)
    driver.add_layer(str(tmp_path))
    before = driver.counts().taken
    driver.publish(ROOT, [HOME], names)
    published = driver.counts().taken
    driver.list_names(LISTS_ROOT, ROOT, ROOT, list(names))
    offset, seen = 0, 0
    while True:
        answer = driver.answer(f.readdirplus(ROOT, LISTS_ROOT, offset, 65536))
        assert answer.verdict is Verdict.ANSWERED
        listed = f.names_of(answer.replies[0][f.OUT_HEADER.size :])
        if not listed:
            break
        seen += len(listed)
        offset = (1 << 30) + seen  # two of the listing are `.` and `..`, and offsets begin at 3
    driver.answer(f.release(ROOT, LISTS_ROOT, f.RELEASEDIR))
    counts = driver.counts()
    assert counts.known == KNOWN
    assert (counts.taken - before) / KNOWN <= GATE_EACH + LENGTH

    nodes = [(HOME.base | plain.real, 1) for plain in names.values() if plain]
    for at in range(0, KNOWN, 1000):
        assert driver.answer(f.batch_forget(*nodes[at : at + 1000])).verdict is Verdict.ANSWERED
    after = driver.counts()
    assert after.known == 0
    assert after.slots <= 1024
    # The room for replies, which is as large as the largest, stays.
    assert after.taken <= published + 400_000
    driver.close()


@pytest.fixture
def crowd(root: None) -> Iterator[Path]:
    """A directory of half a million names on a tmpfs: links to one file, as merging looks at no inode."""
    top = Path(tempfile.mkdtemp(prefix="layerfs-crowd-"))
    mounts.mount("none", top, "tmpfs", 0, "nr_inodes=0,size=0")
    (top / "names").mkdir()
    (top / "file").touch()
    directory = os.open(top / "names", os.O_RDONLY)
    try:
        for number in range(MANY):
            os.link(top / "file", _name(number), dst_dir_fd=directory)
    finally:
        os.close(directory)
    yield top / "names"
    mounts.umount(top)
    top.rmdir()


@pytest.mark.slow
def test_half_a_million_names_in_python(crowd: Path) -> None:
    """And in the gate, as Python publishes them."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(crowd)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["names"] == MANY
    assert told["python"] / MANY <= PYTHON_EACH
    if "gate" in told:
        assert told["gate"] / MANY <= GATE_EACH + LENGTH


def main(path: str) -> None:
    names = XattrNames(TRUSTED)
    stack = Stack([path], None, names)
    layer = stack.lowers[0]
    gc.collect()
    tracemalloc.start(1)
    merged = merge_directory(None, [(layer.root, layer.fd)], names)
    gc.collect()
    told: dict[str, int] = {"names": len(merged.names), "python": tracemalloc.get_traced_memory()[0]}
    tracemalloc.stop()
    try:
        from layerfs.gate.native import NativeGate  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        pass
    else:
        gate = NativeGate(64, RESOLVE_INSIDE)
        gate.publish_directory(ROOT, merged.names, {layer.root: (layer.fd.fd, b"", HOME.base)})
        counters = gate.counters()
        assert counters["entries"] == len(merged.names)
        told["gate"] = counters["bytes"]
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
