"""Idmapped mounts of a mount (mount_setattr(2) with MOUNT_ATTR_IDMAP, as runtimes make them of a root):
whoever works through one finds what he finds through one of a plain directory, and who works through the
mount itself what he finds in the directory itself. (Kernel overlayfs is no oracle: none can be made of it.)
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from layerfs.gate import passthrough
from tests.posix.calls import (
    AT_FDCWD,
    AT_SYMLINK_FOLLOW,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    err,
    fallocate,
    linkat,
    renameat2,
)
from tests.posix.place import forked
from tests.posix.test_acls import ACCESS, DEFAULT, acl, pack
from tests.support import mounts
from tests.support.mounts import Layerfs
from tests.support.stack import Dir, File, Hardlink, Stack, Symlink, Tree
from tests.support.tree import assert_equal, lowers_guard, snapshot

from .test_owners import _CLONE_NEWUSER, CAP_NET_RAW, FIRST, _libc, idmapped, user_namespace

pytestmark = pytest.mark.usefixtures("root")

GROUP = 33
#: No id in the namespace (`test_owners.COUNT`).
FOREIGN = 70_000


@dataclass(frozen=True)
class Person:
    """`inside`: in the user namespace whose ids the idmapped mount has."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    inside: bool = False

    def does(self, call: Callable[[], object], child: int) -> object:
        """What `call` returns in a process of this person's; `child`: one in the namespace."""
        space = os.open(f"/proc/{child}/ns/user", os.O_RDONLY)

        def in_child() -> object:
            if self.inside and _libc.setns(space, _CLONE_NEWUSER):
                raise OSError("setns")
            os.setgroups(list(self.groups))
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)
            return call()

        try:
            return forked(in_child)
        finally:
            os.close(space)


PEOPLE = {
    "inner-root": Person(0, 0, (), True),
    "inner-user": Person(1000, 1000, (), True),
    "inner-member": Person(1000, 1000, (GROUP,), True),
    "inner-by-gid": Person(1000, GROUP, (), True),
    "inner-stranger": Person(5, 5, (), True),
    "outer-twin": Person(FIRST + 1000, FIRST + 1000, (FIRST + GROUP,)),
    "outer-root": Person(0, 0),
    "outer-user": Person(1000, 1000, (GROUP,)),
    "outer-stranger": Person(FOREIGN, FOREIGN),
}

WITH_OTHERS = pack(acl(7, 5, 1, {7: 4, 1000: 6}))
MINE = {"uid": 1000, "gid": 1000}


def tree_of_one() -> Tree:
    return {
        "open": Dir(mode=0o777),
        "shared": Dir(mode=0o2777, gid=GROUP),
        "acl": Dir(mode=0o777, xattrs={DEFAULT: WITH_OTHERS}),
        "closed": Dir(mode=0o700, uid=7, gid=7),
        "closed/f": File(data=b"hidden", mode=0o666),
        "sticky": Dir(mode=0o1777),
        "sticky/theirs": File(data=b"t", mode=0o666, uid=7, gid=7),
        "sticky/mine": File(data=b"m", **MINE),
        "mine": File(data=b"mine" * 1000, **MINE),
        "cut": File(data=b"c" * 5000, **MINE),
        "moved": File(data=b"moved", **MINE),
        "changed": File(data=b"changed", **MINE),
        "one": File(data=b"1", **MINE),
        "two": File(data=b"2", uid=1000, gid=GROUP),
        "group": File(data=b"g", mode=0o775, uid=1000, gid=GROUP),
        "setgid": File(data=b"s", mode=0o2775, uid=1000, gid=GROUP),
        "setgid-dir": Dir(mode=0o2775, uid=1000, gid=GROUP),
        "setuid": File(data=b"#!", mode=0o6777, **MINE),
        "program": File(data=b"#!", mode=0o755, **MINE),
        "dir": Dir(**MINE),
        "dir/k": File(data=b"k", **MINE),
        "theirs": File(data=b"t", mode=0o600, uid=7, gid=7),
        "by-acl": File(data=b"a", mode=0o640, uid=7, gid=7, xattrs={ACCESS: WITH_OTHERS}),
        "any": File(data=b"any", mode=0o666, xattrs={"user.a": b"1", "trusted.a": b"2"}),
        "foreign": File(data=b"f", mode=0o666, uid=FOREIGN, gid=FOREIGN),
        "link": Symlink(target="mine", uid=9, gid=9),
        "my-link": Symlink(target="mine", **MINE),
        "h1": File(data=b"linked", **MINE),
        "h2": Hardlink("h1"),
    }


