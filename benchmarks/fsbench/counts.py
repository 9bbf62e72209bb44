"""How many requests a job may cause, for each operation, on layerfs. Counts do not depend on the machine: the
short form, which CI runs, asserts them and no times."""

from __future__ import annotations

from .results import Results

#: By measure. What is cold pays for the directories that it meets, too: one to fifty files or, in the shapes,
#: to ten. A sequential read or write is counted by blocks of 128 KiB.
MOST: dict[str, float] = {
    "cold_present": 1.05,  # LOOKUP
    "warm_present": 0,
    "cold_absent": 1.05,  # LOOKUP
    "warm_absent": 0,
    "cold_find": 0.1,  # four a directory: OPENDIR, READDIRPLUS twice, RELEASEDIR
    "warm_find": 0.1,
    "cold_ls": 2.1,  # GETXATTR twice
    "warm_ls": 2.1,
    "cold_read": 4.05,  # LOOKUP, OPEN, READ, RELEASE
    "warm_read": 3,  # OPEN, GETATTR (a read makes the access time stale), RELEASE
    "cold_xattr": 3.05,  # LOOKUP, LISTXATTR, GETXATTR
    "warm_xattr": 2,
    "create": 6.1,  # LOOKUP, GETATTR of the directory, CREATE, GETXATTR, WRITE, RELEASE
    "remove": 2.2,  # UNLINK, GETATTR of the directory
    "untar": 14.5,
    "chown": 3.3,  # SETATTR, GETXATTR, GETATTR
    "rename": 3.3,  # LOOKUP, RENAME, GETATTR of the directory
    "move": 6,
    "rm": 2.5,  # UNLINK, GETATTR of the directory
    "append": 6,  # LOOKUP, OPEN, GETXATTR, WRITE, FLUSH, RELEASE
    "seq_cold": 1.1,  # READ of one block or two
    "seq_warm": 0.1,
    "rand_cold": 1.1,  # READ
    "rand_warm": 0.1,
    "mmap_cold": 1.1,
    "mmap_warm": 0.1,
    "seq_write": 2.5,  # GETXATTR, WRITE
    "rand_write": 2.5,
    "seq_sync": 2.5,
    **{
        f"{shape}_{which}_{layers}": 1.2  # LOOKUP, whatever the number of layers
        for shape in ("wide", "deep")
        for which in ("present", "absent")
        for layers in (1, 8, 32, 128)
    },
}


def too_many(results: Results) -> dict[str, str]:
    """By measure, a line that tells which count is larger than it may be."""
    lines: dict[str, str] = {}
    for key in MOST:
        measure = results.measures.get(key)
        for name in results.ours:
            most = MOST[key]
            each = measure.requests_each(name) if measure else None
            if measure and each is not None and each > most:
                kinds = ", ".join(f"{kind} {count}" for kind, count in measure.requests[name].items())
                lines[key] = f"{name}, {measure.title}: {each:.2f} requests, at most {most:g}: {kinds}"
    return lines


def keep_fewer(results: Results, again: Results) -> None:
    """Of two counts the larger one was disturbed: somebody dropped the kernel's caches meanwhile."""
    for key, measure in again.measures.items():
        before = results.measures[key].requests
        for name, kinds in measure.requests.items():
            if name not in before or sum(kinds.values()) < sum(before[name].values()):
                before[name] = kinds
