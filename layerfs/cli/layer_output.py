"""Where a command's layer goes and how it is packed: options that several commands share, and how the result
is told."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from layerfs.errors import UsageError
from layerfs.oci.commit import output_file
from layerfs.oci.streams import COMPRESSIONS, LayerSink, Written, check_level


@dataclass(frozen=True, slots=True)
class LayerOutput:
    """`path` None or `-`: stdout."""

    path: str | None
    compression: str
    level: int | None

    @property
    def to_stdout(self) -> bool:
        return self.path in (None, "-")

    def target(self) -> int | str:
        """The path, or the descriptor of stdout."""
        return sys.stdout.fileno() if self.path is None or self.path == "-" else self.path

    def refuse_terminal(self) -> None:
        """Raises UsageError where the tar would go to a terminal."""
        if self.to_stdout and sys.stdout.isatty():
            raise UsageError("a tar is not for the terminal: give -o FILE, or send the output elsewhere")

    @contextlib.contextmanager
    def open(self, keep_out_of: int | None = None) -> Iterator[int]:
        """A descriptor to write the layer to; a file appears when it is whole, and not in the directory that
        the descriptor `keep_out_of` is. Raises UsageError, LayerError."""
        self.refuse_terminal()
        if self.path is None or self.path == "-":
            sys.stdout.flush()
            yield sys.stdout.fileno()
            return
        with output_file(self.path, keep_out_of) as fd:
            yield fd

    def sink(self, fd: int) -> LayerSink:
        return LayerSink(fd, self.compression, self.level)

    def say(self, text: str) -> None:
        """The summary: to stdout, unless the layer went there."""
        print(text, file=sys.stderr if self.to_stdout else sys.stdout)


def layer_output(command: Callable[..., int]) -> Callable[..., int]:
    """Adds -o, --compression and --level; `command` gets them as `output`, a `LayerOutput`."""

    @click.option(
        "-o", "--output", "path", metavar="FILE", help="Where the tar goes; '-' and default: stdout."
    )
    @packing
    @wraps(command)
    def told(*arguments: Any, path: str | None, compression: str, level: int | None, **rest: Any) -> int:
        return command(*arguments, output=LayerOutput(path, compression, level), **rest)

    return told


def packing(command: Callable[..., int]) -> Callable[..., int]:
    """Adds --compression and --level, checked. A layer of an image is gzip unless somebody says something
    else: it is likely to go to a registry, and every program reads it. `command` makes an image when it gets
    a `layout`, or a `target` in its place (`image_options`)."""

    @click.option(
        "--compression",
        type=click.Choice(COMPRESSIONS),
        help="Of the layer. [default: gzip in an image (--layout), else none]",
    )
    @click.option("--level", type=int, metavar="N", help="Of the compression. [default: a fast one]")
    @wraps(command)
    def told(*arguments: Any, compression: str | None, level: int | None, **rest: Any) -> int:
        if compression is None:
            image = rest.get("layout") is not None or rest.get("target") is not None
            compression = "gzip" if image else "none"
        check_level(compression, level)
        return command(*arguments, compression=compression, level=level, **rest)

    return told


def layer_lines(written: Written, *details: str) -> list[str]:
    """`details` of the size."""
    if written.size != written.tar_size:
        details = (*details, f"{written.tar_size:,} uncompressed")
    size = f"{written.size:,} bytes" + (f" ({', '.join(details)})" if details else "")
    return [f"DiffID   {written.diff_id}", f"Digest   {written.digest}", f"Size     {size}"]


def layer_as_json(written: Written) -> dict[str, object]:
    return {
        "diff_id": written.diff_id,
        "digest": written.digest,
        "media_type": written.media_type,
        "size": written.size,
        "uncompressed_size": written.tar_size,
    }
