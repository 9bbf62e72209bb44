"""`mount.layerfs` as mount(8), podman and buildah call it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from layerfs.cli.mount_helper import parse_arguments
from layerfs.errors import UsageError
from tests.support import mounts
from tests.support.processes import eventually

from .conftest import USER, Box, helper_command

# --- the command line, without mounting -----------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "names", "options", "flags"),
    [
        ("-o a,b m", ["m"], ["a,b"], set()),
        ("m -o a -o b", ["m"], ["a", "b"], set()),
        ("src m -oa", ["src", "m"], ["a"], set()),
        ("src -o a m -s -f -n -v", ["src", "m"], ["a"], {"s", "f", "n", "v-"}),
        ("src m -sfnv -o a", ["src", "m"], ["a"], {"s", "f", "n", "v-"}),
        ("src m -fo a", ["src", "m"], ["a"], {"f"}),
        ("src m -t fuse.layerfs -N 12", ["src", "m"], [], set()),
        ("-o a -- -m", ["-m"], ["a"], set()),
        ("--help", [], [], {"h"}),
        ("-V", [], [], {"V"}),
        ("- m", ["-", "m"], [], set()),
    ],
)
def test_arguments(argv: str, names: list[str], options: list[str], flags: set[str]) -> None:
    parsed = parse_arguments(argv.split())
    assert (parsed.names, parsed.options, parsed.flags, parsed.ignored) == (names, options, flags, [])


def test_unknown_arguments_are_kept_for_a_note() -> None:
    assert parse_arguments(["-x", "--frob", "m"]).ignored == ["-x", "--frob"]


def test_option_without_value() -> None:
    with pytest.raises(UsageError):
        parse_arguments(["m", "-o"])


# --- for real -------------------------------------------------------------------------------------


def stack(box: Box) -> str:
    return f"lowerdir={box('a')}:{box('b')},upperdir={box('u')},workdir={box('w')}"


@pytest.mark.parametrize(
    "arguments",
    [
        lambda box: ["-o", stack(box), box("m")],
        lambda box: [box("m"), "-o", stack(box)],
        lambda box: ["none", box("m"), "-o", stack(box)],
        lambda box: ["none", "-o", stack(box), box("m"), "-s", "-n", "-v"],
        lambda box: ["none", box("m"), "-o", f"rw,{stack(box)}", "-o", "noatime"],
    ],
)
def test_forms(box: Box, arguments: object) -> None:
    done = box.helper(*arguments(box))  # type: ignore[operator]
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert box.run("cat", box("m/in-a"), box("m/in-b")).stdout == "ab"
    assert box.run("touch", box("m/new")).returncode == 0
    box.umount()
    assert os.path.exists(box("u/new"))


def test_source_is_shown(box: Box) -> None:
    done = box.helper("my,image", box("m"), "-o", stack(box))
    assert (done.returncode, done.stderr) == (0, "")
    with open("/proc/self/mountinfo") as file:
        (line,) = (line for line in file if f" {box('m')} " in line)
    assert line.split(" - ")[1].split()[:2] == ["fuse.layerfs", "my,image"]
    box.umount()


def test_podman_read_only(box: Box) -> None:
    """stdin and stdout null, stderr read until everybody has closed it; lowers are relative symlinks."""
    box.mkdir("l")
    os.symlink("../a", box("l/AAA"))
    os.symlink("../b", box("l/BBB"))
    done = box.helper("-o", "lowerdir=l/AAA:l/BBB", box("m"), cwd=str(box.dir))
    assert (done.returncode, done.stderr) == (0, "")
    assert box.run("cat", box("m/in-a"), box("m/in-b")).stdout == "ab"
    assert box.run("touch", box("m/new")).returncode != 0
    box.umount()


def test_the_caller_is_let_go(box: Box) -> None:
    """CONTRACTS 2.1: whoever reads our stderr to its end gets there with the mount live."""
    read, write = os.pipe()
    process = box.popen(
        *helper_command(), "-o", stack(box), box("m"), stdout=subprocess.DEVNULL, stderr=write
    )
    os.close(write)
    with open(read) as stderr:
        assert stderr.read() == ""  # returns at end of file only
    assert process.wait(20) == 0 and box.is_mounted()
    daemon = box.daemon()
    for number in range(3):
        assert os.readlink(f"/proc/{daemon}/fd/{number}") == "/dev/null"
    assert os.readlink(f"/proc/{daemon}/cwd") == "/proc"  # holds no directory of the caller's
    box.umount()


def test_podman_writable(box: Box) -> None:
    """All that containers/storage may say at once; the lowers symbolic links, relative ones among them."""
    box.mkdir("l")
    os.symlink("../a", box("l/AAA"))
    os.symlink(box("b"), box("l/BBB"))
    label = 'context="system_u:object_r:container_file_t:s0:c1,c2"'
    owner = box.uid
    text = (
        f"lowerdir=l/AAA:{box('l/BBB')},upperdir={box('u')},workdir={box('w')},volatile,{label},"
        f"uidmapping=:{owner}:{owner}:1,gidmapping=:{owner}:{owner}:1,nodev,fsync=0,redirect_dir=off"
    )
    if os.path.exists("/sys/fs/selinux/enforce"):
        text = text.replace(f"{label},", "")
    done = box.helper("-o", text, box("m"), cwd=str(box.dir))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert box.run("cat", box("m/in-a"), box("m/in-b")).stdout == "ab"
    box.umount()


@pytest.mark.parametrize("volatile", ["", ",volatile"])
def test_fusermount_ends_the_daemon(box: Box, volatile: str) -> None:
    """CONTRACTS 2.6: the first thing that containers/storage tries; everything is in the upper then."""
    done = box.helper("-o", stack(box) + volatile, box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (box.dir / "w/work/incompat/volatile").exists() == bool(volatile)
    text = "x" * 5_000_000
    assert box.run("sh", "-c", f"head -c 5000000 /dev/zero | tr '\\0' x >{box('m/big')}").returncode == 0
    done = box.run("fusermount3", "-u", box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    box.assert_gone()
    assert (box.dir / "u" / "big").read_text() == text
    assert not (box.dir / "w/work/incompat").exists()


def test_detached_while_in_use(root_box: Box) -> None:
    """umount2(MNT_DETACH) with a file open: what is written afterwards arrives, then the daemon ends."""
    box = root_box
    assert box.helper("-o", stack(box), box("m")).returncode == 0
    with open(box("m/late"), "w") as file:
        assert box.run("umount", "-l", box("m")).returncode == 0
        assert not box.mounted() and box.daemons()
        file.write("late")
    box.assert_gone()
    assert (box.dir / "u" / "late").read_text() == "late"


def test_noxattrs(box: Box) -> None:
    os.setxattr(box("a/in-a"), "user.a", b"1")
    assert box.helper("-o", f"{stack(box)},noxattrs=1", box("m")).returncode == 0

    def refused() -> bool:
        for call in (
            lambda: os.getxattr(box("m/in-a"), "user.a"),
            lambda: os.listxattr(box("m/in-a")),
            lambda: os.setxattr(box("m/in-a"), "user.b", b"1"),
        ):
            try:
                call()
                return False
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    return False
        return True

    assert box.as_user(refused)
    assert box.run("cp", box("m/in-a"), box("m/copy")).returncode == 0
    box.umount()
    assert os.getxattr(box("a/in-a"), "user.a") == b"1"


def test_noacl(root_box: Box) -> None:
    """An ACL that shuts a user out: heeded by default, not under noacl; the mode bits count then."""
    box = root_box
    (box.dir / "a" / "f").write_text("f")
    done = box.run("setfacl", "-m", f"u:{USER}:---", box("a/f"))
    assert done.returncode == 0, done.stderr
    for option, readable in (("", False), (",noacl", True)):
        assert box.helper("-o", stack(box) + option, box("m")).returncode == 0
        found = box.run("cat", box("m/f"), user=USER, group=USER, extra_groups=[]).returncode == 0
        box.umount()
        box.assert_gone()
        assert found is readable


def test_escapes(box: Box) -> None:
    for each in ("co:lon", "com,ma", "up,per", "wo:rk"):
        box.mkdir(each)
    for each in ("co:lon", "com,ma"):
        (box.dir / each / f"in-{each}").write_text(each)
    text = f"lowerdir={box('co')}\\:lon:{box('com')}\\,ma,upperdir={box('up')}\\,per,workdir={box('wo')}\\:rk"
    done = box.helper("-o", text, box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(box("up,per"))) == []
    assert box.run("cat", box("m/in-co:lon"), box("m/in-com,ma")).stdout == "co:loncom,ma"
    box.umount()


def test_unknown_options_are_noted_and_ignored(box: Box) -> None:
    done = box.helper("-o", f"{stack(box)},frobnicate=1,noacl,whatever", box("m"))
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "mount.layerfs: unknown argument ignored: frobnicate=1",
        "mount.layerfs: unknown argument ignored: whatever",
    ]
    box.umount()


@pytest.mark.skipif(os.path.exists("/sys/fs/selinux"), reason="SELinux would judge the label")
def test_a_label_without_selinux_is_ignored(box: Box) -> None:
    label = 'context="system_u:object_r:container_file_t:s0:c1,c2"'
    done = box.helper("-o", f"{stack(box)},{label},nodev", box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    box.umount()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["{m}"], 1, "at least one lower layer"),
        ([], 1, "a mount point is missing"),
        (["a", "b", "c"], 1, "too many names"),
        (["-o"], 1, "needs a value"),
        (["-o", "lowerdir={nope}", "none", "{m}"], 32, "no such directory"),
        (["-o", "lowerdir={nope}", "{m}"], 1, "no such directory"),
        (["-o", "lowerdir={a},uidmapping=0:1", "{m}"], 1, "STORED:SHOWN:COUNT"),
        (["none", "-o", "lowerdir={a}", "{nope}"], 32, "mount point"),
        (["-o", "lowerdir={a},upperdir={u},workdir={u}", "{m}"], 1, "the same"),
        (["none", "{m}", "-o", "lowerdir={a},upperdir={u},workdir={u}"], 32, "the same"),
    ],
)
def test_refused(box: Box, arguments: list[str], code: int, said: str) -> None:
    def fill(text: str) -> str:
        for name in ("m", "a", "u", "nope"):
            text = text.replace(f"{{{name}}}", box(name))
        return text

    done = box.helper(*map(fill, arguments))
    assert done.returncode == code and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not box.mounted() and not box.daemons()


def test_fake(box: Box) -> None:
    """`mount -f`: everything but the mount."""
    done = box.helper("none", box("m"), "-f", "-o", stack(box))
    assert (done.returncode, done.stderr) == (0, "") and not box.mounted()
    done = box.helper("none", box("m"), "-f", "-o", f"lowerdir={box('nope')}")
    assert done.returncode == 32


@pytest.mark.parametrize("flag", ["-f", "-d"])
def test_foreground(box: Box, flag: str) -> None:
    process = box.popen(*helper_command(), flag, "-o", stack(box), box("m"))
    assert eventually(box.is_mounted)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")
    box.assert_gone()


@pytest.mark.parametrize(("flag", "said"), [("--version", "layerfs "), ("-V", "layerfs "), ("-h", "Usage:")])
def test_talk(box: Box, flag: str, said: str) -> None:
    done = box.helper(flag)
    assert done.returncode == 0 and done.stdout.startswith(said) and done.stderr == ""


@pytest.fixture
def sbin(root_box: Box, request: pytest.FixtureRequest) -> Iterator[Box]:
    """A box, and in /sbin what an administrator links there: in a kernel overlay over it, for as long as the
    test takes.
    """
    if reason := mounts.why_no_kernel_overlay():
        pytest.skip(reason)
    where = os.path.realpath("/sbin")
    for each in ("su", "sw"):
        root_box.mkdir(each)
    helper = helper_command()[0]
    links = {"mount.layerfs": helper, "mount.fuse.layerfs": helper}
    for name, target in getattr(request, "param", links).items():
        os.symlink(target, root_box(f"su/{name}"))
    mounts.mount_overlay(where, [where], root_box("su"), root_box("sw"))
    try:
        yield root_box
    finally:
        mounts.umount(where)


def ends(box: Box) -> None:
    done = box.run("umount", box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    box.assert_gone()


@pytest.mark.parametrize("kind", ["layerfs", "fuse.layerfs"])
def test_the_mount_command(sbin: Box, kind: str) -> None:
    box = sbin
    done = box.run("mount", "-t", kind, "-o", f"{stack(box)},nodev,bogus", "image", box("m"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == "mount.layerfs: unknown argument ignored: bogus\n"
    assert box.is_mounted()
    ends(box)
    done = box.run("mount", "-t", kind, "-o", f"lowerdir={box('nope')}", "image", box("m"))
    assert done.returncode == 32 and "no such directory" in done.stderr
    done = box.run("mount", "-f", "-t", kind, "-o", stack(box), "image", box("m"))
    assert (done.returncode, done.stderr) == (0, "") and not box.mounted()


FSTAB_OPTIONS = (
    "defaults,nofail,_netdev,x-systemd.requires-mounts-for=/srv,x-systemd.automount,x-systemd.device-timeout=5,"
    "X-mount.mkdir,x-gvfs-hide,comment=layers"
)


@pytest.mark.parametrize("kind", ["layerfs", "fuse.layerfs"])
@pytest.mark.parametrize("how", ["all", "target"])
def test_fstab(sbin: Box, kind: str, how: str) -> None:
    box = sbin
    (box.dir / "fstab").write_text(f"image {box('m')} {kind} {FSTAB_OPTIONS},{stack(box)} 0 0\n")
    done = box.run("mount", "-T", box("fstab"), *(["-a"] if how == "all" else [box("m")]))
    assert (done.returncode, done.stderr) == (0, "")
    assert box.is_mounted() and box.run("cat", box("m/in-b")).stdout == "b"
    if how == "all":  # what is mounted is known to be
        again = box.run("mount", "-T", box("fstab"), "-a")
        assert (again.returncode, again.stderr) == (0, "") or kind == "layerfs"
    ends(box)


def test_read_only_in_fstab(sbin: Box) -> None:
    box = sbin
    line = f"none {box('m')} layerfs ro,nosuid,noauto,lowerdir={box('a')}:{box('b')} 0 0\n"
    (box.dir / "fstab").write_text(line)
    assert box.run("mount", "-T", box("fstab"), "-a").returncode == 0 and not box.mounted()
    done = box.run("mount", "-T", box("fstab"), box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    assert box.run("touch", box("m/x")).returncode == 1
    assert {"ro", "nosuid"} <= mounts.mount_options(box("m"))
    ends(box)


@pytest.mark.parametrize("sbin", [{"layerfs": mounts.layerfs_command()[0]}], indirect=True)
def test_through_mount_fuse(sbin: Box) -> None:
    """Without a helper of ours: mount(8) runs mount.fuse3(8), and that the `layerfs` in its PATH."""
    box = sbin
    if not os.path.exists("/sbin/mount.fuse"):
        pytest.skip("no /sbin/mount.fuse (package fuse3)")
    argv = [
        "mount",
        "-t",
        "fuse.layerfs",
        "-o",
        f"{stack(box)},nofail,x-systemd.automount",
        "image",
        box("m"),
    ]
    done = box.run(*argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert box.is_mounted()
    ends(box)
    done = box.run("mount", "-t", "fuse.layerfs", "-o", f"lowerdir={box('nope')}", "image", box("m"))
    assert done.returncode == 32 and "no such directory" in done.stderr
