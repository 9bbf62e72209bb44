"""Exit codes, one-line errors, and that nothing slow is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from layerfs import __version__
from layerfs.cli import talk
from layerfs.cli.commands import COMMANDS
from layerfs.errors import BusyError, LayerfsError, TarError, UsageError
from tests.support import mounts


def raising(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (LayerfsError("so"), 1, "layerfs x: so\n"),
        (LayerfsError("two\nlines"), 1, "layerfs x: two lines\n"),
        (BusyError("taken"), 1, "layerfs x: taken\n"),
        (TarError("evil"), 1, "layerfs x: evil\n"),
        (UsageError("wrong"), 2, "layerfs x: wrong (--help shows the usage)\n"),
        (PermissionError(13, "no", "/a/b"), 1, "layerfs x: Permission denied: /a/b\n"),
        (PermissionError(13, "no", b"/a\xff"), 1, "layerfs x: Permission denied: /a\\udcff\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("oh"), 70, "layerfs x: internal error, please report it: ZeroDivisionError: oh\n"),
    ],
)
def test_what_is_raised(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk.run("layerfs x", raising(error)) == code
    assert capsys.readouterr().err == said


def test_a_traceback_is_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAYERFS_TRACEBACK", "1")
    assert talk.run("layerfs", raising(ValueError("x"))) == 70
    assert "Traceback" in capsys.readouterr().err


def layerfs(*arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [*mounts.layerfs_command(), *arguments], capture_output=True, text=True, check=False, **how
    )


def test_version() -> None:
    for arguments in (["--version"], ["--version", "mount"]):
        done = layerfs(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"layerfs {__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_everything(arguments: list[str]) -> None:
    done = layerfs(*arguments)
    assert done.returncode == 0 and done.stderr == ""
    assert all(f"  {command} " in done.stdout for command in COMMANDS)
    assert all(f"{code:>3}  {meaning}" in done.stdout for code, meaning in talk.EXIT_CODES)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    for flag in ("-h", "--help"):
        done = layerfs(command, flag)
        assert (
            done.returncode == 0 and done.stdout.startswith(f"Usage: layerfs {command} ") and not done.stderr
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_one_line(command: str) -> None:
    done = layerfs(command, "--no-such-flag")
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"layerfs {command}: ") and "--no-such-flag" in done.stderr


def test_output_that_nobody_reads() -> None:
    done = subprocess.run(
        ["sh", "-c", '{ "$@"; echo $? >&2; } | :', "sh", *mounts.layerfs_command(), "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines() in ([str(talk.OUTPUT_GONE)], ["0"])


def test_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "layerfs", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"layerfs {__version__}\n"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("layerfs.cli.main", {"click", "rich", "trio", "pyfuse3", "dataclasses", "json", "ctypes"}),
        ("layerfs.cli.launching", {"click", "rich", "trio", "pyfuse3"}),
        ("layerfs.cli.mount_helper", {"click", "rich", "trio", "pyfuse3"}),
        ("layerfs.cli.mount", {"rich", "trio", "pyfuse3"}),
        ("layerfs.cli.umount", {"rich", "trio", "pyfuse3", "subprocess"}),
        ("layerfs.runtime.preflight", {"click", "rich", "trio", "pyfuse3", "subprocess"}),
    ],
)
def test_nothing_slow_is_imported_early(module: str, absent: set[str]) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not absent & set(loaded.split())
