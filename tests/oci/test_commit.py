"""Commit: the law `apply(commit(upper over lowers), lowers) == merged`, over uppers made by hand in every
form and by kernel overlayfs."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerfs.errors import LayerError, UsageError
from layerfs.oci.apply import apply_layer
from layerfs.oci.changes import ChangeFinder, ChangeKind
from layerfs.oci.commit import CommitOptions, Summary, output_file, write_layer
from layerfs.oci.member import Kind, Member
from layerfs.overlay.names import TRUSTED, USER, XattrNames
from layerfs.stack import Stack
from tests.oci import members as m
from tests.support.mounts import KernelOverlay, why_no_kernel_overlay
from tests.support.stack import Stack as Dirs
from tests.support.stack import scratch_root
from tests.support.tree import assert_equal, lowers_guard, snapshot

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (owners, devices, trusted xattrs)")
kernel = pytest.mark.skipif(bool(why_no_kernel_overlay()), reason=str(why_no_kernel_overlay()))


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="commit-", dir=scratch_root()))
    os.chmod(path, 0o755)
    yield path
    subprocess.run(["rm", "-rf", path], check=True)  # some trees here are deeper than Python's stack


def layers(lowers: list[Path], upper: Path, prefix: str = TRUSTED) -> Stack:
    return Stack([str(lower) for lower in lowers], str(upper), XattrNames(prefix))


def commit(
    lowers: list[Path], upper: Path, out: Path, compression: str = "none", prefix: str = TRUSTED
) -> Summary:
    """Commits twice: the same bytes come out, and no layer is touched."""
    with lowers_guard([*lowers, upper]):
        with output_file(str(out)) as fd:
            summary = write_layer(layers(lowers, upper, prefix), fd, CommitOptions(compression))
        again = out.with_suffix(".again")
        with output_file(str(again)) as fd:
            assert write_layer(layers(lowers, upper, prefix), fd, CommitOptions(compression)) == summary
    assert again.read_bytes() == out.read_bytes()
    again.unlink()
    return summary


def diff(lowers: list[Path], upper: Path, notes: list[str] | None = None, prefix: str = TRUSTED) -> list[str]:
    found = ChangeFinder(layers(lowers, upper, prefix), notes if notes is not None else [])
    told = [(change.path, change.kind) for change in found]
    return [
        f"{kind.value} {os.fsdecode(path)}"
        for path, kind in sorted(told)
        if kind in (ChangeKind.ADDED, ChangeKind.CHANGED, ChangeKind.DELETED)
    ]


def apply(layer: Path, target: Path) -> None:
    with open(layer, "rb") as file:
        assert apply_layer(file.fileno(), str(target)).notes == []


def check_layout(layer: Path) -> None:
    """What the specification asks of a layer: no path twice, parents before children, whiteouts before
    siblings, links to what came."""
    seen: dict[bytes, Kind] = {}
    files_in: set[bytes] = set()
    for member, _ in m.read_bytes(layer.read_bytes()):
        assert member.name not in seen, member
        directory, _, name = member.name.rpartition(b"/")
        assert not directory or seen.get(directory) is Kind.DIR, member
        if name.startswith(b".wh."):
            assert directory not in files_in, "a whiteout behind a sibling"
            assert (member.kind, member.size, member.xattrs) == (Kind.FILE, 0, {})
        elif member.name:
            files_in.add(directory)
        if member.kind is Kind.HARDLINK:
            assert seen.get(member.target) not in (None, Kind.DIR, Kind.HARDLINK), member
        seen[member.name] = member.kind


# --- trees written by hand ---


@dataclass(frozen=True)
class Leaf:
    kind: str
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    mtime: int = 0
    xattrs: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class Branch:
    names: dict[bytes, Leaf | Branch]
    mode: int = 0o755
    mtime: int = 0
    xattrs: tuple[tuple[str, bytes], ...] = ()


_NAMES = st.sampled_from([b"a", b"b", b"c", b"\xff\n\\", "ü".encode() * 60, b"e e"])
_TIMES = st.sampled_from([0, 1_500_000_000_123_456_789, -1_000_000_001])
_XATTRS = st.sampled_from([(), (("user.k", b"v\0"),), (("user.%3D", b""), ("user.=", b"1"))])
_leaf = st.one_of(
    st.builds(
        Leaf,
        st.just("file"),
        st.sampled_from([b"", b"1", b"2", b"x" * 1025]),
        st.sampled_from([0o644, 0o4755, 0]),
        st.sampled_from([0, 70000, 4_000_000]),
        _TIMES,
        _XATTRS,
    ),
    st.builds(
        Leaf,
        st.just("link"),
        st.sampled_from([b"a", b"../..", b"t" * 200]),
        st.just(0o777),
        st.just(3),
        _TIMES,
    ),
    st.builds(Leaf, st.just("fifo"), st.just(b""), st.just(0o600), st.just(0), _TIMES),
    st.builds(Leaf, st.just("dev"), st.just(b""), st.just(0o600), st.just(0), _TIMES),
)
_tree = st.recursive(
    st.builds(
        Branch, st.dictionaries(_NAMES, _leaf, max_size=3), st.sampled_from([0o755, 0o1777]), _TIMES, _XATTRS
    ),
    lambda inner: st.builds(
        Branch,
        st.dictionaries(_NAMES, st.one_of(_leaf, inner), max_size=4),
        st.sampled_from([0o755, 0o700]),
        _TIMES,
        _XATTRS,
    ),
    max_leaves=6,
)


def make(path: bytes, node: Leaf | Branch) -> None:
    if isinstance(node, Branch):
        os.makedirs(path, exist_ok=True)
        for name, inner in node.names.items():
            make(path + b"/" + name, inner)
        finish_directory(path, node)
        return
    if node.kind == "file":
        with open(path, "xb") as file:
            file.write(node.data)
    elif node.kind == "link":
        os.symlink(node.data, path)
    else:
        os.mknod(path, stat.S_IFIFO if node.kind == "fifo" else stat.S_IFBLK, os.makedev(7, 300))
    os.chown(path, node.uid, node.uid, follow_symlinks=False)
    if node.kind != "link":
        os.chmod(path, node.mode)
    for key, value in node.xattrs:
        os.setxattr(path, key, value)
    os.utime(path, ns=(0, node.mtime), follow_symlinks=False)


def finish_directory(path: bytes, node: Branch) -> None:
    os.chmod(path, node.mode)
    for key, value in node.xattrs:
        os.setxattr(path, key, value)
    os.utime(path, ns=(0, node.mtime))


class UpperMaker:
    """Writes an upper that turns the tree `old` into `new`, choosing among all forms that the formats
    offer."""

    def __init__(self, choose: random.Random, prefix: str) -> None:
        self.choose = choose
        self.prefix = prefix

    def directory(self, path: bytes, old: Branch | None, new: Branch) -> None:
        os.makedirs(path, exist_ok=True)
        below = old.names if old is not None else {}
        form = self.choose.choice(["device", "oci", "xattr"])
        if old is not None and self.choose.random() < 0.3 and path.count(b"/upper/"):
            below = {}
            if self.choose.random() < 0.5:
                os.setxattr(path, self.prefix + "opaque", b"y")
            else:
                os.close(os.open(path + b"/.wh..wh..opq", os.O_CREAT))
        elif form == "xattr":
            os.setxattr(path, self.prefix + "opaque", b"x")
        for name in below.keys() - new.names.keys():
            self.whiteout(path, name, form)
        for name, node in new.names.items():
            before = below.get(name)
            if node == before and self.choose.random() < 0.7:
                continue  # seen from below
            if isinstance(node, Branch):
                self.directory(path + b"/" + name, before if isinstance(before, Branch) else None, node)
            else:
                make(path + b"/" + name, node)
        finish_directory(path, new)

    def whiteout(self, path: bytes, name: bytes, form: str) -> None:
        if form == "device":
            os.mknod(path + b"/" + name, stat.S_IFCHR, 0)
        elif form == "oci":
            os.close(os.open(path + b"/.wh." + name, os.O_CREAT))
        else:
            os.close(os.open(path + b"/" + name, os.O_CREAT))
            os.setxattr(path + b"/" + name, self.prefix + "whiteout", b"y")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_tree, _tree, st.randoms(use_true_random=False), st.sampled_from([TRUSTED, USER]))
def test_apply_of_commit_is_the_new_tree(
    place: Path, old: Branch, new: Branch, choose: random.Random, prefix: str
) -> None:
    base = Path(tempfile.mkdtemp(dir=place))
    lower, upper, target, expected = (base / name for name in ("lower", "upper", "target", "expected"))
    for path, tree in ((lower, old), (target, old), (expected, new)):
        make(os.fsencode(path), tree)
    UpperMaker(choose, prefix).directory(os.fsencode(upper), old, new)
    summary = commit([lower], upper, base / "layer.tar", prefix=prefix)
    assert not summary.notes
    check_layout(base / "layer.tar")
    apply(base / "layer.tar", target)
    if summary.written.tar_size == 1024:
        os.utime(target, ns=(0, new.mtime))  # the root's time alone is no change: every new upper has another
    assert_equal(snapshot(expected), snapshot(target), labels=("merged", "applied"))
    assert diff([lower], upper, prefix=prefix) == tree_diff(old, new)
    shutil.rmtree(base)


def tree_diff(old: Branch, new: Branch) -> list[str]:
    """What diff must say, from the two descriptions."""
    lines: list[tuple[bytes, str]] = []

    def attributes(node: Branch) -> tuple[object, ...]:
        return node.mode, node.mtime, node.xattrs

    def walk(path: bytes, before: Branch | None, after: Branch) -> None:
        olds = before.names if before is not None else {}
        for name in olds.keys() | after.names.keys():
            here = path + b"/" + name if path else name
            was, now = olds.get(name), after.names.get(name)
            if now is None:
                lines.append((here, "D"))
                continue
            if was is None:
                lines.append((here, "A"))
            elif isinstance(was, Branch) and isinstance(now, Branch):
                if attributes(was) != attributes(now):
                    lines.append((here, "C"))
            elif was != now:
                lines.append((here, "C"))
            if isinstance(now, Branch):
                walk(here, was if isinstance(was, Branch) else None, now)

    if (old.mode, old.xattrs) != (new.mode, new.xattrs):
        lines.append((b"", "C"))
    walk(b"", old, new)
    return [f"{kind} {os.fsdecode(path)}" for path, kind in sorted(lines)]


# --- uppers made by kernel overlayfs ---


class Worker:
    """Does random things in a directory, which may be any file system."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = os.fsencode(root)
        self.random = random.Random(seed)

    def pick(self, want: Callable[[int], bool] = lambda mode: True) -> bytes | None:
        found = []
        for directory, names, files in os.walk(self.root):
            for name in sorted(names + files):
                path = directory + b"/" + name
                if b"/fixed" not in path and want(os.lstat(path).st_mode):
                    found.append(path)
        return self.random.choice(found) if found else None

    def fresh(self) -> bytes:
        directory = self.pick(stat.S_ISDIR) if self.random.random() < 0.8 else None
        return (directory or self.root) + b"/" + self.random.choice([b"n1", b"n2", b"n3", b"\xff n4"])

    def step(self) -> None:
        action = self.random.choice(
            [
                "create",
                "append",
                "chmod",
                "chown",
                "utime",
                "xattr",
                "mkdir",
                "remove",
                "remove",
                "rename",
                "rename",
                "link",
                "symlink",
                "fifo",
                "remake",
            ]
        )
        path, new = self.pick(), self.fresh()
        try:
            self.do(action, path, new)
        except (FileExistsError, NotADirectoryError, IsADirectoryError, FileNotFoundError):
            pass
        except OSError as error:
            # A directory into itself, over a full one, or a cross-device one where redirects do not reach.
            if error.errno not in (22, 39, 18):
                raise

    def do(self, action: str, path: bytes | None, new: bytes) -> None:
        number = self.random.randrange(1000)
        if action == "create":
            with open(new, "xb") as file:  # a fifo may have the name
                file.write(b"%d" % number)
        elif action == "mkdir":
            os.mkdir(new)
        elif action == "symlink":
            os.symlink(b"%d" % number, new)
        elif action == "fifo":
            os.mkfifo(new)
        elif path is None:
            return
        elif action == "rename":
            os.rename(path, new)
        elif action == "chown":
            os.chown(path, number, number, follow_symlinks=False)
        elif action == "utime":
            os.utime(path, ns=(0, number), follow_symlinks=False)
        elif action == "remove":
            shutil.rmtree(path) if stat.S_ISDIR(os.lstat(path).st_mode) else os.unlink(path)
        elif action == "remake" and stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
            os.mkdir(path)
        elif not stat.S_ISREG(os.lstat(path).st_mode):
            return
        elif action == "append":
            with open(path, "ab") as file:
                file.write(b"%d" % number)
        elif action == "chmod":
            os.chmod(path, 0o600 + number % 8)
        elif action == "xattr":
            os.setxattr(path, b"user.k%d" % (number % 3), b"%d" % number)
        elif action == "link":
            os.link(path, new)


