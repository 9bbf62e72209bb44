"""Names that are to stay out of a layer: patterns as in gitignore(5). Walks nothing (`changes` asks)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from layerfs.errors import UsageError


class Excluded:
    """Decides which names are left out.

    Patterns are gitignore(5)'s, anchored at the root of the layer: `*.pyc` matches at any depth, `/tmp` and
    `var/cache` from the root, `log/` directories only, `**` any number of directories; a later `!PATTERN`
    takes names back. What lies below a directory that is left out is never asked about, as there."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises UsageError for a pattern that means nothing."""
        from pathspec import GitIgnoreSpec  # 20 ms: only for those who exclude something

        for pattern in patterns:
            if not pattern.strip():
                raise UsageError("an empty pattern excludes nothing: leave it out")
        # A line that begins with # is a comment in a .gitignore; on a command line it is a name.
        lines = ["\\" + pattern if pattern.startswith("#") else pattern for pattern in patterns]
        try:
            self._spec = GitIgnoreSpec.from_lines(lines)
        except ValueError as error:
            raise UsageError(f"a pattern to exclude cannot be read: {error}") from None

    def __call__(self, path: bytes, *, is_dir: bool) -> bool:
        return self._spec.match_file(os.fsdecode(path) + ("/" if is_dir else ""))
