"""Each runtime does on a mount what it does on a plain directory: what it prints, how it ends, what it
leaves.

Where a runtime does not start on the plain directory, the machine is in its way, and the test skips with what
it said.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.place import as_user
from tests.support.mounts import Layerfs, PlainDir, mounts_below
from tests.support.stack import Stack
from tests.support.tree import assert_equal, snapshot

from . import runtimes
from .roots import root_tree
from .runtimes import Runtime, run_here

Make = Callable[..., Layerfs]
MakePlain = Callable[..., PlainDir]

FILES = """
set -e
cat /etc/motd; echo changed >/etc/motd; echo more >>/usr/share/doc/b; cat /usr/share/doc/a
mv /usr/share /usr/moved; ls /usr/moved /usr/moved/doc; readlink /usr/moved/link; cat /usr/moved/link
rm /etc/issue; ls /etc; mkdir -p /new/deep/er; echo x >/new/deep/er/f; chmod 600 /etc/hostname
cp /bin/busybox /new/busybox; /new/busybox echo runs
stat -c '%n %s %a %h %u %g' /etc/motd /usr/moved/doc/a /bin/busybox
cd /new/deep; pwd; cd ..; pwd; ls -a /
"""
OWNERS = """
chown 7:8 /etc/hostname; chown -R 1000:1000 /usr/share/doc
stat -c '%n %u %g' /etc/hostname /usr/share/doc/*
"""
SUID = """
/bin/ids; as 1000 /bin/ids; as 1000 /bin/suid; as 1000 /bin/sgid
cp /bin/ids /made && chmod 4755 /made && as 1000 /made
as 1000 /bin/cat /secret; as 1000 /bin/cat /home/notes; as 1000 /bin/touch /etc/mine /home/mine /tmp/mine
chmod 4711 /bin/sgid; as 1000 /bin/sgid; stat -c '%a %u %g' /bin/suid /bin/sgid /home/notes
"""
DEVICES = """
echo gone >/devices/null && cat /devices/null; head -c 4 /devices/zero | od -An -tx1
mknod /devices/full c 1 7 && echo x >/devices/full; mknod /devices/null2 c 1 3 && echo y >/devices/null2
mknod /devices/disk b 7 99; mknod /devices/fifo p; stat -c '%n %F %t %T' /devices/*
echo dev >/dev/null; mknod /dev/mine c 1 3 && echo z >/dev/mine && stat -c '%t %T' /dev/mine
"""
MOUNTS = """
mount -t proc proc /proc; readlink /proc/self/exe; mount -t tmpfs none /mnt && echo in >/mnt/f && cat /mnt/f
mount --bind /etc /usr/share/doc && ls /usr/share/doc
mount --bind /bin/busybox /etc/hostname && wc -c </etc/hostname
mkdir /mnt/d && mount --bind /usr /mnt/d && ls /mnt/d; mv /mnt /mnt2; rm -r /mnt
umount /mnt/d; umount /usr/share/doc; umount /etc/hostname; umount /mnt
ls /mnt /usr/share/doc; wc -c </etc/hostname
mount --bind / /mnt && ls /mnt/etc && touch /mnt/etc/through && ls /etc/through && umount /mnt
"""
# As an engine in the container does it: lowers in the root, upper on a volume; and an upper in the root.
OVERLAY = """
mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w /mnt/m && echo mounted
mount -t overlay none -o lowerdir=/usr/share:/etc,upperdir=/mnt/u,workdir=/mnt/w /mnt/m && ls /mnt/m
echo x >/mnt/m/motd; rm /mnt/m/issue; mv /mnt/m/hostname /mnt/m/doc/; ls /mnt/m /mnt/m/doc
cat /etc/motd /mnt/m/motd; chmod 600 /mnt/m/passwd; ln /mnt/m/doc/a /mnt/m/c
stat -c '%n %a %s' /mnt/m/passwd /mnt/m/c /etc/passwd
umount /mnt/m; ls /mnt/u; umount /mnt
"""
READ_ONLY = """
touch /x; echo x >/etc/motd; rm /etc/issue; mkdir /d; mv /usr /usr2; chmod 600 /etc/motd; ln /etc/motd /etc/m
cat /etc/motd; ls /usr/share/doc; mount -t tmpfs none /mnt && touch /mnt/x && ls /mnt; : >/devices/null; ls /
"""
SCRIPTS = {
    "files": FILES,
    "owners": OWNERS,
    "suid": SUID,
    "devices": DEVICES,
    "mounts": MOUNTS,
    "overlay": OVERLAY,
}


def control(runtime: Runtime, root: Path, script: str, *, run: runtimes.Runner = run_here, ro: bool = False):
    """What the runtime does on a plain directory; skips when it cannot do anything there."""
    if reason := runtime.why_not():
        pytest.skip(reason)
    started = runtime.start(root, "echo started", ro, run)
    if started.stdout != "started\n":
        pytest.skip(f"{runtime.name} does not start on a plain directory either: {started.stderr.strip()}")
    return runtime.start(root, script, ro, run)


def same(got: runtimes.Run, want: runtimes.Run) -> None:
    assert (got.returncode, got.stdout, got.stderr) == (want.returncode, want.stdout, want.stderr)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("runtime", runtimes.ALL, ids=lambda r: r.name)
def test_as_on_a_plain_directory(
    runtime: Runtime, script: str, make_plain: MakePlain, make_mount: Make
) -> None:
    began = time.time_ns() - 10**9
    plain = make_plain()
    want = control(runtime, plain.mnt, SCRIPTS[script])
    assert want.stdout, want.stderr
    m = make_mount()
    assert runtime.start(m.mnt, "echo started", False, run_here).stdout == "started\n"
    same(runtime.start(m.mnt, SCRIPTS[script], False, run_here), want)
    assert_equal(snapshot(plain.mnt), snapshot(m.mnt), recent_ns=began, labels=("plain", "layerfs"))
    m.remount()
    assert_equal(snapshot(plain.mnt), snapshot(m.mnt), recent_ns=began, labels=("plain", "remounted"))


def test_suid_works_where_the_runtime_lets_it(make_mount: Make) -> None:
    """Not only as on a plain directory: user 1000 is root in a set-uid program, and in one made just now."""
    done = runtimes.ALL[0].start(make_mount().mnt, SUID, False, run_here)
    assert done.stdout.splitlines()[:5] == [
        "0 0 0 0",
        "1000 1000 1000 1000",
        "1000 0 1000 1000",
        "1000 1000 1000 50",
        "1000 0 1000 1000",
    ]


def test_devices_work(make_mount: Make) -> None:
    done = runtimes.ALL[0].start(make_mount().mnt, DEVICES, False, run_here)
    assert "00 00 00 00" in done.stdout and "No space left on device" in done.stderr, done
    assert "gone" not in done.stdout and "/devices/null2 character special file 1 3" in done.stdout


def test_kernel_overlay_in_the_root(make_mount: Make, kernel_overlay: None) -> None:
    done = runtimes.ALL[0].start(make_mount().mnt, OVERLAY, False, run_here)
    assert done.stderr == "" and "welcome\nx\n" in done.stdout and "/mnt/m/passwd 600 " in done.stdout


@pytest.mark.parametrize("by", ["runtime", "mount"])
@pytest.mark.parametrize("runtime", runtimes.ALL, ids=lambda r: r.name)
def test_read_only_root(runtime: Runtime, by: str, make_plain: MakePlain, make_mount: Make) -> None:
    """Remounted read-only by the runtime, and mounted with `-o ro`: nothing is written, the rest works."""
    plain = make_plain()
    want = control(runtime, plain.mnt, READ_ONLY, ro=True)
    m = make_mount("" if by == "runtime" else "ro")
    before = snapshot(m.mnt)
    got = runtime.start(m.mnt, READ_ONLY, by == "runtime", run_here)
    assert "Read-only file system" in got.stderr
    same(got, want)
    assert_equal(before, snapshot(m.mnt))


def test_runc_makes_devices_in_the_root(make_plain: MakePlain, make_mount: Make) -> None:
    runtime = Runtime("runc", ("runc",), runtimes.runc_with_dev_of_the_root)
    began = time.time_ns() - 10**9
    plain = make_plain()
    want = control(runtime, plain.mnt, DEVICES)
    m = make_mount()
    same(runtime.start(m.mnt, DEVICES, False, run_here), want)
    assert_equal(snapshot(plain.mnt), snapshot(m.mnt), recent_ns=began, labels=("plain", "layerfs"))
    assert (m.mnt / "dev" / "urandom").is_char_device()


@pytest.mark.parametrize("number", range(4), ids=["chroot", "pivot_root", "runc", "bwrap"])
@pytest.mark.parametrize("read_only", [False, True], ids=["rw", "ro"])
def test_as_an_ordinary_user(
    number: int, read_only: bool, make_plain: MakePlain, make_mount: Make, ordinary_user: tuple[int, int]
) -> None:
    """A user's own mount is the root of a container in a user namespace, where that user alone is root."""
    began = time.time_ns() - 10**9
    runtime = runtimes.user_runtimes(*ordinary_user)[number]
    plain = make_plain(ordinary_user)
    m = make_mount("", ordinary_user)
    script = READ_ONLY if read_only else FILES + MOUNTS
    want = control(runtime, plain.mnt, script, run=m.run, ro=read_only)
    same(runtime.start(m.mnt, script, read_only, m.run), want)
    if read_only:
        assert "Read-only file system" in want.stderr
    else:
        assert "runs" in want.stdout
        seen = as_user(lambda: snapshot(m.mnt), *ordinary_user)
        assert_equal(snapshot(plain.mnt), seen, recent_ns=began, labels=("plain", "layerfs"))


@pytest.mark.parametrize("way", ["daemon", "foreground"])
def test_mounted_and_made_the_root_in_one_namespace(
    way: str, make_stack: type[Stack], ordinary_user: tuple[int, int]
) -> None:
    """`unshare -Urm`: mounted without fusermount3 by the root of the namespace, entered by pivot_root(2), and
    gone with it. The kernel then changes the daemon's own root directory too; it must not walk through it.
    """
    stack = make_stack(n_lowers=1, name="inside", owner=ordinary_user, prefix="user.overlay.")
    stack.populate(root_tree(devices=False), "all-lower")
    m = Layerfs(stack, as_user=ordinary_user)
    script = FILES + "chmod 600 /etc/passwd; rm -r /usr/moved; mkdir /usr/moved; ls -l /usr/moved"
    command = m.command()
    if way == "daemon":
        mount = '"$@"'
    else:
        command.insert(2, "--foreground")
        mount = '{ "$@" & } && until [ -e "$mnt/etc/motd" ]; do sleep 0.05; done'
    pivot = runtimes.pivot_script().replace("$0", "$mnt").replace("$1", "$script")
    shell = f"{mount} && {pivot}"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"]
    done = m.run("env", f"mnt={m.mnt}", f"script={script}", *unshare, "sh", "-c", shell, "sh", *command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "runs" in done.stdout and "changed" not in done.stdout
    assert m.wait_gone() and not mounts_below(m.mnt) and not m.new_complaints()
    assert stack.upper is not None and (stack.upper / "etc" / "motd").read_text() == "changed\n"
    with m:
        mode = as_user(lambda: (m.mnt / "etc" / "passwd").stat().st_mode, *ordinary_user)
        assert stat.S_IMODE(mode) == 0o600


def test_crun_refuses_hybrid_cgroups_whatever_the_root(make_plain: MakePlain, make_mount: Make) -> None:
    """As it is, without hiding version 2 from it: the same words for a plain directory."""
    if runtimes.find("crun") is None:
        pytest.skip("not installed: crun")
    want = runtimes.crun_as_it_is(make_plain().mnt, "echo started", False, run_here)
    same(runtimes.crun_as_it_is(make_mount().mnt, "echo started", False, run_here), want)
    if runtimes.hybrid_cgroups():
        assert want.returncode != 0 and "hybrid" in want.stderr