def populate(lower: Path, seed: int) -> None:
    choose = random.Random(seed)
    for directory in ("d1", "d1/s1", "d1/s1/t", "d2", "d2/s2", "fixed"):
        (lower / directory).mkdir(exist_ok=True)
    for number in range(12):
        directory = choose.choice(["", "d1", "d1/s1", "d1/s1/t", "d2", "d2/s2"])
        (lower / directory / f"f{number}").write_bytes(b"%d " % seed * choose.randrange(2000))
        os.setxattr(lower / directory / f"f{number}", "user.seed", b"%d" % seed)
    (lower / "fixed/a").write_text(f"{seed}")
    os.link(lower / "fixed/a", lower / "fixed/b")
    os.symlink("d1", lower / f"l{seed % 2}")


@kernel
@pytest.mark.kernel_overlay
@pytest.mark.parametrize("seed", range(40))
def test_uppers_of_kernel_overlayfs(place: Path, seed: int) -> None:
    dirs = Dirs(place, 3)
    assert dirs.upper is not None
    for number, lower in enumerate(dirs.lowers):
        populate(lower, seed * 3 + number)
    options = "redirect_dir=on,metacopy=on" + (",index=on" if seed % 2 else ",index=off")
    target = place / "target"
    with KernelOverlay(dirs, options) as overlay:
        subprocess.run(["cp", "-a", str(dirs.mnt), str(target)], check=True)
        worker = Worker(dirs.mnt, seed)
        for _ in range(25):
            worker.step()
        overlay.remount()  # metadata-only copies and redirects are read back, not remembered
        merged = snapshot(dirs.mnt)
    commit(dirs.lowers, dirs.upper, place / "layer.tar.gz", "gzip")
    check_layout(place / "layer.tar.gz")
    apply(place / "layer.tar.gz", target)
    # nlink: the kernel counts names of the lower layer that are hidden by now. names: a file of a lower layer
    # that was copied up under one of its names is no longer the same file for the kernel only when the index
    # is off.
    assert_equal(merged, snapshot(target), ignore=("nlink", "names"), labels=("merged", "applied"))
    dirs.remove()


