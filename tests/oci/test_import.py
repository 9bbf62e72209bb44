"""`layerfs import`: what comes out is what the archive says, and hostile archives leave nothing behind."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings

from layerfs.errors import TarError
from layerfs.oci.importing import import_tar
from layerfs.oci.member import Kind, Member
from layerfs.oci.references import open_image
from layerfs.oci.streams import LayerSink, LayerSource
from layerfs.oci.tarwriter import TarWriter
from tests.oci import members as m
from tests.oci.images import Tools, scratch_place
from tests.oci.images import run as tool
from tests.oci.test_apply_evil import _CUT as CUT
from tests.oci.test_apply_evil import END
from tests.oci.test_apply_evil import EVIL as EVIL_LAYERS
from tests.oci.test_flatten import Layer, _settings, _stack, flat, made_up_time, sensible
from tests.oci.test_interop import rich_tree
from tests.oci.test_live import run
from tests.oci.test_squash import documents
from tests.support.mounts import layerfs_command
from tests.support.tree import Snapshot, assert_equal, snapshot

__all__ = ["made_up_time"]  # a fixture for every test here
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (owners, devices)")


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch_place("import") as path:
        yield path


def imported(raw: bytes) -> bytes:
    """The layer that an archive becomes."""
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as target:
        source.write(raw)
        source.seek(0)
        with LayerSource(source.fileno()) as reader, LayerSink(target.fileno()) as sink:
            import_tar(reader, sink)
            sink.finish()
        target.seek(0)
        return target.read()


@given(_stack)
@settings(_settings, max_examples=50)
def test_a_flat_layer_is_imported_as_it_is(layers: list[Layer]) -> None:
    raw = m.tar_bytes(flat(sensible(layers), whole=True))
    assert imported(raw) == raw


def test_the_order_is_kept_and_the_form_is_ours() -> None:
    """Python's tarfile writes what nobody else does: names of owners, a global header, GNU's long names."""
    raw = io.BytesIO()
    headers = {"comment": "x", "SCHILY.xattr.user.evil": "global"}
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT, pax_headers=headers) as tar:
        for name, data in (("z" * 150, b"1"), ("./a//b", b"22"), ("a", b"")):
            info = tarfile.TarInfo(name)
            info.uname, info.gname, info.size, info.mtime = "who", "group", len(data), 1.5
            info.type = tarfile.REGTYPE if data else tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(data))
    found = m.read_bytes(imported(raw.getvalue()))
    half = 1_500_000_000
    assert found == [
        m.file(b"z" * 150, b"1", mtime_ns=half),
        m.file(b"a/b", b"22", mtime_ns=half),
        m.directory(b"a", mode=0o644, mtime_ns=half),
    ]
    assert imported(imported(raw.getvalue())) == imported(raw.getvalue())
    assert b"who" not in imported(raw.getvalue())


def test_hard_links_have_the_attributes_of_what_they_join() -> None:
    layer = [
        m.file(b"a", b"1", uid=7, mode=0o600, mtime_ns=5),
        m.hardlink(b"b", b"a"),
        m.hardlink(b"c", b"b"),
    ]
    found = m.read_bytes(imported(m.tar_bytes(layer)))
    assert [(each.name, each.kind, each.target, each.uid, each.mode, each.mtime_ns) for each, _ in found] == [
        (b"a", Kind.FILE, b"", 7, 0o600, 5),
        (b"b", Kind.HARDLINK, b"a", 7, 0o600, 5),
        (b"c", Kind.HARDLINK, b"b", 7, 0o600, 5),
    ]


def test_what_is_dropped_is_said(place: Path) -> None:
    layer = [
        m.directory(b"d"),
        m.file(b"f", xattrs={"trusted.overlay.metacopy": b"", "user.mine": b"1"}),
        (Member(b"gone", Kind.CHAR, rdev=(0, 0)), b""),
        m.directory(b"d"),
    ]
    m.layer_file(place / "a.tar", layer)
    done = run("import", place / "a.tar", "--layout", f"{place}/l:t")
    assert [line.removeprefix(f"layerfs import: {place}/a.tar: ") for line in done.stderr.splitlines()] == [
        "f: xattr trusted.overlay.metacopy would steer a merge: dropped",
        "gone: a character device 0/0, which would be a whiteout: dropped",
        "d: a directory that comes more than once: written once",
    ]
    (layer_,) = open_image(f"{place}/l:t").layers
    with os.fdopen(layer_.open_raw(), "rb") as file:
        found = m.read_bytes(file.read())
    assert found == [m.directory(b"d"), m.file(b"f", xattrs={"user.mine": b"1"})]


def test_the_image_says_what_was_asked(place: Path) -> None:
    m.layer_file(place / "a.tar", [m.file(b"f", b"1")], "zstd")
    words = ["--layout", f"{place}/l:t", "-m", "why", "-a", "me", "--json", "--compression", "gzip"]
    done = run("import", place / "a.tar", *words, "--change", 'CMD ["sh"]', "--change", "ENV A=1")
    manifest, config = documents(place / "l", "t")
    assert config["config"] == {"Cmd": ["sh"], "Env": ["A=1"]}
    (entry,) = config["history"]
    assert (entry["comment"], entry["author"]) == ("why", "me")
    assert entry["created_by"] == "layerfs import --change 'CMD [\"sh\"]' --change 'ENV A=1'"
    told = json.loads(done.stdout)
    assert [told["diff_id"]] == config["rootfs"]["diff_ids"]
    assert [(told["digest"], told["media_type"])] == [
        (each["digest"], each["mediaType"]) for each in manifest["layers"]
    ]
    assert told["media_type"].endswith("+gzip") and told["members"] == 1


def test_from_stdin(place: Path) -> None:
    raw = m.tar_bytes([m.file(b"f", b"1" * 100_000)], "gzip")
    command = [*layerfs_command(), "import", "-", "--layout", f"{place}/l:t"]
    subprocess.run(command, input=raw, check=True, capture_output=True)
    (place / "a.tar").write_bytes(raw)
    run("import", place / "a.tar", "--layout", f"{place}/l:u")
    assert documents(place / "l", "t") == documents(place / "l", "u")


# --- hostile ---


def _sparse() -> bytes:
    with tempfile.TemporaryDirectory() as path:
        with open(f"{path}/f", "wb") as file:
            file.truncate(1 << 20)
        command = ["tar", "-C", path, "--sparse", "-cf", "-", "f"]
        return subprocess.run(command, capture_output=True, check=True).stdout


def _patched(find: bytes, put: bytes) -> bytes:
    """A tar whose first name was changed behind the writer's back; the checksum is right."""
    raw = bytearray(m.tar_bytes([m.file(find.ljust(len(put), b"_"))]))
    raw[: len(put)] = put
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def test_names_that_begin_with_a_slash(place: Path) -> None:
    """As `tar -P` writes them."""
    (place / "d").mkdir()
    (place / "d/f").write_text("1")
    os.link(place / "d/f", place / "d/g")
    subprocess.run(["tar", "-P", "-cf", place / "flat.tar", place / "d/f", place / "d/g"], check=True)
    with open(place / "flat.tar", "rb") as flat, open(place / "layer.tar", "wb") as layer:
        with LayerSource(flat.fileno()) as source, LayerSink(layer.fileno()) as sink:
            notes = import_tar(source, sink).notes
            sink.finish()
    name = os.fsencode(place / "d/f")[1:]
    found = m.read_bytes((place / "layer.tar").read_bytes())
    assert [(member.name, member.target) for member, _ in found] == [(name, b""), (name[:-1] + b"g", name)]
    # two members and what a hard link joins
    assert notes == (f"{name.decode()}: its name begins with a slash, which was taken away (and 2 more)",)