def whole_tree() -> Tree:
    """One for each person."""
    found: dict[object, object] = {}
    for person in PEOPLE:
        found[person] = Dir(mode=0o777)
        for name, entry in tree_of_one().items():
            if isinstance(entry, Hardlink):
                entry = Hardlink(f"{person}/{entry.to}")
            found[f"{person}/{name}"] = entry
    return found  # type: ignore[return-value]


# -- what everybody does -----------------------------------------------------------------------------


def shown(path: str) -> tuple[object, ...]:
    st = os.lstat(path)
    return st.st_uid, st.st_gid, oct(st.st_mode), stat.S_ISDIR(st.st_mode) or (st.st_size, st.st_nlink)


def notes() -> tuple[dict[str, object], Callable[[str, Callable[[], object]], None]]:
    """What calls give, by what they are called, and how to add one: its value, or the name of its errno."""
    found: dict[str, object] = {}

    def note(what: str, call: Callable[[], object]) -> None:
        try:
            found[what] = call()
        except OSError as error:
            found[what] = errno.errorcode[error.errno or 0]

    return found, note


def work(root: str) -> dict[str, object]:
    """What each thing gives: a value, or the name of an errno."""
    os.umask(0o022)
    os.chdir(root)
    found, note = notes()

    def made(path: str, make: Callable[[str], object]) -> None:
        def call() -> object:
            fd = make(path)
            if isinstance(fd, int):
                os.close(fd)
            return shown(path)

        note(f"make {path}", call)

    def changed(what: str, path: str, change: Callable[[str], object]) -> None:
        note(f"{what} {path}", lambda: (change(path), shown(path)))

    _look(note)
    _make(made)
    _change(note, changed)
    _use(note, changed)
    return found


Note = Callable[[str, Callable[[], object]], None]
Changed = Callable[[str, str, Callable[[str], object]], None]


def _look(note: Note) -> None:
    for name in tree_of_one():
        note(f"lstat {name}", lambda name=name: shown(name))
        for mode in (os.R_OK, os.W_OK, os.X_OK):
            note(f"access {mode} {name}", lambda name=name, mode=mode: os.access(name, mode))
    for name in ("theirs", "by-acl", "foreign", "any", "closed/f", "mine"):
        for flags in (os.O_RDONLY, os.O_WRONLY):
            note(f"open {flags} {name}", lambda name=name, flags=flags: os.close(os.open(name, flags)))
    for name in ("any", "by-acl", "acl", "mine"):
        note(f"listxattr {name}", lambda name=name: sorted(os.listxattr(name)))
        for attribute in ("user.a", "trusted.a", ACCESS, DEFAULT, "security.capability", "user.none"):
            note(f"{attribute} {name}", lambda name=name, attr=attribute: os.getxattr(name, attr))
    note("listdir closed", lambda: os.listdir("closed"))


def _tmpfile(path: str) -> int:
    fd = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"tmp")
    linkat(AT_FDCWD, f"/proc/self/fd/{fd}", path, AT_SYMLINK_FOLLOW)
    return fd


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def _make(made: Callable[[str, Callable[[str], object]], None]) -> None:
    for where in ("open", "shared", "acl", "dir", "sticky"):
        made(f"{where}/file", lambda path: os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o2775))
        made(f"{where}/plain", lambda path: os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        made(f"{where}/dir", lambda path: os.mkdir(path, 0o777))
        made(f"{where}/symlink", lambda path: os.symlink("x", path))
        made(f"{where}/fifo", lambda path: os.mkfifo(path, 0o666))
        made(f"{where}/node", lambda path: os.mknod(path, stat.S_IFREG | 0o640))
        made(f"{where}/device", lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)))
        made(f"{where}/socket", _socket)
        made(f"{where}/tmpfile", _tmpfile)


