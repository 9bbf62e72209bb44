"""The figures that layerfs is to reach (DESIGN, numbers to reach), and the verdicts on a run. Measures
nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .measures import Measures


@dataclass(frozen=True)
class Limit:
    """`most` is what `key` may be at most, as a `kind`:

    ratio    of wall time to kernel overlayfs in the same round
    growth   of wall time to that of the measure `against`, both of the same contender
    value    in the measure's own unit
    layers   of wall time to the pipeline with the same compression, by benchmarks/layers"""

    work: str
    key: str
    most: float
    kind: str = "ratio"
    against: str = ""


@dataclass(frozen=True)
class Verdict:
    limit: Limit
    value: float

    @property
    def met(self) -> bool:
        return self.value <= self.limit.most

    def __str__(self) -> str:
        return "met" if self.met else f"missed by a factor of {self.value / self.limit.most:.2f}"


#: In the order of DESIGN's table. At 1, 32 and 128 layers the *deep* shape is meant: there kernel overlayfs
#: pays for each layer; *wide* has a limit of its own, against one layer (DESIGN, the lookup path).
LIMITS: tuple[Limit, ...] = (
    Limit("cold stat, 10 layers", "cold_present", 1.0),
    Limit("cold absent names, 10 layers", "cold_absent", 0.7),
    *(
        Limit(f"the same, deep: {what}, {layers}", f"deep_{which}_{layers.split()[0]}", most)
        for layers, most in (("1 layer", 3.0), ("32 layers", 0.4), ("128 layers", 0.15))
        for which, what in (("present", "stat"), ("absent", "absent names"))
    ),
    Limit("wide: cold stat at 32 layers, against 1", "wide_present_32", 1.3, "growth", "wide_present_1"),
    Limit("wide: absent names at 32 layers, against 1", "wide_absent_32", 1.3, "growth", "wide_absent_1"),
    Limit("warm stat", "warm_present", 0.75),
    Limit("warm find -ls", "warm_find", 1.1),
    Limit("cold find -ls", "cold_find", 1.5),
    Limit("cold ls -lU of 20,000 names", "cold_ls", 2.0),
    Limit("open, fstat, read, close of 5,000 small files, cold", "cold_read", 1.2),
    Limit("the same, warm", "warm_read", 1.0),
    Limit("lstat + listxattr + getxattr walk, cold", "cold_xattr", 6.0),
    Limit("the same, warm", "warm_xattr", 6.0),
    Limit("sequential read, cold", "seq_cold", 1.05),
    Limit("sequential read, warm", "seq_warm", 1.05),
    Limit("sequential write", "seq_write", 1.05),
    Limit("sequential write and fsync", "seq_sync", 1.05),
    Limit("random read, cold", "rand_cold", 1.05),
    Limit("random read, warm", "rand_warm", 1.05),
    Limit("mmap read, cold", "mmap_cold", 1.05),
    Limit("mmap read, warm", "mmap_warm", 1.05),
    Limit("create 3,000 small files", "create", 2.5),
    Limit("remove them", "remove", 4.0),
    Limit("untar", "untar", 2.5),
    Limit("chown -R of 2,000 lower files", "chown", 0.5),
    Limit("first append to a 512 MiB lower file", "append", 1.0),
    Limit("rm -r of a lower tree", "rm", 4.0),
    Limit("start-up to usable mount, ms", "start", 150.0, "value"),
    Limit("resident memory after a walk of 50,000 files, MB", "memory_50000", 80.0, "value"),
    Limit("commit of 1 GiB, against tar | pigz", "gzip", 1.0, "layers"),
    Limit("commit of 1 GiB, against tar | zstd -T0", "zstd", 1.0, "layers"),
)


def verdict(
    limit: Limit, measures: Measures, name: str, base: str, layers: Mapping[str, float]
) -> Verdict | None:
    """On one contender; None where nothing was measured, or the result was wrong.

    `layers`: ratios by compression, of `benchmarks/layers`."""
    value: float | None
    if limit.kind == "layers":
        value = layers.get(limit.key)
    elif (measure := measures.get(limit.key)) is None:
        value = None
    elif limit.kind == "ratio":
        value = measure.ratio(name, base)
    elif limit.kind == "value":
        value = measure.value(name)
    else:
        ours, other = measure.value(name), measures.get(limit.against)
        less = other.value(name) if other else None
        value = ours / less if ours is not None and less else None
    return None if value is None else Verdict(limit, value)


def verdicts(measures: Measures, name: str, base: str, layers: Mapping[str, float]) -> list[Verdict]:
    found = (verdict(limit, measures, name, base, layers) for limit in LIMITS)
    return [one for one in found if one is not None]
