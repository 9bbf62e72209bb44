"""How each runtime is started on a root, behind one interface, and what it can do. Not tests.

All run `/bin/sh -c SCRIPT` in the root with PATH=/bin, as root of whatever user namespace there is, and leave
nothing behind: containers are deleted, bundles lie beside the root.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Of runc's and crun's containers: what a root shell needs for what the scripts do.
CAPABILITIES = [
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD"),
    *("CAP_SETGID", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT"),
]
_numbers = itertools.count(1)
_ENVIRONMENT = {"PATH": "/bin", "HOME": "/", "LC_ALL": "C"}

Run = subprocess.CompletedProcess[str]
#: Runs a command as whoever the test is about.
Runner = Callable[..., Run]


def run_here(*argv: str | os.PathLike[str], timeout: float = 60) -> Run:
    return subprocess.run(
        [os.fspath(word) for word in argv],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
        cwd="/",
    )


@dataclass(frozen=True)
class Runtime:
    """`start(root, script, read_only, run)`."""

    name: str
    programs: tuple[str, ...]
    start: Callable[[Path, str, bool, Runner], Run]

    def why_not(self) -> str | None:
        absent = [program for program in self.programs if find(program) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


def find(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin")


def _path(program: str) -> str:
    found = find(program)
    assert found is not None, "asked before: why_not"
    return found


# --- without a runtime ----------------------------------------------------------------------------


def _chroot(root: Path, script: str, read_only: bool, run: Runner) -> Run:
    """In a mount namespace of its own, or what the script mounts would stay."""
    remount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && ' if read_only else ""
    enter = remount + 'exec env -i PATH=/bin HOME=/ LC_ALL=C "$2" "$0" /bin/sh -c "$1"'
    return run(_path("unshare"), "--mount", "sh", "-c", enter, root, script, _path("chroot"))


def pivot_script(*, read_only: bool = False) -> str:
    """For `unshare ... sh -c THIS ROOT SCRIPT`: the mount itself is the new root, not a copy of it."""
    ready = 'mount -o remount,bind,ro "$0" && ' if read_only else ""
    # From here on nothing of the old root is needed: env and chroot are those of the new one.
    after = 'exec /bin/env -i PATH=/bin HOME=/ LC_ALL=C /bin/sh -c "$1"'
    return f'{ready}cd "$0" && {_path("pivot_root")} . . && PATH=/bin && umount -l . && cd / && {after}'


def _pivot_root(root: Path, script: str, read_only: bool, run: Runner) -> Run:
    flags = ["--mount", "--propagation", "private"]
    bind = "" if os.path.ismount(root) else 'mount --bind "$0" "$0" && '
    return run(_path("unshare"), *flags, "sh", "-c", bind + pivot_script(read_only=read_only), root, script)


def _nspawn(
    root: Path, script: str, read_only: bool, run: Runner, mapped: tuple[int, int] | None = None
) -> Run:
    """No systemd needed around it: nothing is registered, and the cgroup stays what it is. The directories
    that it makes in /run and leaves there go to a tmpfs. `mapped`: a user namespace whose ids from 0 are
    (first, count) of the host's, and an idmapped mount of the root.
    """
    users = ["--private-users={}:{}".format(*mapped), "--private-users-ownership=map"] if mapped else []
    return run(
        *(_path("unshare"), "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"),
        _path("systemd-nspawn"),
        *("--quiet", "--register=no", "--keep-unit", "--pipe", "--settings=no"),
        *("--resolv-conf=off", "--timezone=off", "--link-journal=no"),
        *(["--read-only"] if read_only else []),
        *users,
        *(f"--setenv={key}={value}" for key, value in _ENVIRONMENT.items()),
        f"--directory={root}",
        "/bin/sh",
        "-c",
        script,
    )


def bwrap_command(root: Path, script: str, read_only: bool = False, more: Sequence[str] = ()) -> list[str]:
    kind = "--ro-bind" if read_only else "--bind"
    environment = [word for key, value in _ENVIRONMENT.items() for word in ("--setenv", key, value)]
    return [_path("bwrap"), "--clearenv", *environment, kind, str(root), "/", *more, "/bin/sh", "-c", script]


def _bwrap(root: Path, script: str, read_only: bool, run: Runner) -> Run:
    more = ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--unshare-pid"]
    return run(*bwrap_command(root, script, read_only, more))


# --- runc and crun --------------------------------------------------------------------------------


def make_bundle(
    root: Path,
    script: str,
    *,
    read_only: bool = False,
    own_dev: bool = False,
    rootless: tuple[int, int] | None = None,
    mapped: tuple[int, int] | None = None,
) -> Path:
    """A bundle beside `root` that runs `script` in it. `own_dev`: /dev is the root's, where the runtime makes
    devices; else a tmpfs. `rootless`: (uid, gid) of the user who runs it, shown as root inside. `mapped`: a
    user namespace whose ids from 0 are (first, count) of the host's.
    """
    bundle = root.parent / f"bundle-{next(_numbers)}"
    bundle.mkdir()
    namespaces = ["mount", "pid", "ipc", "uts", "network"]
    linux: dict[str, Any] = {"namespaces": [{"type": kind} for kind in namespaces]}
    mounts: list[dict[str, Any]] = [{"destination": "/proc", "type": "proc", "source": "proc"}]
    if not own_dev:
        options = ["nosuid", "strictatime", "mode=755"]
        mounts.append({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": options})
    if rootless or mapped:
        linux["namespaces"].append({"type": "user"})
        hosts, size = (rootless, 1) if rootless else ((mapped[0], mapped[0]), mapped[1])  # type: ignore[index]
        for key, number in zip(("uidMappings", "gidMappings"), hosts, strict=True):
            linux[key] = [{"containerID": 0, "hostID": number, "size": size}]
    if rootless:
        os.chown(bundle, *rootless)
    config = {
        "ociVersion": "1.0.0",
        "root": {"path": str(root), "readonly": read_only},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sh", "-c", script],
            "env": [f"{key}={value}" for key, value in _ENVIRONMENT.items()],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
            "noNewPrivileges": False,
        },
        "hostname": "layers",
        "mounts": mounts,
        "linux": linux,
    }
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle


def _oci(program: Sequence[str | os.PathLike[str]], bundle: Path, run: Runner) -> Run:
    name, state = f"layerfs-test-{os.getpid()}-{next(_numbers)}", bundle / "state"
    command = [*program, "--root", state]
    try:
        return run(*command, "run", "--bundle", bundle, name)
    finally:
        run(*command, "delete", "--force", name)
        subprocess.run(["rm", "-rf", "--one-file-system", bundle], check=True)


def _runc(root: Path, script: str, read_only: bool, run: Runner) -> Run:
    return _oci([_path("runc")], make_bundle(root, script, read_only=read_only), run)


def runc_with_dev_of_the_root(root: Path, script: str, read_only: bool, run: Runner) -> Run:
    """runc makes /dev/null and the others in the root itself, as it does without a mount on /dev."""
    return _oci([_path("runc")], make_bundle(root, script, read_only=read_only, own_dev=True), run)


def hybrid_cgroups() -> bool:
    """Cgroup version 2 mounted beside version 1, which crun refuses."""
    return os.path.ismount("/sys/fs/cgroup/unified")


def crun_as_it_is(root: Path, script: str, read_only: bool, run: Runner) -> Run:
    return _oci([_path("crun")], make_bundle(root, script, read_only=read_only), run)


def _crun(root: Path, script: str, read_only: bool, run: Runner) -> Run:
    """Where cgroups are hybrid, crun is shown version 1 alone, in a mount namespace of its own."""
    command: list[str | os.PathLike[str]] = [_path("crun"), "--cgroup-manager=disabled"]
    if hybrid_cgroups():
        shown = 'umount /sys/fs/cgroup/unified && exec "$@"'
        command = [_path("unshare"), "--mount", "sh", "-c", shown, "sh", *command]
    return _oci(command, make_bundle(root, script, read_only=read_only), run)


def runc_mapped(first: int, count: int) -> Runtime:
    """runc as root, with a user namespace for the container."""

    def start(root: Path, script: str, read_only: bool, run: Runner) -> Run:
        bundle = make_bundle(root, script, read_only=read_only, mapped=(first, count))
        return _oci([_path("runc")], bundle, run)

    return Runtime("runc", ("runc",), start)


def nspawn_mapped(first: int, count: int) -> Runtime:
    """systemd-nspawn as root, with a user namespace for the container and an idmapped mount of its root."""

    def start(root: Path, script: str, read_only: bool, run: Runner) -> Run:
        return _nspawn(root, script, read_only, run, mapped=(first, count))

    return Runtime("systemd-nspawn", ("systemd-nspawn",), start)


ALL = (
    Runtime("chroot", ("unshare", "chroot"), _chroot),
    Runtime("pivot_root", ("unshare", "pivot_root"), _pivot_root),
    Runtime("runc", ("runc",), _runc),
    Runtime("crun", ("crun",), _crun),
    Runtime("bwrap", ("bwrap",), _bwrap),
    Runtime("systemd-nspawn", ("systemd-nspawn",), _nspawn),
)

# --- as an ordinary user --------------------------------------------------------------------------


def user_runtimes(uid: int, gid: int) -> tuple[Runtime, ...]:
    """What an ordinary user can start without any help: in a user namespace where they alone are root."""

    def runc(root: Path, script: str, read_only: bool, run: Runner) -> Run:
        bundle = make_bundle(root, script, read_only=read_only, rootless=(uid, gid))
        return _oci([_path("runc"), "--rootless=true"], bundle, run)

    def bwrap(root: Path, script: str, read_only: bool, run: Runner) -> Run:
        inside = ["--unshare-all", "--uid", "0", "--gid", "0", "--cap-add", "ALL", "--proc", "/proc"]
        return run(*bwrap_command(root, script, read_only, [*inside, "--dev", "/dev", "--tmpfs", "/tmp"]))

    def pivot(root: Path, script: str, read_only: bool, run: Runner) -> Run:
        # A mount of the namespace above cannot be moved alone: it is bound with all that is below it.
        enter = 'mount --rbind "$0" "$0" && ' + pivot_script(read_only=read_only)
        return run(_path("unshare"), "--user", "--map-root-user", "--mount", "sh", "-c", enter, root, script)

    def chroot(root: Path, script: str, read_only: bool, run: Runner) -> Run:
        remount = 'mount --rbind "$0" "$0" && mount -o remount,bind,ro "$0" && ' if read_only else ""
        enter = remount + 'exec env -i PATH=/bin HOME=/ LC_ALL=C "$2" "$0" /bin/sh -c "$1"'
        unshare = [_path("unshare"), "--user", "--map-root-user", "--mount"]
        return run(*unshare, "sh", "-c", enter, root, script, _path("chroot"))

    return (
        Runtime("chroot", ("unshare", "chroot"), chroot),
        Runtime("pivot_root", ("unshare", "pivot_root"), pivot),
        Runtime("runc", ("runc",), runc),
        Runtime("bwrap", ("bwrap",), bwrap),
    )
