"""Which of an index's platforms suits this machine. Source: image-spec image-index.md, "Platform Variants";
names are those of Go (GOARCH)."""

from __future__ import annotations

import os
import re

from layerfs.oci.image import Platform

_MACHINES = {
    "x86_64": "amd64",
    "i386": "386",
    "i486": "386",
    "i586": "386",
    "i686": "386",
    "aarch64": "arm64",
    "aarch64_be": "arm64be",
    "armv5tel": "arm/v5",
    "armv6l": "arm/v6",
    "armv7l": "arm/v7",
    "armv8l": "arm/v8",
    "loongarch64": "loong64",
    "mips": "mips",
    "mips64": "mips64",
}


def this_machine(machine: str | None = None) -> Platform:
    """The platform whose programs run here; `machine`: what uname(2) says. Names that Go and Linux share
    (riscv64, s390x, ppc64le) are as they are."""
    machine = machine or os.uname().machine
    architecture, _, variant = _MACHINES.get(machine, machine).partition("/")
    return Platform(architecture, "linux", variant)


def rank(offered: Platform, here: Platform) -> int | None:
    """How well an image for `offered` suits: 0 is best, None not at all."""
    if (offered.os, offered.architecture) != (here.os, here.architecture):
        return None
    # no variant means the usual one: v7 of arm, v8 of arm64, v1 of amd64
    usual = {"arm": 7, "arm64": 8}.get(here.architecture, 1)
    version = _version(offered.variant, usual)
    if here.architecture == "arm":
        mine = _version(here.variant, usual)
        return mine - version if version <= mine else None
    # what this processor has beyond the usual is not looked for: the plainest image runs
    return abs(version - usual)


def _version(variant: str, usual: int) -> int:
    match = re.fullmatch(r"v([0-9]{1,3})", variant)
    return int(match[1]) if match else usual
