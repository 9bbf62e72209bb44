"""How commands that look at an upper are told which: by its mount, or by its layers. Opens nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click


@dataclass(frozen=True, slots=True)
class Chosen:
    """`mountpoint`, or `upper` and `lowers` (top first); `userxattr` as `control.mounts.open_layers`
    has it."""

    mountpoint: str | None
    upper: str | None
    lowers: Sequence[str]
    userxattr: bool | None


def upper_options(command: Callable[..., int]) -> Callable[..., int]:
    """Adds MOUNTPOINT, --upper, --lower and --userxattr; `command` gets them as its first argument, a
    `Chosen`."""

    @click.option("--upper", metavar="DIR", help="The upper directory, when it is not mounted.")
    @click.option(
        "--lower", "lowers", multiple=True, metavar="DIR", help="A lower layer, top first; may be repeated."
    )
    @click.option(
        "--userxattr/--no-userxattr",
        default=None,
        help="The upper's marks are user.* or trusted.* attributes. [default: found out]",
    )
    @click.argument("mountpoint", required=False)
    @wraps(command)
    def told(
        mountpoint: str | None,
        upper: str | None,
        lowers: tuple[str, ...],
        userxattr: bool | None,
        **rest: Any,
    ) -> int:
        return command(Chosen(mountpoint, upper, lowers, userxattr), **rest)

    return told
