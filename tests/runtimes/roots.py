"""The root that the runtimes are given: busybox, devices, a suid program. Lays trees out; starts nothing.

`helper` is a static program of our own: busybox, where it is set-uid, drops the privilege again.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.support.stack import Dir, File, Hardlink, Node, Symlink, Tree, scratch_root

#: An ordinary user inside.
USER = 1000

_HELPER = r"""
#define _GNU_SOURCE
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* as UID PROGRAM...: runs PROGRAM as that user and group, with no others. ids: tells who it runs as. */
int main(int count, char **words)
{
    if (count > 2) {
        unsigned id = atoi(words[1]);
        if (setgroups(0, NULL) || setresgid(id, id, id) || setresuid(id, id, id)) {
            perror("as");
            return 1;
        }
        execv(words[2], words + 2);
        perror(words[2]);
        return 1;
    }
    printf("%d %d %d %d\n", getuid(), geteuid(), getgid(), getegid());
    return 0;
}
"""

_NAMES = """
sh ls cat cp id mount umount mknod stat touch mkdir rmdir rm ln mv echo grep head od sleep chmod chown true
test readlink pwd sync wc tr env find pivot_root chroot ps
"""
APPLETS = _NAMES.split()


@cache
def helper() -> bytes:
    """The static program `as`. Skips the test where it cannot be compiled."""
    here = scratch_root() / "helper"
    here.mkdir(exist_ok=True)
    (here / "as.c").write_text(_HELPER)
    try:
        subprocess.run(
            ["gcc", "-static", "-O1", "-o", here / "as", here / "as.c"], check=True, capture_output=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no static program can be compiled here: {error}")
    return (here / "as").read_bytes()


@cache
def _busybox() -> bytes:
    found = shutil.which("busybox")
    if found is None:
        pytest.skip("busybox-static is not installed")
    return Path(found).read_bytes()


def root_tree(*, devices: bool = True) -> Tree:
    """`devices`: with those that only root can make, and what belongs to others."""
    program = helper()
    tree: dict[str, object] = {
        **{
            name: Dir()
            for name in ("bin", "dev", "etc", "mnt", "proc", "root", "run", "sys", "usr", "usr/share")
        },
        "tmp": Dir(mode=0o1777),
        "var": Dir(),
        "var/tmp": Dir(mode=0o1777),
        "bin/busybox": File(data=_busybox(), mode=0o755),
        **{f"bin/{name}": Symlink(target="busybox") for name in APPLETS},
        "bin/as": File(data=program, mode=0o755),
        "bin/ids": File(data=program, mode=0o755),
        "etc/passwd": File(data=b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n"),
        "etc/group": File(data=b"root:x:0:\nuser:x:1000:\n"),
        "etc/os-release": File(data=b"ID=layers\n"),
        "etc/hostname": File(data=b"layers\n"),
        "etc/localtime": File(),
        "etc/resolv.conf": File(),
        "etc/motd": File(data=b"welcome\n"),
        "etc/issue": File(data=b"old\n"),
        "usr/share/doc": Dir(),
        "usr/share/doc/a": File(data=b"a\n"),
        "usr/share/doc/b": Hardlink("usr/share/doc/a"),
        "usr/share/link": Symlink(target="doc/a"),
        "secret": File(data=b"secret\n", mode=0o600),
    }
    if devices:
        tree |= {
            "bin/suid": File(data=program, mode=0o4755),
            "bin/sgid": File(data=program, mode=0o2755, gid=50),
            "devices": Dir(),
            "devices/null": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 3), mode=0o666),
            "devices/zero": Node(kind=stat.S_IFCHR, rdev=os.makedev(1, 5), mode=0o666),
            "home": Dir(uid=USER, gid=USER),
            "home/notes": File(data=b"mine\n", mode=0o600, uid=USER, gid=USER),
        }
    return tree  # type: ignore[return-value]
