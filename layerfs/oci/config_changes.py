"""`--change`: a Dockerfile instruction changes how an image's containers run. Works on the JSON of an image
config; writes nothing.

Taken: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR, as `docker commit --change` has
them; variables are those of the image's Env. ONBUILD and HEALTHCHECK are refused: an OCI config has no field
for them, and a program that ignores one would run something else than was asked for.

As docker build and commit do it: ENTRYPOINT drops the CMD of the base, but not one that was changed before;
a relative WORKDIR goes on from the one before; ENV and LABEL replace what has the same name and keep the
order of the rest. Stricter than docker: what stands behind a JSON array is refused and not ignored.

Sources: docker's Dockerfile reference; image-spec config.md.
"""

from __future__ import annotations

import json
import posixpath
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerfs.errors import UsageError
from layerfs.oci.shell_words import expand, split
from layerfs.oci.strict_json import encode

_SHELL = ["/bin/sh", "-c"]
_PORTS = re.compile(
    r"(?:[0-9]+:|[^/:]+:[0-9]*:)?([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp|sctp))?", re.ASCII
)
_REALTIME = re.compile(r"RTM(?:IN(?:\+([1-9]|1[0-5]))?|AX(?:-([1-9]|1[0-4]))?)")
_NO_FIELD = frozenset(("ONBUILD", "HEALTHCHECK", "SHELL"))


