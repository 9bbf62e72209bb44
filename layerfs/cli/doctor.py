"""`layerfs doctor`: shows what `layerfs.runtime.abilities` and `layerfs.vfs.forms` find. Tries nothing
itself.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import click

from layerfs import __version__
from layerfs.errors import MountError
from layerfs.runtime import abilities
from layerfs.vfs import checks, forms

_MARKS = {True: ("ok", "green"), False: ("no", "red"), None: ("--", None)}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
@click.option(
    "--upper", metavar="DIR", help="Also tell what DIR can carry, and which options the kernel needs for it."
)
def command(as_json: bool, upper: str | None) -> int:
    """Tell what this machine and kernel allow. Exit code 1 when nothing can be mounted."""
    findings = abilities.machine()
    report: dict[str, Any] = {
        "version": __version__,
        "usable": all(each.ok is not False for each in findings if each.needed),
        "machine": {each.name: {"ok": each.ok, "text": each.text} for each in findings},
    }
    if upper is not None:
        report["upper"] = _upper(upper)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        for each in findings:
            _line(each.name, each.ok, each.text)
        if upper is not None:
            _show_upper(report["upper"])
    return 0 if report["usable"] else 1


def _line(name: str, ok: bool | None, text: str) -> None:
    mark, colour = _MARKS[ok]
    click.echo(f"{click.style(f'{mark:<3}', fg=colour)} {name:<18} {text}")


def _upper(path: str) -> dict[str, Any]:
    able = abilities.upper(path)
    try:
        found = forms.scan_upper(path)
    except OSError as error:
        raise MountError(
            f"upper directory {checks.shown(path)}: {checks.reason(error)}", error.errno
        ) from None
    return {
        "path": path,
        "fstype": able.fstype,
        "probe": asdict(able.probe) if able.probe else None,
        "problem": able.problem,
        "objects": found.objects,
        "unreadable": found.unreadable,
        "forms": dict(sorted(found.counts.items())),
        "prefixes": sorted(found.prefixes),
        "kernel_options": found.kernel_options(),
        "kernel_obstacles": found.obstacles(),
        "trusted_visible": os.geteuid() == 0,
    }


def _show_upper(upper: dict[str, Any]) -> None:
    click.echo(f"\nupper directory {checks.shown(upper['path'])} on {upper['fstype']}")
    probe = upper["probe"]
    if probe is None:
        _line("probe", None, f"not tried: {upper['problem']}")
    else:
        prefix = probe["prefix"]
        _line("xattrs", prefix is not None, f"{prefix}* will be used" if prefix else "none can be set")
        device = probe["whiteout_device"]
        _line(
            "whiteouts", None, "character device 0/0" if device else ".wh.NAME files (mknod is not allowed)"
        )
        _line("RENAME_WHITEOUT", None, "yes" if probe["rename_whiteout"] else "no")
        _line("reflink", None, "yes" if probe["reflink"] else "no")
    counts = ", ".join(f"{count} {form}" for form, count in upper["forms"].items()) or "no overlay marks"
    _line("content", None, f"{upper['objects']} objects: {counts}")
    if upper["unreadable"]:
        _line("unreadable", False, f"{upper['unreadable']} objects could not be looked at")
    if not upper["trusted_visible"]:
        _line("note", None, "trusted.* attributes are shown to root only")
    options = upper["kernel_options"]
    if options is None:
        for obstacle in upper["kernel_obstacles"]:
            _line("kernel overlay", False, f"cannot read it: {obstacle}")
    else:
        _line("kernel overlay", True, f"needs -o {','.join(options)}" if options else "needs no options")
