"""Entry point of `layerfs`: placeholder until the commands land."""

from __future__ import annotations


def main() -> int:
    return 0