def apply_changes(execution: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """The `config` of an image config (checked by `image.parse_config`), changed by each of `changes` in
    turn; unknown fields stay. Raises UsageError."""
    applied = _Changes(execution)
    for change in changes:
        try:
            applied.apply(change)
        except UsageError as error:
            raise UsageError(f"--change {change!r}: {error}") from None
    return applied.fields


class _Changes:
    def __init__(self, execution: Mapping[str, Any]) -> None:
        self.fields: dict[str, Any] = {key: value for key, value in execution.items() if value is not None}
        self._cmd_set = False
        self._instructions: dict[str, Callable[[str], None]] = {
            "CMD": self._cmd,
            "ENTRYPOINT": self._entrypoint,
            "ENV": self._env,
            "EXPOSE": self._expose,
            "LABEL": self._label,
            "STOPSIGNAL": self._stop_signal,
            "USER": self._user,
            "VOLUME": self._volume,
            "WORKDIR": self._working_dir,
        }

    def apply(self, change: str) -> None:
        if any(char in "\n\r\0" for char in change):
            raise UsageError("an instruction is one line")
        words = change.split(None, 1)
        name, rest = words[0].upper() if words else "", words[1].strip() if len(words) > 1 else ""
        if name in _NO_FIELD:
            raise UsageError(f"OCI images have no {name}")
        if name not in self._instructions:
            raise UsageError(f"not an instruction: give one of {', '.join(self._instructions)}")
        if not rest:
            raise UsageError(f"{name} needs a value")
        self._instructions[name](rest)
        try:
            encode(self.fields)
        except UnicodeEncodeError:
            raise UsageError("this is not UTF-8") from None

    @property
    def _variables(self) -> dict[str, str]:
        pairs = (entry.partition("=") for entry in self.fields.get("Env", ()))
        return {name: value for name, _, value in pairs}

    def _expanded(self, word: str) -> str:
        return expand(word, self._variables)

    # -- what runs ------------------------------------------------------------------------------------

    def _cmd(self, rest: str) -> None:
        self.fields["Cmd"] = self._command(rest)
        self._cmd_set = True

    def _entrypoint(self, rest: str) -> None:
        self._set("Entrypoint", self._command(rest))
        if not self._cmd_set:
            self.fields.pop("Cmd", None)

    def _command(self, rest: str) -> list[str]:
        words = _json_words(rest)
        if words is not None:
            return words
        shell = self.fields.get("Shell")  # docker's own field
        if not (isinstance(shell, list) and shell and all(isinstance(word, str) for word in shell)):
            shell = _SHELL
        return [*shell, rest]

    def _user(self, rest: str) -> None:
        self._set("User", self._expanded(rest))

    def _working_dir(self, rest: str) -> None:
        path = self._expanded(rest)
        if not path:
            raise UsageError("WORKDIR needs a directory")
        if not path.startswith("/"):
            path = posixpath.normpath(posixpath.join("/", self.fields.get("WorkingDir", ""), path))
        self.fields["WorkingDir"] = path

    def _stop_signal(self, rest: str) -> None:
        name = self._expanded(rest)
        plain = name.upper().removeprefix("SIG")
        known = (
            0 < int(plain) < 65
            if re.fullmatch(r"[0-9]{1,3}", plain, re.ASCII)
            else _REALTIME.fullmatch(plain) or f"SIG{plain}" in signal.Signals.__members__
        )
        if not known:
            raise UsageError(f"{name!r} is no signal")
        self.fields["StopSignal"] = name

    # -- lists and tables -----------------------------------------------------------------------------

    def _env(self, rest: str) -> None:
        entries = list(self.fields.get("Env", ()))
        for name, value in self._pairs("ENV", rest):
            at = next((at for at, old in enumerate(entries) if old.partition("=")[0] == name), len(entries))
            entries[at : at + 1] = [f"{name}={value}"]
        self.fields["Env"] = entries

    def _label(self, rest: str) -> None:
        self.fields["Labels"] = {**self.fields.get("Labels", {}), **dict(self._pairs("LABEL", rest))}

    def _pairs(self, instruction: str, rest: str) -> list[tuple[str, str]]:
        """NAME=VALUE words; or, when the first word has no `=`, one NAME and all of the rest as its value."""
        words = split(rest)
        if words and "=" not in words[0]:
            name_and_value = rest.split(None, 1)
            if len(name_and_value) < 2:
                raise UsageError(f"{instruction} needs NAME=VALUE")
            pairs = [(name_and_value[0], name_and_value[1])]
        else:
            pairs = []
            for word in words:
                name, equals, value = word.partition("=")
                if not equals:
                    raise UsageError(f"{word!r} has no '=': quote a value that holds blanks")
                pairs.append((name, value))
        expanded = [(self._expanded(name), self._expanded(value)) for name, value in pairs]
        if any(not name for name, _ in expanded):
            raise UsageError(f"{instruction} needs a name before each '='")
        return expanded

    def _expose(self, rest: str) -> None:
        ports = dict(self.fields.get("ExposedPorts", {}))
        for word in rest.split():
            # one variable may hold several ports
            for told in self._expanded(word).split():
                ports.update({port: {} for port in _ports(told)})
        self.fields["ExposedPorts"] = ports

    def _volume(self, rest: str) -> None:
        words = _json_words(rest)
        volumes = dict(self.fields.get("Volumes", {}))
        for word in rest.split() if words is None else words:
            path = self._expanded(word).strip()
            if not path:
                raise UsageError("VOLUME needs a directory")
            volumes[path] = {}
        self.fields["Volumes"] = volumes

    def _set(self, field: str, value: str | list[str]) -> None:
        """An empty value is no value."""
        if value:
            self.fields[field] = value
        else:
            self.fields.pop(field, None)


def _json_words(rest: str) -> list[str] | None:
    """The strings of a JSON array; None where `rest` is none, and so the shell's to understand."""
    if not rest.startswith("["):
        return None
    try:
        words, end = json.JSONDecoder().raw_decode(rest)
    except (ValueError, RecursionError):
        return None
    if rest[end:].strip():
        raise UsageError(f"something stands behind the JSON array: {rest[end:].strip()!r}")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UsageError("a JSON array of an instruction holds strings only")
    return words


def _ports(told: str) -> list[str]:
    match = _PORTS.fullmatch(told.lower())
    if match is None:
        raise UsageError(
            f"{told!r} is no port: give PORT, FIRST-LAST, or one of them with /tcp, /udp or /sctp"
        )
    first = int(match[1])
    last = int(match[2] or first)
    if not first <= last <= 0xFFFF:
        raise UsageError(f"{told!r} is no range of ports from 0 to 65535")
    return [f"{port}/{match[3] or 'tcp'}" for port in range(first, last + 1)]