def _change(note: Note, changed: Changed) -> None:
    for name in ("setgid", "setgid-dir"):
        changed("set an acl of", name, lambda path: os.setxattr(path, ACCESS, WITH_OTHERS))
        note(f"acl of {name}", lambda name=name: os.getxattr(name, ACCESS))
    for name in ("mine", "group", "theirs", "dir", "foreign", "any", "setgid-dir"):
        changed("chmod", name, lambda path: os.chmod(path, 0o2775))
        changed("utime", name, lambda path: os.utime(path, ns=(10**18, 10**18)))
        changed("touch", name, os.utime)
        changed("set", name, lambda path: os.setxattr(path, "user.b", b"b", os.XATTR_CREATE))
        changed("trust", name, lambda path: os.setxattr(path, "trusted.b", b"b"))
        changed("give an acl to", name, lambda path: os.setxattr(path, ACCESS, WITH_OTHERS))
        note(f"acl of {name}", lambda name=name: os.getxattr(name, ACCESS))
        changed("give a default acl to", name, lambda path: os.setxattr(path, DEFAULT, WITH_OTHERS))
        changed("take the acl of", name, lambda path: os.removexattr(path, ACCESS))
    changed("empower", "program", lambda path: os.setxattr(path, "security.capability", CAP_NET_RAW))
    note("its power", lambda: os.getxattr("program", "security.capability"))
    for ids in ((-1, GROUP), (-1, FIRST + GROUP), (1000, -1), (7, 8), (FOREIGN, -1), (-1, FOREIGN), (-1, -1)):
        for name in ("changed", "dir", *(["setuid"] if ids != (-1, -1) else [])):
            changed(f"chown {ids}", name, lambda path, ids=ids: os.chown(path, *ids))
        changed(f"lchown {ids}", "my-link", lambda path, ids=ids: os.lchown(path, *ids))


def _write(path: str, data: bytes = b"more", at: int = 3) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.pwrite(fd, data, at)
    os.close(fd)


def _copy(path: str) -> None:
    source, target = os.open("any", os.O_RDONLY), os.open(path, os.O_WRONLY)
    os.copy_file_range(source, target, 3, 0, 10)


def _allocate(path: str) -> None:
    fallocate(os.open(path, os.O_WRONLY), 0, 0, 9000)


def _use(note: Note, changed: Changed) -> None:
    for name in ("mine", "one", "setuid", "any", "theirs", "foreign", "h1", "by-acl", "link", "program"):
        changed("write to", name, _write)
    note("its power then", lambda: os.getxattr("program", "security.capability"))
    note("the other name", lambda: shown("h2"))
    note("what it holds", lambda: Path("h2").read_bytes())
    for name in ("cut", "foreign", "theirs"):
        changed("cut", name, lambda path: os.truncate(path, 3))
        changed("allocate in", name, _allocate)
        changed("copy into", name, _copy)
    for name in ("mine", "any", "foreign", "theirs", "my-link"):
        changed("link", f"open/{name}", lambda path: os.link(path[5:], path, follow_symlinks=False))
    for name in ("moved", "dir", "theirs", "my-link"):
        changed("move", f"shared/{name}", lambda path: os.rename(path[7:], path))
    changed("exchange", "two", lambda path: renameat2("one", path, RENAME_EXCHANGE))
    changed("not replace", "two", lambda path: renameat2("one", path, RENAME_NOREPLACE))
    for name in ("sticky/theirs", "sticky/mine", "closed/f", "foreign", "h1", "shared/dir/k"):
        note(f"unlink {name}", lambda name=name: os.unlink(name))
    note("rmdir", lambda: os.rmdir("shared/dir"))
    note("names", lambda: {where: sorted(os.listdir(where)) for where in (".", "open", "shared", "sticky")})


# -- the comparison ----------------------------------------------------------------------------------


