"""The click side of `layerfs`: a group whose commands are imported when they are called. Knows no command's
work.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from layerfs import __version__
from layerfs.cli import talk
from layerfs.cli.commands import COMMANDS, MODULES
from layerfs.errors import UsageError

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in talk.EXIT_CODES)


class LazyGroup(click.Group):
    """Imports a command's module only to run it: `layerfs mount` must not pay for `layerfs commit`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = MODULES.get(cmd_name, cmd_name)
        command = importlib.import_module(f"layerfs.cli.{module}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
    no_args_is_help=False,
)
@click.version_option(__version__, message="%(prog)s %(version)s", prog_name="layerfs")
def layerfs() -> None:
    """Read-only layers under a writable directory, shown as one file system through FUSE."""


def run(arguments: list[str]) -> int:
    """Run one command line. Raises UsageError in place of click's own, LayerfsError, KeyboardInterrupt,
    OSError.

    Not through click's `main`, which turns a closed stdout into exit code 1.
    """
    try:
        with layerfs.make_context("layerfs", list(arguments)) as context:
            result: Any = layerfs.invoke(context)
    except click.exceptions.Exit as done:  # --help, --version, ctx.exit()
        return done.exit_code
    except click.UsageError as error:
        raise UsageError(error.format_message().rstrip(".")) from None
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        raise UsageError(error.format_message()) from None
    return result if isinstance(result, int) else 0
