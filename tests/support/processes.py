"""Waiting for something, and work in a forked child. Asserts nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

#: Seconds after which what has not come never will.
PATIENCE = 20.0


def eventually(true: Callable[[], object], patience: float = PATIENCE, every: float = 0.002) -> bool:
    """Whether `true` says so within `patience` seconds; it is asked again `every` so many."""
    deadline = time.monotonic() + patience
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def spawn(call: Callable[[], object]) -> int:
    """Pid of a child that does `call` and ends with 0, or says on stderr what it raised and ends with 1."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        call()
        code = 0
    except BaseException as error:  # the parent shows nothing of it otherwise
        print(f"in the child: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)
