"""apt-get install in a chroot on the mount, of packages that were fetched before."""

from __future__ import annotations

from pathlib import Path

from ..caches import drop_names
from ..commands import BenchmarkError, run
from ..contenders import Contender
from ..measures import Sizes
from ..place import Place, mounted_inside
from ..rounds import Bench
from ..stacks import Stack, as_it_is
from .group import Group, lacking

_SUITE, _MIRROR = "bookworm", "http://deb.debian.org/debian"
#: small ones, whose scripts add a user and alternatives, and one that is larger
_PACKAGES = ("nano", "uuid-runtime", "less", "perl-modules-5.36")
_CLEAN = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
}  # fmt: skip
_INSTALL = ("apt-get", "-q", "-y", "--no-install-recommends", "install")


class Apt(Group):
    """The base layer is a Debian root made by mmdebstrap, with the packages in apt's own cache."""

    name = "apt"
    stack = "debian"
    laborious = True

    def rounds(self, sizes: Sizes) -> int:
        return sizes.slow_rounds

    def prepare(self, scratch: Path, sizes: Sizes) -> None:
        lacking("mmdebstrap")

    def make(self, base: Path, sizes: Sizes) -> Stack:
        # Nothing may be started by a package in the chroot: it would hold the mount.
        no_services = (
            r'printf "#!/bin/sh\nexit 101\n" >"$1/usr/sbin/policy-rc.d"; chmod 755 "$1/usr/sbin/policy-rc.d"'
        )
        fetch = f'chroot "$1" {" ".join(_INSTALL)} --download-only {" ".join(_PACKAGES)} >&2'
        (base / "layers").mkdir(parents=True)
        command: list[str | Path] = [
            "mmdebstrap", "--quiet", "--mode=root", "--variant=apt", "--skip=cleanup/apt",
            f"--customize-hook={no_services}", f"--customize-hook={fetch}",
            _SUITE, base / "layers" / "0", _MIRROR,
        ]  # fmt: skip
        try:
            run(command, timeout=600)
        except BenchmarkError as error:
            raise BenchmarkError(f"no Debian root could be made: {error}") from None
        return as_it_is(base)

    def take(self, bench: Bench, contender: Contender, stack: Stack) -> None:
        chroot = ("env", "-i", *(f"{name}={value}" for name, value in _CLEAN.items()), "chroot")
        inside = (["-t", "proc", "proc", "proc"], ["--bind", "/dev", "dev"])
        with bench.place(contender, stack, own_disk=True) as place, mounted_inside(place.mnt, *inside):
            drop_names()
            place.time(
                "apt", f"apt-get install of {len(_PACKAGES)} packages", 1,
                lambda: place.program(*chroot, place.mnt, *_INSTALL, "--no-download", *_PACKAGES),
                lambda: _check(place, *chroot, place.mnt), unit="ms",
            )  # fmt: skip


def _check(place: Place, *chroot: str | Path) -> None:
    if audit := place.said(*chroot, "dpkg", "--audit"):
        raise BenchmarkError(f"dpkg --audit: {audit.splitlines()[0]}")
    if wrong := place.said(*chroot, "dpkg", "--verify", *_PACKAGES):
        raise BenchmarkError(f"dpkg --verify: {wrong.splitlines()[0]}")
