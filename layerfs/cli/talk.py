"""How every command ends: one line on stderr for what went wrong, and an exit code. Imports nothing slow.

| code | meaning                                                                |
|------|------------------------------------------------------------------------|
| 0    | done; for `mount`: the mount is usable                                 |
| 1    | it could not be done: stderr says why in one line                      |
| 2    | the command line is wrong                                              |
| 70   | a bug of layerfs (LAYERFS_TRACEBACK=1 shows where)                     |
| 130  | interrupted; 143: ended by SIGTERM; nothing stays mounted              |
| 141  | whoever read the output went away                                      |

`mount.layerfs` speaks to mount(8) and uses its codes: 1 wrong usage, 4 bug, 32 mount failed.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from layerfs.errors import LayerfsError, UsageError

INTERNAL = 70
INTERRUPTED = 130
OUTPUT_GONE = 141

EXIT_CODES = (
    (0, "done; for mount: the mount is usable"),
    (1, "it could not be done: one line on stderr says why"),
    (2, "the command line is wrong"),
    (INTERNAL, "a bug of layerfs (LAYERFS_TRACEBACK=1 shows where)"),
    (INTERRUPTED, "interrupted; 143: ended by SIGTERM"),
    (OUTPUT_GONE, "whoever read the output went away"),
)


def note(program: str, message: str) -> None:
    """Say one line on stderr, whatever is in `message`. A closed stderr is no reason to fail."""
    line = f"{program}: " + " ".join(message.splitlines())
    line = line.encode(errors="backslashreplace").decode()  # names are bytes: some are no text
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        pass


def run(program: str, work: Callable[[], int | None]) -> int:
    """Run `work`, turn what it raises into one line and an exit code, and make sure that the output got
    out.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # names, and what images say, may hold what this terminal's encoding has not got
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = work() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UsageError as error:
        note(program, f"{error} (--help shows the usage)")
        return error.exit_code
    except LayerfsError as error:
        note(program, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OUTPUT_GONE
    except OSError as error:
        where = f": {os.fsdecode(error.filename)}" if error.filename is not None else ""
        note(program, f"{os.strerror(error.errno) if error.errno else error}{where}")
        return 1
    except Exception as error:  # noqa: BLE001 - a traceback is not for users
        if os.environ.get("LAYERFS_TRACEBACK"):
            import traceback

            traceback.print_exc()
        note(program, f"internal error, please report it: {type(error).__name__}: {error}")
        return INTERNAL


def die_quietly_of_sigint() -> None:
    """While nothing needs undoing: a KeyboardInterrupt in the middle of an import is lost or complained
    about.
    """
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