def why_not(stack: Stack) -> str | None:
    """Why no idmapped mount can be had here of a FUSE file system whose daemon asks for it."""
    if reason := mounts.why_no_layerfs():
        return reason
    if mounts.gate == "off":
        return "without the gate nobody asks for idmapped mounts"
    if tuple(int(n) for n in re.findall(r"\d+", os.uname().release)[:2]) < (6, 12):
        return "the kernel makes no idmapped mounts of FUSE (Linux 6.12)"
    if (number := refusal(stack.dir, stack)) is not None:
        return f"no idmapped mount of a plain directory here: {errno.errorcode[number]}"
    return None


def refusal(of: Path, stack: Stack) -> int | None:
    """errno of an attempt to make an idmapped mount."""
    target = stack.dir / "tried"
    target.mkdir(exist_ok=True)
    try:
        with user_namespace() as child, idmapped(of, target, child):
            return None
    except OSError as error:
        return error.errno


@dataclass(frozen=True)
class Both:
    """A mount and a plain directory that hold the same, and an idmapped mount of each."""

    mount: Layerfs
    mapped: Path
    plain: Path
    plain_mapped: Path
    #: in the namespace
    child: int


@contextmanager
def both(stack: Stack, tree: Tree, options: str = "", arrangement: str = "all-lower") -> Iterator[Both]:
    if reason := why_not(stack):
        pytest.skip(reason)
    mapped, plain, plain_mapped = (stack.dir / name for name in ("mapped", "plain", "plain-mapped"))
    for path in (mapped, plain, plain_mapped):
        path.mkdir()
    stack.write(plain, tree)
    stack.populate(tree, arrangement)
    for top in (plain, *stack.lowers, stack.upper):
        if top is not None:
            os.chmod(top, 0o755)
    mount = Layerfs(stack, options)
    with user_namespace() as child, lowers_guard(map(str, stack.lowers)), mount:
        with idmapped(mount.mnt, mapped, child), idmapped(plain, plain_mapped, child):
            yield Both(mount, mapped, plain, plain_mapped, child)


def same(both: Both, name: str = ".", *, through_both: bool = True) -> None:
    """The same in the mount as in the plain directory; `through_both`: as the idmapped mounts show it, too.
    (What has an owner that those do not know, root of the host may not look into there.)"""
    ways = {"itself": (both.plain, both.mount.mnt)}
    if through_both:
        ways["idmapped"] = (both.plain_mapped, both.mapped)
    for way, (plain, mounted) in ways.items():
        labels = (f"plain, {way}", f"layerfs, {way}")
        assert_equal(snapshot(plain / name), snapshot(mounted / name), ignore=["mtime_ns"], labels=labels)


@pytest.mark.parametrize("arrangement", ["all-lower", "all-upper", "merged"])
@pytest.mark.parametrize("way", ["idmapped", "itself"])
def test_as_with_a_plain_directory(way: str, arrangement: str, make_stack: type[Stack]) -> None:
    stack = make_stack(n_lowers={"merged": 3}.get(arrangement, 1))
    with both(stack, whole_tree(), arrangement=arrangement) as b:
        same(b)
        roots = (b.plain_mapped, b.mapped) if way == "idmapped" else (b.plain, b.mount.mnt)
        for name, person in PEOPLE.items():
            want, got = (
                person.does(lambda root=root, name=name: work(f"{root}/{name}"), b.child) for root in roots
            )
            assert got == want, name
            same(b, name, through_both=way == "idmapped")
    with b.mount:
        assert_equal(snapshot(b.plain), snapshot(b.mount.mnt), ignore=["mtime_ns"], message="remounted")