EVIL: dict[str, tuple[Callable[[], bytes], str]] = {
    "dotdot": (lambda: _patched(b"x", b"../x"), "has a '..'"),
    "behind a link": (lambda: m.tar_bytes([m.link(b"l", b"/etc"), m.file(b"l/x")]), "behind a symbolic link"),
    "below a file": (lambda: m.tar_bytes([m.file(b"f"), m.file(b"f/x")]), "no directory"),
    "link to nothing": (lambda: m.tar_bytes([m.hardlink(b"h", b"absent")]), "that is not there"),
    "link through a link": (
        lambda: m.tar_bytes([m.link(b"l", b"/etc"), m.hardlink(b"h", b"l/passwd")]),
        "behind a symbolic link",
    ),
    "link to a directory": (
        lambda: m.tar_bytes([m.directory(b"d"), m.hardlink(b"h", b"d")]),
        "is a directory",
    ),
    "whiteout": (lambda: m.tar_bytes([m.file(b"d/.wh.x")]), "is a whiteout: this is a layer and no flat tar"),
    "opaque": (lambda: m.tar_bytes([m.file(b".wh..wh..opq")]), "is a whiteout"),
    "aufs": (lambda: m.tar_bytes([m.file(b".wh..wh.plnk")]), "is a whiteout"),
    "below a whiteout": (lambda: m.tar_bytes([m.file(b".wh.d/x")]), "lies below a whiteout"),
    "bare whiteout": (lambda: m.tar_bytes([m.file(b"d/.wh.")]), "nothing that can be named"),
    "file twice": (lambda: m.tar_bytes([m.file(b"f"), m.file(b"f")]), "f comes more than once"),
    "directory twice": (
        lambda: m.tar_bytes([m.directory(b"d"), m.directory(b"d", mode=0o700)]),
        "d comes more than once",
    ),
    "file over directory": (lambda: m.tar_bytes([m.directory(b"d"), m.file(b"d")]), "d comes more than once"),
    "link over file": (
        lambda: m.tar_bytes([m.file(b"a"), m.file(b"b"), m.hardlink(b"b", b"a")]),
        "b comes more than once",
    ),
    "root twice": (lambda: m.tar_bytes([m.directory(b""), m.directory(b"", mode=0)]), "comes more than once"),
    "sparse": (_sparse, "GNU sparse file"),
    "cut": (lambda: m.tar_bytes([m.file(b"f", b"1" * 2000)])[:1500], "truncated"),
    "cut gzip": (lambda: m.tar_bytes([m.file(b"f", b"1" * 2000)], "gzip")[:-5], "truncated"),
    "cut zstd": (lambda: m.tar_bytes([m.file(b"f", os.urandom(2000))], "zstd")[:-900], "truncated"),
    "no tar": (lambda: b"hello" * 1000, "no tar archive"),
    "empty": (lambda: b"", "end mark"),
}


