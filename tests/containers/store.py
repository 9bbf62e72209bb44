"""A store for podman and buildah that is all its own: directories, configuration, images, and its end.

Nothing of the machine's configuration is read and nothing of its stores is written: every file that the
programs look for is named in their environment, and the one that cannot be named (the cache of blobs) is
covered. Knows nothing of what is tested on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tests.cli.conftest import helper_command
from tests.support import mounts
from tests.support.processes import eventually
from tests.support.stack import scratch_root

#: One command of podman or buildah, at the worst.
PATIENCE = 120
BUSYBOX = Path("/bin/busybox")

_CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
netns = "none"
log_driver = "k8s-file"
apparmor_profile = "unconfined"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
image_copy_tmp_dir = "{dir}/tmp"
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


def why_not(*programs: str) -> str | None:
    """Why containers cannot be tested here, or None."""
    if absent := [name for name in programs if not shutil.which(name)]:
        return f"not installed: {', '.join(absent)}"
    if not BUSYBOX.exists() or not _is_static():
        return "no static busybox"
    return mounts.why_not_root() or mounts.why_no_layerfs() or mounts.why_no_fuse_overlayfs()


@cache
def _is_static() -> bool:
    """It runs in a root that holds nothing else."""
    where = scratch_root() / f"static-{uuid.uuid4().hex}"
    where.mkdir()
    try:
        shutil.copy(BUSYBOX, where)
        return subprocess.run(["chroot", where, "/busybox", "true"], capture_output=True).returncode == 0
    finally:
        shutil.rmtree(where)


@dataclass
class Store:
    """`kind`: layerfs, fuse-overlayfs or vfs. `uid`: who it is for."""

    kind: str
    uid: int = 0
    #: storage.conf's `mountopt`
    mountopt: str = ""
    dir: Path = field(init=False)
    #: What lives as long as containers run. podman wants its path short: 50 characters.
    run_dir: Path = field(init=False)
    env: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.dir = scratch_root() / f"store-{self.kind}-{uuid.uuid4().hex[:8]}"
        self.dir.mkdir(mode=0o755)
        self.run_dir = Path(tempfile.mkdtemp(prefix="lfs-", dir="/tmp"))
        self.run_dir.chmod(0o711)
        (self.run_dir / "x").mkdir(mode=0o700)
        for name in ("home", "tmp", "log", "config"):
            (self.dir / name).mkdir(mode=0o700)
        config = self.dir / "config"
        (config / "containers.conf").write_text(_CONTAINERS_CONF.format(dir=self.dir))
        (config / "registries.conf").write_text("unqualified-search-registries = []\n")
        # The rest is said on the command line: podman hands that on to the programs that it starts.
        driver = "vfs" if self.kind == "vfs" else "overlay"
        (config / "storage.conf").write_text(
            f'[storage]\ndriver = "{driver}"\ngraphroot = "{self.dir}/root"\nrunroot = "{self.run_dir}/r"\n'
        )
        wrapper = self.dir / "mount.layerfs"
        # One log for each mount: a daemon that complains fails the test. `calls` is what was asked for.
        wrapper.write_text(
            f"#!/bin/sh\nprintf '%s\\n' \"$*\" >>{self.dir}/log/calls\n"
            f"export LAYERFS_LOG={self.dir}/log/$$.log\n"
            f'exec {shlex.join(helper_command())} "$@"\n'
        )
        wrapper.chmod(0o755)
        self.env = {
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
            "HOME": str(self.dir / "home"),
            "XDG_RUNTIME_DIR": str(self.run_dir / "x"),
            "TMPDIR": str(self.dir / "tmp"),
            "CONTAINERS_CONF": str(config / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(config / "storage.conf"),
            "CONTAINERS_REGISTRIES_CONF": str(config / "registries.conf"),
            "BUILDAH_ISOLATION": "chroot",
            "LC_ALL": "C.UTF-8",
            mounts.SESSION_MARK: mounts.session_id,
        }
        if "PYTHONPATH" in os.environ:
            self.env["PYTHONPATH"] = os.environ["PYTHONPATH"]
        for path in (self.run_dir, self.run_dir / "x", self.dir, *self.dir.rglob("*")):
            os.chown(path, self.uid, self.uid)

    # -- commands ---------------------------------------------------------------------------------

    @property
    def where(self) -> list[str]:
        """The options that say which store, for podman and buildah alike."""
        words = ["--root", f"{self.dir}/root", "--runroot", f"{self.run_dir}/r"]
        if self.kind == "vfs":
            return [*words, "--storage-driver", "vfs"]
        program = f"{self.dir}/mount.layerfs" if self.kind == "layerfs" else shutil.which("fuse-overlayfs")
        words += ["--storage-driver", "overlay", "--storage-opt", f"overlay.mount_program={program}"]
        return [*words, "--storage-opt", f"overlay.mountopt={self.mountopt}"] if self.mountopt else words

    def run(self, *command: str | Path, stdin: bytes | None = None, timeout: float = PATIENCE) -> Done:
        """A command in this store's environment, as its user."""
        who: dict[str, Any] = {}
        if self.uid:
            who = {"user": self.uid, "group": self.uid, "extra_groups": []}
        # Files, not pipes: conmon and a daemon that hold one of them open must not keep us waiting unseen.
        done = subprocess.run(
            [os.fspath(word) for word in command],
            env=self.env,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout,
            cwd=self.dir,
            **who,
        )
        return Done(
            done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        )

    def ok(self, *command: str | Path, **how: Any) -> str:
        """A command that must end well: its output."""
        done = self.run(*command, **how)
        assert done.code == 0, (
            f"{self.kind}: {' '.join(map(str, command))}: {done.code}\n{done.out}{done.err}"
        )
        return done.out

    def podman(self, *words: str | Path, **how: Any) -> str:
        return self.ok("podman", *self.where, "--tmpdir", self.run_dir / "t", *words, **how)

    def try_podman(self, *words: str | Path, **how: Any) -> Done:
        return self.run("podman", *self.where, "--tmpdir", self.run_dir / "t", *words, **how)

    def buildah(self, *words: str | Path, **how: Any) -> str:
        return self.ok("buildah", *self.where, *words, **how)

    # -- images -----------------------------------------------------------------------------------

    def build(self, context: Path, tag: str, *more: str) -> str:
        return self.buildah("build", "--isolation", "chroot", "--network", "host", *more, "-t", tag, context)

    def layers(self, image: str, *, podman: bool = False) -> list[Layer]:
        """The image's layers, the lowest first, as others get them: pushed to an OCI layout."""
        layout = self.dir / f"oci-{uuid.uuid4().hex[:8]}"
        if podman:
            self.podman("push", "-q", image, f"oci:{layout}:t")
        else:
            self.buildah("push", "-q", image, f"oci:{layout}:t")
        try:
            return read_layout(layout)
        finally:
            shutil.rmtree(layout)

    # -- what there is ----------------------------------------------------------------------------

    def fuse_mounts(self) -> list[tuple[str, str]]:
        """(mount point, type) of the file systems that programs serve in this store."""
        return [m for m in mounts.mounts_below(self.dir) if m[1].startswith("fuse")]

    def processes(self) -> list[int]:
        """Daemons, conmon, podman itself and what they started: whoever has this store on its command line,
        in its environment (podman gives conmon but a few variables), or in a mount namespace of its own, as
        containers have."""
        found, own = [], os.readlink("/proc/self/ns/mnt")
        names = (os.fsencode(self.dir.name), os.fsencode(self.run_dir.name))
        for name in os.listdir("/proc"):
            if not name.isdigit() or int(name) == os.getpid():
                continue
            try:
                what = [Path(f"/proc/{name}/{each}").read_bytes() for each in ("cmdline", "environ")]
                if os.readlink(f"/proc/{name}/ns/mnt") != own:
                    what.append(Path(f"/proc/{name}/mountinfo").read_bytes())
            except OSError:
                continue  # it ended
            if any(each in text for text in what for each in names):
                found.append(int(name))
        return found

    def daemons(self) -> list[int]:
        """Processes of layerfs (or fuse-overlayfs) that serve this store."""
        return [pid for pid in self.processes() if _serves(pid)]

    def calls(self) -> list[str]:
        """The arguments of each call of the mount program so far."""
        try:
            return (self.dir / "log/calls").read_text().splitlines()
        except FileNotFoundError:
            return []

    def complaints(self) -> str:
        return "".join(
            line
            for log in (self.dir / "log").glob("*.log")
            for line in log.read_text(errors="replace").splitlines(keepends=True)
            if mounts.SUSPICIOUS.search(line)
        )

    def assert_idle(self) -> None:
        """No container runs: no mount and no process is there. A process that ends may take a moment."""
        assert eventually(lambda: not self.fuse_mounts() and not self.processes()), (
            f"mounts left: {self.fuse_mounts()}, processes left: "
            f"{[mounts._describe(pid) for pid in self.processes()]}"
        )

    # -- the end ----------------------------------------------------------------------------------

    def close(self) -> list[str]:
        """Removes all of it; what had to be removed by force, in words."""
        wrong = []
        eventually(lambda: not self.processes())  # one that ends may take a moment
        for pid in self.processes():
            wrong.append(f"process left: {mounts._describe(pid)}")
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for point, kind in reversed([*mounts.mounts_below(self.dir), *mounts.mounts_below(self.run_dir)]):
            # The store's own directory, bound upon itself, stays mounted by containers/storage's design.
            if point != f"{self.dir}/root/overlay":
                wrong.append(f"mount left: {kind} on {point}")
            mounts.umount(point, mounts.MNT_DETACH)
        if said := self.complaints():
            wrong.append(f"logged:\n{said}")
        shutil.rmtree(self.dir)
        shutil.rmtree(self.run_dir)
        return wrong


