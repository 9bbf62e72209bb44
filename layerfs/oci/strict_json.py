"""JSON of strangers, read so that it can mean one thing only, and JSON written compactly. Knows no document.

Refused, with ImageError: what is not UTF-8, a key given twice (parsers differ in which one counts, and a
digest covers both), NaN and infinities, lone surrogates, nesting beyond `MAX_DEPTH`, more bytes than the
caller allows. Source: RFC 8259; image-spec considerations.md ("canonicalization" is not asked for, so bytes
are never compared after a rewrite).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from layerfs.errors import ImageError

#: Manifests nest five deep, configs six; extensions a little more.
MAX_DEPTH = 64

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(data: bytes, what: str, limit: int) -> dict[str, Any]:
    """The JSON object that `data` holds; see `parse`."""
    raw = parse(data, what, limit)
    if not isinstance(raw, dict):
        raise ImageError(f"{what} is malformed: it is no JSON object")
    return raw


def parse(data: bytes, what: str, limit: int) -> Any:
    """The JSON value that `data` holds. `what` names it in messages; `limit` is in bytes. Raises
    ImageError."""
    if len(data) > limit:
        raise ImageError(f"{what} is refused: it is larger than {limit >> 10} KiB")
    try:
        raw = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _check_depth(raw, MAX_DEPTH)
        if _SURROGATE.search(data):
            encode(raw)
    except UnicodeError:
        raise ImageError(f"{what} is malformed: it is not UTF-8") from None
    except RecursionError:
        raise ImageError(f"{what} is refused: it is nested too deeply") from None
    except ValueError as error:
        raise ImageError(f"{what} is malformed: {error}") from None
    return raw


def encode(document: object) -> bytes:
    """`document` as JSON without blanks; keys in their order. Raises UnicodeEncodeError for a lone
    surrogate."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} is given twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _check_depth(value: object, left: int) -> None:
    if isinstance(value, (dict, list)):
        if not left:
            raise RecursionError
        for each in value.values() if isinstance(value, dict) else value:
            _check_depth(each, left - 1)
