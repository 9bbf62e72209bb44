"""Every way to be refused: the exit code, exactly one line on stderr, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.support import mounts

from .conftest import USER, Box

Arguments = Callable[[Box], list[str]]


def plain(box: Box) -> list[str]:
    return ["--lower", box("a"), "--upper", box("u"), "--work", box("w"), box("m")]


def layers(*lowers: str, upper: str = "u", work: str | None = "w", on: str = "m") -> Arguments:
    def arguments(box: Box) -> list[str]:
        argv = [word for lower in lowers for word in ("--lower", box(lower))]
        argv += ["--upper", box(upper)]
        if work is not None:
            argv += ["--work", box(work)]
        return [*argv, box(on)]

    return arguments


def words(*argv: str) -> Arguments:
    return lambda box: list(argv)


def with_options(*more: str) -> Arguments:
    return lambda box: [*more, *plain(box)]


@dataclass
class Case:
    """`said` must be in the one line, after `{NAME}` became the path of NAME in the box."""

    name: str
    arguments: Arguments
    said: str
    code: int = 1
    prepare: Callable[[Box], object] = lambda box: None
    #: "root", "user" or both.
    who: str = "both"

    def __str__(self) -> str:
        return self.name


def a_file(name: str) -> Callable[[Box], object]:
    def make(box: Box) -> None:
        (box.dir / name).write_text("file")
        box.own(box.dir / name)

    return make


def directories(*names: str, mode: int = 0o755) -> Callable[[Box], object]:
    return lambda box: [box.mkdir(name, mode) for name in names]


def links(*pairs: tuple[str, str]) -> Callable[[Box], object]:
    return lambda box: [os.symlink(box(target), box(name)) for name, target in pairs]


def mounted(name: str, kind: str, *dirs: str, flags: int = 0) -> Callable[[Box], object]:
    def make(box: Box) -> None:
        mounts.mount("none", box.mkdir(name), kind, flags)
        for each in dirs:
            box.mkdir(f"{name}/{each}")

    return make


def bound(source: str, name: str, read_only: bool = False) -> Callable[[Box], object]:
    return lambda box: mounts.bind(box(source), box.mkdir(name), read_only=read_only)


def kernel_overlay(upper: str, work: str) -> Callable[[Box], object]:
    def make(box: Box) -> None:
        if reason := mounts.why_no_kernel_overlay():
            pytest.skip(reason)
        box.mkdir("k")
        for each in ("ku", "kw"):
            box.mkdir(each)
        # Options with commas and colons must be recognised too.
        mounts.mount_overlay(box("k"), [box("a")], box(upper), box(work))

    return make


def root_owned(name: str) -> Callable[[Box], object]:
    return lambda box: os.chown(box(name), 0, 0)


def sticky(box: Box) -> None:
    os.chmod(box.mkdir("sticky"), 0o1777)
    os.chown(box("sticky"), 0, 0)


CASES = [
    # the command line
    Case("no lower", lambda box: [box("m")], "at least one lower layer", 2),
    Case("no mount point", lambda box: ["--lower", box("a")], "MOUNTPOINT", 2),
    Case("two mount points", lambda box: [*plain(box), box("m"), "more"], "too many names: more", 2),
    Case("unknown flag", with_options("--frobnicate"), "--frobnicate", 2),
    Case("unknown option", with_options("-o", "frob=1"), "unknown mount option: frob=1", 2),
    Case("fuse-overlayfs option", with_options("-o", "fast_ino=1"), "fast_ino=1", 2),
    Case("bad value", with_options("-o", "metacopy=perhaps"), "metacopy: must be one of on, off", 2),
    Case(
        "owner mapping", with_options("-o", "uidmapping=0:1"), "uidmapping=0:1: must be STORED:SHOWN:COUNT", 2
    ),
    Case("passthrough", with_options("-o", "data=passthrough", "--gate", "off"), "takes the native gate", 2),
    Case("data-only", lambda box: ["-o", f"lowerdir={box('a')}::{box('b')}", box("m")], "data-only", 2),
    Case("both lowers", with_options("-o", "lowerdir=/x"), "--lower and -o lowerdir=", 2),
    Case("both uppers", with_options("-o", "upperdir=/x"), "--upper and -o upperdir=", 2),
    Case("work alone", lambda box: ["--lower", box("a"), "--work", box("w"), box("m")], "needs an upper", 2),
    Case("ephemeral and upper", with_options("--ephemeral"), "--ephemeral makes its own", 2),
    Case("empty lower", with_options("--lower", ""), "empty path", 2),
    Case("empty mount point", lambda box: ["--lower", box("a"), ""], "empty name", 2),
    # layers
    Case("missing lower", layers("a", "nope"), "lower layer {nope}: no such directory"),
    Case("lower is a file", layers("f"), "lower layer {f}: not a directory", prepare=a_file("f")),
    Case("lower is a dangling link", layers("l"), "lower layer {l}: no such", prepare=links(("l", "nope"))),
    Case(
        "lower is a link to itself",
        layers("l"),
        "lower layer {l}: Too many levels",
        prepare=links(("l", "l")),
    ),
    Case(
        "unreadable lower",
        layers("x"),
        "lower layer {x}: cannot be read",
        prepare=directories("x", mode=0o311),
        who="user",
    ),
    Case(
        "unsearchable lower",
        layers("x"),
        "lower layer {x}: cannot be read",
        prepare=directories("x", mode=0o644),
        who="user",
    ),
    Case("missing upper", layers("a", upper="nope"), "upper directory {nope}: no such directory"),
    Case(
        "upper is a file", layers("a", upper="f"), "upper directory {f}: not a directory", prepare=a_file("f")
    ),
    Case("missing work", layers("a", work="nope"), "work directory {nope}: no such directory"),
    Case(
        "no place for a work directory",
        layers("a", upper="p/u", work=None),
        "--work DIR names another",
        prepare=lambda box: (box.mkdir("p"), box.mkdir("p/u"), os.chmod(box("p"), 0o555)),
        who="user",
    ),
    Case("a newline in a name", layers("a\nb"), "no such directory"),
    Case("bytes that are no text", layers("a\udcff"), "no such directory"),
    # relations
    Case("upper is lower", layers("a", upper="a"), "is also the lower layer"),
    Case(
        "upper is lower by another name",
        layers("l", upper="a"),
        "is also the lower layer",
        prepare=links(("l", "a")),
    ),
    Case(
        "upper inside lower",
        layers("a", upper="a/u"),
        "is inside the lower layer",
        prepare=directories("a/u"),
    ),
    Case("lower inside upper", layers("u/x"), "is inside the upper directory", prepare=directories("u/x")),
    Case(
        "upper inside a bind of lower",
        layers("bind", upper="a/u"),
        "is inside the lower layer",
        prepare=lambda box: (directories("a/u")(box), bound("a", "bind")(box)),
        who="root",
    ),
    Case("work is lower", layers("a", work="a"), "is also the lower layer"),
    Case(
        "work inside lower", layers("a", work="a/w"), "is inside the lower layer", prepare=directories("a/w")
    ),
    Case("lower inside work", layers("w/x"), "is inside the work directory", prepare=directories("w/x")),
    Case("upper is work", layers("a", work="u"), "upper and work directory are the same"),
    Case(
        "work inside upper",
        layers("a", work="u/w"),
        "is inside the upper directory",
        prepare=directories("u/w"),
    ),
    Case(
        "upper inside work",
        layers("a", upper="w/u"),
        "is inside the work directory",
        prepare=directories("w/u"),
    ),
    Case("upper is the mount point", layers("a", on="u"), "is inside the mount point"),
    Case(
        "upper inside the mount point",
        layers("a", upper="m/u"),
        "is inside the mount point",
        prepare=directories("m/u"),
    ),
    Case(
        "work inside the mount point",
        layers("a", work="m/w"),
        "is inside the mount point",
        prepare=directories("m/w"),
    ),
    Case(
        "mount point inside upper",
        layers("a", on="u/m"),
        "is inside the upper directory",
        prepare=directories("u/m"),
    ),
    Case(
        "mount point inside work",
        layers("a", on="w/m"),
        "is inside the work directory",
        prepare=directories("w/m"),
    ),
    # file systems
    Case(
        "no xattrs",
        layers("a", upper="r/u", work="r/w"),
        "does not keep extended attributes",
        prepare=mounted("r", "ramfs", "u", "w"),
        who="root",
    ),
    Case(
        "user xattrs refused",
        lambda box: ["-o", "userxattr", *layers("a", upper="r/u", work="r/w")(box)],
        "does not keep user.* attributes",
        prepare=mounted("r", "ramfs", "u", "w"),
        who="root",
    ),
    Case(
        "work on another file system",
        layers("a", work="t/w"),
        "not on the same mounted file system",
        prepare=mounted("t", "tmpfs", "w"),
        who="root",
    ),
    Case(
        "work on another mount",
        layers("a", work="bw"),
        "not on the same mounted file system",
        prepare=bound("w", "bw"),
        who="root",
    ),
    Case(
        "read-only upper",
        layers("a", upper="p/u", work="p/w"),
        "read-only file system",
        prepare=lambda box: (directories("q", "q/u", "q/w")(box), bound("q", "p", read_only=True)(box)),
        who="root",
    ),
    Case(
        "upper not ours",
        layers("a"),
        "upper directory {u}: cannot be written",
        prepare=root_owned("u"),
        who="user",
    ),
    Case(
        "work not ours",
        layers("a"),
        "work directory {w}: cannot be written",
        prepare=root_owned("w"),
        who="user",
    ),
    # held by others
    Case(
        "upper under a kernel overlay",
        layers("a", upper="ku"),
        "in use by the kernel overlay mounted on {k}",
        prepare=kernel_overlay("ku", "kw"),
        who="root",
    ),
    Case(
        "work under a kernel overlay",
        layers("a", work="kw"),
        "in use by the kernel overlay mounted on {k}",
        prepare=kernel_overlay("ku", "kw"),
        who="root",
    ),
    Case(
        "volatile mark",
        layers("a"),
        "mark of a volatile mount",
        prepare=directories("w/work", "w/work/incompat", "w/work/incompat/volatile"),
    ),
    # the mount point and the daemon's own needs
    Case("missing mount point", layers("a", on="nope"), "mount point {nope}: no such directory"),
    Case(
        "mount point is a file", layers("a", on="f"), "mount point {f}: not a directory", prepare=a_file("f")
    ),
    Case(
        "mount point not ours",
        layers("a"),
        "mount point {m}: not writable",
        prepare=root_owned("m"),
        who="user",
    ),
    Case(
        "sticky mount point",
        layers("a", on="sticky"),
        "{sticky}: a sticky directory",
        prepare=sticky,
        who="user",
    ),
    Case("allow_other", with_options("-o", "allow_other"), "user_allow_other", who="user"),
    Case(
        "no fusermount3",
        plain,
        "fusermount3 is not installed",
        who="user",
        prepare=lambda box: box.env.update(PATH="/nowhere"),
    ),
    Case("log that cannot be written", with_options("--log", "/proc/nope/log"), "log file /proc/nope/log"),
]


def everything(box: Box) -> set[str]:
    return {os.path.join(top, name) for top, dirs, files in os.walk(box.dir) for name in dirs + files}


def assert_refused(
    box: Box,
    done: subprocess.CompletedProcess[str],
    code: int,
    said: str,
    before: set[str],
    mounts_before: object,
) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.endswith("\n"), done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr
    assert box.mounted() == mounts_before
    assert not box.daemons()
    assert box.is_free("u") and box.is_free("w")
    assert everything(box) == before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_refused(box: Box, case: Case) -> None:
    if case.who not in ("both", "root" if box.is_root else "user"):
        pytest.skip(f"for {case.who}")
    if case.name == "allow_other" and "user_allow_other" in open("/etc/fuse.conf").read().split("\n"):
        pytest.skip("allowed on this machine")
    case.prepare(box)
    before, mounts_before = everything(box), box.mounted()
    done = box.layerfs("mount", *case.arguments(box))
    said = case.said
    for name in ("nope", "sticky", "f", "l", "x", "u", "w", "m", "k"):
        said = said.replace(f"{{{name}}}", box(name))
    assert_refused(box, done, case.code, said, before, mounts_before)


def test_too_many_lowers(box: Box) -> None:
    before, mounts_before = everything(box), box.mounted()
    lowers = [word for _ in range(200) for word in ("--lower", box("a"))]
    done = box.run("prlimit", "--nofile=128:128", *mounts.layerfs_command(), "mount", *lowers, box("m"))
    assert_refused(box, done, 1, "200 lower layers are too many: at most 64", before, mounts_before)


@pytest.mark.parametrize(
    ("device", "said", "who"),
    [
        (None, "/dev/fuse does not exist", "root"),
        ("mknod -m 0600 /dev/fuse c 10 229", "/dev/fuse: permission denied", "user"),
        ("mknod -m 0666 /dev/fuse c 10 254", "this kernel has no FUSE", "root"),
    ],
)
def test_no_fuse_device(box: Box, device: str | None, said: str, who: str) -> None:
    if os.geteuid() != 0 or who != ("root" if box.is_root else "user"):
        pytest.skip(f"for {who}, by root")
    before, mounts_before = everything(box), box.mounted()
    script = "mount -t tmpfs -o mode=755 none /dev && mknod -m 0666 /dev/null c 1 3 && "
    if device:
        script += f"{device} && "
    become = "" if box.is_root else f"setpriv --reuid {USER} --regid {USER} --clear-groups "
    script += f'exec {become} "$@"'
    argv = ["unshare", "-m", "sh", "-c", script, "sh", *mounts.layerfs_command(), "mount", *plain(box)]
    uid, box.uid = box.uid, 0
    try:
        done = box.run(*argv)
    finally:
        box.uid = uid
    assert_refused(box, done, 1, said, before, mounts_before)


@pytest.mark.parametrize(
    ("upper", "work", "said"), [("u", "w2", "upper directory"), ("u2", "w", "work directory")]
)
def test_held_by_a_live_mount(box: Box, upper: str, work: str, said: str) -> None:
    for each in ("u2", "w2", "m2"):
        box.mkdir(each)
    box.mount()
    mounts_before = box.mounted()
    done = box.layerfs("mount", "--lower", box("a"), "--upper", box(upper), "--work", box(work), box("m2"))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert said in done.stderr and "in use by another layerfs mount" in done.stderr
    assert box.mounted() == mounts_before and len(box.daemons()) == 1
    box.umount()
    box.assert_gone()
    # What was busy is free again.
    done = box.layerfs("mount", "--lower", box("a"), "--upper", box(upper), "--work", box(work), box("m2"))
    assert (done.returncode, done.stderr) == (0, "")
    assert box.layerfs("umount", box("m2")).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["umount", "{m}"], 1, "is not a mount point"),
        (["umount", "{nope}"], 1, "No such file"),
        (["umount", "/proc"], 1, "not a layerfs mount but proc"),
        (["umount"], 2, "MOUNTPOINT"),
        (["doctor", "--upper", "{nope}"], 1, "upper directory {nope}"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["--frobnicate"], 2, "--frobnicate"),
    ],
)
def test_other_commands_refuse(box: Box, arguments: list[str], code: int, said: str) -> None:
    def fill(text: str) -> str:
        return text.replace("{m}", box("m")).replace("{nope}", box("nope"))

    done = box.layerfs(*map(fill, arguments))
    assert done.returncode == code and fill(said) in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_umount_of_somebody_elses(root_box: Box, user_box: Box) -> None:
    root_box.mount()
    done = user_box.layerfs("umount", root_box("m"))
    assert done.returncode == 1 and "was mounted by user 0" in done.stderr and root_box.is_mounted()
    root_box.umount()
    user_box.mount()
    daemon = user_box.daemon()
    done = root_box.layerfs("umount", user_box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    assert daemon not in user_box.daemons(), "root's umount did not wait for the user's daemon"
    user_box.assert_gone()
