"""The benchmarks: their pure parts, and a short run that counts requests. No test here looks at a time."""