@kernel
@pytest.mark.kernel_overlay
def test_each_kind_of_change(place: Path) -> None:
    dirs = Dirs(place, 2)
    assert dirs.upper is not None
    low, top = dirs.lowers[1], dirs.lowers[0]
    for path in ("etc/deep/er", "usr/lib", "var"):
        (low / path).mkdir(parents=True)
    for path in (
        "etc/conf",
        "etc/deep/er/x",
        "usr/lib/a",
        "usr/lib/b",
        "var/log",
        "touched",
        "opened",
        "big",
    ):
        (low / path).write_text(path)
    (top / "usr/lib").mkdir(parents=True)
    (top / "usr/lib/c").write_text("c")
    (low / "nested").write_text("n")
    with KernelOverlay(dirs, "redirect_dir=on,metacopy=on"):
        mnt = dirs.mnt
        os.chmod(mnt / "big", 0o600)
        os.rename(mnt / "usr", mnt / "moved")
        (mnt / "etc/deep/er/x").write_text("changed")
        os.unlink(mnt / "var/log")
        with open(mnt / "opened", "r+"):
            pass  # copied up, and nothing else
        (mnt / "new").write_text("1")
        os.link(mnt / "new", mnt / "new2")
        os.setxattr(mnt / "nested", "user.x", b"1")
    os.setxattr(dirs.upper / "nested", "trusted.overlay.overlay.opaque", b"y")
    # A socket cannot be in a layer; the kernel's own marks must not be.
    import socket

    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(dirs.upper / "socket"))
    notes: list[str] = []
    assert diff(dirs.lowers, dirs.upper, notes) == [
        "C big",
        "C etc/deep/er/x",
        "A moved",
        "A moved/lib",
        "A moved/lib/a",
        "A moved/lib/b",
        "A moved/lib/c",
        "C nested",
        "A new",
        "A new2",
        "D usr",
        "C var",
        "D var/log",
    ]
    assert notes == ["socket: a socket, which a layer cannot hold: skipped"]
    summary = commit(dirs.lowers, dirs.upper, place / "layer.tar")
    assert (summary.added, summary.changed, summary.deleted, summary.unchanged) == (7, 4, 2, 1)
    members = {
        member.name: (member, data) for member, data in m.read_bytes((place / "layer.tar").read_bytes())
    }
    assert b"opened" not in members and b"socket" not in members
    assert {b"etc", b"etc/deep", b"etc/deep/er"} <= members.keys(), "directories on the way are carried"
    member, data = members[b"big"]
    assert (member.mode, data) == (0o600, b"big"), "a metadata-only copy comes with its data"
    assert members[b"moved/lib/c"][1] == b"c" and members[b"moved/lib/a"][1] == b"usr/lib/a"
    assert members[b"new2"][0].kind is Kind.HARDLINK and members[b"new2"][0].target == b"new"
    assert members[b"nested"][0].xattrs == {"user.x": b"1", "trusted.overlay.opaque": b"y"}
    for other, _ in members.values():
        if other.name != b"nested":
            assert not [key for key in other.xattrs if "overlay" in key], other


