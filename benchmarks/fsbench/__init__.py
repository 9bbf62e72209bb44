"""What benchmarks/run is made of: stacks of layers, the file systems compared, jobs, rounds, the report.

Needs only the standard library (the charts: matplotlib) and nothing of layerfs, which is driven through its
command like the others."""