# -- other kinds of mounts ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["data=passthrough", "xattr_permissions=1", "userxattr", "noacl"])
def test_whatever_the_mount_is_like(options: str, make_stack: type[Stack]) -> None:
    if options == "data=passthrough" and (reason := passthrough.obstacle()):
        pytest.skip(reason)
    person = PEOPLE["inner-member"]

    def use(root: Path) -> object:
        os.umask(0)
        os.chdir(root / "one")
        Path("open/new").write_text("new")
        os.mkdir("shared/dir")
        Path("mine").write_text("other")
        os.chown("changed", -1, GROUP)
        os.chmod("group", 0o2750)
        os.rename("dir", "open/dir")
        names = ("open/new", "shared/dir", "mine", "changed", "group", "open/dir", "theirs", "link")
        return [(shown(name), sorted(os.listxattr(name, follow_symlinks=False))) for name in names]

    contents: Tree = {"one": Dir(mode=0o777), **{f"one/{name}": e for name, e in tree_of_one().items()}}
    del contents["one/h2"]
    if options == "noacl":
        for name in ("one/acl", "one/by-acl"):
            contents[name] = dataclasses.replace(contents[name], xattrs={})
    with both(make_stack(), contents, options) as b:
        want, got = (person.does(lambda r=r: use(r), b.child) for r in (b.plain_mapped, b.mapped))
        assert got == want
        same(b)


def test_read_only(make_stack: type[Stack]) -> None:
    """Files and directories are opened without asking."""
    with both(make_stack(writable=False), whole_tree()) as b:
        same(b)
        for person in PEOPLE.values():
            want, got = (
                person.does(lambda r=r: _looked(r / "inner-user"), b.child)
                for r in (b.plain_mapped, b.mapped)
            )
            assert got == want
        with pytest.raises(OSError, match="Read-only"):
            PEOPLE["inner-root"].does(lambda: os.mkdir(b.mapped / "new"), b.child)


def _looked(root: Path) -> dict[str, object]:
    os.chdir(root)
    found, note = notes()

    _look(note)
    return {what: seen for what, seen in found.items() if not what.startswith(("access 2", "open 1"))}


def test_a_file_capability_works_through_it(make_stack: type[Stack]) -> None:
    contents: Tree = {
        "cat": File(
            data=Path("/bin/cat").read_bytes(), mode=0o755, xattrs={"security.capability": CAP_NET_RAW}
        )
    }

    def permitted(root: Path) -> str:
        status = subprocess.run(
            [root / "cat", "/proc/self/status"], capture_output=True, text=True, check=True
        )
        return next(line for line in status.stdout.splitlines() if line.startswith("CapPrm:"))

    with both(make_stack(), contents) as b:
        for person in ("inner-user", "outer-user"):
            got, want = (
                PEOPLE[person].does(lambda r=r: permitted(r), b.child) for r in (b.mapped, b.plain_mapped)
            )
            assert got == want, person
        assert PEOPLE["inner-user"].does(lambda: permitted(b.mapped), b.child) == f"CapPrm:\t{1 << 13:016x}"


@pytest.mark.parametrize("who", ["inner-member", "inner-root", "outer-user"])
def test_setgid_of_what_its_group_may_not_execute(who: str, make_stack: type[Stack]) -> None:
    """A deviation. It is not known through which mount a writer came, so his groups are compared with the
    file's as it is stored. Such a bit gives nobody anything."""
    contents: Tree = {"f": File(data=b"f", mode=0o2767, gid=GROUP)}
    with both(make_stack(), contents) as b:
        for root in (b.plain_mapped, b.mapped):
            PEOPLE[who].does(lambda root=root: _write(f"{root}/f"), b.child)
        in_stored_group = who == "outer-user"
        assert stat.S_IMODE((b.plain / "f").stat().st_mode) == (0o767 if in_stored_group else 0o2767)
        assert stat.S_IMODE((b.mount.mnt / "f").stat().st_mode) == (0o2767 if in_stored_group else 0o767)


# -- who asks ----------------------------------------------------------------------------------------


def test_who_is_told_what_a_mount_is(make_stack: type[Stack]) -> None:
    """Root, by whatever way, and nobody else, whatever he is in a namespace."""
    with both(make_stack(), {}) as b:
        for who, person in PEOPLE.items():
            for root in (b.mount.mnt, b.mapped):
                told = person.does(lambda root=root: err(os.getxattr, root, "layerfs.mount"), b.child)
                assert (told == "") == (who == "outer-root"), (who, root)
        for command in (["stat", "--json"], ["diff"]):
            done = subprocess.run(
                [*mounts.layerfs_command(), command[0], b.mapped, *command[1:]],
                capture_output=True,
                text=True,
            )
            assert (done.returncode, done.stderr) == (0, "")


