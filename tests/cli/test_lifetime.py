"""From `mount` returning to the daemon's end: every way to end it, and what is left after each."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import mounts
from tests.support.processes import eventually

from .conftest import Box, helper_command

Way = str
WAYS = ["layerfs umount", "SIGTERM", "SIGINT", "umount", "fusermount3"]


def end(box: Box, way: Way) -> None:
    if way == "layerfs umount":
        box.umount()
    elif way.startswith("SIG"):
        box.kill(signal.Signals[way])
    elif way == "umount":
        if not box.is_root:
            pytest.skip("umount(8) of a FUSE mount is root's")
        mounts.umount(box("m"))
    else:
        done = box.run("fusermount3", "-u", box("m"))
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_end(box: Box, way: Way) -> None:
    box.mount()
    assert box.run("cat", box("m/in-a"), box("m/in-b")).stdout == "ab"
    assert box.run("sh", "-c", f"echo new > {box('m/new')}; rm {box('m/in-a')}").returncode == 0
    assert not box.is_free("u") and not box.is_free("w")
    end(box, way)
    box.assert_gone()
    assert (box.dir / "u/new").read_text() == "new\n"
    left = [box(f"w/work/{name}") for name in os.listdir(box("w/work"))]
    assert all(stat.S_ISCHR(os.lstat(each).st_mode) for each in left), (
        "more than a spare whiteout in the work directory"
    )
    box.mount()
    assert box.run("cat", box("m/new")).stdout == "new\n"
    assert box.run("cat", box("m/in-a")).returncode != 0
    box.umount()


@pytest.mark.parametrize("way", ["layerfs umount", "mount again"])
def test_killed(box: Box, way: str) -> None:
    box.mount()
    assert box.run("sh", "-c", f"echo new > {box('m/new')}; sync {box('m/new')}").returncode == 0
    box.kill(signal.SIGKILL)
    done = box.run("ls", box("m"))
    # The latter for a request that met the end of the process before that of its descriptors.
    dead = (errno.ENOTCONN, errno.ECONNABORTED)
    assert any(os.strerror(number) in done.stderr for number in dead), done
    if way == "layerfs umount":
        box.umount()
        box.assert_gone()
        box.mount()
    else:
        done = box.layerfs("mount", "--lower", box("a"), "--upper", box("u"), "--work", box("w"), box("m"))
        assert done.returncode == 0, done.stderr
        assert done.stderr == f"layerfs mount: a dead mount was cleared off {box('m')}\n"
    assert box.run("cat", box("m/new")).stdout == "new\n"
    assert len(box.mounted()) == 1
    box.umount()
    box.assert_gone()


def test_killed_while_a_process_is_inside(box: Box) -> None:
    box.mount()
    inside = box.popen("sh", "-c", "echo in; exec sleep 60", cwd="/" if not box.is_root else box("m"))
    assert inside.stdout is not None and inside.stdout.readline() == "in\n"
    daemon = next(pid for pid in box.daemons() if pid != inside.pid)
    os.kill(daemon, signal.SIGKILL)
    assert eventually(lambda: daemon not in box.daemons())
    box.umount()
    assert not box.mounted()
    inside.kill()
    inside.communicate()


def test_busy(box: Box) -> None:
    box.mount()
    inside = box.popen("sh", "-c", f"exec < {box('m/in-a')}; echo in; exec sleep 60")
    assert inside.stdout is not None and inside.stdout.readline() == "in\n"
    done = box.layerfs("umount", box("m"))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "is busy" in done.stderr
    assert box.is_mounted()
    done = box.layerfs("umount", "--lazy", box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    assert not box.mounted()
    inside.kill()
    inside.communicate()
    box.assert_gone()


def test_the_caller_is_not_kept_waiting(box: Box) -> None:
    """podman reads stderr until every holder has closed it."""
    done = box.run(
        "sh",
        "-c",
        '"$@" 2>&1 | cat',
        "sh",
        *mounts.layerfs_command(),
        "mount",
        "--lower",
        box("a"),
        box("m"),
        timeout=10,
    )
    assert (done.returncode, done.stdout) == (0, "")
    box.umount()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_caller_with_closed_descriptors(box: Box, closed: str) -> None:
    done = box.run(
        "sh",
        "-c",
        f'exec "$@" {closed}',
        "sh",
        *mounts.layerfs_command(),
        "mount",
        "--lower",
        box("a"),
        "--upper",
        box("u"),
        box("m"),
    )
    assert done.returncode == 0 and box.is_mounted()
    assert box.run("cat", box("m/in-a")).stdout == "a"
    done = box.run("sh", "-c", f'exec "$@" {closed}', "sh", *mounts.layerfs_command(), "umount", box("m"))
    assert done.returncode == 0
    box.assert_gone()


def test_what_the_daemon_keeps_of_its_caller(box: Box) -> None:
    """Nothing: no terminal, no session, no directory, no descriptors, no blocked signals, no limits."""
    box.mkdir("cwd")
    read, write = os.pipe()

    def deaf_and_poor() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.umask(0o077)

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
    try:
        box.mount(pass_fds=(write,), preexec_fn=deaf_and_poor, cwd=box("cwd"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    os.close(write)
    assert os.read(read, 1) == b"", "the daemon holds a descriptor of its caller"
    os.close(read)
    pid = box.daemon()
    assert os.readlink(f"/proc/{pid}/cwd") == "/proc"
    assert [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (0, 1, 2)] == ["/dev/null"] * 3
    assert os.getsid(pid) == pid
    limits = [line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if "open files" in line]
    assert limits[0].split()[3:5] == [str(before[1])] * 2
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert int(status["SigBlk"], 16) == 0 and status["Umask"].strip() == "0000"
    box.kill(signal.SIGTERM)
    box.assert_gone()


def test_relative_paths_are_the_callers(box: Box) -> None:
    os.symlink("a", box("link"))
    arguments = ["--lower", "link", "--lower", "b/../b", "--upper", "./u", "--work", "w", "m"]
    done = box.layerfs("mount", *arguments, cwd=str(box.dir))
    assert (done.returncode, done.stderr) == (0, "")
    assert box.run("cat", box("m/in-a"), box("m/in-b")).stdout == "ab"
    done = box.layerfs("umount", "../m", cwd=box("a"))
    assert (done.returncode, done.stderr) == (0, "")
    box.assert_gone()


def test_umount_through_a_symlink(box: Box) -> None:
    box.mount()
    os.symlink("m", box("link"))
    assert box.layerfs("umount", box("link")).returncode == 0
    box.mount()
    box.kill(signal.SIGKILL)
    assert box.layerfs("umount", box("m")).returncode == 0
    box.assert_gone()


@pytest.mark.parametrize(
    "name", ["with space", "co:lon", "com,ma", "back\\slash", "new\nline", 'quo"te', "ü\udcff"]
)
def test_odd_names(box: Box, name: str) -> None:
    for each in ("lower", "upper", "work", "mnt"):
        box.mkdir(f"{name}/{each}")
    (box.dir / name / "lower/file").write_text("data")
    lower, upper, work, mnt = (box(f"{name}/{each}") for each in ("lower", "upper", "work", "mnt"))
    done = box.layerfs("mount", "--lower", lower, "--lower", box("a"), "--upper", upper, "--work", work, mnt)
    assert (done.returncode, done.stderr) == (0, "")
    assert box.run("cat", f"{mnt}/file", f"{mnt}/in-a").stdout == "dataa"
    done = box.layerfs("umount", mnt)
    assert (done.returncode, done.stderr) == (0, "")
    assert not box.mounted()


def test_default_work_directory(box: Box) -> None:
    done = box.layerfs("mount", "--lower", box("a"), "--upper", box("u"), box("m"))
    assert (done.returncode, done.stderr) == (0, "") and os.path.isdir(box("u.work"))
    box.umount()
    done = box.layerfs("mount", "--lower", box("a"), "--upper", box("u"), box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    box.umount()


def test_read_only_without_upper(box: Box) -> None:
    done = box.layerfs("mount", "--lower", box("a"), "--lower", box("b"), box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    assert box.run("cat", box("m/in-a"), box("m/in-b")).stdout == "ab"
    assert os.strerror(errno.EROFS) in box.run("touch", box("m/x")).stderr
    box.umount()


def test_ephemeral(box: Box) -> None:
    box.env["TMPDIR"] = box.mkdir("tmp")
    os.chmod(box("a"), 0o751)
    done = box.layerfs("mount", "--lower", box("a"), "--ephemeral", box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    (_,) = os.listdir(box("tmp"))
    script = (
        f"echo x > {box('m/x')} && mkdir -p {box('m/d/e')} && touch {box('m/d/e/f')} && chmod 0 {box('m/d')}"
    )
    assert box.run("sh", "-c", script).returncode == 0
    assert box.run("stat", "-c", "%a", box("m")).stdout == "751\n"
    box.umount()
    assert os.listdir(box("tmp")) == []
    assert os.listdir(box("a")) == ["in-a"]


def test_what_a_killed_ephemeral_mount_leaves_goes_with_the_next(box: Box) -> None:
    box.env["TMPDIR"] = box.mkdir("tmp")
    argv = ["mount", "--lower", box("a"), "--ephemeral", box("m")]
    assert box.layerfs(*argv).returncode == 0
    (first,) = os.listdir(box("tmp"))
    box.kill(signal.SIGKILL)
    assert os.listdir(box("tmp")) == [first]
    assert box.layerfs(*argv).returncode == 0
    (second,) = os.listdir(box("tmp"))
    assert second != first
    box.kill(signal.SIGKILL)
    box.umount()
    assert os.listdir(box("tmp")) == []


def test_ephemeral_that_fails_leaves_nothing(box: Box) -> None:
    box.env["TMPDIR"] = box.mkdir("tmp")
    done = box.layerfs("mount", "--lower", box("nope"), "--ephemeral", box("m"))
    assert done.returncode == 1 and os.listdir(box("tmp")) == []
    box.env["TMPDIR"] = box("nowhere")
    done = box.layerfs("mount", "--lower", box("a"), "--ephemeral", box("m"))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "TMPDIR" in done.stderr


# --- in the foreground ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_foreground(box: Box, way: Way) -> None:
    process = box.popen(
        *mounts.layerfs_command(),
        "mount",
        "--foreground",
        "--lower",
        box("a"),
        "--upper",
        box("u"),
        "--work",
        box("w"),
        box("m"),
    )
    assert eventually(box.is_mounted)
    assert box.run("cat", box("m/in-a")).stdout == "a"
    if way.startswith("SIG"):
        process.send_signal(signal.Signals[way])
    else:
        end(box, way)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")
    box.assert_gone()


def test_foreground_refused(box: Box) -> None:
    done = box.layerfs("mount", "--foreground", "--lower", box("nope"), box("m"))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert not box.mounted()


# --- when the mount command itself is interrupted -------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_at_any_moment(box: Box, how: signal.Signals) -> None:
    """Whenever `layerfs mount` is interrupted: either nobody knows of the mount and there is none, or it had
    returned.
    """
    argv = [
        *mounts.layerfs_command(),
        "mount",
        "--lower",
        box("a"),
        "--upper",
        box("u"),
        "--work",
        box("w"),
        box("m"),
    ]
    for step in range(9):
        process = box.popen(*argv)
        time.sleep(step * 0.03)
        process.send_signal(how)
        _, err = process.communicate(timeout=20)
        # Python itself complains when it is interrupted before our first lines run.
        assert "Traceback" not in err or not re.search("launching|layerfs/runtime|click", err), err
        if process.returncode == 0:
            assert box.is_mounted()
            box.umount()
        box.assert_gone()


# --- odd places -----------------------------------------------------------------------------------


def test_five_hundred_lowers(box: Box) -> None:
    lowers = [box.mkdir(f"many/{number}") for number in range(500)]
    for number in (0, 250, 499):
        (box.dir / f"many/{number}/file{number}").write_text(str(number))
        (box.dir / f"many/{number}/same").write_text(str(number))
    words = [word for lower in lowers for word in ("--lower", lower)]
    done = box.layerfs("mount", *words, "--upper", box("u"), "--work", box("w"), box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    names = ("same", "file0", "file250", "file499")
    assert box.run("cat", *(box(f"m/{name}") for name in names)).stdout == "00250499"
    box.umount()
    done = box.layerfs("mount", "-o", "lowerdir=" + ":".join(reversed(lowers)), box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    assert box.run("cat", box("m/same")).stdout == "499"
    box.umount()


def test_mounted_on_its_own_lower(box: Box) -> None:
    argv = ["--lower", box("a"), "--upper", box("u"), "--work", box("w"), box("a")]
    done = box.layerfs("mount", *argv)
    assert (done.returncode, done.stderr) == (0, "")
    assert box.run("cat", box("a/in-a")).stdout == "a"
    assert box.run("sh", "-c", f"echo new > {box('a/in-a')}").returncode == 0
    assert box.layerfs("umount", box("a")).returncode == 0
    assert (box.dir / "a/in-a").read_text() == "a" and (box.dir / "u/in-a").read_text() == "new\n"


def test_mounted_inside_its_own_lower(box: Box) -> None:
    box.mkdir("a/inside")
    argv = ["--lower", box("a"), "--upper", box("u"), "--work", box("w"), box("a/inside")]
    done = box.layerfs("mount", *argv)
    if (
        not box.is_root
    ):  # who cannot copy the lower's mount would meet the mount in itself, and wait for itself
        assert done.returncode == 1 and "only root can mount there" in done.stderr and not box.mounted()
        return
    assert (done.returncode, done.stderr) == (0, "")
    assert box.run("cat", box("a/inside/in-a")).stdout == "a"
    # What the mount point hides is what the lower has there: an empty directory, not the mount in itself.
    assert box.run("ls", box("a/inside/inside")).stdout == ""
    assert box.run("touch", box("a/inside/inside/new")).returncode == 0
    assert box.layerfs("umount", box("a/inside")).returncode == 0
    assert os.listdir(box("a/inside")) == [] and os.listdir(box("u/inside")) == ["new"]


def test_mounted_on_itself_twice(root_box: Box) -> None:
    """A second mount on the same point lies on top; each umount takes one off. (fusermount3 forbids it to
    users.)
    """
    box = root_box
    box.mount()
    done = box.layerfs("mount", "--lower", box("b"), box("m"))
    assert (done.returncode, done.stderr) == (0, "")
    assert box.run("ls", box("m")).stdout == "in-b\n"
    assert box.layerfs("umount", box("m")).returncode == 0
    assert box.run("ls", box("m")).stdout == "in-a\nin-b\n"
    box.umount()


def test_many_at_once(box: Box) -> None:
    points = [box.mkdir(f"mnt/{number}") for number in range(8)]
    started = [box.popen(*mounts.layerfs_command(), "mount", "--lower", box("a"), point) for point in points]
    for process in started:
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
    assert len(box.daemons()) == len(points)
    ended = [box.popen(*mounts.layerfs_command(), "umount", point) for point in points]
    for process in ended:
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
    assert not box.daemons() and not box.mounted()


def test_a_race_for_one_upper_has_one_winner(box: Box) -> None:
    points = [box.mkdir(f"mnt/{number}") for number in range(4)]
    layers = ["--lower", box("a"), "--upper", box("u"), "--work", box("w")]
    started = [box.popen(*mounts.layerfs_command(), "mount", *layers, point) for point in points]
    codes = []
    for process in started:
        _, err = process.communicate(timeout=60)
        codes.append(process.returncode)
        assert process.returncode == 0 or (len(err.splitlines()) == 1 and "in use" in err), err
    assert sorted(codes) == [0, 1, 1, 1]
    (winner,) = (point for point, code in zip(points, codes, strict=True) if code == 0)
    assert box.layerfs("umount", winner).returncode == 0
    assert not box.mounted()


def test_a_second_place_keeps_the_daemon(root_box: Box) -> None:
    box = root_box
    box.mount()
    mounts.bind(box("m"), box.mkdir("bind"))
    done = box.layerfs("umount", box("m"))
    assert done.returncode == 0 and done.stderr == (
        f"layerfs umount: still mounted on {box('bind')}: the daemon goes on\n"
    )
    assert box.run("cat", box("bind/in-a")).stdout == "a"
    done = box.layerfs("umount", box("bind"))
    assert (done.returncode, done.stderr) == (0, "")
    box.assert_gone()


def test_another_namespace_keeps_the_daemon(root_box: Box) -> None:
    box = root_box
    box.mount()
    daemon = box.daemon()
    script = f"mount --make-rprivate / && echo in && read line && cat {box('m/in-a')}"
    other = box.popen("unshare", "-m", "sh", "-c", script, stdin=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == "in\n"
    done = box.layerfs("umount", box("m"))
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1
    assert "still mounted on" in done.stderr and "mount namespace" in done.stderr
    out, _ = other.communicate("go\n", timeout=20)
    assert out == "a"
    assert eventually(lambda: daemon not in box.daemons())
    box.assert_gone()


def test_in_a_user_namespace(user_box: Box) -> None:
    """As rootless podman does it: root in a user namespace, without fusermount3, without trusted.*
    attributes.
    """
    box = user_box
    if box.run("unshare", "-Urm", "true").returncode != 0:
        pytest.skip("no user namespaces for ordinary users")
    layers = f"lowerdir={box('a')}:{box('b')},upperdir={box('u')},workdir={box('w')}"
    script = f"""
        set -e
        {" ".join(helper_command()[:1])} -o {layers} {box("m")}
        cat {box("m/in-a")}; rm {box("m/in-b")}; echo new > {box("m/new")}
        {mounts.layerfs_command()[0]} umount {box("m")}
        {" ".join(helper_command()[:1])} -o {layers} {box("m")}
        ls {box("m")}
        {mounts.layerfs_command()[0]} umount {box("m")}
    """
    if len(mounts.layerfs_command()) > 1 or len(helper_command()) > 1:
        pytest.skip("the commands are not installed")
    done = box.run(
        "unshare", "-Urm", "sh", "-c", script, env=os.environ | box.env | {"PATH": "/usr/bin:/bin"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ain-a\nnew\n", "")
    assert (box.dir / "u/new").read_text() == "new\n"
    box.assert_gone()


@pytest.mark.parametrize("way", ["SIGTERM", "SIGINT"])
def test_told_to_end_again_and_again(box: Box, way: Way) -> None:
    """Only the first counts; the others must not kill it while it unmounts and syncs."""
    box.mount()
    pid = box.daemon()
    assert box.run("sh", "-c", f"echo new > {box('m/new')}").returncode == 0
    while pid in box.daemons():
        try:
            os.kill(pid, signal.Signals[way])
        except ProcessLookupError:
            break
    box.assert_gone()
    assert (box.dir / "u/new").read_text() == "new\n"
