"""apt-get in a chroot on the mount: packages with maintainer scripts are installed and purged."""

from __future__ import annotations

import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.mounts import KernelOverlay, Layerfs, mount, umount, why_no_kernel_overlay
from tests.support.stack import Stack
from tests.support.tree import assert_equal, snapshot

from .conftest import Place, run

pytestmark = [pytest.mark.long, pytest.mark.root, pytest.mark.timeout(900)]

MIRROR, SUITE = "http://deb.debian.org/debian", "bookworm"
# A program whose script adds a user, alternatives, and byte code compiled after unpacking.
PACKAGES = ["uuid-runtime", "nano", "python3-minimal"]
CLEAN = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C",
    "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
}


def why_no_mirror() -> str | None:
    try:
        with urllib.request.urlopen(f"{MIRROR}/dists/{SUITE}/InRelease", timeout=30) as answer:
            return None if answer.read(1) else "an empty answer"
    except OSError as error:
        return str(error)


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A minimal Debian root with apt, made by mmdebstrap."""
    if not shutil.which("mmdebstrap"):
        pytest.skip("not installed: mmdebstrap")
    if why := why_no_mirror():
        pytest.skip(f"no Debian mirror: {MIRROR}: {why}")
    stack = Stack(n_lowers=1, name="debian", writable=False)
    root = stack.lowers[0] / "root"
    no_services = (
        r'printf "#!/bin/sh\nexit 101\n" >"$1/usr/sbin/policy-rc.d"; chmod 755 "$1/usr/sbin/policy-rc.d"'
    )
    options = ["--quiet", "--variant=apt", "--skip=cleanup/apt/lists", f"--customize-hook={no_services}"]
    run(["mmdebstrap", *options, SUITE, root, MIRROR])
    yield root
    shutil.rmtree(stack.dir)


def chroot(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    mount("proc", root / "proc", "proc")
    try:
        return run(["chroot", root, *command], env=CLEAN)
    finally:
        umount(root / "proc")


def test_apt_installs_and_purges(place: Place, debian: Path) -> None:
    mounted = place(debian, content=False)
    root = mounted.mnt
    shutil.copyfile("/etc/resolv.conf", root / "etc/resolv.conf")
    chroot(root, "apt-get", "-q", "update")
    said = chroot(root, "apt-get", "-q", "-y", "install", "--no-install-recommends", *PACKAGES)
    assert "Setting up uuid-runtime" in said.stdout

    def well() -> None:
        assert chroot(root, "dpkg", "--audit").stdout == ""
        assert chroot(root, "dpkg", "--verify").stdout == ""  # every file of every package has its checksum
        chroot(root, "apt-get", "check")

    def works() -> None:
        well()
        assert len(chroot(root, "uuidgen").stdout.strip()) == 36
        assert chroot(root, "id", "-u", "uuidd").stdout.strip().isdigit()
        assert "GNU nano" in chroot(root, "nano", "--version").stdout
        assert chroot(root, "python3", "-c", "import sys; print(sys.path[0] == '')").stdout == "True\n"
        assert (root / "etc/alternatives/editor").readlink() == Path("/bin/nano")

    works()
    mounted.remount()
    works()
    chroot(root, "apt-get", "-q", "-y", "purge", "--autoremove", *PACKAGES)
    well()
    assert not (root / "usr/bin/uuidgen").exists()
    mounted.remount()
    well()
    if isinstance(mounted, Layerfs) and why_no_kernel_overlay() is None:
        shown = snapshot(str(root))
        mounted.close()
        with KernelOverlay(mounted.stack):
            assert_equal(shown, snapshot(str(root)), labels=("layerfs", "kernel overlayfs, same layers"))