def _serves(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"lowerdir=" in words and b"podman" not in words


# --- layers as values -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One name of a layer, with what hard links share resolved."""

    type: str
    mode: int
    uid: int
    gid: int
    device: tuple[int, int]
    target: str
    digest: str
    xattrs: tuple[tuple[str, str], ...]
    names: tuple[str, ...]
    #: seconds; None when it is not older than the test
    mtime: int | None


Layer = dict[str, Member]


def read_layer(path: Path, *, recent: float | None = None) -> Layer:
    """A layer's tarball, by Python's own reader. mtimes from `recent` on count as "now"."""
    members: dict[str, tarfile.TarInfo] = {}
    digests: dict[str, str] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.strip("/").removeprefix("./") or "."
            members[name] = member
            if member.isreg():
                file = tar.extractfile(member)
                assert file is not None
                digests[name] = hashlib.sha256(file.read()).hexdigest()
    groups: dict[str, list[str]] = {}
    for name, member in members.items():
        first = member.linkname.strip("/").removeprefix("./") if member.islnk() else name
        groups.setdefault(first, []).append(name)
    result: Layer = {}
    for first, names in groups.items():
        real = members[first]
        for name in names:
            result[name] = Member(
                type={b"\0": "0"}.get(real.type, real.type.decode()),
                mode=real.mode,
                uid=real.uid,
                gid=real.gid,
                device=(real.devmajor, real.devminor) if real.ischr() or real.isblk() else (0, 0),
                target=real.linkname if real.issym() else "",
                digest=digests.get(first, ""),
                xattrs=tuple(
                    sorted((k, v) for k, v in real.pax_headers.items() if k.startswith("SCHILY.xattr."))
                ),
                names=tuple(sorted(names)),
                mtime=None if recent is not None and real.mtime >= recent else int(real.mtime),
            )
    return result


def read_layout(layout: Path, *, recent: float | None = None) -> list[Layer]:
    """The layers of the one image of an OCI layout, the lowest first."""
    blobs = layout / "blobs/sha256"
    index = json.loads((layout / "index.json").read_text())
    (entry,) = index["manifests"]
    manifest = json.loads((blobs / entry["digest"].split(":")[1]).read_text())
    # mtimes: what was made by the test is younger than a day
    since = time.time() - 86400 if recent is None else recent
    return [read_layer(blobs / each["digest"].split(":")[1], recent=since) for each in manifest["layers"]]


def assert_same_layers(
    ours: list[Layer], theirs: list[Layer], who: str, *, but: Collection[str] = (), mtimes: bool = True
) -> None:
    """The layers of layerfs are those of `who`, apart from the names in `but`."""
    lines = [] if len(ours) == len(theirs) else [f"layerfs has {len(ours)} layers, {who} {len(theirs)}"]
    for number, layers in enumerate(zip(ours, theirs, strict=False)):
        for name in sorted({*layers[0], *layers[1]} - {*but}):
            left, right = (layer.get(name) for layer in layers)
            if not mtimes and left is not None and right is not None:
                left, right = replace(left, mtime=None), replace(right, mtime=None)
            if left != right:
                lines.append(f"layer {number}, {name}:\n    layerfs {left}\n    {who} {right}")
    assert not lines, "\n".join(lines[:20])