def golden_upper(place: Path) -> Dirs:
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    (dirs.lowers[0] / "etc").mkdir()
    (dirs.lowers[0] / "etc/gone").write_text("")
    etc = dirs.upper / "etc"
    etc.mkdir()
    os.mknod(etc / "gone", stat.S_IFCHR, 0)
    (etc / "motd").write_text("hello\n")
    os.chown(etc / "motd", 1000, 1001)
    os.chmod(etc / "motd", 0o4640)
    os.setxattr(etc / "motd", "user.k", b"v")
    os.link(etc / "motd", etc / "motd2")
    os.symlink("../proc/self/mounts", etc / "mtab")
    os.mknod(dirs.upper / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chmod(dirs.upper / "null", 0o666)
    for path in ("etc/motd", "etc/mtab", "null", "etc", "."):
        os.utime(dirs.upper / path, ns=(0, 1_600_000_000_500_000_000), follow_symlinks=False)
    return dirs


def test_golden_tree(place: Path) -> None:
    """One tree, one DiffID, for all time and on every machine.

    The expected members are written down here; that members become the right bytes is pinned by
    test_tar.py::test_golden_layer, which builds them without the writer. The digest is what sha256sum says of
    the file, after `tar -tv` had listed it as meant."""
    dirs = golden_upper(place)
    assert dirs.upper is not None
    summary = commit(dirs.lowers, dirs.upper, place / "layer.tar")
    t = 1_600_000_000_500_000_000
    motd = {"mode": 0o4640, "uid": 1000, "gid": 1001, "mtime_ns": t}
    expected = [
        m.directory(b"", mtime_ns=t),
        m.directory(b"etc", mtime_ns=t),
        m.file(b"etc/.wh.gone"),
        m.file(b"etc/motd", b"hello\n", xattrs={"user.k": b"v"}, **motd),
        (Member(b"etc/motd2", Kind.HARDLINK, target=b"etc/motd", **motd), b""),
        (Member(b"etc/mtab", Kind.SYMLINK, 0o777, mtime_ns=t, target=b"../proc/self/mounts"), b""),
        (Member(b"null", Kind.CHAR, 0o666, mtime_ns=t, rdev=(1, 3)), b""),
    ]
    assert m.read_bytes((place / "layer.tar").read_bytes()) == expected
    assert (place / "layer.tar").read_bytes() == m.tar_bytes(expected)
    assert summary.written.diff_id == GOLDEN_TREE


GOLDEN_TREE = "sha256:f71fa588ca8429bceba1df8615247ba41dd144c95dac63e1ce06dc922bb77f40"


def test_a_link_whose_partner_is_below_is_a_file(place: Path) -> None:
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    os.link(dirs.upper / "x", dirs.upper / "y") if (dirs.upper / "x").write_text("1") else None
    os.unlink(dirs.upper / "x")
    commit(dirs.lowers, dirs.upper, place / "layer.tar")
    found = {member.name: member.kind for member, _ in m.read_bytes((place / "layer.tar").read_bytes())}
    assert found == {b"": Kind.DIR, b"y": Kind.FILE}


def test_an_unchanged_file_is_carried_for_its_other_name(place: Path) -> None:
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    for root in (dirs.lowers[0], dirs.upper):
        (root / "b").write_text("1")
        os.utime(root / "b", ns=(0, 5))
    os.link(dirs.upper / "b", dirs.upper / "a")
    assert diff(dirs.lowers, dirs.upper) == ["A a"]
    commit(dirs.lowers, dirs.upper, place / "layer.tar")
    found = {member.name: member.kind for member, _ in m.read_bytes((place / "layer.tar").read_bytes())}
    assert found == {b"": Kind.DIR, b"a": Kind.FILE, b"b": Kind.HARDLINK}


def test_same_size_and_time_but_other_bytes_is_a_change(place: Path) -> None:
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    for root, text in ((dirs.lowers[0], "one"), (dirs.upper, "two")):
        (root / "f").write_text(text)
        os.utime(root / "f", ns=(0, 5))
    assert diff(dirs.lowers, dirs.upper) == ["C f"]


def test_nothing_changed_is_an_empty_layer(place: Path) -> None:
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    (dirs.upper / "d").mkdir()
    (dirs.lowers[0] / "d").mkdir()
    for root in (dirs.upper, dirs.lowers[0]):
        os.utime(root / "d", ns=(0, 0))
    summary = commit(dirs.lowers, dirs.upper, place / "layer.tar")
    assert (place / "layer.tar").read_bytes() == bytes(1024)
    # The DiffID of the empty layer, which docker and buildah know by heart.
    assert (
        summary.written.diff_id == "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"
    )


def test_made_up_times(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    (dirs.lowers[0] / "f").write_text("1")
    os.mknod(dirs.upper / "f", stat.S_IFCHR, 0)
    for epoch, seconds in (("", 0), ("86400", 86400)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        commit(dirs.lowers, dirs.upper, place / "layer.tar")
        found = {
            member.name: member.mtime_ns for member, _ in m.read_bytes((place / "layer.tar").read_bytes())
        }
        assert found[b".wh.f"] == seconds * 10**9
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "tomorrow")
    with pytest.raises(UsageError):
        commit(dirs.lowers, dirs.upper, place / "layer.tar")


def test_order_of_directories_does_not_matter(place: Path) -> None:
    """The same tree made in another order, with other inode numbers, gives the same bytes."""
    digests = set()
    for seed in range(3):
        dirs = Dirs(place, 1)
        assert dirs.upper is not None
        names = [f"n{number}" for number in range(60)]
        random.Random(seed).shuffle(names)
        for name in names:
            (dirs.upper / name).write_text(name[1:])
            os.utime(dirs.upper / name, ns=(0, 1))
        os.link(dirs.upper / "n7", dirs.upper / "z")
        os.utime(dirs.upper, ns=(0, 1))
        digests.add(commit(dirs.lowers, dirs.upper, place / "layer.tar").written.diff_id)
    assert len(digests) == 1


def test_deep_trees(place: Path) -> None:
    """Deeper than Python's stack and than descriptors last."""
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    deep = os.path.join(os.fsencode(dirs.upper), b"d/" * 1500)
    subprocess.run(["mkdir", "-p", deep], check=True)
    with open(deep + b"f", "wb") as file:
        file.write(b"x")
    summary = write_layer(layers(dirs.lowers, dirs.upper), os.open(os.devnull, os.O_WRONLY))
    assert summary.added == 1501


def test_work_grows_with_the_upper_only(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file is changed over a big base: only the directories on its way are ever listed."""
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    for number in range(50):
        (dirs.lowers[0] / f"d{number}/s").mkdir(parents=True)
        (dirs.lowers[0] / f"d{number}/s/f").write_text("1")
    (dirs.upper / "d7/s").mkdir(parents=True)
    (dirs.upper / "d7/s/f").write_text("22")
    listed: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(path), scandir(path))[1])
    write_layer(layers(dirs.lowers, dirs.upper), os.open(os.devnull, os.O_WRONLY))
    assert len(listed) <= 3 * 3


@pytest.mark.parametrize(
    "mark",
    [
        ("d", "trusted.overlay.redirect", b"../../etc"),
        ("d", "trusted.overlay.redirect", b"/../etc"),
        ("d", "trusted.overlay.redirect", b"x" * 300),
        ("f", "trusted.overlay.metacopy", b""),
    ],
)
def test_evil_uppers_are_errors(place: Path, mark: tuple[str, str, bytes]) -> None:
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    (dirs.upper / "d").mkdir()
    (dirs.upper / "f").write_text("1")
    os.setxattr(dirs.upper / mark[0], mark[1], mark[2])
    with pytest.raises(LayerError, match=f"^{mark[0]}: "):
        write_layer(layers(dirs.lowers, dirs.upper), os.open(os.devnull, os.O_WRONLY))


@pytest.mark.parametrize("target", [b"/etc", b"/out", b"/out/deeper"])
def test_redirects_cannot_leave_the_layers(place: Path, target: bytes) -> None:
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    os.symlink("/etc", dirs.lowers[0] / "out")
    (dirs.upper / "d").mkdir()
    os.setxattr(dirs.upper / "d", "trusted.overlay.redirect", target)
    assert diff(dirs.lowers, dirs.upper) == ["A d"]


def test_output_appears_whole_or_not_at_all(place: Path) -> None:
    out = place / "layer.tar"
    out.write_text("old")
    with pytest.raises(RuntimeError), output_file(str(out)) as fd:
        os.write(fd, b"half")
        raise RuntimeError
    assert out.read_text() == "old" and os.listdir(place) == ["layer.tar"]
    with output_file(str(out)) as fd:
        os.write(fd, b"new")
    assert out.read_text() == "new" and os.listdir(place) == ["layer.tar"]
    for bad in (place / "absent/layer.tar", place):
        with pytest.raises(UsageError), output_file(str(bad)):
            pass
    with output_file("/dev/null") as fd:
        os.write(fd, b"x")
    inside = os.open(place, os.O_RDONLY)
    (place / "sub").mkdir()
    for bad in (place / "l.tar", place / "sub/l.tar"):
        with pytest.raises(UsageError, match="upper directory"), output_file(str(bad), keep_out_of=inside):
            pass
    os.close(inside)


def packed(dirs: Dirs, out: Path, **options: object) -> tuple[Summary, dict[bytes, tuple[Member, bytes]]]:
    """Commits with `options`; the summary and the members by name."""
    assert dirs.upper is not None
    with output_file(str(out)) as fd:
        given_options = CommitOptions(**options)  # type: ignore[arg-type]
        summary = write_layer(layers(dirs.lowers, dirs.upper), fd, given_options)
    return summary, {member.name: (member, data) for member, data in m.read_bytes(out.read_bytes())}


def test_keep_unchanged(place: Path) -> None:
    """Copies that equal what lies below are dropped, or carried when they are to be kept."""
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    for root in (dirs.lowers[0], dirs.upper):
        for name in ("same", "touched", "d/same", "empty-dir/x"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(name)
        for name in ("same", "touched", "d/same", "d", "empty-dir"):
            os.utime(root / name, ns=(0, 7))
    (dirs.upper / "empty-dir/x").unlink()
    os.utime(dirs.upper / "empty-dir", ns=(0, 7))
    os.utime(dirs.upper / "touched", ns=(0, 8))
    summary, found = packed(dirs, place / "layer.tar")
    assert found.keys() == {b"", b"touched"}
    assert (summary.changed, summary.unchanged, summary.file_bytes) == (1, 2, len("touched"))
    summary, found = packed(dirs, place / "layer.tar", keep_unchanged=True)
    assert found.keys() == {b"", b"touched", b"same", b"d", b"d/same", b"empty-dir"}
    assert found[b"d/same"][1] == b"d/same"
    assert (summary.added, summary.changed, summary.unchanged) == (0, 1, 0)


def test_excluded_names_are_as_if_they_had_not_been_changed(place: Path) -> None:
    """Neither added nor changed nor deleted, with all below them; what a tree had there it keeps."""
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    low, upper, target = dirs.lowers[0], dirs.upper, place / "target"
    for name in ("cache/a", "cache/gone", "log/x", "etc/a.tmp", "etc/b"):
        (low / name).parent.mkdir(exist_ok=True)
        (low / name).write_text("old")
    subprocess.run(["cp", "-aT", low, target], check=True)
    for name in ("cache/a", "cache/new", "etc/a.tmp", "etc/c.tmp", "etc/keep.tmp", "etc/b", "tmp/deep/er"):
        (upper / name).parent.mkdir(exist_ok=True, parents=True)
        (upper / name).write_text("new")
    os.mknod(upper / "cache/gone", stat.S_IFCHR, 0)
    os.mknod(upper / "log", stat.S_IFCHR, 0)  # a whiteout of a directory
    (upper / "logs").write_text("a file")
    os.link(upper / "cache/new", upper / "linked")
    patterns = ("/cache", "*.tmp", "!keep.tmp", "/tmp/", "log/", "logs/")
    summary, found = packed(dirs, place / "layer.tar", exclude=patterns)
    assert found.keys() == {b"", b"etc", b"etc/b", b"etc/keep.tmp", b"linked", b"logs"}
    assert found[b"linked"][0].kind is Kind.FILE and found[b"linked"][1] == b"new", "its partner is not here"
    assert (summary.added, summary.changed, summary.deleted, summary.excluded) == (3, 2, 0, 5)
    before = snapshot(target)
    apply(place / "layer.tar", target)
    after = snapshot(target)
    for path in (b"cache", b"cache/a", b"cache/gone", b"log", b"log/x", b"etc/a.tmp"):
        assert after[path] == before[path]


@pytest.mark.parametrize("pattern", ["", "   ", "!"])
def test_patterns_that_mean_nothing(place: Path, pattern: str) -> None:
    with pytest.raises(UsageError, match="pattern"):
        packed(Dirs(place, 1), place / "layer.tar", exclude=(pattern,))


def test_a_pattern_is_a_name_whatever_its_first_character(place: Path) -> None:
    dirs = Dirs(place, 1)
    assert dirs.upper is not None
    for name in (b"#comment", b"\xff\n", b"kept"):
        (dirs.upper / os.fsdecode(name)).write_text("")
    _, found = packed(dirs, place / "layer.tar", exclude=("#comment", os.fsdecode(b"\xff*")))
    assert found.keys() == {b"", b"kept"}


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_tree, _tree, st.randoms(use_true_random=False), st.booleans())
def test_a_whole_tree_is_made_of_nothing(
    place: Path, old: Branch, new: Branch, choose: random.Random, with_upper: bool
) -> None:
    """`whole`: the layer over nothing is the merged tree, with and without an upper, and holds no
    whiteout."""
    base = Path(tempfile.mkdtemp(dir=place))
    lower, upper, target, expected = (base / name for name in ("lower", "upper", "target", "expected"))
    make(os.fsencode(lower), old)
    make(os.fsencode(expected), new if with_upper else old)
    if with_upper:
        UpperMaker(choose, TRUSTED).directory(os.fsencode(upper), old, new)
    target.mkdir()
    with output_file(str(base / "layer.tar")) as fd:
        stack = Stack([str(lower)], str(upper) if with_upper else None, XattrNames(TRUSTED))
        summary = write_layer(stack, fd, CommitOptions(whole=True))
    assert (summary.changed, summary.deleted, summary.unchanged) == (0, 0, 0)
    check_layout(base / "layer.tar")
    apply(base / "layer.tar", target)
    assert_equal(snapshot(expected), snapshot(target), labels=("merged", "applied"))
    shutil.rmtree(base)
