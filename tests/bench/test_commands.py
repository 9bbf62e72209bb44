"""Commands that fail, that hang, that are not there: one line each."""

from __future__ import annotations

import time

import pytest

from benchmarks.fsbench.commands import BenchmarkError, run


def test_output() -> None:
    assert run(["sh", "-c", "echo said; echo aside >&2"]) == "said\n"


def test_the_last_line_of_what_went_wrong() -> None:
    with pytest.raises(BenchmarkError, match=r"^sh: exit status 3: the reason$"):
        run(["sh", "-c", "echo more >&2; echo the reason >&2; exit 3"])


def test_not_there() -> None:
    with pytest.raises(BenchmarkError, match=r"^no-such-program: No such file"):
        run(["no-such-program"])


def test_a_command_that_hangs_is_ended() -> None:
    begin = time.monotonic()
    with pytest.raises(BenchmarkError, match="no end after"):
        run(["sleep", "60"], timeout=0.2)
    assert time.monotonic() - begin < 30
