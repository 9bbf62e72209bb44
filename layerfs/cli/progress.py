"""A progress bar on stderr for commands that take long. Silent where stderr is no terminal, and for
`--json`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from layerfs.oci.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class _Bar:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def total(self, size: int | None) -> None:
        self._bars.update(self._task, total=size)

    def advance(self, size: int) -> None:
        self._bars.advance(self._task, size)

    def describe(self, text: str) -> None:
        self._bars.update(self._task, description=text)


@contextlib.contextmanager
def bar(title: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Progress that is shown on a terminal while the block runs and gone after it; `quiet`: not shown
    at all."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield Silent()
        return
    # 60 ms to import: only for somebody who looks.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),  # names of files are no markup
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    # rich must not take over stdout: the layer itself may go there.
    bars = Bars(
        *columns,
        console=Console(file=sys.stderr),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bars:
        yield _Bar(bars, bars.add_task(title, total=None))
