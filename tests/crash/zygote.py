"""A process that has imported layerfs once and serves each mount in a fork of itself, for tests that mount
often and kill the daemon at a chosen step.

Reads one JSON object a line from stdin: the fields of `StackConfig`, `mountpoint`, and for a mount that is to
die `arm` (steps count while this file exists), `trace` (file that takes their names), `at` (die at this one,
from 1), `shutdown` ([directory, ioctl, flags]: take that file system down first). Answers "ready PID" or
"error TEXT".
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

from layerfs.errors import LayerfsError
from layerfs.fuse.serve import serve
from layerfs.upper import steps
from layerfs.upper.upper import Upper
from layerfs.vfs.config import StackConfig

FUSE_OPTIONS = {
    "default_permissions",
    "allow_other",
    "suid",
    "dev",
    "noatime",
    "fsname=layerfs",
    "subtype=layerfs",
}


def killer(request: dict[str, Any]) -> Callable[[str], None]:
    arm, at, down = request["arm"], request.get("at"), request.get("shutdown")
    trace = os.open(request["trace"], os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
    target = os.open(down[0], os.O_RDONLY | os.O_DIRECTORY) if down else -1
    count = 0

    def hook(name: str) -> None:
        nonlocal count
        if not os.path.exists(arm):
            return
        count += 1
        os.write(trace, name.encode() + b"\n")
        if count == at:
            if down:
                fcntl.ioctl(target, down[1], struct.pack("I", down[2]))
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def child(request: dict[str, Any]) -> None:
    if "arm" in request:
        steps.hook = killer(request)
    if request.pop("file_whiteouts", False):  # as where mknod of 0/0 is not allowed
        Upper._can_whiteout_device = lambda self: False  # type: ignore[method-assign]
    fields = {k: v for k, v in request.items() if k in StackConfig.__dataclass_fields__}
    config = StackConfig(**{**fields, "lowers": tuple(request["lowers"])})

    def ready() -> None:
        os.write(1, b"ready %d\n" % os.getpid())

    try:
        serve(config, request["mountpoint"], set(FUSE_OPTIONS), ready)
    except LayerfsError as error:
        os.write(1, f"error {error}\n".encode())


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    child(json.loads(line))
                    code = 0
                except BaseException:
                    import traceback

                    text = traceback.format_exc().replace("\n", " | ")
                    os.write(1, f"error {text}\n".encode())
            os._exit(code)


if __name__ == "__main__":
    main()
