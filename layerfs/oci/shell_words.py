"""Words of a Dockerfile instruction: split at blanks, variables put in, quotes and escapes taken off. Knows
no instruction.

Source: docker's Dockerfile reference, "Environment replacement" and "Escape"; where it is silent, what docker
does. Not carried: the modifiers `#`, `%` and `/`, which images' own variables rarely need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from layerfs.errors import UsageError

_QUOTES = "'\""
_SPECIAL = "@*#?-$!"


def split(text: str) -> list[str]:
    """The words of `text`, still quoted. A backslash keeps the next character from ending a word or a quote
    (in single quotes too: so does docker's parser)."""
    words: list[str] = []
    word = ""
    quote = ""
    at = 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            word += text[at : at + 2] if at + 1 < len(text) else ""
            at += 2
            continue
        if not quote and char.isspace():
            if word:
                words.append(word)
            word = ""
        else:
            word += char
            if quote:
                quote = "" if char == quote else quote
            elif char in _QUOTES:
                quote = char
        at += 1
    if word:
        words.append(word)
    return words


def expand(word: str, variables: Mapping[str, str]) -> str:
    """`word` without quotes and escapes, `$NAME`, `${NAME}`, `${NAME:-WORD}`, `${NAME:+WORD}` and
    `${NAME:?WORD}` (and without the colon) replaced; what is not set is empty. Raises UsageError."""
    return _Expansion(word, variables).until("")


class _Expansion:
    def __init__(self, text: str, variables: Mapping[str, str]) -> None:
        self._text = text
        self._variables = variables
        self._at = 0

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        char = self._peek()
        self._at += 1
        return char

    def until(self, stop: str) -> str:
        """Up to `stop`, which is passed; "" is the end."""
        result = ""
        while char := self._peek():
            if char == stop:
                self._at += 1
                return result
            if (part := self._part(char)) is not None:
                result += part()
            else:
                self._at += 1
                result += self._next() if char == "\\" else char
        if stop:
            raise self._unfinished(stop)
        return result

    def _part(self, char: str) -> Callable[[], str] | None:
        return {"'": self._single_quoted, '"': self._double_quoted, "$": self._variable}.get(char)

    def _single_quoted(self) -> str:
        end = self._text.find("'", self._at + 1)
        if end < 0:
            raise self._unfinished("'")
        start, self._at = self._at + 1, end + 1
        return self._text[start:end]

    def _double_quoted(self) -> str:
        self._at += 1
        result = ""
        while char := self._peek():
            if char == '"':
                self._at += 1
                return result
            if char == "$":
                result += self._variable()
                continue
            self._at += 1
            # a backslash before anything else stands for itself; the last one of all is dropped
            if char == "\\" and self._peek() in ('"', "$", "\\", ""):
                char = self._next()
            result += char
        raise self._unfinished('"')

    def _variable(self) -> str:
        self._at += 1
        if self._peek() != "{":
            name = self._name()
            return self._variables.get(name, "") if name else "$"
        self._at += 1
        name = self._name()
        if not name:
            raise UsageError(f"{self._text!r}: ${{}} needs the name of a variable")
        value = self._variables.get(name)
        operator = self._next()
        if operator == "}":
            return value or ""
        if operator == ":":
            operator = self._next()
            value = value or None
        if operator not in ("-", "+", "?"):
            raise UsageError(f"{self._text!r}: after ${{{name} only }}, -, + and ? are known")
        word = self.until("}")
        if operator == "+":
            return word if value is not None else ""
        if operator == "?" and value is None:
            raise UsageError(f"{self._text!r}: {name} is not set{': ' + word if word else ''}")
        return word if value is None else value

    def _name(self) -> str:
        start = self._at
        if self._peek() and self._peek() in _SPECIAL:
            return self._next()
        digits = self._peek().isdigit()
        while (char := self._peek()) and (
            char.isdigit() if digits else char.isalpha() or char.isdigit() or char == "_"
        ):
            self._at += 1
        return self._text[start : self._at]

    def _unfinished(self, end: str) -> UsageError:
        return UsageError(f"{self._text!r}: the closing {end} is missing")
