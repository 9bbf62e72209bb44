"""Feeds a target: `python -m tests.fuzz.harness TARGET SECONDS CORPUS`. With atheris (pip install
layerfs[fuzz]) it is guided by coverage, without it changes seeds at random. A process of its own: libFuzzer
does not come back.

Ends with status 0 when nothing was found. What breaks a target is left as `crash-…` in the directory above
CORPUS."""

from __future__ import annotations

import importlib
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

#: A zstd window may take 128 MiB.
MEMORY_MIB = 800
MAX_LENGTH = 12_000


def mutate(raw: bytes, others: list[bytes], choose: random.Random) -> bytes:
    """One change of the kinds that libFuzzer makes."""
    at = choose.randrange(len(raw) + 1)
    end = min(len(raw), at + choose.choice((1, 2, 8, 512, 1024)))
    return choose.choice(
        (
            lambda: raw[:at] + choose.randbytes(end - at) + raw[end:],
            lambda: raw[:at] + raw[end:],
            lambda: raw[:end] + raw[at:],
            lambda: (
                raw[:at] + choose.choice((b"\0", b"\xff", b"7", b"=", b"/..", b"99")) * (end - at) + raw[end:]
            ),
            lambda: raw[:at] + choose.choice(others)[at:],
            lambda: raw[: at & ~511] + choose.choice(others) + raw[at & ~511 :],
        )
    )()[:MAX_LENGTH]


def at_random(
    read: Callable[[bytes], None], seeds: list[bytes], *, number: int, seconds: float, seed: int
) -> int:
    """Up to `number` inputs, for up to `seconds`; how many it were. An exception carries its input in
    `add_note`."""
    choose = random.Random(seed)
    end = time.monotonic() + seconds
    for done in range(number):
        raw = choose.choice(seeds)
        for _ in range(choose.randint(0, 6)):
            raw = mutate(raw, seeds, choose)
        try:
            read(raw)
        except BaseException as error:
            error.add_note(f"input: {raw.hex()}")
            raise
        if time.monotonic() > end:
            return done
    return number


def main(name: str, seconds: int, corpus: Path) -> None:
    try:
        import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        target = importlib.import_module("tests.fuzz.targets").TARGETS[name]
        done = at_random(target.read, target.seeds(), number=10**9, seconds=seconds, seed=int(time.time()))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{done} inputs at random, {memory} MiB")
        assert memory < MEMORY_MIB
        return
    with atheris.instrument_imports(include=["layerfs.oci"]):
        target = importlib.import_module("tests.fuzz.targets").TARGETS[name]
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number:02}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_LENGTH}",
        f"-rss_limit_mb={MEMORY_MIB}",
        "-timeout=20",
        "-print_final_stats=1",
        f"-artifact_prefix={corpus.parent}/",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target.read)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
