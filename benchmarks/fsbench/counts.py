"""How many requests a job may cause, for each operation, on layerfs. Counts do not depend on the machine: the
short form, which CI runs, asserts them and no times."""

from __future__ import annotations

from .results import Results

#: By measure. What is cold pays for the directories it meets, too, one to ten or fifty files.
MOST: dict[str, float] = {}


def too_many(results: Results) -> list[str]:
    """One line for each count that is larger than it may be."""
    lines = []
    for key, most in MOST.items():
        measure = results.measures.get(key)
        for name in results.ours:
            each = measure.requests_each(name) if measure else None
            if measure and each is not None and each > most:
                kinds = ", ".join(f"{kind} {count}" for kind, count in measure.requests[name].items())
                lines.append(f"{name}, {measure.title}: {each:.2f} requests, at most {most:g}: {kinds}")
    return lines
