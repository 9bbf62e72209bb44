"""What kind of owner this process makes files as: trees made by different kinds must not be shared. Makes
nothing."""

from __future__ import annotations

import hashlib
import os

#: Inode number of the initial user namespace in nsfs (include/linux/proc_ns.h, PROC_USER_INIT_INO).
_INITIAL = 0xEFFFFFFD
#: CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_ADMIN (trusted.* xattrs), MKNOD, SETFCAP: a layer unpacked
#: without one of them is another tree.
_CAPABILITIES = sum(1 << number for number in (0, 1, 3, 4, 21, 27, 31))


def ownership_form() -> str:
    """A file name for the kind:

    root               real root: every owner, device and xattr is as the layer says
    root-caps-HEX      the same with fewer capabilities
    ns-HEX             root of a user namespace, by its maps: owners are shifted, devices left out
    user               anybody else: everything is his
    """
    if os.geteuid() != 0:
        return "user"
    missing = _CAPABILITIES & ~_effective()
    suffix = f"-caps-{_CAPABILITIES & ~missing:x}" if missing else ""
    if os.stat("/proc/self/ns/user").st_ino == _INITIAL:
        return "root" + suffix
    maps = hashlib.sha256()
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}", "rb") as file:
            maps.update(b" ".join(file.read().split()) + b"\n")
    return f"ns-{maps.hexdigest()[:16]}{suffix}"


def _effective() -> int:
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"CapEff:"):
                return int(line.split()[1], 16)
    return 0
