"""What benchmarks/run is made of: stacks of layers, the file systems compared, jobs, rounds, the report.

Needs only the standard library (charts excepted), and nothing of layerfs: it is driven through its command like the others."""