def test_an_ordinary_user_owns_his_mount(make_stack: type[Stack], ordinary_user: tuple[int, int]) -> None:
    uid, gid = ordinary_user
    stack = make_stack(owner=ordinary_user, prefix="user.overlay.")
    if reason := why_not(stack):
        pytest.skip(reason)

    def use() -> object:
        Path(stack.mnt / "f").write_text("x")
        os.setxattr(stack.mnt / "f", "user.a", b"1")
        st = os.stat(stack.mnt / "f")
        return os.getxattr(stack.mnt, "layerfs.gate"), os.listxattr(stack.mnt / "f"), (st.st_uid, st.st_gid)

    with Layerfs(stack, as_user=ordinary_user):
        assert forked(use, uid=uid, gid=gid) == (b"on", ["user.a"], ordinary_user)


# -- where there are none ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["gate=off", "allow_root", "allow_root,noacl"])
def test_where_nobody_asks_for_them(options: str, make_stack: type[Stack]) -> None:
    """libfuse holds `allow_root` by the uid of every request, which would not be told any more."""
    stack = make_stack()
    if reason := why_not(stack):
        pytest.skip(reason)
    with Layerfs(stack, options) as m:
        assert refusal(m.mnt, stack) == errno.EINVAL
        (m.mnt / "f").write_text("x")
        os.setxattr(m.mnt / "f", "trusted.a", b"1")
        assert os.listxattr(m.mnt / "f") == ["trusted.a"]
        assert os.getxattr(m.mnt, "layerfs.gate")


@contextmanager
def mounted_in_a_pid_namespace(m: Layerfs, *options: str) -> Iterator[int]:
    """Pid of a shell in it. `options` of unshare(1)."""
    script = '"$@" && echo mounted && read line; umount "$MNT"'
    argv = ["unshare", "--pid", "--fork", *options, "sh", "-c", script, "sh", *m.command()]
    m.log.touch()
    env = m.env() | {"MNT": str(m.mnt)}
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == "mounted\n"
        yield int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())
    finally:
        holder.communicate("\n", timeout=20)
        assert m.wait_gone()


def test_where_the_daemon_cannot_see_who_asks(make_stack: type[Stack]) -> None:
    """In a pid namespace whose /proc is that of another: requests tell who makes them, as ever."""
    stack = make_stack()
    if reason := why_not(stack):
        pytest.skip(reason)
    m = Layerfs(stack)
    with mounted_in_a_pid_namespace(m):
        assert refusal(m.mnt, stack) == errno.EINVAL
        assert not err(os.getxattr, m.mnt, "layerfs.mount")
        assert forked(lambda: err(os.getxattr, m.mnt, "layerfs.mount"), uid=1000, gid=1000)
        (m.mnt / "f").write_text("x")
        os.setxattr(m.mnt / "f", "trusted.a", b"1")
        assert os.listxattr(m.mnt / "f") == ["trusted.a"]
        assert forked(lambda: os.listxattr(m.mnt / "f"), uid=1000, gid=1000) == []


def test_who_comes_from_outside_of_the_pid_namespace(make_stack: type[Stack]) -> None:
    """The daemon sees him not at all: what is his own is, but he is nobody."""
    stack = make_stack()
    if reason := why_not(stack):
        pytest.skip(reason)
    os.chmod(stack.upper, 0o777)  # type: ignore[arg-type]
    m = Layerfs(stack)
    with mounted_in_a_pid_namespace(m, "--mount-proc") as pid:
        root = Path(f"/proc/{pid}/root{m.mnt}")
        assert err(os.getxattr, root, "layerfs.mount")
        directory = os.open(root, os.O_PATH | os.O_DIRECTORY)
        try:

            def make() -> object:
                os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
                return os.stat("f", dir_fd=directory).st_uid

            assert forked(make, uid=1000, gid=1000) == 1000
        finally:
            os.close(directory)
