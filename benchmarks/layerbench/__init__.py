"""What benchmarks/layers is made of: a tree of files, the programs that pack and unpack it, rounds, the
report.

Needs only the standard library, and nothing of layerfs: it is driven through its command like the others."""