@pytest.mark.parametrize(
    ("name", "piped"), [*((name, False) for name in EVIL), ("behind a link", True), ("cut gzip", True)]
)
def test_evil_archives_leave_nothing(place: Path, name: str, piped: bool) -> None:
    make, message = EVIL[name]
    raw = make()
    with pytest.raises(TarError, match=message):
        imported(raw)
    (place / "evil.tar").write_bytes(raw)
    m.layer_file(place / "good.tar", [m.file(b"f")])
    run("import", place / "good.tar", "--layout", f"{place}/l:t")
    before = sorted(os.walk(place))
    index = (place / "l/index.json").read_bytes()
    done = subprocess.run(
        [*layerfs_command(), "import", "-" if piped else place / "evil.tar", "--layout", f"{place}/l:t"],
        input=raw if piped else b"",
        capture_output=True,
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done
    assert done.stderr.startswith(b"layerfs import: standard input: " if piped else b"layerfs import: /")
    assert (sorted(os.walk(place)), (place / "l/index.json").read_bytes()) == (before, index)


def test_evil_layers_are_refused_as_by_apply() -> None:
    """The table of test_apply_evil.py, but for what needs something below."""
    for what, (raw, says) in EVIL_LAYERS.items():
        if "below" not in what and what not in ("hard link to a directory", "through a symlink to inside"):
            with pytest.raises(TarError, match=f"{says}|is a whiteout|is not there"):
                imported(raw + (b"" if what in CUT else END))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.tar", "--layout", "L:t"], "No such file or directory"),
        (["/tmp", "--layout", "L:t"], "layerfs import: /tmp: Is a directory"),
        (["/proc/self/mem", "--layout", "L:t"], "layerfs import: /proc/self/mem: Input/output error"),
        (["a.tar"], "Missing option '--layout'"),
        (["a.tar", "--layout", "L:t", "--change", "FROM x"], "not an instruction"),
        (["a.tar", "--layout", "L:t", "--compression", "none", "--level", "1"], "has no levels"),
        (["a.tar", "--layout", "L:no tag"], "is no tag"),
    ],
)
def test_wrong_usage(place: Path, words: list[str], message: str) -> None:
    m.layer_file(place / "a.tar", [m.file(b"f")])
    told = [word.replace("L:", f"{place}/l:").replace("a.tar", f"{place}/a.tar") for word in words]
    done = run("import", *told, code=2)
    assert message in done.stderr
    assert os.listdir(place) == ["a.tar"]


_LIMITED = """
import resource, sys
from layerfs.oci.importing import import_tar
from layerfs.oci.streams import LayerSink, LayerSource
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
with open("/dev/null", "wb") as out, LayerSource(0) as source, LayerSink(out.fileno(), "gzip") as sink:
    import_tar(source, sink)
    print(sink.finish().tar_size)
"""


def test_memory_does_not_grow_with_data() -> None:
    """600 MiB of zeros out of a small gzip, through a pipe, in 400 MiB of address space."""
    with tempfile.NamedTemporaryFile() as file:
        with LayerSink(file.fileno(), "gzip") as sink:
            writer = TarWriter(sink.write)
            writer.add(Member(b"f", Kind.FILE, size=600 << 20), (bytes(1 << 20) for _ in range(600)))
            writer.finish()
            sink.finish()
        with subprocess.Popen(["cat", file.name], stdout=subprocess.PIPE) as cat:
            command = [sys.executable, "-c", _LIMITED]
            done = subprocess.run(command, stdin=cat.stdout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 512 + (600 << 20) + 1024


# --- archives of others ---

_TAR = ["tar", "--numeric-owner", "--xattrs", "--xattrs-include=*"]


def unpacked(place: Path, tag: str) -> Snapshot:
    """The image's root as umoci sees it."""
    tool("umoci", "raw", "unpack", "--image", f"{place}/l:{tag}", place / f"umoci-{tag}")
    return snapshot(place / f"umoci-{tag}")


@root
@pytest.mark.parametrize("form", ["pax", "gnu"])
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_archives_of_gnu_tar(place: Path, form: str, compression: str) -> None:
    rich_tree(place / "tree")
    extra = _TAR[1:] if form == "pax" else []
    tool("tar", f"--format={form}", *extra, "-cf", place / "a.tar", "-C", place / "tree", ".")
    run("import", place / "a.tar", "--layout", f"{place}/l:t", "--compression", compression)
    ignore = () if form == "pax" else ("xattrs", "mtime_ns")
    assert_equal(snapshot(place / "tree"), unpacked(place, "t"), ignore=ignore, labels=("tree", "umoci"))
    # skopeo takes it, and gives it back
    tools = Tools(place)
    tools.skopeo_copy(f"oci:{place}/l:t", f"docker-archive:{place}/d.tar:x:t")
    one, other = open_image(f"{place}/l:t"), open_image(f"{place}/d.tar")
    assert [layer.diff_id for layer in one.layers] == [layer.diff_id for layer in other.layers]


@root
def test_what_podman_exports(place: Path) -> None:
    """The same form as `docker export`."""
    rich_tree(place / "tree")
    tool(*_TAR, "-cf", place / "a.tar", "-C", place / "tree", ".")
    tools = Tools(place)
    tools.podman("import", place / "a.tar", "x:t")
    container = tools.podman("create", "x:t", "sh").strip()
    try:
        tools.podman("export", "-o", place / "exported.tar", container)
    finally:
        tools.podman("rm", container)
    run("import", place / "exported.tar", "--layout", f"{place}/l:t")
    (place / "plain").mkdir()
    tool(*_TAR, "-xpf", place / "exported.tar", "-C", place / "plain")
    found = unpacked(place, "t")
    plain = snapshot(place / "plain")
    found[b"."] = plain[b"."]  # the archive does not name it
    assert_equal(plain, found, labels=("GNU tar", "imported"))
    assert found.keys() >= snapshot(place / "tree").keys()


@root
def test_the_root_of_a_buildah_container(place: Path) -> None:
    m.layer_file(place / "a.tar", [m.directory(b"d", uid=5), m.file(b"d/f", b"1", mode=0o4711, uid=7)])
    run("import", place / "a.tar", "--layout", f"{place}/l:t")
    tools = Tools(place)
    container = tools.buildah("from", f"oci:{place}/l:t").strip()
    try:
        mounted = Path(tools.buildah("mount", container).strip())
        (mounted / "d/new").write_text("2")
        tool(*_TAR, "-cf", place / "b.tar", "-C", mounted, ".")
        expected = snapshot(mounted)
    finally:
        tools.buildah("rm", container)
    run("import", place / "b.tar", "--layout", f"{place}/l:u")
    assert_equal(expected, unpacked(place, "u"), ignore=("mtime_ns",), labels=("buildah", "imported"))
